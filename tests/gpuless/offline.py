"""Compile Triton kernels for GPUs that aren't there, through the launch path that a GPU would take.

:func:`captured` notes what a launcher launches when it is called on meta tensors; :func:`compiled` compiles such a launch
for one target, with the real specialisation of its arguments, and :func:`offline_machine.inspect` reads the machine code.
"""

import contextlib
from typing import NamedTuple

import torch
import triton
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import KernelInterface


class Chip(NamedTuple):
    """What there is to compile for; ``shared`` is the KiB of shared memory that one program may use."""

    target: GPUTarget
    shared: int


# By Triton's name for them: the compute capability of NVIDIA's, the target of AMD's.
CHIPS = {
    80: Chip(GPUTarget("cuda", 80, 32), 163),
    86: Chip(GPUTarget("cuda", 86, 32), 99),
    89: Chip(GPUTarget("cuda", 89, 32), 99),
    90: Chip(GPUTarget("cuda", 90, 32), 227),
    100: Chip(GPUTarget("cuda", 100, 32), 227),
    120: Chip(GPUTarget("cuda", 120, 32), 99),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 64),
}


class OfflineDriver(DriverBase):
    """Answers which GPU is there; nothing is ever loaded or launched."""

    def __init__(self, chip):
        self.chip = chip

    @classmethod
    def is_active(cls):
        return True

    def get_current_target(self):
        return CHIPS[self.chip].target

    def get_active_torch_device(self):
        return torch.device("cuda", 0)

    def get_current_device(self):
        return self.chip  # Triton keeps compiled kernels by device

    def get_current_stream(self, device=0):
        return 0

    def get_benchmarker(self):
        raise RuntimeError("nothing can be timed offline")

    def map_python_to_cpp_type(self, ty):
        return ty


class _Addresses(TorchFunctionMode):
    """Meta tensors answer as a fresh allocation of the CUDA allocator would: its start is a multiple of 256 bytes."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.data_ptr and args[0].is_meta:
            return (1 << 32) + args[0].storage_offset() * args[0].element_size()
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def target(chip: int | str):
    """Inside, Triton sees one GPU, and meta tensors lie on it."""
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(OfflineDriver(chip))
    try:
        with _Addresses():
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
        """The kernel and its blocks, as in ``bottleneck_fwd_kernel R64 M32 D128``."""
        blocks = (f"{key.removeprefix('BLOCK_')}{value}" for key, value in self.kwargs.items() if key.startswith("BLOCK_"))
        return " ".join((self.kernel.fn.__name__, *blocks))


@contextlib.contextmanager
def captured():
    """Inside, ``kernel[grid](...)`` appends a Launch to the list that this yields, and does nothing else."""
    launches, stock = [], KernelInterface.__getitem__
    KernelInterface.__getitem__ = lambda kernel, grid: lambda *a, **k: launches.append(Launch(kernel, grid, a, k))
    try:
        yield launches
    finally:
        KernelInterface.__getitem__ = stock


def compiled(launch: Launch):
    """The launch compiled for the current target."""
    return launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.kwargs)
