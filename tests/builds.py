"""Requests for model files."""

from shrinkkit.runtimes.base import BuildRequest


def request(folder, model, example, precision="", *, calibration=(), skip=()):
    """Return the request of a variant whose files go into `folder`."""
    scratch = folder / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    return BuildRequest(folder, scratch, model, example, precision, skip, calibration)
