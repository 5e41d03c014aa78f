"""ONNX Runtime's part of a runtime that needs torch."""

from shrinkkit.runtimes import base
from shrinkkit.runtimes.onnx import scan
from shrinkkit.runtimes.onnxruntime import build, integers, load, profile


class Backend:
    """See `base.Backend`."""

    build = staticmethod(build.build)
    load = staticmethod(load.load)
    scan = staticmethod(scan.scan)
    layers = staticmethod(profile.layers)
    check_integers = staticmethod(integers.check)
    denormals = staticmethod(profile.denormals)


BACKEND: base.Backend = Backend()
