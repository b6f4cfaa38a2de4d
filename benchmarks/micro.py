"""The CPU micro-kernel against ``torch.mm``, float32, both on one core."""

import ctypes
import os
import shutil
import subprocess
import tempfile
from functools import partial
from pathlib import Path

import torch

from .report import print_rows
from .timing import WallTimer, interleave

SOURCE = Path(__file__).parent / "micro.cpp"
BLOCK = 48  # rows
# (rows, inner, columns): down projections, up projections, a square.
SHAPES = ((512, 768, 16), (512, 768, 48), (512, 1024, 64), (512, 48, 768), (512, 64, 1024), (384, 384, 384))


def build(lanes: int) -> ctypes.CDLL:
    """Compile the micro-kernel for this machine with vectors of ``lanes`` floats."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise RuntimeError("--micro needs a C++ compiler: g++, clang++ or the one that CXX names")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "micro.so"
        flags = ["-O3", "-std=c++17", "-march=native", "-shared", "-fPIC", f"-DFA_LANES={lanes}"]
        run = subprocess.run([compiler, *flags, str(SOURCE), "-o", str(library)], capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"{SOURCE.name} does not compile:\n{run.stderr[-4000:]}")
        loaded = ctypes.CDLL(str(library))
    loaded.packed_floats.restype = loaded.columns.restype = ctypes.c_int64
    return loaded


def product(library: ctypes.CDLL, a: torch.Tensor, b: torch.Tensor) -> tuple:
    """A call that multiplies, its result, and the weight packed beforehand, as the kernels do once a call."""
    (rows, k), n, word = a.shape, b.shape[1], ctypes.c_int64
    packed = torch.empty(library.packed_floats(word(k), word(n)))
    c = torch.zeros(rows, library.columns(word(n)))
    library.pack(word(k), word(n), ctypes.c_void_p(b.data_ptr()), ctypes.c_void_p(packed.data_ptr()))
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (a, packed, c)]
    return partial(library.multiply, word(rows), word(BLOCK), word(k), word(n), *pointers), c, packed


def main(seconds: float) -> None:
    """Print GFLOP/s and the ratio to ``torch.mm`` for each shape and vector length."""
    torch.set_num_threads(1)
    lengths = (16, 8) if torch.backends.cpu.get_cpu_capability() == "AVX512" else (8, 16)
    libraries = {f"{lanes} lanes": build(lanes) for lanes in lengths}
    table = [
        ["rows x inner x columns", "torch.mm GF/s", *(f"{name} GF/s" for name in libraries), *(f"{n} / mm" for n in libraries)]
    ]
    for rows, k, n in SHAPES:
        a, b = torch.randn(rows, k), torch.randn(k, n)
        out, kept = torch.empty(rows, n), []
        calls = {"mm": partial(torch.mm, a, b, out=out)}
        for name, library in libraries.items():
            calls[name], *tensors = product(library, a, b)
            kept += tensors  # the call knows their addresses only
            calls[name]()
            torch.testing.assert_close(tensors[0][:, :n], a @ b, rtol=1e-4, atol=1e-3)
        rates = {name: 2e-9 * rows * k * n / t.median for name, t in interleave(calls, WallTimer(), seconds).items()}
        ours = [rates[name] for name in libraries]
        cells = [f"{rates['mm']:.0f}", *(f"{r:.0f}" for r in ours), *(f"{r / rates['mm']:.2f}" for r in ours)]
        table.append([f"{rows} x {k} x {n}", *cells])
    print("\nmicro-kernel, one core, float32, weights packed beforehand")
    print_rows(table)
