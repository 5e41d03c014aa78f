"""Silence for what libraries tell of themselves: deprecations, advice, progress, and reports to their makers."""

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator

# torch's profiler writes to the terminal at each start and stop, and reads this when it first starts.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
# OpenVINO and NNCF report their use over the network unasked, and do without where this package is missing.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


@contextlib.contextmanager
def libraries() -> Iterator[None]:
    """Hide warnings, log lines and what is printed while the block runs. Exceptions pass."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        # torch prints programs that it cannot export, NNCF draws its progress.
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
