"""Triton's interpreter, made strict enough to be trusted: it must fail where a GPU would be wrong or undefined.

The interpreter of Triton 3.6 to 3.9 computes bfloat16 wrongly and is silent on much else. After :func:`install`

* bfloat16 is bfloat16, rounded to nearest even; float32 operands of a tf32 dot are rounded to tf32; ``tl.sum`` adds as a
  tree, as threads do;
* every enabled lane of a load, store or atomic must lie inside a tensor argument;
* lanes that are masked off without ``other`` are poison, not zero;
* two programs that touch one element, one of them with a plain store, raise, and so do two lanes of one store;
* programs run in a shuffled order;
* overflow of int32 arithmetic and a failed ``tl.device_assert`` raise.

:func:`ghost_launch` runs chosen programs of a launch that is far too large for memory, to find overflow of offsets.
"""

import contextlib
import random
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_Builder = interpreter.InterpreterBuilder
_Handle = interpreter.TensorHandle
_numpy_dtype = interpreter._get_np_dtype
_state = SimpleNamespace(regions=[], starts=None, ends=None, order=None, seed=0, ghost=None)


class BoundsError(AssertionError):
    """An enabled lane points outside every tensor argument of the launch."""


class RaceError(AssertionError):
    """The result depends on the order in which programs or lanes run."""


class Region:
    """The memory of one tensor argument, from its first to its last element, and which program touched what."""

    def __init__(self, name, tensor):
        self.name, self.item, self.start = name, tensor.element_size(), tensor.data_ptr()
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
        self.end = self.start + extent * self.item if tensor.numel() else self.start
        self.touched = None

    def absorb(self, other):
        """Take in a region that overlaps this one, so that aliases are tracked by address."""
        self.end, self.item = max(self.end, other.end), min(self.item, other.item)
        self.name += "/" + other.name

    def log(self, program, elements, kind):
        """Note an access; programs are numbered from 1, -1 stands for several."""
        if self.touched is None:
            size = (self.end - self.start) // self.item + 1
            self.touched = {k: np.zeros(size, np.int32) for k in ("load", "store", "atomic")}
        conflicts = {"load": ("store", "atomic"), "store": ("load", "store", "atomic"), "atomic": ("load", "store")}
        for other in conflicts[kind]:
            seen = self.touched[other][elements]
            if ((seen != 0) & (seen != program)).any():
                at = int(elements[np.argmax((seen != 0) & (seen != program))])
                raise RaceError(f"{kind} by program {program - 1} races with a {other} at element {at} of {self.name}")
        if kind == "store" and np.unique(elements).size != elements.size:
            raise RaceError(f"store by program {program - 1} writes an element of {self.name} from several lanes")
        seen = self.touched[kind][elements]
        self.touched[kind][elements] = np.where((seen == 0) | (seen == program), program, -1)


class Ghost:
    """A tensor with a shape, a dtype, strides and an address of its own, but no memory."""

    _next = 1 << 44

    def __init__(self, tensor):
        self.shape, self.dtype, self._tensor, self._address = tensor.shape, tensor.dtype, tensor, Ghost._next
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
        Ghost._next += (extent * tensor.element_size() + (2 << 20)) >> 20 << 20

    def data_ptr(self):
        return self._address

    def stride(self, *dim):
        return self._tensor.stride(*dim)

    def element_size(self):
        return self._tensor.element_size()

    def numel(self):
        return self._tensor.numel()


@contextlib.contextmanager
def ghost_launch(programs, grid):
    """Inside, ``kernel[(len(programs),)](...)`` runs only these programs of a one-dimensional launch of size ``grid``.

    Addresses are checked, memory isn't touched: loads give zeros.
    """
    _state.ghost = list(programs), (grid, 1, 1)
    try:
        yield
    finally:
        _state.ghost = None


