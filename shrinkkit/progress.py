"""The callback by which long work tells how far it is."""

from collections.abc import Callable

Watch = Callable[[float, float, str], None]
"""Called by long work with how much is done, of how much, and what it is at."""


def unwatched(_done: float, _total: float, _said: str) -> None:
    """Watch long work for nobody."""
