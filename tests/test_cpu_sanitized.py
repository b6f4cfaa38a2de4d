"""The CPU kernels of every op, with the code that divides their work, under AddressSanitizer, UBSan and ThreadSanitizer.

AddressSanitizer sees the exact bounds of every tensor and of the scratch memory. Under the others these lie against pages that
nobody may touch, which stops masked loads and tile loads too. An instruction set that the processor lacks is skipped.
"""

import functools
import shutil
import subprocess

import pytest
import torch

from .battery import TELLING, check
from .gpuless import stable
from .gpuless.sanitized import CPU, TARGETS, missing, ops, program
from .layouts import LAYOUTS, sliced
from .specs import SPECS

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPS = ops()
USUAL = "portable" if missing("avx2") else "avx2"
program = functools.cache(program)


@pytest.fixture
def sanitize(monkeypatch):
    """Puts the program of an op under a sanitizer below the op, and returns what checks a case: it says how often several
    threads ran at once."""

    def install(op, sanitizer, target, edited=None, **settings):
        if reason := missing(target) or stable.unusable(sanitizer):
            pytest.skip(reason)
        call = program(op, sanitizer, target, edited).with_settings(**settings)
        stable.install(monkeypatch, SPECS[op], call)
        unit = lambda dtype: "amx" if target == "amx" and dtype == torch.bfloat16 else "vector"  # noqa: E731

        def run(case, dtype, **options):
            before = call.parallel_regions
            check(SPECS[op], "native", lambda: case.make(dtype, "cpu"), unit=unit(dtype), **options)
            return call.parallel_regions - before

        return run

    return install


