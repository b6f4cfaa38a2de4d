import os
from pathlib import Path

import torch
from setuptools import find_packages, setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

# FASTADAPT_BUILD = cpu | cuda | none.  The default follows the torch that is installed.
build = os.environ.get("FASTADAPT_BUILD", "cuda" if torch.version.cuda and CUDA_HOME else "cpu")
if build not in ("cpu", "cuda", "none"):
    raise SystemExit(f"FASTADAPT_BUILD must be cpu, cuda or none, got {build!r}")
stable = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]  # one binary for torch 2.10 and newer

sources = sorted(map(str, Path("csrc").glob("*.cpp"))) + sorted(map(str, Path("csrc/cpu").glob("*.cpp")))
# g++ 12 takes its own AVX-512 headers to read what isn't set, and notes what has changed since g++ 4.
quiet = ["-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-psabi"]
# The kernels are vectors and unrolled loops by hand: with -O3 they are no faster, and take half as long again to compile.
optimized = ["-O2", "-fpeel-loops", "-funswitch-loops"]
args = {"cxx": [*optimized, "-g0", "-std=c++17", "-fvisibility=hidden", *quiet, *stable]}
extension = CppExtension
if build == "cuda":
    if not torch.cuda.is_available():  # torch compiles for the GPUs that it sees, and fails without one
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    sources += sorted(map(str, Path("csrc/cuda").glob("*.cu")))
    args["nvcc"] = ["-O3", "-std=c++17", "-DUSE_CUDA", *stable]
    extension = CUDAExtension

setup(
    packages=find_packages(include=["fastadapt*"]) + ["fastadapt.kernels"],
    package_dir={"fastadapt.kernels": "kernels"},
    ext_modules=[] if build == "none" else [
        extension("fastadapt._C", sources, extra_compile_args=args, py_limited_api=True)
    ],
    cmdclass={"build_ext": BuildExtension},
    options={} if build == "none" else {"bdist_wheel": {"py_limited_api": "cp310"}},
)
