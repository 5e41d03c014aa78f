"""The functions of inductor that need torch; see `base.Backend`."""

from shrinkkit.runtimes.base import Backend
from shrinkkit.runtimes.inductor import build, load, profile
from shrinkkit.runtimes.torch.profile import denormals
from shrinkkit.runtimes.torch.scan import scan

BACKEND = Backend(build.build, load.load, scan, profile.layers, profile.check_integers, denormals)
