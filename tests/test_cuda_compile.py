"""Every CUDA source compiles for every architecture, without a GPU and against a torch without CUDA, and spills nothing."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
ARCHITECTURES = (80, 90, 100, 120)
FLAGS = ("-std=c++17", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-Xcompiler", "-fPIC")
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<architecture>sm_\d+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads",
    re.DOTALL,
)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.name)
def test_compiles_without_spills(source, tmp_path):
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    includes = [f"-isystem={path}" for path in include_paths()]
    command = ["nvcc", *FLAGS, *targets, *includes, "-t", "2", "-Xptxas", "-v", "-c", source, "-o", tmp_path / "object.o"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = [m.groupdict() for m in KERNEL.finditer(done.stderr)]
    assert {k["architecture"] for k in kernels} == {f"sm_{a}" for a in ARCHITECTURES}, done.stderr
    assert len(kernels) == done.stderr.count("Compiling entry function")
    # A stack frame alone means an array that registers could not hold, which is as slow as a spill.
    spilled = [k for k in kernels if any(int(k[what]) for what in ("stack", "stores", "loads"))]
    assert not spilled, spilled


def test_finds_the_sources():
    assert SOURCES, "csrc/cuda has no .cu files"
