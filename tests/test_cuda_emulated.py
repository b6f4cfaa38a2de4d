"""The CUDA kernels without a GPU: their own source, compiled for the CPU, passes the op's cases in several schedules."""

import dataclasses
import shutil

import pytest
import torch

from fastadapt.ops.bottleneck import Bottleneck, _bwd, _fwd

from .gpuless.emulated import CUDA, Emulated
from .specs.bottleneck import SPEC, make
from .test_ops import LAYOUTS, check, run

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
# One multiprocessor: blocks of 64 rows, one split of the rows.  Many: blocks of 16 rows, many splits.
DEVICES = {"large-tiles": {"multiprocessors": 1, "schedule": 0}, "small-tiles": {"multiprocessors": 64, "schedule": 1}}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EMULATED = dataclasses.replace(SPEC, op=lambda backend=None, **a: Bottleneck.apply("emulated", *SPEC.leaf_args(a)))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return Emulated.build(tmp_path_factory.mktemp("emulated") / "bottleneck.so")


@pytest.fixture
def emulate(library, monkeypatch):
    def install(library=library, **device):
        leaves = Emulated(library, **device)
        monkeypatch.setattr(_fwd, "emulated", leaves.bottleneck_fwd, raising=False)
        monkeypatch.setattr(_bwd, "emulated", leaves.bottleneck_bwd, raising=False)

    return install


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", SPEC.cases, ids=lambda c: c.name)
def test_matches_reference(emulate, case, dtype, device):
    emulate(**DEVICES[device])
    check(EMULATED, None, lambda: case.make(dtype, "cpu"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ("everything", "bank-of-sequences", "m33-d65-r17"))
def test_any_strides(emulate, name, layout):
    emulate(**DEVICES["small-tiles"])
    names = (*SPEC.activations, "grad_y")
    case = SPEC.case(name)
    check(EMULATED, None, lambda: case.make(torch.bfloat16, "cpu"), layout=lambda n, t: LAYOUTS[layout](t) if n in names else t)


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
    emulate(**DEVICES[device])
    check(EMULATED, None, lambda: make(dtype, "cpu", **options))


@pytest.mark.parametrize("r, d", ((0, 24), (3, 0)))
def test_nothing_to_multiply(emulate, r, d):
    emulate(**DEVICES["large-tiles"])
    shapes = {"x": (5, d), "down_weight": (r, d), "up_weight": (d, r), "down_bias": (r,), "up_bias": (d,), "scale": (d,)}
    arguments = {name: torch.randn(shape) for name, shape in shapes.items()}
    actual, expected = run(EMULATED.op, arguments), run(SPEC.reference, arguments)
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name])


@pytest.mark.parametrize("name", SPEC.bwd_outputs)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda d: str(d)[6:])
def test_one_gradient_alone(emulate, name, dtype):
    emulate(**DEVICES["large-tiles"])
    for case in ("everything", "bank-with-everything"):
        check(EMULATED, None, lambda: SPEC.case(case).make(dtype, "cpu"), wanted={name})  # noqa: B023


@pytest.mark.parametrize("ids", (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8), ids=lambda d: str(d)[6:])
def test_ids_of_any_integer_dtype(emulate, ids):
    emulate(**DEVICES["small-tiles"])
    arguments = make(torch.float32, "cpu", shape=(40, 24), r=4, g=3, ids=[2, 0, 1, 2] * 10)
    expected = run(EMULATED.op, arguments)["y"]
    assert torch.equal(run(EMULATED.op, {**arguments, "adapter_ids": arguments["adapter_ids"].to(ids)})["y"], expected)


def test_id_outside_the_bank_gives_nan_and_spoils_no_other_row(emulate):
    emulate(**DEVICES["large-tiles"])
    arguments = make(torch.bfloat16, "cpu", shape=(6, 24), r=4, g=3, ids=[2, 3, -1, -2, 0, 1])
    result = run(EMULATED.op, arguments)
    bad = torch.tensor([False, True, False, True, False, False])
    assert torch.equal(result["y"].isnan().all(-1), bad) and torch.equal(result["y"].isnan().any(-1), bad)
    assert torch.equal(result["x"].isnan().all(-1), bad) and torch.equal(result["x"].isnan().any(-1), bad)
    assert all(result[n].isfinite().all() for n in ("down_weight", "up_weight", "down_bias", "up_bias"))


@pytest.mark.parametrize("name", ("m65-d129-r48", "everything", "bank-with-everything"))
def test_no_schedule_changes_a_bit(emulate, name):
    """A race, or a sum in the order of arrival, would."""
    arguments = SPEC.case(name).make(torch.bfloat16, "cpu")
    grad_y = torch.randn(arguments["x"].shape).bfloat16()
    results = []
    for schedule in range(6):
        emulate(multiprocessors=4, schedule=schedule)
        results.append(run(EMULATED.op, arguments, grad_y))
    for result in results[1:]:
        assert all(torch.equal(result[n], results[0][n]) for n in result)


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_one_bad_row_spoils_no_other(emulate, value):
    emulate(**DEVICES["large-tiles"])
    arguments = make(torch.bfloat16, "cpu", shape=(40, 24), r=5, residual="none", activation="relu")
    clean = run(EMULATED.op, arguments)["y"]
    arguments["x"][7, 3] = value
    y, expected = run(EMULATED.op, arguments)["y"], run(SPEC.reference, arguments)["y"]
    others = torch.arange(40) != 7
    assert torch.equal(y[others], clean[others])
    assert torch.equal(y[7].isnan(), expected[7].isnan()) and torch.equal(y[7].isinf(), expected[7].isinf())


# What the emulator is for: errors that a lucky order of threads hides.  Text of csrc/cuda/tiles.cuh and its replacement.
PLANTED = {
    "no-barrier-before-use": ("      __syncthreads();\n    }\n", "    }\n"),
    "waits-for-too-few-copies": ("cp_async_wait<STAGES - 2>()", "cp_async_wait<STAGES - 1>()"),
    "copies-past-the-last-column": ("least<int>(left * sizeof(T), 16)", "16"),
}


@pytest.mark.parametrize("error", PLANTED)
def test_planted_error_is_seen(emulate, tmp_path, error):
    good, bad = PLANTED[error]
    headers = tmp_path / "cuda"
    shutil.copytree(CUDA, headers)
    text = (headers / "tiles.cuh").read_text()
    assert text.count(good) == 1
    (headers / "tiles.cuh").write_text(text.replace(good, bad))
    broken = Emulated.build(tmp_path / "broken.so", headers, "-DFA_ONLY_BFLOAT16", "-O0")
    with pytest.raises((AssertionError, RuntimeError)):
        for schedule in range(4):
            emulate(broken, multiprocessors=1, schedule=schedule)
            check(EMULATED, None, lambda: make(torch.bfloat16, "cpu", shape=(40, 200), r=20))
