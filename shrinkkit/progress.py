"""The progress callback of long work, and what a step is doing, for the run that waits for it."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Protocol

VARIABLE = "SHRINKKIT_ACTIVITY"
"""Environment variable of a step's processes: the file that says what they are doing."""


def announce(activity: str) -> None:
    """Tell the run that started this process what it is doing; nothing without a run."""
    if path := os.environ.get(VARIABLE):
        with suppress(OSError):  # a full disk fails where something is stored
            Path(path).write_text(activity, encoding="utf-8")


class Progress(Protocol):
    """Called with the amount of work done, the total amount, and a text that says what is being done."""

    def __call__(self, done: float, total: float, text: str, /) -> None:
        """Report progress."""


def no_progress(_done: float, _total: float, _text: str, /) -> None:
    """Progress callback that does nothing."""
