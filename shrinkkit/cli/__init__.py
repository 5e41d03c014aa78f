"""The command line, a module for each group of commands. Starts without importing torch."""

from shrinkkit.cli.app import TRACEBACK, main

__all__ = ["TRACEBACK", "main"]
