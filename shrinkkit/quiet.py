"""Silence for what libraries print about themselves: deprecations, advice, progress of their own."""

import contextlib
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def libraries() -> Iterator[None]:
    """Hide warnings and log lines below errors while the block runs. Exceptions pass."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
