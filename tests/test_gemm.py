"""The micro-kernel of the CPU kernels: products of odd sizes, elementary functions and conversions, in every instantiation."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "gemm_driver.cpp"
# 16 lanes on AVX2 is what AVX-512 machines run, split in two by the compiler: so it is tested on machines without it.
BUILDS = {
    "avx512": ("-DFA_LANES=16", "-DUSE_AVX512"),
    "avx2": ("-DFA_LANES=8", "-DUSE_AVX2"),
    "avx2-16-lanes": ("-DFA_LANES=16", "-DUSE_AVX2"),
    "portable": ("-DFA_LANES=8",),
}
SPLIT = ("avx2-16-lanes", "portable")


NEEDS = {"avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq"), "avx2": ("avx2", "fma", "f16c"), "portable": ()}


def runs_here(name: str) -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if platform.machine() == "x86_64" and cpuinfo.exists() else []
    return all(flag in flags for flag in NEEDS[name.removesuffix("-16-lanes")])


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
# Where the compiler has to split the lanes it takes a quarter to half a minute.
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SPLIT)) for n in BUILDS])
def test_products_functions_and_conversions(name, tmp_path):
    if not runs_here(name):
        pytest.skip(f"this processor has no {name}")
    program = tmp_path / "gemm"
    subprocess.run(["g++", "-O2", "-std=c++17", "-Wno-psabi", *BUILDS[name], str(SOURCE), "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[:2000]
    assert float(subprocess.run([str(program), "rate"], capture_output=True, text=True, check=True).stdout) > 0
