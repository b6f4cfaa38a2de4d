"""Leaf ops from the unmodified sources in csrc/, on numpy arrays and without libtorch.

stable_runtime.cpp stands in for libtorch behind its stable C interface. What is built against it runs in this process
(``Module``, bound with pybind11) or in one of its own (``Program``), where a sanitizer watches it: Python and numpy stay
outside, so that a report is always about a kernel. Both are called in the same way, and ``install`` puts either below the op.
"""

import contextlib
import copy
import functools
import importlib.util
import re
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ABI = re.search(r"-DTORCH_TARGET_VERSION=\w+", (ROOT / "setup.py").read_text())[0]
# The codes of torch's ScalarType.
CODES = {
    "uint8": 0, "int8": 1, "int16": 2, "int32": 3, "int64": 4, "float16": 5, "float32": 6, "float64": 7, "bool": 11,
    "bfloat16": 15,
}  # fmt: skip
UNDEFINED = ("-fsanitize=undefined", "-fno-sanitize-recover=all")
# AddressSanitizer finds accesses out of bounds, UBSan overflow and misalignment, ThreadSanitizer races; pages that nobody may
# touch stop even those accesses that no sanitizer instruments: masked vector loads, tile loads.
SANITIZERS = {
    "address": ("-fsanitize=address",),
    "undefined": (*UNDEFINED, "-DFA_GUARD_PAGES"),
    "thread": ("-fsanitize=thread", "-DFA_GUARD_PAGES"),
}


@functools.cache
def builder(sanitizer: str | None = None) -> "Builder":
    """The builder of this run of the tests for a key of ``SANITIZERS``, or for none."""
    return Builder(*SANITIZERS.get(sanitizer, ()))


class Builder:
    """Compiles sources with the same flags; a source that is asked for again is compiled once."""

    def __init__(self, *flags: str):
        self.flags, self.objects, self.temporary = flags, {}, tempfile.TemporaryDirectory()
        self.folder = Path(self.temporary.name)

    def compile(self, source: Path, *flags: str) -> Path:
        key = source, flags
        if key not in self.objects:
            out = self.folder / f"{len(self.objects)}-{source.stem}.o"
            language = ("-x", "c++") if source.suffix == ".cu" else ()
            includes = ("-I", HERE, "-I", HERE / "cuda_host", "-isystem", Path(torch.__file__).parent / "include")
            # A sanitizer makes the compiler warn of what isn't there.
            warnings = ("-w",) if self.flags else ("-Wall", "-Werror", "-Wno-unknown-pragmas", "-Wno-psabi")
            command = ("g++", "-std=c++17", "-g1", "-fPIC", "-fno-gnu-unique", *warnings, ABI, *self.flags, *flags, *includes)
            subprocess.run([*command, *language, "-c", source, "-o", out], check=True)
            self.objects[key] = out
        return self.objects[key]

    def module(self, *objects: Path) -> Path:
        """A Python module; -Bsymbolic keeps it from binding to the libtorch of this process."""
        import pybind11

        out = Path(tempfile.mkdtemp(dir=self.folder)) / f"module{sysconfig.get_config_var('EXT_SUFFIX')}"
        headers = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
        binding = self.compile(HERE / "stable_module.cpp", *headers)
        runtime = self.compile(HERE / "stable_runtime.cpp")
        subprocess.run(["g++", "-shared", "-Wl,-Bsymbolic", *self.flags, *objects, binding, runtime, "-o", out], check=True)
        return out

    def program(self, *objects: Path, optional: str = r"(?!)") -> Path:
        """An executable; only symbols whose mangled names match ``optional`` may be missing, and then nothing may call them."""
        out = Path(tempfile.mkdtemp(dir=self.folder)) / "program"
        parts = [self.compile(HERE / name) for name in ("stable_program.cpp", "stable_runtime.cpp")]
        command = ["g++", "-pthread", *UNDEFINED, *self.flags, *objects, *parts, "-o", out]
        attempt = subprocess.run([*command, "-Wl,--no-demangle"], capture_output=True, text=True)
        missing = sorted(set(re.findall(r"undefined reference to `(.*)'", attempt.stderr)))
        if attempt.returncode and not (missing and all(re.search(optional, name) for name in missing)):
            raise RuntimeError(f"the program can't be linked\n{attempt.stderr[:4000]}")
        if missing:
            subprocess.run([*command, *(f"-Wl,--defsym={name}=0" for name in missing)], check=True)
        return out


class Module:
    """A module of ``Builder`` as ``call(leaf, kinds, values, outputs)``."""

    def __init__(self, path: Path, **settings: int):
        self.settings = settings
        # A name of its own, since pybind11 answers a second module of one name with the first.
        spec = importlib.util.spec_from_file_location(f"{path.parent.name}.module", path)
        self.module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)

    def with_settings(self, **settings: int) -> "Module":
        other = copy.copy(self)
        other.settings = self.settings | settings
        return other

    def __call__(self, leaf, kinds, values, outputs):
        for name, shape, strides, content in self.module.call(leaf, kinds, values, outputs, self.settings):
            yield array(name, shape, strides, content)