def _check(builder, pointers, mask, kind):
    """Bounds and races of one memory access."""
    enabled = np.broadcast_to(mask.data, pointers.data.shape).ravel().astype(bool)
    addresses = pointers.data.ravel()[enabled]
    if not addresses.size:
        return
    item = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
    index = np.searchsorted(_state.starts, addresses, side="right").astype(np.int64) - 1
    outside = (index < 0) | (addresses + item > _state.ends[np.maximum(index, 0)])
    if outside.any():
        address = int(addresses[np.argmax(outside)])
        near = min(_state.regions, key=lambda region: min(abs(address - region.start), abs(address - region.end)))
        raise BoundsError(
            f"{kind} by program {builder.grid_idx} at byte {address - near.start} of {near.name}, which has "
            f"{near.end - near.start}; {int(outside.sum())} of {addresses.size} lanes are outside"
        )
    if _state.ghost is None:
        x, y, z = builder.grid_idx
        program = 1 + x + builder.grid_dim[0] * (y + builder.grid_dim[1] * z)
        for i in np.unique(index):
            region = _state.regions[i]
            elements = (addresses[index == i] - np.uint64(region.start)) // np.uint64(region.item)
            region.log(program, elements.astype(np.int64), kind)


def _bits(array):
    """bfloat16 as the integers that Triton's memory functions know."""
    return np.ascontiguousarray(array).view(np.uint16) if array.dtype == BFLOAT16 else array


def _dtype(ty):
    return BFLOAT16 if ty.scalar == tl.bfloat16 else _numpy_dtype(ty)


def _install_arithmetic():
    """bfloat16, casts, tf32, and the GPU's rules: sums are trees, maximum and minimum drop NaN."""
    stock_cast, stock_fp_to_fp, stock_dot = _Builder.cast_impl, _Builder.create_fp_to_fp, _Builder.create_dot

    def cast(self, source, target):
        have, want = source.dtype.scalar, target.scalar
        if tl.bfloat16 not in (have, want) and (have, want) != (tl.float32, tl.float16):
            return stock_cast(self, source, target)
        data = source.data.astype(np.float32) if have in (tl.bfloat16, tl.float64) else source.data
        return _Handle(data.astype(_dtype(target)), want)

    def fp_to_fp(self, source, target, rounding):
        if 8 in (source.dtype.scalar.primitive_bitwidth, target.scalar.primitive_bitwidth):
            return stock_fp_to_fp(self, source, target, rounding)
        return cast(self, source, target)

    def tf32(data):
        return ((np.ascontiguousarray(data).view(np.uint32) + 0x1000) & np.uint32(0xFFFFE000)).view(np.float32)

    def dot(self, a, b, acc, precision, *rest):
        if a.data.dtype == BFLOAT16:
            a, b = (_Handle(t.data.astype(np.float32), tl.float32) for t in (a, b))
        elif a.data.dtype == np.float32 and str(precision).endswith("TF32"):
            a, b = (_Handle(tf32(t.data), tl.float32) for t in (a, b))
        return stock_dot(self, a, b, acc, precision, *rest)

    def tree_sum(self, tensor):
        data, axis = tensor.handle.data, self.axis
        if axis is None:
            data, axis = data.reshape(-1), 0
        while data.shape[axis] > 1:
            data = np.add(*np.split(data, 2, axis), dtype=data.dtype)
        if self.keep_dims:
            data = data if self.axis is not None else data.reshape((1,) * len(tensor.shape))
        else:
            data = data.squeeze(axis)
        return self.to_tensor(data, tensor.dtype)

    interpreter.ReduceOps.sum = tree_sum
    interpreter._get_np_dtype = _dtype
    _Builder.cast_impl, _Builder.create_fp_to_fp, _Builder.create_dot = cast, fp_to_fp, dot
    for kind in ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc"):
        setattr(_Builder, f"create_{kind}", cast)
    _Builder.get_bf16 = lambda self, value: _Handle(np.array([value], np.float32).astype(BFLOAT16), tl.bfloat16)
    _Builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    _Builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)


