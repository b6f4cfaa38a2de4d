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
module = functools.cache(emulated.module)


@pytest.fixture
def emulate(monkeypatch):
    def install(**settings):
        stable.install(monkeypatch, SPEC, module("lora_linear").with_settings(**settings))

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
    _, u = SPEC.fwd.native(x, frozen, None, eye(k), ones(150, k), *rest)
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


def test_gain_of_zero_has_no_gradient(emulate):
    emulate(multiprocessors=4)
    arguments = make(torch.bfloat16, "cpu", shape=(40, 24), n=20, r=3, **{**ALL, "dropout": 0.0})
    arguments["magnitude"][7], arguments["bias"] = 0, torch.randn(20)  # which a 16-bit y can't hold
    grad = run(SPEC.op, arguments, backend="native")["magnitude"]
    assert torch.equal(grad.isnan(), torch.arange(20) == 7) and not grad.isinf().any()
