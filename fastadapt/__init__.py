"""Fused kernels for adapter layers in PyTorch."""

import importlib.util

import torch  # noqa: F401  _C finds torch's libraries loaded

if importlib.util.find_spec("fastadapt._C"):  # a wheel built with FASTADAPT_BUILD=none has no C++ kernels
    from . import _C  # noqa: F401

from . import nn  # noqa: E402
from ._leaf import explain  # noqa: E402
from .integrations import accelerate, restore  # noqa: E402
from .ops import *  # noqa: E402, F403
from .ops import __all__ as _ops  # noqa: E402

__all__ = ["accelerate", "explain", "nn", "restore", *_ops]
__version__ = "0.1.0"
