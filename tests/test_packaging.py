"""The package installs anywhere: one stable binary, and an import that needs neither it nor Triton nor transformers."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def python(code, **options):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, **options)


def test_imports_without_optional_packages():
    missing = ("triton", "transformers", "adapters", "peft")
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({missing!r}))  # None: not installed\n"
        "import torch, fastadapt\n"
        "x = torch.randn(3, 8)\n"
        "print(fastadapt.bottleneck(x, torch.zeros(2, 8), torch.zeros(8, 2), residual=x).equal(x))"
    )
    done = python(code)
    assert done.stdout == "True\n", done.stderr


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the sources, so that builds leave the checkout alone."""
    copy = tmp_path_factory.mktemp("tree") / "fastadapt"
    names = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "fastadapt", "kernels")
    copy.mkdir()
    for name in names:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(source, copy / name)
    return copy


def wheel(tree, build, folder):
    """The wheel of a source tree. Objects that setup.py has compiled there before, as for an in-place build, serve again."""
    command = [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", folder / "dist", "--bdist-dir", folder / "b"]
    done = subprocess.run(
        command, cwd=tree, env={**os.environ, "FASTADAPT_BUILD": build}, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (folder / "dist").glob("*.whl")
    zipfile.ZipFile(path).extractall(folder / "installed")
    return path.name, folder / "installed"


def test_pure_python_wheel_runs_the_reference(tree, tmp_path):
    name, installed = wheel(tree, "none", tmp_path)
    assert name.endswith("-py3-none-any.whl")
    assert not list(installed.rglob("*.so")) and (installed / "fastadapt/kernels/bottleneck.py").exists()
    done = python(
        "import sys\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]  # they would find the checkout's library\n"
        "import torch, fastadapt\n"
        "x = torch.randn(3, 8)\n"
        "print(fastadapt.__file__, fastadapt.explain(fastadapt.bottleneck, x, torch.ones(2, 8), torch.ones(8, 2)))",
        cwd=installed,
        env={**os.environ, "PYTHONPATH": str(installed)},
    )
    assert str(installed) in done.stdout and "bottleneck_fwd on cpu: reference" in done.stdout, done.stderr


@pytest.mark.skipif(sys.version_info < (3, 11), reason="torch-abi-audit needs Python 3.11")
def test_compiled_wheel_keeps_to_the_stable_abi(tmp_path):
    name, installed = wheel(ROOT, "cpu", tmp_path)
    assert "-cp310-abi3-" in name
    audit = shutil.which("torch-abi-audit", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    (library,) = installed.rglob("*.so")
    done = subprocess.run([audit, "--check", "both", str(library)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_unknown_build_is_refused(tree):
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=tree, env={**os.environ, "FASTADAPT_BUILD": "rocm"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode != 0 and "FASTADAPT_BUILD must be cpu, cuda or none, got 'rocm'" in done.stderr


def test_a_build_for_cuda_needs_no_gpu():
    """Without a list of its own torch asks the GPUs that it sees, and has an IndexError where there are none."""
    code = (
        "import runpy, sys\n"
        "from torch.utils import cpp_extension\n"
        "cpp_extension.CUDA_HOME, sys.argv = '/nowhere', ['setup.py', '--version']\n"
        "runpy.run_path('setup.py')\n"
        "print(*cpp_extension._get_cuda_arch_flags())"
    )
    kept = {name: value for name, value in os.environ.items() if name != "TORCH_CUDA_ARCH_LIST"}
    done = python(code, cwd=ROOT, env={**kept, "FASTADAPT_BUILD": "cuda", "CUDA_VISIBLE_DEVICES": ""})
    for code in ("code=sm_80", "code=sm_90", "code=compute_90"):
        assert code in done.stdout, done.stderr
