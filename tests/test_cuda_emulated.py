"""The CUDA kernels without a GPU: their own sources, compiled for the CPU, pass the cases of every op in several schedules.

Once in this process, where their numbers are checked, and once in a process of their own under a sanitizer.
"""

import functools
import re
import shutil

import pytest
import torch

from . import numerics
from .battery import TELLING, check, run
from .gpuless import emulated, stable
from .gpuless.emulated import CUDA
from .layouts import LAYOUTS
from .specs import SPECS
from .specs.bottleneck import make

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
# Few multiprocessors want large tiles and few splits, many want small tiles and many splits.
DEVICES = {"large-tiles": {"multiprocessors": 1, "schedule": 0}, "small-tiles": {"multiprocessors": 64, "schedule": 1}}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPS = emulated.ops()
emulated_check = functools.partial(check, backend="native", unit="matrix")


@pytest.fixture
def emulate(monkeypatch):
    """Puts an emulation of an op below it, on tensors of the CPU where there is a GPU too."""
    monkeypatch.setattr(numerics, "DEVICE", "cpu")

    def install(op="bottleneck", call=None, **settings):
        stable.install(monkeypatch, SPECS[op], (call or emulated.module(op)).with_settings(**settings))
        return SPECS[op]

    return install


def over(cases, *dtypes):
    """Parametrize a test. The larger sizes can wait, and what float16 adds to bfloat16 the telling cases show."""
    parameters = [
        pytest.param(op, case, dtype, id=f"{op}-{case.name}-{str(dtype)[6:]}", marks=pytest.mark.slow if slow else ())
        for op in OPS
        for case in cases(SPECS[op])
        for dtype in dtypes
        if dtype != torch.float16 or case.name in TELLING
        for slow in [case in SPECS[op].tiled]
    ]
    return pytest.mark.parametrize("op, case, dtype", parameters)


def all_cases(spec):
    return (*spec.cases, *spec.tiled)


def over_devices(takes, *dtypes):
    """Parametrize a test: telling cases and tiles in each dtype on each device, another case where ``takes`` says it of the
    places of case, dtype and device."""
    parameters = [
        pytest.param(op, case, dtype, device, id=f"{op}-{case.name}-{str(dtype)[6:]}-{device}", marks=[pytest.mark.slow] * tile)
        for op in OPS
        for i, case in enumerate(all_cases(SPECS[op]))
        for tile in [case in SPECS[op].tiled]
        for j, dtype in enumerate(dtypes)
        if dtype != torch.float16 or case.name in TELLING
        for k, device in enumerate(DEVICES)
        if tile or case.name in TELLING or takes(i, j, k)
    ]
    return pytest.mark.parametrize("op, case, dtype, device", parameters)


def telling(spec):
    return [case for case in spec.cases if case.name in TELLING]


@over_devices(lambda i, j, k: j > 0 or k > 0, *DTYPES)  # float32 of the others on small tiles alone
def test_matches_reference(emulate, op, case, dtype, device):
    emulated_check(emulate(op, **DEVICES[device]), make=lambda: case.make(dtype, "cpu"))


@pytest.mark.parametrize("layout", LAYOUTS)
@over(lambda spec: [c for c in spec.cases if c.name in ("everything", "bank-of-sequences", "m33-d65-r17")], torch.bfloat16)
def test_any_strides(emulate, op, case, dtype, layout):
    spec = emulate(op, **DEVICES["small-tiles"])
    change = lambda n, t: LAYOUTS[layout](t) if t.dim() else t  # noqa: E731
    emulated_check(spec, make=lambda: case.make(dtype, "cpu"), layout=change)


@over(telling, *DTYPES[:2])
def test_one_gradient_alone(emulate, op, case, dtype):
    spec = emulate(op, **DEVICES["large-tiles"])
    given = case.make(dtype, "cpu")
    for name in spec.bwd_outputs:
        if isinstance(given.get(name), torch.Tensor):
            emulated_check(spec, make=lambda: case.make(dtype, "cpu"), wanted={name})


@over(telling, torch.bfloat16)
def test_no_schedule_changes_a_bit(emulate, op, case, dtype):
    """A race, or a sum in the order of arrival, would."""
    arguments, results = case.make(dtype, "cpu"), []
    spec = SPECS[op]
    grad_y = torch.randn_like(spec.output(arguments))
    for schedule in range(6):
        emulate(op, multiprocessors=4, schedule=schedule)
        results.append(run(spec.op, arguments, grad_y, backend="native"))
    for result in results[1:]:
        assert all(torch.equal(result[n], results[0][n]) for n in result)


