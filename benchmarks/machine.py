"""What a result depends on: the machine, the versions, the commit."""

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _cpu() -> str:
    try:
        return re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)[1]
    except (OSError, TypeError):  # not Linux, or an architecture whose cpuinfo has no such line
        return platform.processor() or platform.machine()


def machine(device: torch.device) -> dict:
    found = {"cpu": _cpu(), "cores": cores(), "isa": torch.backends.cpu.get_cpu_capability()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "arch": f"sm_{properties.major}{properties.minor}"}
    return found


def machine_name(device: torch.device) -> str:
    """A file name: the GPU, or the CPU with its cores and vector instructions."""
    found = machine(device)
    name = found["gpu"] if "gpu" in found else f"{found['cpu']}-{found['cores']}-cores-{found['isa']}"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((R|TM)\)", "", name).lower()).strip("-")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
    return run.stdout.strip() if run.returncode == 0 else ""


def commit() -> str | None:
    """The commit that is measured; a ``+`` says that the kernels or the package differ from it."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--", "../csrc", "../kernels", "../fastadapt", "../setup.py")
    except OSError:  # no git
        return None
    return head + "+" * bool(changed) or None


def software() -> dict:
    packages = ("torch", "triton", "adapters", "peft", "transformers")
    return {"python": platform.python_version(), **{name: _version(name) for name in packages}, "commit": commit()}
