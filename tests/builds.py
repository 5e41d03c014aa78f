"""Requests for model files, and run folders of variants."""

from shrinkkit.runtimes.base import BuildRequest
from shrinkkit.transforms import variants


def request(folder, model, example, precision="", *, calibration=(), skip=()):
    """Return the request of a variant whose files go into `folder`."""
    scratch = folder / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    return BuildRequest(folder, scratch, model, example, precision, skip, calibration)


def write_variants(folder, task, precisions, runtimes):
    """Write the task's own model in each precision, by the name of its variant, and return the run folder."""
    for name, precision in precisions.items():
        variants.write(folder / "variants" / name, task, task.model, precision=precision, runtimes=runtimes)
    return folder
