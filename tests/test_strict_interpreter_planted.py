"""The strict interpreter finds what is planted, and says nothing of what is right."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor

from fastadapt._leaf import INTERPRET

from .gpuless import strict_interpreter as strict

pytestmark = pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")
fails = lambda message: pytest.raises(InterpreterError, match=message)  # noqa: E731
NAN = float("nan")


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, stride, BLOCK: tl.constexpr, MASK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n) if MASK else tl.load(x_ptr + i)
    tl.store(y_ptr + i * stride, x, mask=i < n)


def test_a_correct_kernel_passes():
    x, y = torch.randn(10), torch.empty(10)
    _copy_kernel[(3,)](x, y, 10, 1, BLOCK=4, MASK=True)
    assert torch.equal(x, y)


@pytest.mark.parametrize(
    "n, stride, mask, message",
    [
        (10, 1, False, r"load by program \(2, 0, 0\) of 4 bytes at byte 40 of x_ptr, a \(10,\) torch.float32"),
        (11, 1, True, "load .* at byte 40 of x_ptr.* 1 of 3 lanes are outside"),
        (10, 2, True, "store .* of y_ptr"),
        (10, -1, True, "store .* at byte -.* of y_ptr"),
        (10, 0, True, "from several lanes"),
    ],
)
def test_planted_bounds(n, stride, mask, message):
    x, y = torch.randn(10), torch.empty(10)
    with fails(message):
        _copy_kernel[(3,)](x, y, n, stride, BLOCK=4, MASK=mask)


def test_planted_overrun_into_what_else_is_there():
    """Into the gap between the rows of a view, into the neighbour in the same memory, and half an element away."""
    rows = torch.randn(4, 5)[:, :3]
    with fails("at byte 12 of x_ptr"):
        _copy_kernel[(1,)](rows, torch.empty(16), 4, 1, BLOCK=4, MASK=True)
    both = torch.randn(8)
    with fails("at byte 16 of x_ptr"):
        _copy_kernel[(2,)](both[:4], both[4:], 8, 1, BLOCK=4, MASK=True)
    with fails("at byte 2 of x_ptr"):
        _cast_pointer_kernel[(1,)](torch.randn(4), torch.empty(4))


@triton.jit
def _cast_pointer_kernel(x_ptr, y_ptr):
    halves = x_ptr.to(tl.pointer_type(tl.float16)) + 1
    tl.store(y_ptr, tl.load(halves.to(tl.pointer_type(tl.float32))))


@triton.jit
def _descriptor_kernel(x, y_ptr, m, BLOCK: tl.constexpr):
    y = tl.make_tensor_descriptor(y_ptr, shape=[m, 8], strides=[8, 1], block_shape=[BLOCK, 8])
    i = tl.program_id(0) * BLOCK
    y.store([i, 0], x.load([i, 0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_planted_shape_of_a_descriptor(dtype):
    x, y = torch.randn(10, 8).to(dtype), torch.empty(10, 8, dtype=dtype)
    _descriptor_kernel[(3,)](TensorDescriptor.from_tensor(x, [4, 8]), y, 10, BLOCK=4)
    assert torch.equal(x, y)
    with fails("store .* of y_ptr, .* 8 of 16 lanes are outside"):
        _descriptor_kernel[(3,)](TensorDescriptor.from_tensor(x, [4, 8]), y[:9], 10, BLOCK=4)


@triton.jit
def _store_then_load_kernel(x_ptr, BARRIER: tl.constexpr):
    i = tl.arange(0, 4)
    tl.store(x_ptr + i, i.to(tl.float32))
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + 4 + i, tl.load(x_ptr + 3 - i))


@triton.jit
def _atomic_kernel(x_ptr, value, PLAIN: tl.constexpr):
    tl.atomic_add(x_ptr, value)
    if PLAIN:
        tl.store(x_ptr, value)


def test_planted_races():
    x, y = torch.randn(10), torch.empty(10)
    with fails("store by program . races with another program's store, at element 0 of y_ptr"):
        _copy_kernel[(3,)](x, y, 3, 0, BLOCK=1, MASK=True)
    with fails("races with another program's .*, at element . of x_ptr/y_ptr"):
        _copy_kernel[(3,)](x, x[1:], 3, 1, BLOCK=1, MASK=True)
    with fails("load by program 0 races with a store before a barrier"):
        _store_then_load_kernel[(1,)](x, BARRIER=False)
    _store_then_load_kernel[(1,)](x, BARRIER=True)
    assert x[4:8].tolist() == [3, 2, 1, 0]


def test_planted_atomics():
    count = torch.zeros(1, dtype=torch.int32)
    _atomic_kernel[(5,)](count, 2, PLAIN=False)
    assert count.item() == 10
    with fails("races with another program's (store|atomic)"):
        _atomic_kernel[(5,)](count, 2, PLAIN=True)
    with fails("atomic by program . races with another program's atomic"):  # no order of the sum is fixed
        _atomic_kernel[(5,)](torch.zeros(1), 2.0, PLAIN=False)
    with fails("NotImplementedError"):
        _atomic_kernel[(1,)](torch.zeros(1, dtype=torch.bfloat16), 2.0, PLAIN=False)


@triton.jit
def _reduce_kernel(x_ptr, y_ptr, n, OTHER: tl.constexpr, MAX: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=OTHER)
    tl.store(y_ptr, tl.max(x, 0) if MAX else tl.sum(x, 0))


@triton.jit
def _gather_kernel(i_ptr, x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + tl.load(i_ptr + i, mask=i < n)))


def test_planted_loads_without_other():
    x, y = torch.ones(8), torch.empty(1)
    for seed in range(3):
        strict.reseed(seed)
        for maximum in (False, True):
            _reduce_kernel[(1,)](x, y, 3, OTHER=0.0, MAX=maximum, BLOCK=8)
            assert y.item() == (1 if maximum else 3)
            _reduce_kernel[(1,)](x, y, 3, OTHER=None, MAX=maximum, BLOCK=8)
            assert y > 1e30 if maximum else y.isnan()
        with fails("load .* of x_ptr"):
            _gather_kernel[(1,)](torch.zeros(8, dtype=torch.int32), x, x.clone(), 5, BLOCK=8)


@triton.jit
def _overflow_kernel(x_ptr, n, KIND: tl.constexpr, ROW: tl.constexpr):
    i = tl.arange(0, 2)
    if KIND == "product":
        i = i * n * ROW
    elif KIND == "loop":
        for row in range(0, n, n // 2):
            i += (row * ROW).to(tl.int64)
    elif KIND == "sum":
        i += tl.sum(i * 0 + n * 2000, 0)
    elif KIND == "cumsum":
        i = tl.cumsum(i * 0 + n * 2000, 0)
    elif KIND == "cast":
        i = (i.to(tl.int64) * n * ROW).to(tl.int32)
    elif KIND == "wide":
        for row in range(0, n.to(tl.int64), n // 2):
            i += row * ROW
    tl.store(x_ptr + (i - i), 1.0, mask=i < 1)


@pytest.mark.parametrize("kind", ["product", "loop", "sum", "cumsum", "cast"])
def test_planted_int32_overflow(kind):
    with fails("int32 overflow"):
        _overflow_kernel[(1,)](torch.empty(1), 1_000_000, KIND=kind, ROW=8192)
    _overflow_kernel[(1,)](torch.empty(1), 1_000_000, KIND="wide", ROW=8192)


@triton.jit
def _undefined_kernel(x_ptr, n, KIND: tl.constexpr):
    x = tl.load(x_ptr)
    if KIND == "assert":
        tl.device_assert(n == 1, "n must be one")
    elif KIND == "division":
        x += 1 // (n - n)
    elif KIND == "cast":
        x += x.to(tl.int32)
    elif KIND == "float8":
        x += x.to(tl.float8e5).to(tl.float32)
    tl.store(x_ptr, x)


@pytest.mark.parametrize(
    "kind, n, x, message",
    [
        ("assert", 2, 0.0, "n must be one"),
        ("division", 2, 0.0, "division by zero"),
        ("cast", 2, NAN, "isn't finite"),
        ("float8", 2, 1.0, "NotImplementedError"),
        ("cast", 2, 3e9, "int32 overflow in a cast from fp32"),
    ],
)
def test_planted_undefined_or_unknown_operations(kind, n, x, message):
    with fails(message):
        _undefined_kernel[(1,)](torch.tensor([x]), n, KIND=kind)
    _undefined_kernel[(1,)](torch.tensor([1.0]), 1, KIND="assert")


@triton.jit
def _hints_kernel(x_ptr, value, start, WRONG: tl.constexpr):
    i = tl.max_contiguous(tl.multiple_of(start + tl.arange(0, 8), 8), 8 if WRONG != 2 else 4)
    i = tl.max_contiguous(i * 2, 4) if WRONG == 2 else i
    tl.store(x_ptr + i % 8, i + value.to(tl.float64))


def test_planted_hints_to_the_compiler():
    x = torch.empty(8, dtype=torch.float64)
    _hints_kernel[(1,)](x, 0.1, 16, WRONG=0)
    assert torch.equal(x, torch.arange(16, 24) + torch.tensor(0.1).double())  # a number is passed in float32
    with fails(r"multiple_of of \[8\] is false"):
        _hints_kernel[(1,)](x, 0.1, 4, WRONG=1)
    with fails(r"max_contiguous of \[4\] is false"):
        _hints_kernel[(1,)](x, 0.1, 16, WRONG=2)


def test_planted_hole_in_an_output():
    x, y, z = torch.randn(10), torch.empty(2, 6), torch.empty(3)
    with strict.recorded() as launches:
        _copy_kernel[(2,)](x, y, 8, 1, BLOCK=4, MASK=True)
    assert [(r.kernel, r.grid, r.constants["BLOCK"]) for r in launches] == [("_copy_kernel", (2, 1, 1), 4)]
    assert strict.unwritten(y, launches) == 4 and strict.unwritten(y[1:], launches) == 4
    assert strict.unwritten(y[:1], launches) == 0 and strict.unwritten(y[:, ::3], launches) == 1
    assert strict.unwritten(z, launches) is None


@triton.jit
def _ticket_kernel(count_ptr, order_ptr):
    tl.store(order_ptr + tl.atomic_add(count_ptr, 1), tl.program_id(0) + 10 * tl.program_id(1))


def test_the_order_of_programs_is_shuffled():
    orders = []
    for seed in (0, 0, 1):
        strict.reseed(seed)
        for _ in range(2):
            order = torch.empty(6, dtype=torch.int32)
            _ticket_kernel[(3, 2)](torch.zeros(1, dtype=torch.int32), order)
            assert sorted(order.tolist()) == [0, 1, 2, 10, 11, 12]
            orders.append(order.tolist())
    first, second, again, _, other, _ = orders
    assert first == again and first != second and first != other


def test_planted_grid():
    with pytest.raises(ValueError, match="grid.y must be at most 65535, got 65536"):
        _copy_kernel[(1, 65536)](torch.empty(4), torch.empty(4), 4, 1, BLOCK=4, MASK=True)


@triton.autotune([triton.Config({"BLOCK": 2}), triton.Config({"BLOCK": 4}), triton.Config({"BLOCK": 16})], key=["n"])
@triton.jit
def _tuned_kernel(x_ptr, y_ptr, n, SHORT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n - n % BLOCK if SHORT and BLOCK == 4 else i < n
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=(i < n) & mask if BLOCK < 16 else i < 16), mask=mask)


def test_an_autotuner_runs_every_configuration():
    """Each on what the one before has left, and a fault of any is found."""
    grid = lambda meta: (triton.cdiv(meta["n"], meta["BLOCK"]),)  # noqa: E731
    with strict.recorded() as launches:
        _tuned_kernel[grid](torch.randn(16), torch.empty(16), 16, SHORT=False)
    assert [r.constants["BLOCK"] for r in launches] == [2, 4, 16, 2]
    with fails("of x_ptr"):
        _tuned_kernel[grid](torch.randn(10), torch.empty(10), 10, SHORT=False)


@triton.jit
def _rows_kernel(ids_ptr, y_ptr, stride, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    row = tl.load(ids_ptr + tl.program_id(0)) if ids_ptr is not None else tl.program_id(0)
    row = row.to(tl.int64) if WIDE else row.to(tl.int32)
    for start in range(0, stride, BLOCK):
        tl.store(y_ptr + row * stride + start + tl.arange(0, BLOCK), tl.zeros((BLOCK,), tl.float32))


@pytest.mark.parametrize("ids", [False, True])
def test_planted_offsets_of_int32(ids):
    """The programs of a launch on 12 gigabytes that isn't there; with ids it takes their values to see the overflow."""
    with strict.ghosts() as launches:
        y = torch.empty((3_000_000, 1024), device="meta")
        table = torch.tensor([0, 2_999_998], device="meta")[torch.tensor([1, 0, 1], device="meta")] + 1 if ids else None
        grid = (3,) if ids else (3_000_000,)
        _rows_kernel[grid](table, y, 1024, BLOCK=64, WIDE=True)
        with fails("int32 overflow in mul"):
            _rows_kernel[grid](table, y, 1024, BLOCK=64, WIDE=False)
        with fails("of y_ptr"):
            _rows_kernel[grid](table, y[:-1], 1024, BLOCK=64, WIDE=True)
    assert [r.grid[0] for r in launches] == list(grid)
    with pytest.raises(TypeError, match="needs ghosts"):
        _rows_kernel[grid](None, y, 1024, BLOCK=64, WIDE=True)


@pytest.mark.parametrize("rows", [3_000_000, 65_535])
def test_planted_launch_of_too_few_programs(rows):
    with strict.ghosts() as launches:
        _rows_kernel[(rows,)](None, torch.empty((3_000_000, 1024), device="meta"), 1024, BLOCK=64, WIDE=True)
    assert strict.unreached(launches) == (["y_ptr"] if rows < 3_000_000 else [])


PINS = """
from triton.runtime import interpreter
from tests.gpuless.strict_interpreter_pins import moved
print(moved())
del interpreter._get_np_dtype
interpreter.ScanOps.cumsum = lambda self, input, extra: None
interpreter.ASTTransformer.visit_For = None
print("\\n".join(moved()))
"""


def test_planted_changes_of_triton():
    done = subprocess.run([sys.executable, "-c", PINS], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    release = f"in Triton {triton.__version__}"
    assert done.stdout.splitlines() == [
        "[]",
        "triton.runtime.interpreter:ScanOps.cumsum must take (self input), got (self input extra) " + release,
        f"triton.runtime.interpreter:_get_np_dtype is missing {release}",
        f"triton.runtime.interpreter:ASTTransformer.visit_For is new {release}",
    ], done.stderr
