"""Numbers as a GPU computes them, where Triton's interpreter doesn't: bfloat16, roundings, NaN, sums, overflow."""

import ast
import functools
import math
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.backends.nvidia.compiler import min_dot_size
from triton.language.extra import libdevice
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
Handle = interpreter.TensorHandle
_Builder = interpreter.InterpreterBuilder
_stock_dtype = interpreter._get_np_dtype
# Where only addresses are of interest, the first and the last turns of a loop show the smallest and the largest of them.
settings = SimpleNamespace(only_ends_of_loops=False)
_EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


@functools.cache
def _by_name(name):
    return BFLOAT16 if name == "bf16" else _stock_dtype(tl.dtype(name))


def numpy_dtype(ty):
    return np.dtype(np.uint64) if ty.scalar.is_ptr() else _by_name(ty.scalar.name)


@functools.cache
def _limits(dtype):
    return int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)


def _fits(data, dtype, what):
    """Raise unless these exact integers can be represented in ``dtype``."""
    least, largest = _limits(dtype)
    if data.size and (data.min() < least or data.max() > largest):
        program = interpreter.interpreter_builder.grid_idx
        raise OverflowError(f"{dtype} overflow in {what} by program {program}: {data.min()} to {data.max()}")


def _install_integers():
    """int32 must not overflow, nor a cast lose bits, nor a loop variable be wider than on a GPU."""

    def sanitize(self, left, right, op):
        dtype = left.handle.data.dtype
        if dtype.itemsize < 8 and dtype.kind in "iu":
            wide = (operand.handle.data.astype(np.int64) for operand in (left, right))
            _fits(_EXACT[op.__name__](*wide), dtype, op.__name__)

    def division(stock):
        def divide(self, left, right):
            if (right.data == 0).any():
                raise ZeroDivisionError(f"integer division by zero by program {self.grid_idx}")
            return stock(self, left, right)

        return divide

    def cumsum(self, tensor):
        data = tensor.handle.data
        if data.dtype.kind in "iu":
            _fits(np.cumsum(data, self.axis, np.int64), data.dtype, "cumsum")
        return [self.to_tensor(np.cumsum(data, self.axis, data.dtype), tensor.dtype)]

    def loop(first, last=None, step=1, **options):
        """``range`` of a kernel: the stock one gives Python integers, which never overflow."""
        first, last = (0, first) if last is None else (first, last)
        bounds = [getattr(b, "value", b) for b in (first, last, step)]
        wide = any(isinstance(b, tl.tensor) and b.dtype.primitive_bitwidth == 64 for b in bounds)
        dtype, ty = (np.int64, tl.int64) if wide else (np.int32, tl.int32)
        numbers = range(*(b.handle.data.item() if isinstance(b, tl.tensor) else b for b in bounds))
        for i in (*numbers[:2], *numbers[-2:]) if settings.only_ends_of_loops and len(numbers) > 4 else numbers:
            yield tl.tensor(Handle(np.array([i], dtype), ty), ty)

    def visit_for(self, node):
        if isinstance(node.iter, ast.Call) and ast.unparse(node.iter.func).rpartition(".")[2] == "range":
            node.iter.func = ast.copy_location(ast.Name("_strict_range", ast.Load()), node.iter.func)
        return self.generic_visit(node)

    def patch_tensor(tensor, scope):
        stock_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))  # numpy 2.4 refuses what 3.6 does

    stock_patch, interpreter._patch_lang_tensor = interpreter._patch_lang_tensor, patch_tensor
    TritonSemantic.binary_op_sanitize_overflow_impl = sanitize
    for name in ("idiv", "srem", "urem"):
        setattr(_Builder, f"create_{name}", division(getattr(_Builder, f"create_{name}")))
    interpreter.ScanOps.cumsum = cumsum
    interpreter._strict_range = loop  # the interpreter puts its globals where kernels see them
    interpreter.ASTTransformer.visit_For = visit_for


def cast(self, source, target):
    """Round once, to nearest even; float64 goes to bfloat16 by way of float32. What is undefined on a GPU raises."""
    have, want = source.dtype.scalar, target.scalar
    if have.is_fp8() or want.is_fp8():
        raise NotImplementedError(f"{have} to {want}: eight-bit floats round wrongly in the interpreter")
    data = source.data
    if want.is_int() and want.primitive_bitwidth > 1:
        dtype = numpy_dtype(want)
        if have.is_floating():
            data = np.trunc(data.astype(np.float64))
            if not np.isfinite(data).all():
                raise OverflowError(f"cast of a number that isn't finite to {want} by program {self.grid_idx}")
            _fits(data, dtype, f"a cast from {have}")
        elif want.is_int_signed() and have.primitive_bitwidth == 64:
            _fits(data, dtype, f"a cast from {have}")
    elif tl.bfloat16 in (have, want) and have != tl.float32:
        data = data.astype(np.float32)
    return Handle(data.astype(numpy_dtype(want)), want)


def _cast_rounding(self, source, target, rounding):
    if rounding not in (None, interpreter._ir.ROUNDING_MODE.RTNE):
        raise NotImplementedError(f"casts that round by {rounding}")
    return cast(self, source, target)


def tf32(data):
    """Round float32 to ten bits of mantissa, ties away from zero, as ``cvt.rna.tf32`` does."""
    bits = np.ascontiguousarray(data).view(np.uint32)
    return np.where(np.isfinite(data), (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000), bits).view(np.float32)


