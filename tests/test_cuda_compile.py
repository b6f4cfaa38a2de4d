"""Every CUDA source compiles for every architecture, without a GPU and against a torch without CUDA, spills nothing and keeps
its budget."""

import shutil

import pytest

from .gpuless import budgets, cuda_budget, nvcc

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")

PLANTED = """
__global__ void holds_an_array(float* out, int n) {
  float values[64] = {};
  for (int i = 0; i < n; i++) values[i * 7 % 64] += out[i];
  out[threadIdx.x] = values[n % 64];
}
__global__ void __launch_bounds__(1024) spills(float* out) {
  float values[128];
  for (int i = 0; i < 128; i++) values[i] = out[threadIdx.x + i * 1024];
  __syncthreads();
  for (int i = 0; i < 128; i++) out[threadIdx.x * 128 + i] = values[127 - i];
}
__global__ void sound(float* out) {
  __shared__ float values[32];
  values[threadIdx.x] = out[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = values[31 - threadIdx.x];
}
"""


def check(source, architectures):
    measured = cuda_budget.compiled(source, architectures)
    budget = budgets.read(f"{source.stem}.cuda")
    known = budget["compiler"] in (None, nvcc.version())
    problems = []
    for architecture in architectures:
        rows = {name: chips[architecture] for name, chips in measured.items()}
        problems += cuda_budget.faults(rows, architecture)
        if known:
            problems += budgets.exceeded(budget, rows, architecture, complete=True)
    assert not problems, "\n".join(problems)
    if not known:
        pytest.skip(f"registers unchecked: the budgets are of {budget['compiler']}, this is {nvcc.version()}")


@pytest.mark.parametrize("source", cuda_budget.SOURCES, ids=lambda p: p.name)
def test_compiles_and_fits(source):
    check(source, (80,))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [a for a in cuda_budget.ARCHITECTURES if a != 80])
@pytest.mark.parametrize("source", cuda_budget.SOURCES, ids=lambda p: p.name)
def test_compiles_and_fits_elsewhere(source, architecture):
    check(source, (architecture,))


def test_finds_the_sources():
    assert cuda_budget.SOURCES, "csrc/cuda has no .cu files"


def test_finds_planted_faults(tmp_path):
    source = tmp_path / "planted.cu"
    source.write_text(PLANTED)
    measured = cuda_budget.compiled(source, (80, 90))
    rows = {name.partition("(")[0]: chips[90] for name, chips in measured.items()}
    found = cuda_budget.faults(rows, 90)
    assert sorted(fault.split(" ")[1] for fault in found) == ["holds_an_array:", "spills:", "spills:"]
    assert rows["holds_an_array"]["stack"] == 256 and rows["spills"]["spills"] > 0
    assert rows["sound"] == {"registers": rows["sound"]["registers"], "shared": 128, "stack": 0, "spills": 0}

    budget = {"kernels": {"sound": {"90": [rows["sound"]["registers"], 96, 0, 0]}}}
    (fault,) = budgets.exceeded(budget, {"sound": rows["sound"]}, 90, complete=True)
    assert "sound uses shared 128, its budget is 96" in fault and "make budgets" in fault
    (tmp_path / "broken.cu").write_text("no CUDA")
    with pytest.raises(RuntimeError, match="error"):
        cuda_budget.compiled(tmp_path / "broken.cu", (90,))
