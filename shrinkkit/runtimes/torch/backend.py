"""torch's part of a runtime that needs torch."""

from shrinkkit.runtimes import base
from shrinkkit.runtimes.torch import build, integers, load, profile, scan


class Backend:
    """See `base.Backend`."""

    build = staticmethod(build.build)
    load = staticmethod(load.load)
    scan = staticmethod(scan.scan)
    layers = staticmethod(profile.layers)
    check_integers = staticmethod(integers.check)
    denormals = staticmethod(profile.denormals)


BACKEND: base.Backend = Backend()
