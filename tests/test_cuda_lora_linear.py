"""What the battery can't say of the CUDA kernels of lora_linear: the mask to the bit, and the parts of a long depth."""

import ctypes
import functools
import shutil
import subprocess

import pytest
import torch

from fastadapt.ops import dropout

from .battery import check, run
from .gpuless import emulated, stable
from .specs import SPECS
from .specs.lora_linear import ALL, make

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
SPEC = SPECS["lora_linear"]
SEED, P = torch.tensor(0x7123456789ABCDEF), 0.3


@pytest.fixture
def emulate(monkeypatch):
    def install(**settings):
        stable.install(monkeypatch, SPEC, emulated.module("lora_linear").with_settings(**settings))

    return install


def test_mask_of_any_row_and_column(tmp_path):
    library, source = tmp_path / "dropout.so", stable.ROOT / "tests/dropout_driver.cpp"
    flags = ("-std=c++17", "-shared", "-fPIC", "-DFA_EMULATE", "-Wno-unknown-pragmas", "-I", stable.HERE)
    subprocess.run(["g++", *flags, source, "-o", library], check=True)
    rows = torch.cat([torch.arange(50), torch.tensor([2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 7, 2**40 + 3, 2**62])])
    blocks = torch.cat([torch.arange(50) * 3, torch.tensor([0, 1, 2**20, 2**27 - 1, 5, 6, 7])])
    zero = torch.zeros_like(rows)
    words = dropout.philox((blocks, rows & 0xFFFFFFFF, rows >> 32, zero), SEED)
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], -1)
    expected = ((halves >= dropout.threshold(P)) << torch.arange(8)).sum(-1)
    actual, pointer = torch.empty_like(rows), lambda t: ctypes.c_void_p(t.data_ptr())
    ctypes.CDLL(str(library)).kept(
        ctypes.c_int64(SEED.item()), dropout.threshold(P), ctypes.c_int64(len(rows)), pointer(rows), pointer(blocks),
        pointer(actual),
    )  # fmt: skip
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("multiprocessors", (1, 64))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("k", (208, 203), ids=("aligned", "odd"))
def test_mask_of_every_kernel(emulate, k, dtype, multiprocessors):
    """Identity matrices let the mask through, times the scale of what stays."""
    emulate(multiprocessors=multiprocessors)
    expected = dropout.kept(SEED, 150, k, P) * dropout.kept_scale(P)
    ones, eye = lambda *s: torch.ones(s, dtype=dtype), lambda n: torch.eye(n, dtype=dtype)
    frozen, x = torch.zeros(150, k, dtype=dtype), ones(150, k)
    rest = (None, None, 1.0, P, SEED, None)
    _, u, _ = SPEC.fwd.native(x, frozen, None, eye(k), ones(150, k), *rest, False)
    assert torch.equal(u, expected.float())

    def backward(grad_y, lora_a, lora_b, wanted):
        mask = [i == wanted for i in range(7)]
        return SPEC.bwd.native(
            grad_y, x, ones(150, len(lora_a)).float(), None, frozen[: len(lora_b)], None, lora_a, lora_b, *rest, mask
        )[wanted]

    assert torch.equal(backward(ones(150, 1), ones(1, k), ones(1, 1), 0), expected.to(dtype))
    assert torch.equal(backward(eye(150), ones(150, k), eye(150), 3), expected.to(dtype))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=lambda d: str(d)[6:])
def test_depth_of_several_chunks(emulate, dtype):
    """However many blocks share the depth and whatever the tiles, a row has the same bits."""
    draw = functools.partial(make, dtype, "cpu", shape=(18, 1100), n=530, r=9, dropout=0.2, lora_bias=True, diagonal=True)
    results, arguments = [], draw()
    grad_y = torch.randn_like(SPEC.output(arguments))
    for multiprocessors in (1, 64):
        emulate(multiprocessors=multiprocessors)
        results.append(run(SPEC.op, arguments, grad_y, backend="native"))
    check(SPEC, "native", draw, unit="matrix")
    for result in results[1:]:
        assert torch.equal(result["y"], results[0]["y"]) and torch.equal(result["x"], results[0]["x"])


def test_small_magnitudes_have_gradients_like_others(emulate):
    """Down to zero, under a bias which a 16-bit y is hardly more than."""
    emulate(multiprocessors=4)

    def draw():
        arguments = make(torch.bfloat16, "cpu", shape=(40, 24), n=20, r=3, **{**ALL, "dropout": 0.0})
        arguments["magnitude"] *= torch.logspace(0, -6, 20).bfloat16()
        arguments["magnitude"][7], arguments["bias"] = 0, 10 * torch.randn(20)
        return arguments

    check(SPEC, "native", draw, unit="matrix")


# --- banks -----------------------------------------------------------------------------------------------------------------

# Few ranks are multiplied whole, many for the adapters of a tile, whose rows are sorted.
RANKS = {"few": 4, "many": 40}
IDS = [5, 0, -1, 5, 2, 4, 4, 0, 1, -1] * 14


def a_bank(dtype, ids, r, k=43, **options):
    return make(dtype, "cpu", shape=(len(ids), k), n=70, r=r, g=6, ids=ids, **{"scale": "each", "diagonal": True, **options})


