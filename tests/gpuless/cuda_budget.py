"""What ptxas says of the kernels of a CUDA source: registers, shared memory, stack and spills, without a GPU."""

import re
import subprocess
from pathlib import Path

from . import nvcc

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
ARCHITECTURES = (80, 90, 100, 120)
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for 'sm_(?P<architecture>\d+)a?'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def compiled(source: Path, architectures) -> dict:
    """kernel -> architecture -> {column: value} for every kernel of ``source``; an architecture that lacks one raises."""
    report = "".join(nvcc.ptxas(nvcc.ptx(source, architecture), architecture) for architecture in architectures)
    found = list(KERNEL.finditer(report))
    names = subprocess.run(["c++filt", *(m["name"] for m in found)], capture_output=True, text=True, check=True).stdout
    measured = {}
    for name, m in zip(names.splitlines(), found, strict=True):
        shared = re.search(r"(\d+) bytes smem", m["rest"])
        measured.setdefault(name, {})[int(m["architecture"])] = {
            "registers": int(m["registers"]), "shared": int(shared[1]) if shared else 0, "stack": int(m["stack"]),
            "spills": int(m["stores"]) + int(m["loads"]),
        }  # fmt: skip
    if len(found) != report.count("Compiling entry function") or not measured:
        raise RuntimeError(f"ptxas reports in another form: {report}")
    for name, rows in measured.items():
        if set(rows) != set(architectures):
            raise RuntimeError(f"{name} is compiled for {set(rows)}, not for {set(architectures)}")
    return measured


def faults(rows: dict, architecture: int) -> list[str]:
    """What no kernel may do. A stack frame alone means an array that registers could not hold, which is as slow as a spill."""
    return [
        f"{architecture} {name}: {row[column]} bytes of {column}"
        for name, row in rows.items()
        for column in ("stack", "spills")
        if row[column]
    ]
