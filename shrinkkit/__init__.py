"""Make trained PyTorch models smaller and faster, and know that they are."""

import os

__version__ = "0.1.0"

# Read when torch is loaded, which every module here does later: notices from inside it would stand amid a notebook.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