# --- under sanitizers ------------------------------------------------------------------------------------------------------


def sanitized(sanitizer, op, sources=CUDA):
    if reason := stable.unusable(sanitizer):
        pytest.skip(reason)
    return emulated.program(op, sanitizer, sources)


def in_bfloat16(folder):
    """A copy of the sources for one dtype: what costs a short run is the compiler."""
    shutil.copytree(stable.ROOT / "csrc", folder / "csrc")
    call = folder / "csrc/cuda/call.h"
    text, count = re.subn(r"plan\((float|f16)\{\}, device\)", "plan(bf16{}, device)", call.read_text())
    assert count == 2
    call.write_text(text)
    return call.parent


@pytest.fixture(scope="module")
def sources_in_bfloat16(tmp_path_factory):
    return in_bfloat16(tmp_path_factory.mktemp("bfloat16"))


@pytest.mark.short
@pytest.mark.parametrize("sanitizer", ("address", "thread"))
@over(telling, torch.bfloat16)
def test_sanitizer_reports_nothing(emulate, sources_in_bfloat16, op, case, dtype, sanitizer):
    spec = emulate(op, sanitized(sanitizer, op, sources_in_bfloat16), **DEVICES["small-tiles"], schedules=2)
    emulated_check(spec, make=lambda: case.make(dtype, "cpu"))


@pytest.mark.slow
@over_devices(lambda i, j, k: (i + j + k) % 2 == 0, *DTYPES[:2])
def test_no_access_out_of_bounds(emulate, op, case, dtype, device):
    """Of the calls whose numbers test_matches_reference looks at."""
    run(emulate(op, sanitized("address", op), **DEVICES[device]).op, case.make(dtype, "cpu"), backend="native")


@pytest.mark.slow
@over(lambda spec: [case for case in all_cases(spec) if case.name not in TELLING], torch.bfloat16)
def test_no_race(emulate, op, case, dtype):
    """In one schedule: what no barrier orders is reported in whatever order it comes. The telling cases have twenty below."""
    emulated_check(emulate(op, sanitized("thread", op), multiprocessors=8), make=lambda: case.make(dtype, "cpu"))


@pytest.mark.slow
@over(telling, *DTYPES[:2])
def test_twenty_schedules(emulate, op, case, dtype):
    """Of races alone: no order of the threads moves what they reach."""
    spec = emulate(op, sanitized("thread", op), multiprocessors=8, schedules=20)
    emulated_check(spec, make=lambda: case.make(dtype, "cpu"))


# What the emulator is for: errors that a lucky order of threads, or lucky memory, hides. Text of a source and its replacement,
# and what must be said of it: by the numbers in this process (None), or by a sanitizer.
RACE, OVERFLOW = "ThreadSanitizer: data race", "AddressSanitizer: heap-buffer-overflow"
NUMBERS = "error .*, plain PyTorch|not finite"
END = "  cp_async_wait<0>();\n  __syncthreads();\n"
PLANTED = {
    "no-barrier-before-use": ("tiles.cuh", "      __syncthreads();\n    }\n", "    }\n", {None: NUMBERS, "thread": RACE}),
    "no-barrier-before-reuse": ("tiles.cuh", END, "  cp_async_wait<0>();\n", {"thread": RACE}),
    "no-barrier-of-the-warp": ("bottleneck.cuh", "(int first) {\n    __syncwarp();\n", "(int first) {\n", {"thread": RACE}),
    "waits-for-too-few-copies": (
        "tiles.cuh", "cp_async_wait<STAGES - 2>()", "cp_async_wait<STAGES - 1>()", {None: NUMBERS, "thread": RACE},
    ),
    "divergent-barrier": (
        "tiles.cuh", END, END.replace("__sync", "if (threadIdx.x < 96) __sync"), {None: "wait for ever: a divergent barrier"},
    ),
    "load-past-the-last-column": (
        "tiles.cuh", "from && column < valid ?", "from && column <= valid ?", {"address": OVERFLOW},
    ),
    "store-past-the-last-column": ("tiles.cuh", "if (left > 1) to[1] =", "to[1] =", {"address": OVERFLOW}),
    "blocks-write-one-sum": (
        "bottleneck_backward.cuh", "q.hidden_sums[(blockIdx.x * int64_t{2}", "q.hidden_sums[(0 * int64_t{2}", {"thread": RACE},
    ),
}  # fmt: skip
QUICK = (("divergent-barrier", None), ("store-past-the-last-column", "address"), ("blocks-write-one-sum", "thread"))