class Program:
    """A program of ``Builder`` as ``call(leaf, kinds, values, outputs)``; what it or its sanitizer reports is raised.

    ``schedules`` runs that many, from the setting ``schedule`` on, which must agree in every bit.
    """

    def __init__(self, path: Path, **settings: int | str):
        self.processes, self.settings, self.parallel_regions = Processes(path), settings, 0

    def with_settings(self, **settings: int | str) -> "Program":
        other = copy.copy(self)
        other.settings, other.parallel_regions = self.settings | settings, 0
        return other

    def __call__(self, leaf, kinds, values, outputs):
        with tempfile.TemporaryDirectory() as folder:
            given, result = Path(folder) / "input", Path(folder) / "output"
            given.write_bytes(b"".join(encode(leaf, kinds, values, outputs)))
            settings = " ".join(f"{name} {value}" for name, value in self.settings.items())
            self.parallel_regions += int(self.processes.answer(leaf, f"{given}\n{result}\n{settings}\n"))
            return list(decode(result.read_bytes()))


class Processes:
    """One process of a program, which answers call after call; after an error, the next one."""

    def __init__(self, path: Path):
        self.path, self.process = path, None

    def answer(self, leaf: str, question: str) -> str:
        if self.process is None:
            environment = {
                "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1",
                "TSAN_OPTIONS": "halt_on_error=1 report_signal_unsafe=0", "PATH": "/usr/bin:/bin",
            }  # fmt: skip
            self.errors, pipe = tempfile.TemporaryFile("w+", errors="replace"), subprocess.PIPE  # noqa: SIM115
            self.process = subprocess.Popen(
                [*fixed_addresses(), self.path], stdin=pipe, stdout=pipe, stderr=self.errors, text=True, env=environment
            )
        with contextlib.suppress(BrokenPipeError):  # it has ended since its last answer, which the next line says
            self.process.stdin.write(question)
            self.process.stdin.flush()
        if line := self.process.stdout.readline():
            return line
        process, self.process = self.process, None
        code = process.wait()
        self.errors.seek(0)
        raise RuntimeError(f"{leaf}: the program ended with {code}\n{self.errors.read(4000)}")


@functools.cache
def unusable(sanitizer: str) -> str:
    """Why programs under the sanitizer don't run here, or an empty string."""
    folder = builder(sanitizer).folder
    (folder / "probe.cpp").write_text("#include <thread>\nint main() { std::thread([] {}).join(); }\n")
    command = ["g++", "-pthread", *SANITIZERS[sanitizer], folder / "probe.cpp", "-o", folder / "probe"]
    for step in (command, [*fixed_addresses(), folder / "probe"]):
        done = subprocess.run(step, capture_output=True, text=True)
        if done.returncode:
            return f"-fsanitize={sanitizer} doesn't work here: {done.stderr[:200]}"
    return ""


def fixed_addresses() -> list[str]:
    """ThreadSanitizer can't lay out its memory where the kernel spreads addresses widely."""
    return ["setarch", "-R"] if shutil.which("setarch") else []


def encode(leaf, kinds, values, outputs):
    """What stable_program.cpp reads: a tensor's bytes from its first element to its last, with NaN between its elements."""
    yield f"{leaf} {outputs} {len(kinds)}\n".encode()
    for kind, value in zip(kinds, values):
        if value is None:
            yield f"{kind} 0 none\n".encode()
        elif isinstance(value, np.ndarray):
            span = value.itemsize * (1 + sum((n - 1) * s // value.itemsize for n, s in zip(value.shape, value.strides)))
            memory = np.full(span if value.size else 0, 0xFF, np.uint8)
            if value.size:
                inside = np.ndarray(value.shape, value.dtype, memory.data, strides=value.strides)
                inside[...] = value
            sizes = (*value.shape, *(stride // value.itemsize for stride in value.strides))
            words = (CODES[value.dtype.name], value.ctypes.data % 16, value.ndim, *sizes)
            yield f"{kind} {memory.nbytes} {' '.join(map(str, words))}\n".encode() + memory.tobytes()
        else:
            words = value if isinstance(value, (list, tuple)) else [value]
            yield f"{kind} 0 {' '.join(repr(float(v)) if kind == 'float' else str(int(v)) for v in words)}\n".encode()


def decode(content):
    names = {code: name for name, code in CODES.items()}
    while content:
        line, _, content = content.partition(b"\n")
        code, nbytes, dims, *lengths = map(int, line.split())
        yield array(names[code], lengths[:dims], lengths[dims:], content[:nbytes])
        content = content[nbytes:]


def array(name, shape, strides, content):
    """An output, in the layout that the kernel gave it."""
    dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
    return np.ndarray(shape, dtype, bytearray(content), strides=[stride * dtype.itemsize for stride in strides])


def to_numpy(t):
    t = t.detach()
    return t.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if t.dtype == torch.bfloat16 else t.numpy()


def to_torch(array):
    bits = array.view(np.int16) if array.dtype == ml_dtypes.bfloat16 else array
    return torch.from_numpy(bits).view(torch.bfloat16) if bits is not array else torch.from_numpy(array)


def implementation(call, leaf):
    """``leaf`` on torch tensors by a call on numpy arrays."""
    schema = getattr(torch.ops.fastadapt, leaf.name).default._schema
    kinds = [str(argument.type) for argument in schema.arguments]

    def run(*args):
        values = [to_numpy(v) if isinstance(v, torch.Tensor) else v for v in args]
        outputs = [to_torch(array) for array in call(leaf.name, kinds, values, len(schema.returns))]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    return run


def install(monkeypatch, spec, call):
    """Until the test ends, ``backend="native"`` of the op is what ``call`` runs."""
    for leaf in (spec.fwd, spec.bwd):
        monkeypatch.setattr(leaf, "native", implementation(call, leaf))
        monkeypatch.setattr(leaf, "available", leaf.available | {("native", "cpu")})
        # What the built kernels for the CPU refuse says nothing of ``call``, which refuses for itself.
        monkeypatch.setattr(leaf, "unsupported", lambda backend, args: None)