@pytest.mark.parametrize("multiprocessors", (1, 64))
@pytest.mark.parametrize("r", RANKS.values(), ids=RANKS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=lambda d: str(d)[6:])
def test_row_of_a_bank_has_the_bits_that_it_has_alone(emulate, dtype, r, multiprocessors):
    emulate(multiprocessors=multiprocessors)
    arguments = a_bank(dtype, IDS, r)
    grad_y = torch.randn_like(SPEC.output(arguments))

    def of(rows):
        some = {**arguments, "x": arguments["x"][rows], "adapter_ids": arguments["adapter_ids"][rows]}
        result = run(SPEC.op, some, grad_y[rows], backend="native")
        return result["y"], result["x"]

    whole = of(torch.arange(len(IDS)))
    for rows in (*torch.tensor([[0], [2], [8]]), torch.arange(3, 90, 2), torch.arange(len(IDS)).flip(0)):
        assert all(torch.equal(part, all_rows[rows]) for part, all_rows in zip(of(rows), whole))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=lambda d: str(d)[6:])
def test_adapters_behind_change_no_bit(emulate, dtype):
    """A bank that is multiplied whole, and the same one behind which so many others stand that its rows are sorted."""
    emulate(multiprocessors=4)
    arguments = a_bank(dtype, IDS, r=20)
    more = {n: torch.cat([arguments[n], arguments[n][:5]]) for n in ("lora_a", "lora_b", "diagonal", "scale")}
    few, many = (SPEC.op(**{**arguments, **edit}, backend="native") for edit in ({}, more))
    assert torch.equal(few, many)


@pytest.mark.parametrize("r", RANKS.values(), ids=RANKS)
def test_id_outside_the_bank_gives_nan_and_spoils_nothing_else(emulate, r):
    emulate(multiprocessors=4)
    ids = [5, 6, 0, -2, -1, 127, 3, -128]
    arguments = a_bank(torch.bfloat16, ids, r, dropout=0.2)
    bad = torch.tensor([not -1 <= i < 6 for i in ids])
    grad_y = torch.randn_like(SPEC.output(arguments))

    def leaves(adapter_ids):
        x, *rest, _, keep_z = SPEC.leaf_args(arguments)
        y, u, _ = SPEC.fwd.native(x, *rest, adapter_ids, keep_z)
        grads = SPEC.bwd.native(grad_y, x, u, None, *rest, adapter_ids, [name != "magnitude" for name in SPEC.bwd_outputs])
        return {"y": y, "u": u, **dict(zip(SPEC.bwd_outputs, grads))}

    result, clean = leaves(arguments["adapter_ids"]), leaves(torch.where(bad, -1, arguments["adapter_ids"]))
    for name in ("y", "u", "x"):
        assert result[name][bad].isnan().all() and torch.equal(result[name][~bad], clean[name][~bad])
    assert not clean["u"][bad].any() and all(t.isfinite().all() for t in clean.values())
    assert all(torch.equal(result[n], clean[n]) for n in clean if n not in ("y", "u", "x"))


@pytest.mark.parametrize("r", (32, 64), ids=("whole", "sorted"))
def test_adapter_without_rows_costs_nothing(emulate, r):
    """Not even where the adapters on both sides of it have rows: what it holds reaches no product."""
    emulate(multiprocessors=4)
    arguments = a_bank(torch.bfloat16, IDS, r)  # of which none has adapter 3
    for name in ("lora_a", "lora_b"):
        arguments[name][3] = float("nan")
    result = run(SPEC.op, arguments, backend="native")
    assert all(t.isfinite().all() for t in result.values()) and not result["lora_a"][3].any()


@pytest.mark.parametrize("ids", (torch.int32, torch.int16, torch.int8, torch.uint8), ids=lambda d: str(d)[6:])
def test_ids_of_any_integer_dtype(emulate, ids):
    emulate(multiprocessors=4)
    arguments = a_bank(torch.float32, [5, 0, 3, 0, 2] * 4, r=4)
    other = {**arguments, "adapter_ids": arguments["adapter_ids"].to(ids).repeat_interleave(2)[::2]}
    assert torch.equal(SPEC.op(**other, backend="native"), SPEC.op(**arguments, backend="native"))


@pytest.mark.parametrize("r", RANKS.values(), ids=RANKS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=lambda d: str(d)[6:])
def test_bank_of_many_tiles(emulate, dtype, r):
    emulate(multiprocessors=64)
    check(SPEC, "native", lambda: a_bank(dtype, IDS, r, k=530, dropout=0.2, lora_bias=True), unit="matrix")


def test_bank_of_one_layer_has_the_bits_of_the_layer(emulate):
    emulate(multiprocessors=4)
    arguments = a_bank(torch.bfloat16, [3] * 70, r=20, dropout=0.2)
    grad_y = torch.randn_like(SPEC.output(arguments))
    bank = run(SPEC.op, arguments, grad_y, backend="native")
    names = ("lora_a", "lora_b", "diagonal", "scale")
    one = {n: arguments[n][3] if n in names else arguments[n] for n in arguments if n != "adapter_ids"}
    layer = run(SPEC.op, one, grad_y, backend="native")
    assert all(torch.equal(bank[n][3] if n in names else bank[n], layer[n]) for n in layer if n != "scale")
