"""inductor's part of a runtime that needs torch. Its files are scanned as torch's."""

from shrinkkit.runtimes import base
from shrinkkit.runtimes.inductor import build, load, profile
from shrinkkit.runtimes.torch import profile as torch_profile
from shrinkkit.runtimes.torch import scan


class Backend:
    """See `base.Backend`."""

    build = staticmethod(build.build)
    load = staticmethod(load.load)
    scan = staticmethod(scan.scan)
    layers = staticmethod(profile.layers)
    check_integers = staticmethod(profile.check_integers)
    denormals = staticmethod(torch_profile.denormals)


BACKEND: base.Backend = Backend()
