"""Everything that needs an NVIDIA GPU, in the Python environment that is active: ``python -m tests.gpu FOLDER``.

Builds with CUDA, proves, measures, and prints a table; FOLDER gets gpu.json, gpu.log and bench.json. Each section is a process
of its own: none can take another down. No network is needed. ``--device stand-in`` runs on the CPU what has a meaning there.
"""

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from .harness import ROOT, Run, Section

PYTHON = sys.executable
MACHINE = """
import json, subprocess, sys, torch
from benchmarks.machine import machine, software
device = torch.device({device!r})
if device.type == "cuda":
    if not torch.cuda.is_available():
        sys.exit(f"torch {{torch.__version__}} sees no CUDA device")
    subprocess.run(["nvidia-smi"])
print(json.dumps({{**machine(device), **software(), "cuda": torch.version.cuda}}))
"""
# Tests in this folder by name, and their limits.
CHECKS = {
    "backends": 60, "configurations": 150, "repeats": 120, "graphs": 90, "streams": 60, "devices": 60, "memory": 90,
    "synchronisations": 60, "large": 150,
}  # fmt: skip
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")


def always(*command):
    return lambda results: list(command)


def pytest(*arguments):
    return always(PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)


def workers() -> list[str]:
    """Side by side where pytest-xdist is there: the battery waits for the compiler most of the time."""
    return ["-n", str(min(12, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []


def check(name: str):
    return pytest("tests/gpu", "-k", f"test_{name}", *(workers() if name == "configurations" else ()))


def found(*patterns: str) -> list[str]:
    return sorted(f"tests/{path.name}" for pattern in patterns for path in (ROOT / "tests").glob(pattern))


def ops() -> list[str]:
    """The ops by name; their specs themselves would import torch."""
    return [path.stem for path in (ROOT / "tests/specs").glob("[!_]*.py")]


def build(results: dict) -> list[str]:
    """For the GPUs that are there: one architecture takes a fraction of the time of all."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ";".join(sorted(set(found))))
    return [PYTHON, "setup.py", "--quiet", "build_ext", "--inplace"]


def sanitizer(tool: str):
    # No filter of kernels: initcheck would not see what the others write.
    command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "20")
    return always(*command, PYTHON, "-m", "tests.gpu.small")


def benchmarks(folder: Path):
    def command(results: dict) -> list[str]:
        green = all(name in results and results[name].result == "passed" for name in ("battery-native", "battery-triton"))
        options = ["--quick", "--dtype", "bfloat16", "float32", "--timer", "graph", "--out", str(folder / "bench.json")]
        return [PYTHON, "-m", "benchmarks.run", *options, *([] if green else ["--no-check"])]

    return command


def sections(folder: Path, device: str) -> list[list[Section]]:
    """In groups that run one after the other."""
    real = device == "cuda"
    refusal = None if real else "needs a CUDA device"
    missing = refusal or (None if shutil.which("compute-sanitizer") else "compute-sanitizer isn't installed")
    battery, modules = found("test_ops*.py"), found("test_nn*.py", *(f"test_{op}.py" for op in ops()))
    install = (PYTHON, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--editable", ".")
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor is an allocation, so that a read past its end is seen
    here = {"PIP_BREAK_SYSTEM_PACKAGES": "1", "FASTADAPT_BUILD": "none"}
    cuda = {"FASTADAPT_BUILD": "cuda", "MAX_JOBS": os.environ.get("MAX_JOBS", str(os.cpu_count()))}
    return [
        [Section("machine", always(PYTHON, "-c", MACHINE.format(device="cuda" if real else "cpu")), 60)],
        [Section("install", always(*install), 60, refusal=refusal, environment=here)],
        [Section("build", build, 240, refusal=refusal, environment=cuda)],
        [Section("battery-native", pytest(*battery, *workers(), "-k", "not triton"), 150, True, refusal)],
        # Not the fuzzing, since each size compiles anew.
        [Section("battery-triton", pytest(*battery, *workers(), "-k", "triton and not fuzz"), 200, True, refusal)],
        [Section("modules", pytest(*modules, *workers()), 100, True, refusal)],
        [Section(name, check(name), limit, True) for name, limit in CHECKS.items()],
        [Section(tool, sanitizer(tool), 90, False, missing, alone) for tool in SANITIZERS],
        [Section("overhead", always(PYTHON, "-m", "benchmarks.run", "--overhead"), 40, refusal=refusal)],
        [Section("benchmarks", benchmarks(folder), 600, refusal=refusal)],
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the record and the logs go")
    parser.add_argument("--seconds", type=float, default=580, help="everything ends within these (580)")
    parser.add_argument("--only", nargs="+", metavar="SECTION", default=[], help="these, and what describes the machine")
    parser.add_argument("--device", choices=["cuda", "stand-in"], default="cuda")
    args = parser.parse_args(argv)
    folder = args.folder.resolve()
    groups = sections(folder, args.device)
    names = [section.name for group in groups for section in group]
    if unknown := set(args.only) - set(names):
        parser.error(f"a section must be one of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    wanted = {"machine", *(args.only or names)}
    groups = [chosen for group in groups if (chosen := [s for s in group if s.name in wanted])]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit from outside leaves the table, too
    return 0 if Run(folder, args.seconds).groups(groups) else 1


if __name__ == "__main__":
    sys.exit(main())
