"""The CPU kernels under sanitizers: csrc/cpu/<op>*.cpp as they are, with the code that divides the work among threads."""

import platform
from pathlib import Path

from ..specs import SPECS
from .stable import HERE, ROOT, Program, builder

CPU = ROOT / "csrc/cpu"
# Target of csrc/cpu/target.h -> the last word of the file names of its units, and what the processor needs.
TARGETS = {
    "portable": ("portable", ()),
    "avx2": ("avx2", ("avx2", "fma", "f16c")),
    "avx512": ("avx512", ("avx512f", "avx512bw", "avx512vl", "avx512dq")),
    "amx": ("avx512", ("avx512f", "avx512bw", "avx512vl", "avx512dq", "amx_tile", "amx_bf16")),
}

# Units of several ops, by the first word of their file names.
SHARED = {"kron": {"compacter", "kron_linear"}}


def ops() -> list[str]:
    return [name for name in SPECS if (CPU / f"{name}.cpp").exists()]


def missing(target: str) -> str:
    """Why ``target`` can't run here, or an empty string."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if platform.machine() == "x86_64" and cpuinfo.exists() else []
    lacking = [flag for flag in TARGETS[target][1] if flag not in flags]
    return f"this processor has no {', '.join(lacking)}" if lacking else ""


def owners(path: Path) -> set[str]:
    """The ops that a source belongs to; all of them, if its name says nothing."""
    names = [op for op in SPECS if f"{path.stem}_".startswith(f"{op}_")]
    return {max(names, key=len)} if names else SHARED.get(path.stem.partition("_")[0], set(SPECS))


def units(op: str, target: str) -> list[Path]:
    """The sources of ``op`` and those of no op, without the units of other targets."""
    others = {suffix for suffix, _ in TARGETS.values()} - {TARGETS[target][0]}
    return [p for p in sorted(CPU.glob("*.cpp")) if op in owners(p) and p.stem.rpartition("_")[2] not in others]


def program(op: str, sanitizer: str, target: str, edited: Path | None = None) -> Program:
    """The leaves of ``op`` in a process of their own; its memory, scratch too, is guarded to the byte.

    ``edited`` takes the place of the source of its name.
    """
    build = builder(sanitizer)
    flags = ("-I", str(CPU), "-include", str(HERE / "sanitized_scratch.h"))
    paths = [edited if edited and path.name == edited.name else path for path in units(op, target)]
    objects = [build.compile(path, *flags) for path in (*paths, HERE / "sanitized_products.cpp")]
    others = {suffix for suffix, _ in TARGETS.values()} - {TARGETS[target][0]}
    return Program(build.program(*objects, optional=rf"\d({'|'.join(others)})"), target=target, alignment=1)
