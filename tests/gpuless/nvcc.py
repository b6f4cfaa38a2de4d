"""nvcc without a GPU: the PTX of a CUDA source, which the budgets and the simulator share, and what ptxas says of it."""

import functools
import re
import subprocess
import tempfile
from pathlib import Path

from torch.utils.cpp_extension import include_paths

from .stable import ABI


def version() -> str:
    return "nvcc " + re.search(r"V([\d.]+)", _output("nvcc", "--version").stdout)[1]


@functools.cache
def ptx(source: Path, architecture: int) -> str:
    flags = ("-std=c++17", "-O3", "-DUSE_CUDA", ABI, *(f"-isystem={path}" for path in include_paths()))
    return _output("nvcc", *flags, f"-arch=sm_{architecture}", "-ptx", source, "-o", "-").stdout


def ptxas(text: str, architecture: int) -> str:
    """What ptxas reports of the kernels in PTX."""
    with tempfile.TemporaryDirectory() as folder:
        kernels = Path(folder) / "kernels.ptx"
        kernels.write_text(text)
        command = ("nvcc", f"-arch=sm_{architecture}", "-Xptxas", "-v", "-cubin", kernels, "-o", kernels.with_suffix(".cubin"))
        return _output(*command).stderr


def _output(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done
