"""The functions of OpenVINO that need torch; see `base.Backend`."""

from shrinkkit.runtimes.base import Backend
from shrinkkit.runtimes.openvino import build, load, profile

BACKEND = Backend(build.build, load.load, load.scan, profile.layers, profile.check_integers, profile.denormals)
