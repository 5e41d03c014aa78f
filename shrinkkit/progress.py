"""The progress callback of long work."""

from typing import Protocol


class Progress(Protocol):
    """Called with the amount of work done, the total amount, and a text that says what is being done."""

    def __call__(self, done: float, total: float, text: str, /) -> None:
        """Report progress."""


def no_progress(_done: float, _total: float, _text: str, /) -> None:
    """Progress callback that does nothing."""
