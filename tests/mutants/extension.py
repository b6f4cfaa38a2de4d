"""The CPU kernels of an edited tree as an extension module, quickly: without optimization, for one instruction set.

The dispatch refers to the kernels of every instruction set; those not built stay undefined and, bound lazily, cost nothing
until they are called, which :mod:`.extension_plugin` prevents.
"""

import fcntl
import hashlib
import platform
import re
import subprocess
import sysconfig
from pathlib import Path

INSTRUCTION_SETS = ("portable", "avx2", "avx512")
FLAGS = ("-std=c++17", "-O0", "-fPIC", "-w", "-DTORCH_TARGET_VERSION=0x020a000000000000")


def target() -> str:
    """avx2 compiles four times as fast as portable."""
    flags = Path("/proc/cpuinfo").read_text().split() if platform.machine() == "x86_64" else []
    return "avx2" if {"avx2", "fma", "f16c"} <= set(flags) else "portable"


def text_of(source: Path, seen: set | None = None) -> str:
    """A source and the headers beside it that it includes."""
    seen = set() if seen is None else seen
    if source in seen or not source.exists():
        return ""
    seen.add(source)
    text = source.read_text()
    headers = re.findall(r'#include "(.*)"', text)
    return text + "".join(text_of((source.parent / header).resolve(), seen) for header in headers)


def kept(path: Path, make) -> Path:
    """``path``, which ``make(another path)`` makes if it isn't there; others that want it meanwhile wait."""
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            unfinished = path.with_suffix(".unfinished")
            make(unfinished)
            unfinished.rename(path)
    return path


def _object(source: Path, objects: Path) -> Path:
    """The compiled source, from the folder of objects if its text hasn't changed."""
    from torch.utils.cpp_extension import include_paths

    digest = hashlib.sha256(text_of(source.resolve()).encode()).hexdigest()[:16]
    includes = [f"-isystem{p}" for p in (*include_paths(), sysconfig.get_paths()["include"])]
    compile = lambda path: subprocess.run(["g++", *FLAGS, *includes, "-c", source, "-o", path], check=True)  # noqa: E731
    return kept(objects / f"{source.stem}-{digest}.o", compile)


def build(tree: Path, objects: Path, needs: str) -> None:
    """Build ``fastadapt._C`` in ``tree``, with the ops that ``needs`` names, or with all if it names none."""
    from torch.utils.cpp_extension import library_paths

    ops = [path.stem for path in (tree / "tests/specs").glob("[!_]*.py")]
    unneeded = tuple(op for op in ops if op not in needs and any(other in needs for other in ops))
    others = tuple(f"_{name}" for name in INSTRUCTION_SETS if name != target())
    sources = sorted([*(tree / "csrc").glob("*.cpp"), *(tree / "csrc/cpu").glob("*.cpp")])
    sources = [source for source in sources if not source.stem.startswith(unneeded)]
    linked = [_object(source, objects) for source in sources if not source.stem.endswith(others)]
    libraries = [option for path in library_paths() for option in (f"-L{path}", f"-Wl,-rpath,{path}")]
    module = tree / "fastadapt/_C.abi3.so"
    command = ["g++", "-shared", "-Wl,-z,lazy", *linked, *libraries, "-lc10", "-ltorch_cpu", "-ltorch", "-o", module]
    subprocess.run(command, check=True)
