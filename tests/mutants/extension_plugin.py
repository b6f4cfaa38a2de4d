"""A pytest plugin: the CPU kernels of this very tree, for the instruction set that was built."""

import os
import sys
from pathlib import Path

from . import ROOT
from .extension import target

flags = sys.getdlopenflags()
sys.setdlopenflags(os.RTLD_LAZY)  # the kernels of other instruction sets are undefined
import fastadapt  # noqa: E402

sys.setdlopenflags(flags)
if Path(fastadapt._C.__file__).parent != ROOT / "fastadapt":
    raise ImportError(f"fastadapt._C comes from {fastadapt._C.__file__}")
fastadapt._C.cpu_target(target())
