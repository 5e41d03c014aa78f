"""The functions of torch that need torch; see `base.Backend`."""

from shrinkkit.runtimes.base import Backend
from shrinkkit.runtimes.torch import build, integers, load, profile, scan

BACKEND = Backend(build.build, load.load, scan.scan, profile.layers, integers.check, profile.denormals)