def _install_memory():
    """Bounds, races, poison, and bfloat16 as its bits."""
    stock_load, stock_store = _Builder.create_masked_load, _Builder.create_masked_store
    stock_rmw, stock_cas = _Builder.create_atomic_rmw, _Builder.create_atomic_cas

    def load(self, pointers, mask, other, *rest):
        _check(self, pointers, mask, "load")
        ty, shape = pointers.get_element_ty(), pointers.data.shape
        dtype = _dtype(ty)
        if _state.ghost:
            return _Handle(np.zeros(shape, dtype), ty)
        if other is None:
            poison = np.full(shape, np.nan, np.float32) if ty.is_floating() else np.full(shape, 113)
            other = _Handle(poison.astype(dtype), ty)
        if dtype != BFLOAT16:
            return stock_load(self, pointers, mask, other, *rest)
        other = _bits(np.broadcast_to(other.data, shape))
        bits = interpreter._interpreter.load(pointers.data, mask.data, other, np.dtype(np.uint16))
        return _Handle(bits.view(BFLOAT16), ty)

    def store(self, pointers, value, mask, *rest):
        _check(self, pointers, mask, "store")
        if not _state.ghost:
            stock_store(self, pointers, _Handle(_bits(value.data), value.dtype), mask, *rest)

    def rmw(self, op, pointers, value, mask, *rest):
        _check(self, pointers, mask, "atomic")
        if value.data.dtype == BFLOAT16:
            raise NotImplementedError("bfloat16 atomics")
        return value if _state.ghost else stock_rmw(self, op, pointers, value, mask, *rest)

    def cas(self, pointers, *rest):
        _check(self, pointers, _Handle(np.ones(pointers.data.shape, bool), tl.int1), "atomic")
        return stock_cas(self, pointers, *rest)

    _Builder.create_masked_load, _Builder.create_masked_store = load, store
    _Builder.create_atomic_rmw, _Builder.create_atomic_cas = rmw, cas


def _regions(names, args, kwargs):
    """The regions of a launch by address, overlapping ones merged."""
    found = []

    def add(name, value):
        if isinstance(value, tuple):
            for i, item in enumerate(value):
                add(f"{name}[{i}]", item)
        elif isinstance(value, (torch.Tensor, Ghost)) and value.numel():
            found.append(Region(name, value))

    for name, value in (*zip(names, args), *kwargs.items()):
        add(name, value)
    merged = []
    for region in sorted(found, key=lambda region: region.start):
        if merged and region.start < merged[-1].end:
            merged[-1].absorb(region)
        else:
            merged.append(region)
    return merged


def _install_launch():
    """The order of programs, and what a launch may touch."""
    executor = interpreter.GridExecutor
    stock_index, stock_in, stock_out = _Builder.set_grid_idx, executor._init_args_hst, executor._restore_args_dev

    def set_index(self, x, y, z):
        if _state.ghost:
            programs, self.grid_dim = _state.ghost
            return stock_index(self, programs[x], 0, 0)
        nx, ny, nz = self.grid_dim
        if _state.order is None:
            _state.order = random.Random(_state.seed).sample(range(nx * ny * nz), nx * ny * nz)
        program = _state.order[(x * ny + y) * nz + z]
        return stock_index(self, program // (ny * nz), program // nz % ny, program % nz)

    def args_in(self, args, kwargs):
        args, kwargs = (list(args), dict(kwargs)) if _state.ghost else stock_in(self, args, kwargs)
        _state.regions, _state.order = _regions(self.arg_names, args, kwargs), None
        _state.starts = np.array([region.start for region in _state.regions], np.uint64)
        _state.ends = np.array([region.end for region in _state.regions], np.uint64)
        return args, kwargs

    def args_out(self, *args):
        if not _state.ghost:
            stock_out(self, *args)

    _Builder.set_grid_idx, executor._init_args_hst, executor._restore_args_dev = set_index, args_in, args_out


def install(seed: int = 0) -> None:
    """Make the interpreter of this process strict. ``seed`` shuffles the order of programs."""
    _state.seed = seed
    if getattr(_Builder, "is_strict", False):
        return
    _Builder.is_strict = True
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = type(options)(
        **{**options.__dict__, "debug": True, "sanitize_overflow": True}
    )
    _install_arithmetic()
    _install_memory()
    _install_launch()