def turns(cases, *names, **values):
    """Parametrize a test over cases and tuples that end in a dtype. Telling cases meet all of them, and every case those of
    AMX; what else there is another case meets in one dtype or the other."""
    parameters = [
        pytest.param(op, case, *value, id=f"{op}-{case.name}-{name}")
        for op in OPS
        for i, case in enumerate(cases(SPECS[op]))
        for j, (value, name) in enumerate(zip(values["argvalues"], values["ids"]))
        if case.name in TELLING or "amx" in value or (i + j + j // 2) % 2 == 1
    ]
    return pytest.mark.parametrize(["op", "case", *names], parameters)


def over(cases):
    parameters = [pytest.param(op, case, id=f"{op}-{case.name}") for op in OPS for case in cases(SPECS[op])]
    return pytest.mark.parametrize("op, case", parameters)


def all_cases(spec):
    return (*spec.cases, *spec.tiled)


def paths(spec):
    return spec.numerics.paths if spec.numerics else ()


def telling(spec):
    return [case for case in spec.cases if case.name in TELLING]


def shared(spec):
    """Cases of few operations, yet of enough for several threads."""
    return [*spec.tiled, *(case for case in spec.bench if 5e6 < case.flops < 1.4e7)]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@over(telling)
def test_usual_target_stays_in_bounds(sanitize, op, case, dtype):
    sanitize(op, "address", USUAL, threads=2, schedules=2)(case, dtype)


# The kernels of "amx" differ from those of "avx512" in bfloat16 alone.
EVERY = [(target, dtype) for target in TARGETS for dtype in DTYPES[:2] if target != "amx" or dtype == torch.bfloat16]
# Against pages: the usual target, and the one whose loads no sanitizer sees.
PAGES = (("undefined", USUAL, torch.float32), ("undefined", USUAL, torch.bfloat16), ("thread", "amx", torch.bfloat16))


# Each layout in one dtype or the other.
STRIDED = [(layout, *page) for i, layout in enumerate(LAYOUTS) for j, page in enumerate(PAGES) if j == 2 or (i + j) % 2]


def named(values):
    return {"argvalues": values, "ids": ["-".join(str(v).removeprefix("torch.") for v in value) for value in values]}


@pytest.mark.slow
@turns(all_cases, "target", "dtype", **named(EVERY))
def test_stays_in_bounds(sanitize, op, case, dtype, target):
    sanitize(op, "address", target, threads=2)(case, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("target", ("avx512", "amx"))
@over(paths)
def test_large_calls_stay_in_bounds(sanitize, op, case, target):
    sanitize(op, "address", target, threads=2)(case, torch.bfloat16)


@pytest.mark.slow
@turns(all_cases, "sanitizer", "target", "dtype", **named(PAGES))
def test_stays_between_pages(sanitize, op, case, dtype, sanitizer, target):
    sanitize(op, sanitizer, target, threads=2, schedules=2)(case, dtype)  # two: either end of the memory is guarded


@pytest.mark.slow
@pytest.mark.parametrize("layout, sanitizer, target, dtype", **named(STRIDED))
@over(lambda spec: [c for c in spec.cases if c.name in (*TELLING, "bank-of-sequences")])
def test_any_strides_stay_between_pages(sanitize, op, case, dtype, layout, sanitizer, target):
    names = (*SPECS[op].activations, "grad_y")
    change = lambda n, t: LAYOUTS[layout](t) if n in names else t if t.dim() == 0 else sliced(t)  # noqa: E731
    sanitize(op, sanitizer, target, threads=2, schedules=2)(case, dtype, layout=change)


@pytest.mark.slow
@pytest.mark.parametrize("target, dtype", **named(((USUAL, torch.float32), ("amx", torch.bfloat16))))
@pytest.mark.parametrize("op", OPS)
def test_has_no_race(sanitize, op, dtype, target):
    run = sanitize(op, "thread", target, threads=4)
    parallel = [case.name for case in shared(SPECS[op]) if run(case, dtype)]
    assert len(parallel) > 1, "too few cases whose work threads share"


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ("address", "thread"))
@over(lambda spec: shared(spec)[:2])
def test_twenty_runs_agree(sanitize, op, case, sanitizer):
    sanitize(op, sanitizer, USUAL, threads=3, schedules=20)(case, torch.float32)


# Text of csrc/cpu/bottleneck.cpp and its replacement, and what the sanitizer must say of it.
PLANTED = {
    "address": (
        "ScratchMemory memory(sizes.shared + call.parts * sizes.thread",
        "ScratchMemory memory(sizes.shared + (call.parts - 1) * sizes.thread",
        "AddressSanitizer: (heap-buffer-overflow|SEGV)",
    ),
    "undefined": (
        "p.m * p.d * (p.r + 4) *", "p.m * p.d * (p.r + 4) * (int64_t{1} << 62) *",
        "runtime error: signed integer overflow",
    ),
    "thread": (
        "k.forward(p, shared, thread, s);", "k.forward(p, shared, threads, s);",
        "ThreadSanitizer: data race",
    ),
}  # fmt: skip


@pytest.mark.parametrize("sanitizer", ("address", *(pytest.param(n, marks=pytest.mark.slow) for n in ("undefined", "thread"))))
def test_planted_error_is_seen(sanitize, tmp_path, sanitizer):
    good, bad, message = PLANTED[sanitizer]
    text = (CPU / "bottleneck.cpp").read_text()
    assert text.count(good) == 1
    edited = tmp_path / "bottleneck.cpp"
    edited.write_text(text.replace(good, bad))
    run = sanitize("bottleneck", sanitizer, USUAL, edited, threads=3)
    with pytest.raises(RuntimeError, match=message):
        run(next(case for case in SPECS["bottleneck"].tiled if case.name == "r130"), torch.float32)


@pytest.mark.parametrize("end, schedule", (("last", 0), ("first", 1)))
def test_guard_pages_stop_a_read_beyond_the_end(end, schedule, tmp_path):
    """By a program of two lines, since no kernel is to be broken for it."""
    source = tmp_path / "probe.cpp"
    source.write_text(f"""
        #include "stable_runtime.h"
        int main(int argc, char**) {{
          host::settings().schedule = {schedule};
          const auto memory = host::allocate(33, 0, 1);
          volatile const char* p = static_cast<const char*>(memory.get());
          return p[{32 if end == "last" else 0}] == 0 || (argc > 1 && p[{33 if end == "last" else -1}]);
        }}""")
    build = stable.Builder("-DFA_GUARD_PAGES")
    objects = [build.compile(path) for path in (source, stable.HERE / "stable_runtime.cpp")]
    subprocess.run(["g++", "-pthread", *objects, "-o", tmp_path / "probe"], check=True)
    run = lambda *words: subprocess.run([tmp_path / "probe", *words]).returncode  # noqa: E731
    assert run() == 0 and run("outside") == -11  # a segmentation fault
