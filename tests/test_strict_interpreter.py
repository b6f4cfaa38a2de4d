"""The strict interpreter finds planted errors, and the offsets of the real launches at sizes that fit no memory."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from fastadapt._leaf import INTERPRET
from fastadapt.ops.bottleneck import _launch_bwd, _launch_fwd

from .gpuless import offline
from .gpuless.strict_interpreter import Ghost, ghost_launch
from .specs.bottleneck import EVERYTHING, SPEC, make

pytestmark = pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, stride, BLOCK: tl.constexpr, MASK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n) if MASK else tl.load(x_ptr + i)
    tl.store(y_ptr + i * stride, x, mask=i < n)


@triton.jit
def _sum_kernel(x_ptr, y_ptr, OTHER: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < 3, other=OTHER)
    tl.store(y_ptr, tl.sum(x.to(tl.float32), 0))


@triton.jit
def _arithmetic_kernel(x_ptr, y_ptr, sum_ptr, dot_ptr, PRECISION: tl.constexpr):
    i = tl.arange(0, 16)
    tile = i[:, None] * 16 + i[None, :]
    x, y = tl.load(x_ptr + tile), tl.load(y_ptr + tile)
    tl.store(sum_ptr + tile, (x.to(tl.float32) + y.to(tl.float32)).to(sum_ptr.dtype.element_ty))
    tl.store(dot_ptr + tile, tl.dot(x, y, input_precision=PRECISION))


def test_a_correct_kernel_passes():
    x, y = torch.randn(10), torch.empty(10)
    _copy_kernel[(3,)](x, y, 10, 1, BLOCK=4, MASK=True)
    assert torch.equal(x, y)


@pytest.mark.parametrize(
    "n, stride, mask, message",
    [
        (10, 1, False, "load by program .* lanes are outside"),
        (11, 1, True, "outside"),
        (10, 2, True, "store by program .* outside"),
        (10, 0, True, "from several lanes"),
    ],
)
def test_planted_bounds_and_races(n, stride, mask, message):
    x, y = torch.randn(10), torch.empty(10)
    with pytest.raises(InterpreterError, match=message):
        _copy_kernel[(3,)](x, y, n, stride, BLOCK=4, MASK=mask)


def test_planted_race_between_programs():
    x, y = torch.randn(10), torch.empty(10)
    with pytest.raises(InterpreterError, match="races with a store"):
        _copy_kernel[(3,)](x, y, 3, 0, BLOCK=1, MASK=True)
    with pytest.raises(InterpreterError, match="races with"):
        _copy_kernel[(3,)](x, x[1:], 3, 1, BLOCK=1, MASK=True)


def test_planted_load_without_other():
    x, y = torch.ones(3), torch.empty(1)
    _sum_kernel[(1,)](x, y, OTHER=0.0, BLOCK=4)
    assert y.item() == 3
    _sum_kernel[(1,)](x, y, OTHER=None, BLOCK=4)
    assert y.isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_arithmetic_rounds_as_torch(dtype):
    x, y = (torch.randn(16, 16).to(dtype) for _ in range(2))
    sums, dots = torch.empty_like(x), torch.empty(16, 16)
    _arithmetic_kernel[(1,)](x, y, sums, dots, PRECISION="ieee")
    assert torch.equal(sums, (x.float() + y.float()).to(dtype))
    torch.testing.assert_close(dots, x.float() @ y.float())


def test_tf32_is_modelled():
    x, y = torch.randn(16, 16), torch.randn(16, 16)
    dots = torch.empty(16, 16)
    _arithmetic_kernel[(1,)](x, y, torch.empty_like(x), dots, PRECISION="tf32")
    error = (dots.double() - x.double() @ y.double()).norm() / dots.norm()
    assert 1e-5 < error < 1e-3


@triton.jit
def _rows_kernel(y_ptr, stride, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    tl.store(y_ptr + row * stride + tl.arange(0, BLOCK), tl.zeros((BLOCK,), tl.float32))


def test_planted_int32_offset():
    ghost = Ghost(torch.empty((3_000_000, 1024), device="meta"))
    with ghost_launch([0, 2_999_999], 3_000_000):
        _rows_kernel[(2,)](ghost, 1024, BLOCK=1024, WIDE=True)
        with pytest.raises(InterpreterError, match="overflow"):
            _rows_kernel[(2,)](ghost, 1024, BLOCK=1024, WIDE=False)


def test_offsets_of_the_launches_are_64_bit(monkeypatch):
    """First and last program of every launch of a call with more than 2**31 elements."""
    monkeypatch.setattr("fastadapt.kernels.bottleneck._PROGRAMS", 20_000)  # many planes of few rows: short loops
    shape = (3_000_000, 1024)
    arguments = make(torch.bfloat16, "meta", shape=shape, r=16, **EVERYTHING)
    args = SPEC.leaf_args(arguments)
    grad_y = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    with offline.target(90), offline.captured() as launches:
        _launch_fwd(*args)
        _launch_bwd(*SPEC.bwd_leaf_args(grad_y, args, [True] * 10))
    assert len(launches) == 8
    for launch in launches:
        ghosts = [Ghost(a) if isinstance(a, torch.Tensor) else a for a in launch.args]
        with ghost_launch([0, launch.grid[0] - 1], launch.grid[0]):
            launch.kernel[(2,)](*ghosts, **launch.kwargs)
