"""The strict interpreter computes as a GPU does: roundings, NaN, sums, products."""

import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.runtime.errors import InterpreterError

from fastadapt._leaf import INTERPRET

pytestmark = pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")
NAN, INF = float("nan"), float("inf")


@triton.jit
def _reduce_kernel(x_ptr, y_ptr, MAX: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr, tl.max(x, 0) if MAX else tl.sum(x, 0))


@triton.jit
def _elementwise_kernel(x_ptr, y_ptr, out_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    if OP == "add":
        out = x + y
    elif OP == "sub":
        out = x - y
    elif OP == "mul":
        out = x * y
    elif OP == "div":
        out = x / y
    elif OP == "neg":
        out = -x
    elif OP == "abs":
        out = tl.abs(x)
    elif OP == "where":
        out = tl.where(x > y, x, y * 2.0)
    elif OP == "fma":
        out = tl.fma(x, y, x)
    elif OP == "maximum":
        out = tl.maximum(x, y)
    elif OP == "minimum":
        out = tl.minimum(x, y)
    elif OP == "propagate":
        out = tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)
    elif OP == "tanh":
        out = libdevice.tanh(x)
    elif OP == "cast":
        out = x
    tl.store(out_ptr + i, out.to(out_ptr.dtype.element_ty))


def elementwise(op, x, y, dtype=None):
    out = torch.empty_like(x, dtype=dtype or x.dtype)
    _elementwise_kernel[(1,)](x, y, out, OP=op, BLOCK=len(x))
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_arithmetic_rounds_once_to_nearest_even(dtype):
    x, y = torch.randn(1024).to(dtype), torch.randn(1024).to(dtype)
    expected = {
        "add": x + y, "sub": x - y, "mul": x * y, "neg": -x, "abs": x.abs(), "where": torch.where(x > y, x, y * 2),
        "fma": (x.double() * y.double() + x.double()).to(dtype),
    }  # fmt: skip
    for op, values in expected.items():
        assert torch.equal(elementwise(op, x, y), values), op
    for op, values in {"div": x / y, "tanh": x.tanh()}.items():
        torch.testing.assert_close(elementwise(op, x, y), values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_round_to_nearest_even(dtype):
    """Ties to both sides, subnormals, the largest numbers, what overflows, infinities and NaN."""
    exact = torch.randn(500).to(dtype).float()
    ulp = exact.abs() * torch.finfo(dtype).eps / 2
    special = torch.tensor([0.0, -0.0, 1e-45, 6e-8, 1e-40, 65504, 65519.99, 65520, 3.3895e38, 3.4e38, INF, -INF])
    x = torch.cat([exact, exact + ulp / 2, exact + ulp, special])
    x = torch.nn.functional.pad(x, (0, 2048 - len(x)))
    assert torch.equal(elementwise("cast", x, x, dtype), x.to(dtype))
    nan = torch.full((2,), NAN)
    assert elementwise("cast", nan, nan, dtype).isnan().all()
    assert torch.equal(elementwise("cast", x.to(dtype), x.to(dtype), torch.float32), x.to(dtype).float())
    whole = torch.arange(-1024, 1024) * 1001
    assert torch.equal(elementwise("cast", whole, whole, dtype), whole.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_maximum_and_minimum_drop_nan(dtype):
    x, y = torch.tensor([NAN, 1, -INF, NAN], dtype=dtype), torch.tensor([0, NAN, 5, NAN], dtype=dtype)
    assert elementwise("maximum", x, y)[:3].tolist() == [0, 1, 5] and elementwise("maximum", x, y)[3].isnan()
    assert elementwise("minimum", x, y)[:3].tolist() == [0, 1, -INF]
    assert elementwise("propagate", x, y).isnan().tolist() == [True, True, False, True]
    out = torch.empty(1, dtype=dtype)
    _reduce_kernel[(1,)](x, out, MAX=True, BLOCK=4)
    assert out.item() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_16_bit_are_rounded_at_every_step(dtype):
    x, out = torch.rand(512).to(dtype), torch.empty(1, dtype=dtype)
    tree = x
    while len(tree) > 1:
        tree = tree[: len(tree) // 2] + tree[len(tree) // 2 :]
    _reduce_kernel[(1,)](x, out, MAX=False, BLOCK=512)
    assert torch.equal(out, tree) and abs(out.double() - x.double().sum()) > 0.01


@triton.jit
def _dot_kernel(x_ptr, y_ptr, out_ptr, K: tl.constexpr, PRECISION: tl.constexpr):
    i, k = tl.arange(0, 16), tl.arange(0, K)
    x, y = tl.load(x_ptr + i[:, None] * K + k[None, :]), tl.load(y_ptr + k[:, None] * 16 + i[None, :])
    tl.store(out_ptr + i[:, None] * 16 + i[None, :], tl.dot(x, y, input_precision=PRECISION))


@pytest.mark.parametrize(
    "dtype, precision, least, most",
    [
        (torch.bfloat16, "ieee", 0, 1e-6), (torch.float16, "ieee", 0, 1e-6), (torch.float32, "ieee", 0, 1e-6),
        (torch.float32, "tf32", 1e-4, 1e-3), (torch.float32, "tf32x3", 0, 3e-6),
    ],
)  # fmt: skip
def test_products(dtype, precision, least, most):
    x, y, out = torch.randn(16, 32).to(dtype), torch.randn(32, 16).to(dtype), torch.empty(16, 16)
    _dot_kernel[(1,)](x, y, out, K=32, PRECISION=precision)
    exact = x.double() @ y.double()
    assert least <= (out - exact).norm() / exact.norm() <= most
    x[0, 0] = INF
    _dot_kernel[(1,)](x, y, out, K=32, PRECISION=precision)
    assert not out[0].isfinite().any() and out[1:].isfinite().all()
    with pytest.raises(InterpreterError, match="K >= "):  # no hardware multiplies so little
        _dot_kernel[(1,)](x, y, out, K=4, PRECISION=precision)