def _install_dot(stock):
    def dot(self, a, b, acc, precision, *rest):
        if a.dtype.scalar.is_fp8() or b.dtype.scalar.is_fp8():
            raise NotImplementedError("products of eight-bit floats")
        product = lambda left, right, acc: stock(  # noqa: E731
            self, Handle(left, tl.float32), Handle(right, tl.float32), acc, precision, *rest
        )
        if a.data.dtype == BFLOAT16:  # products of two are exact in float32, where they are added
            return product(a.data.astype(np.float32), b.data.astype(np.float32), acc)
        precision_name = str(precision).rpartition(".")[2]
        if a.data.dtype != np.float32 or precision_name == "IEEE":
            return stock(self, a, b, acc, precision, *rest)
        left, right = tf32(a.data), tf32(b.data)
        if precision_name == "TF32x3":  # the parts that tf32 drops, times what it keeps
            acc = product(tf32(a.data - left), right, product(left, tf32(b.data - right), acc))
        elif precision_name != "TF32":
            raise NotImplementedError(f"products in {precision_name}")
        return product(left, right, acc)

    _Builder.create_dot = dot
    # The least inner dimension that the hardware multiplies; the stock interpreter takes any.
    interpreter.interpreter_builder.codegen_fns["min_dot_size"] = min_dot_size(None)


def _install_floats():
    def tree_sum(self, tensor):
        """``tl.sum``: a tree of additions, each rounded to the type, as threads add."""
        data, axis = tensor.handle.data, self.axis
        if axis is None:
            data, axis = data.reshape(-1), 0
        if data.dtype.kind in "iu":
            _fits(np.sum(data, axis, np.int64), data.dtype, "sum")
        while data.shape[axis] > 1:
            data = np.add(*np.split(data, 2, axis), dtype=data.dtype)
        if self.keep_dims:
            data = data if self.axis is not None else data.reshape((1,) * len(tensor.shape))
        else:
            data = data.squeeze(axis)
        return self.to_tensor(data, tensor.dtype)

    def clamp(self, value, low, high, propagate_nan):
        if propagate_nan == interpreter._ir.PROPAGATE_NAN.NONE:
            return self.binary_op(self.binary_op(value, low, np.fmax), high, np.fmin)
        return self.ternary_op(value, low, high, np.clip)

    def fma(self, x, y, z):
        """One rounding: products of float32 are exact in float64. Its sums are rounded twice, which shows once in 2**29."""
        wide = np.float64 if z.data.dtype != np.float64 else np.longdouble
        return Handle((x.data.astype(wide) * y.data + z.data).astype(z.data.dtype), z.dtype.scalar)

    def in_float64(function):
        def call(x, *args, **kwargs):
            data = function(x.handle.data.astype(np.float64)).astype(x.handle.data.dtype)
            return tl.tensor(Handle(data, x.handle.dtype), x.type)

        return call

    interpreter.ReduceOps.sum = tree_sum
    _Builder.create_clampf, _Builder.create_fma = clamp, fma
    # max.f32 and min.f32 drop NaN.
    _Builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    _Builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    # Functions that have no body outside a GPU. The ones that aren't here give None, which no kernel survives.
    functions = {name: getattr(np, name) for name in ("tanh", "sinh", "cosh", "log1p", "expm1")}
    functions |= {name: getattr(np, f"arc{name[1:]}") for name in ("asin", "acos", "atan")}
    functions["erf"] = np.vectorize(math.erf, otypes=[np.float64])
    for name, function in functions.items():
        setattr(libdevice, name, in_float64(function))


def _install_hints():
    """What a kernel tells the compiler of its offsets must be true, since wide loads are built on it."""
    stock = interpreter._patch_lang_core

    def hinted(name, hint, holds):
        def check(tensor, values):
            sizes = [getattr(v, "value", v) for v in (values if isinstance(values, (list, tuple)) else [values])]
            data = tensor.handle.data if isinstance(tensor, tl.tensor) else np.array([tensor])
            if not all(holds(data, axis, size) for axis, size in enumerate(sizes)):
                program = interpreter.interpreter_builder.grid_idx
                raise AssertionError(f"{name} of {sizes} is false by program {program}: {data.ravel()[:8]}")
            return hint(tensor, values)

        return check

    def multiple(data, axis, size):  # of the first element; those after it may be contiguous
        return data.flat[0] % size == 0

    def contiguous(data, axis, size):
        parts = np.split(data, data.shape[axis] // size, axis)
        return all((np.diff(part.astype(np.int64), axis=axis) == 1).all() for part in parts)

    def patch_core(lang, scope):
        stock(lang, scope)
        for name, holds in (("multiple_of", multiple), ("max_contiguous", contiguous)):
            scope.set_attr(lang, name, hinted(name, getattr(lang, name), holds))

    interpreter._patch_lang_core = patch_core


def install():
    interpreter._get_np_dtype = numpy_dtype
    _Builder.cast_impl, _Builder.create_fp_to_fp = cast, _cast_rounding
    for kind in ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc"):
        setattr(_Builder, f"create_{kind}", cast)
    _Builder.get_bf16 = lambda self, value: Handle(np.array([value], np.float32).astype(BFLOAT16), tl.bfloat16)
    _install_integers()
    _install_dot(_Builder.create_dot)
    _install_floats()
    _install_hints()
