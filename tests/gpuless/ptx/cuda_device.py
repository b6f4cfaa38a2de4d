"""CUDA sources on a simulated GPU: their host side runs here, and the kernels that it launches run as the PTX of nvcc."""

import ctypes
import functools
import subprocess
import weakref
from pathlib import Path

import numpy as np

from .. import nvcc
from ..emulated import CUDA, FLAGS
from ..stable import Builder, Module
from .machine import Launch
from .memory import Memory
from .parser import entries

HOST = Path(__file__).parent / "host"
# Types of hardware.cuh, which names them anew for nvcc.
NAMES = {"fastadapt::bf16": "__nv_bfloat16", "fastadapt::f16": "__half"}
LAUNCH = ctypes.CFUNCTYPE(
    None, ctypes.c_uint64, *(ctypes.c_uint,) * 4, ctypes.c_uint64, ctypes.c_uint, ctypes.POINTER(ctypes.c_uint64),
    ctypes.POINTER(ctypes.c_char),
)  # fmt: skip
ALLOCATE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint64)
OWNS = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)


@functools.cache
def builder() -> Builder:
    return Builder("-I", HOST, "-O0", "-Wl,--wrap=free,--wrap=posix_memalign")


def demangled(names: list[str]) -> list[str]:
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


class CudaDevice:
    """``call(leaf, kinds, values, outputs)`` for the leaves of csrc/cuda/<op>.cu, as :func:`..stable.install` wants.

    ``arch`` is what nvcc compiles for, ``settings`` are those of :class:`..stable.Module`, ``run`` gets each launch.
    """

    def __init__(self, op: str, sources: Path = CUDA):
        library = builder().module(builder().compile(sources / f"{op}.cu", *FLAGS))
        self.source, self.module, self.ptx = sources / f"{op}.cu", Module(library), {}
        symbols = subprocess.run(["nm", "-C", "--defined-only", library], capture_output=True, text=True, check=True).stdout
        for ours, theirs in NAMES.items():
            symbols = symbols.replace(ours, theirs)
        self.kernels = {int(at, 16): name for at, _, name in (line.split(" ", 2) for line in symbols.splitlines())}
        self.hooks = LAUNCH(self.launch), ALLOCATE(self.allocate), OWNS(self.owns)
        shared_object = ctypes.CDLL(str(library))
        for name, hook in zip(("simulator_launch", "simulator_allocate", "simulator_owns"), self.hooks):
            pointer = ctypes.c_void_p.in_dll(shared_object, name)
            pointer.value = ctypes.cast(hook, ctypes.c_void_p).value
            # The library frees memory of its own until the interpreter is gone, when Python can't be called any more.
            weakref.finalize(self, setattr, pointer, "value", None)
        self.arch, self.run, self.settings, self.memory, self.error = 80, Launch.run, {}, None, None

    def entry(self, name: str) -> tuple[str, str]:
        """PTX and the name in it of the kernel that the host calls ``name``."""
        if self.arch not in self.ptx:
            ptx = nvcc.ptx(self.source, self.arch)
            mangled = entries(ptx)
            self.ptx[self.arch] = ptx, dict(zip(demangled(mangled), mangled))
        ptx, names = self.ptx[self.arch]
        return ptx, names[name]

    def __call__(self, leaf, kinds, values, outputs):
        self.memory, self.error = Memory(), None
        values = [self.placed(v, i) if isinstance(v, np.ndarray) else v for i, v in enumerate(values)]
        results = list(self.module.with_settings(cuda=1, **self.settings)(leaf, kinds, values, outputs))
        if self.error:
            raise self.error
        return results

    def placed(self, array, number):
        """The array in the memory of the simulator, in an allocation of its own with the same place among its bytes."""
        if not array.size:
            return array
        span = array.itemsize + sum((n - 1) * stride for n, stride in zip(array.shape, array.strides))
        offset = array.ctypes.data % 16
        start = self.memory.add(offset + span, f"argument {number}") + offset
        inside = np.ndarray(array.shape, array.dtype, self.memory.data.data, start, array.strides)
        inside[...] = array
        self.memory.forbid(start - offset, offset + span)
        self.memory.allow(start, array.itemsize, array.shape, array.strides)
        return inside

    def allocate(self, size):
        return self.memory.origin + self.memory.add(size, f"allocation of {size} bytes")

    def owns(self, address):
        return self.memory is not None and 0 <= (address or 0) - self.memory.origin < len(self.memory.data)

    def launch(self, kernel, x, y, z, threads, shared, count, sizes, content):
        if self.error:
            return
        try:
            ends = np.cumsum([0, *sizes[:count]]).tolist()
            arguments = [content[a:b] for a, b in zip(ends, ends[1:])]
            name = self.kernels[kernel]
            ptx, entry = self.entry(name)
            self.run(Launch(ptx, entry, self.memory, (x, y, z), threads, shared, arguments))
        except Exception as error:  # no exception can pass through the host's code
            self.error = error
