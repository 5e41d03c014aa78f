"""OpenVINO's part of a runtime that needs torch."""

from shrinkkit.runtimes import base
from shrinkkit.runtimes.openvino import build, load, profile


class Backend:
    """See `base.Backend`."""

    build = staticmethod(build.build)
    load = staticmethod(load.load)
    scan = staticmethod(load.scan)
    layers = staticmethod(profile.layers)
    check_integers = staticmethod(profile.check_integers)
    denormals = staticmethod(profile.denormals)


BACKEND: base.Backend = Backend()
