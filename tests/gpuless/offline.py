"""Compile Triton kernels for GPUs that aren't there, through the launch path that a GPU would take.

:func:`captured` notes what a launcher launches when it is called on meta tensors; :func:`compiled` compiles such a launch
for one architecture, with the real specialisation of its arguments, and :func:`inspect` reads the machine code.
"""

import contextlib
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia import __file__ as nvidia
from triton.runtime.jit import KernelInterface

# KiB of shared memory that one program may use.
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
# What the machine code calls the tensor cores: mma.sync, wgmma, tcgen05.
TENSOR_CORES = r"\b(HMMA|HGMMA|UTC\w*MMA)\b"


class OfflineDriver(DriverBase):
    """Answers which GPU is there; nothing is ever loaded or launched."""

    def __init__(self, arch):
        self.target = GPUTarget("cuda", arch, 32)

    @classmethod
    def is_active(cls):
        return True

    def get_current_target(self):
        return self.target

    def get_active_torch_device(self):
        return torch.device("cuda", self.target.arch)

    def get_current_device(self):
        return self.target.arch  # Triton keeps compiled kernels by device

    def get_current_stream(self, device=0):
        return 0

    def get_benchmarker(self):
        raise RuntimeError("nothing can be timed offline")

    def map_python_to_cpp_type(self, ty):
        return ty


@contextlib.contextmanager
def target(arch):
    """Inside, Triton sees one GPU of compute capability ``arch``."""
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(OfflineDriver(arch))
    try:
        yield
    finally:
        triton.runtime.driver._active = before


class Launch(NamedTuple):
    kernel: object
    grid: tuple
    args: tuple
    kwargs: dict

    @property
    def name(self):
        return self.kernel.fn.__name__


@contextlib.contextmanager
def captured():
    """Inside, ``kernel[grid](...)`` appends a Launch to the list that this yields, and does nothing else."""
    launches, stock = [], KernelInterface.__getitem__
    KernelInterface.__getitem__ = lambda kernel, grid: lambda *a, **k: launches.append(Launch(kernel, grid, a, k))
    try:
        yield launches
    finally:
        KernelInterface.__getitem__ = stock


class _Pointer:
    """A meta tensor as the launch path sees it: its alignment is that of its first element in a fresh allocation."""

    def __init__(self, tensor):
        self.dtype, self._offset = tensor.dtype, tensor.storage_offset() * tensor.element_size()

    def data_ptr(self):
        return (1 << 32) + self._offset


class Machine(NamedTuple):
    """What the machine code of a kernel uses. ``stack`` and ``spills`` are zero in a kernel that fits its registers;
    ``unfenced``: wgmma reads what cp.async wrote to shared memory with no fence between the two."""

    registers: int
    stack: int
    spills: int
    shared: int
    tensor_cores: bool
    wide_loads: bool
    unfenced: bool


def compiled(launch):
    """The launch compiled for the current target."""
    args = [_Pointer(a) if isinstance(a, torch.Tensor) else a for a in launch.args]
    return launch.kernel.warmup(*args, grid=launch.grid, **launch.kwargs)


def inspect(kernel) -> Machine:
    """Read the cubin itself: a second run of ptxas on the PTX may differ from it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = str(Path(nvidia).parent / "bin" / "cuobjdump")
        read = lambda option: subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout  # noqa: E731
        usage, code = read("--dump-resource-usage"), read("-sass")
    ptx = kernel.asm["ptx"]
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return Machine(
        registers, stack, len(re.findall(r"\b(?:STL|LDL)\b", code)), kernel.metadata.shared,
        re.search(TENSOR_CORES, code) is not None, re.search(r"\b(LDG|LDGSTS)\S*\.128", code) is not None,
        "wgmma.mma_async" in ptx and "cp.async" in ptx and "fence.proxy.async" not in ptx,
    )  # fmt: skip
