"""Make trained PyTorch models smaller and faster, and know that they are."""

__version__ = "0.1.0"
