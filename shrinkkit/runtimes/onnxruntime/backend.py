"""The functions of ONNX Runtime that need torch; see `base.Backend`."""

from shrinkkit.runtimes.base import Backend
from shrinkkit.runtimes.onnx.scan import scan
from shrinkkit.runtimes.onnxruntime import build, integers, load, profile

BACKEND = Backend(build.build, load.load, scan, profile.layers, integers.check, profile.denormals)