@pytest.mark.parametrize(
    "error, sanitizer",
    [
        pytest.param(error, sanitizer, id=f"{error}-{sanitizer}", marks=() if (error, sanitizer) in QUICK else pytest.mark.slow)
        for error, (*_, seen_by) in PLANTED.items()
        for sanitizer in seen_by
    ],
)
def test_planted_error_is_seen(emulate, tmp_path, error, sanitizer):
    name, good, bad, seen_by = PLANTED[error]
    folder = in_bfloat16(tmp_path)
    text = (folder / name).read_text()
    assert text.count(good) == 1
    (folder / name).write_text(text.replace(good, bad))
    broken = sanitized(sanitizer, "bottleneck", folder) if sanitizer else emulated.module("bottleneck", folder, "-O0")
    arguments = {"shape": (40, 65), "r": 20}
    with pytest.raises((AssertionError, RuntimeError), match=seen_by[sanitizer]):
        for schedule in range(4):
            spec = emulate("bottleneck", broken, multiprocessors=64, schedule=schedule)
            emulated_check(spec, make=lambda: make(torch.bfloat16, "cpu", **arguments))


# --- what only bottleneck has ----------------------------------------------------------------------------------------------

SHAPES = {
    "aligned": {"shape": (70, 128), "r": 64},
    "rank-of-three-tiles": {"shape": (18, 72), "r": 136, "norm": "bias", "hidden_skip": True},
    "largest-rank": {"shape": (3, 16), "r": 1024},
    "two-tiles-an-adapter": {"shape": (150, 40), "r": 8, "g": 2, "ids": [1, 1, 0] * 50, "norm": "weight", "skip": True},
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", SHAPES)
def test_tiles(emulate, name, dtype, device):
    options = {**SHAPES[name], "activation": "gelu"}
    emulated_check(emulate(**DEVICES[device]), make=lambda: make(dtype, "cpu", **options))


@pytest.mark.parametrize("r, d", ((0, 24), (3, 0)))
def test_nothing_to_multiply(emulate, r, d):
    spec = emulate(**DEVICES["large-tiles"])
    shapes = {"x": (5, d), "down_weight": (r, d), "up_weight": (d, r), "down_bias": (r,), "up_bias": (d,), "scale": (d,)}
    arguments = {name: torch.randn(shape) for name, shape in shapes.items()}
    actual, expected = run(spec.op, arguments, backend="native"), run(spec.reference, arguments)
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name])


@pytest.mark.parametrize("ids", (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8), ids=lambda d: str(d)[6:])
def test_ids_of_any_integer_dtype(emulate, ids):
    spec = emulate(**DEVICES["small-tiles"])
    arguments = make(torch.float32, "cpu", shape=(40, 24), r=4, g=3, ids=[2, 0, 1, 2] * 10)
    expected = spec.op(**arguments, backend="native")
    assert torch.equal(spec.op(**{**arguments, "adapter_ids": arguments["adapter_ids"].to(ids)}, backend="native"), expected)


def test_id_outside_the_bank_gives_nan_and_spoils_no_other_row(emulate):
    spec = emulate(**DEVICES["large-tiles"])
    arguments = make(torch.bfloat16, "cpu", shape=(6, 24), r=4, g=3, ids=[2, 3, -1, -2, 0, 1])
    result = run(spec.op, arguments, backend="native")
    bad = torch.tensor([False, True, False, True, False, False])
    assert torch.equal(result["y"].isnan().all(-1), bad) and torch.equal(result["y"].isnan().any(-1), bad)
    assert torch.equal(result["x"].isnan().all(-1), bad) and torch.equal(result["x"].isnan().any(-1), bad)
    assert all(result[n].isfinite().all() for n in ("down_weight", "up_weight", "down_bias", "up_bias"))


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_one_bad_row_spoils_no_other(emulate, value):
    spec = emulate(**DEVICES["large-tiles"])
    arguments = make(torch.bfloat16, "cpu", shape=(40, 24), r=5, residual="none", activation="relu")
    clean = spec.op(**arguments, backend="native")
    arguments["x"][7, 3] = value
    y, expected = spec.op(**arguments, backend="native"), spec.reference(**arguments)
    others = torch.arange(40) != 7
    assert torch.equal(y[others], clean[others])
    assert torch.equal(y[7].isnan(), expected[7].isnan()) and torch.equal(y[7].isinf(), expected[7].isinf())
