"""The CUDA kernels on the CPU: csrc/cuda/<op>.cu as it is, compiled by g++ against cuda_emulator.h."""

import functools
from pathlib import Path

from .stable import ROOT, UNDEFINED, Module, Program, builder

CUDA = ROOT / "csrc/cuda"
FLAGS = ("-DFA_EMULATE", "-DUSE_CUDA")


def ops() -> list[str]:
    return sorted(path.stem for path in CUDA.glob("*.cu"))


@functools.cache
def module(op: str, sources: Path = CUDA, optimize: str = "-O1") -> Module:
    """The leaves of ``op`` in this process. With -march=native g++ contracts a * b + c to one rounding, as nvcc does."""
    build = builder()
    return Module(build.module(build.compile(sources / f"{op}.cu", *FLAGS, optimize, "-march=native")), cuda=1)


@functools.cache
def program(op: str, sanitizer: str, sources: Path = CUDA) -> Program:
    """The leaves of ``op`` in a process of their own under a sanitizer."""
    build = builder(sanitizer)
    undefined = UNDEFINED if sanitizer == "address" else ()  # both at once are cheap here; a GPU traps misaligned vectors
    return Program(build.program(build.compile(sources / f"{op}.cu", *FLAGS, *undefined)), cuda=1)
