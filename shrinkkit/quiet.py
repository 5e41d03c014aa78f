"""Silences libraries: deprecations, advice, progress bars and telemetry."""

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator

# torch's profiler writes to the terminal at each start and stop; it reads this when it first starts.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
# OpenVINO and NNCF send usage data through this package, and work without it.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
# torchao, which NNCF and transformers import, reports GPU libraries that it does not find, and torch its old spelling.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)


@contextlib.contextmanager
def libraries() -> Iterator[None]:
    """Hide warnings, log messages and printed output of the block. Exceptions pass."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        # torch prints programs that it cannot export; NNCF prints progress bars.
        out, err = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
        with warnings.catch_warnings(action="ignore"), out, err:
            yield
    finally:
        logging.disable(before)
