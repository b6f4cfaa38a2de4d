"""Triton's interpreter, made strict enough to be trusted: it must fail where a GPU would be wrong or undefined.

The interpreter of Triton 3.6 to 3.9 computes bfloat16 wrongly and is silent on much else. After :func:`install`

* numbers round as on a GPU (strict_interpreter_arithmetic.py): bfloat16 is bfloat16, tf32 products are tf32, ``tl.sum`` adds
  as a tree in its own type, ``tl.maximum`` drops NaN; overflow of int32, also of loop variables and casts, raises;
* every enabled lane of a load, store or atomic must hit an element of the tensor argument that its pointer came from
  (strict_interpreter_memory.py); lanes masked off without ``other`` hold poison;
* two programs that touch one element, one of them with a plain store, raise; so do two lanes of one store, a load of what
  the same program stored with no barrier between, and atomic sums of floats, which no order fixes;
* programs run in a shuffled order, a new one every launch; :func:`reseed` begins a reproducible sequence of orders;
* a failed ``tl.device_assert`` raises, and so do a false ``tl.multiple_of`` and a grid larger than a GPU takes.

:func:`recorded` notes launches, for :func:`unwritten` to say which elements of an output no program stored.
:func:`ghosts` runs chosen programs of launches on meta tensors of any size, to find overflow of offsets without memory, and
:func:`unreached` says of which tensors the last of these programs leave the end out.
"""

import contextlib
import dataclasses
import math
import random
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

from . import strict_interpreter_arithmetic as arithmetic
from . import strict_interpreter_language as language
from . import strict_interpreter_memory, strict_interpreter_pins
from .strict_interpreter_arithmetic import BFLOAT16, Handle
from .strict_interpreter_memory import BoundsError, Memory, RaceError

__all__ = ["BoundsError", "RaceError", "ghosts", "install", "recorded", "reseed", "unreached", "unwritten"]
_Builder = interpreter.InterpreterBuilder
_state = SimpleNamespace(random=random.Random(0), memory=None, poison=0, choose=None, records=None)
_GRID_LIMITS = (2**31 - 1, 2**16 - 1, 2**16 - 1)


class Record(NamedTuple):
    """One launch: what ran, how often, its constants, its arguments (their tensors alive, so that no address is used again),
    its stores."""

    kernel: str
    grid: tuple
    constants: dict
    arguments: list
    stores: list

    @property
    def tensors(self):
        return [argument.tensor for argument in self.arguments]


def _install_memory():
    """Checked loads, stores and atomics on the real addresses; bfloat16 travels as its bits."""
    memory = interpreter._interpreter
    stock_rmw, stock_cas = _Builder.create_atomic_rmw, _Builder.create_atomic_cas
    bits = lambda array: np.ascontiguousarray(array).view(np.uint16) if array.dtype == BFLOAT16 else array  # noqa: E731

    def load(self, pointers, mask, other, *rest, **options):
        real, backed = _state.memory.access(self, pointers, mask.data, "load")
        ty, shape = pointers.get_element_ty(), pointers.data.shape
        dtype = arithmetic.numpy_dtype(ty)
        if other is None:
            rest_of = strict_interpreter_memory.poison(dtype, shape, _state.poison)
        else:
            rest_of = np.broadcast_to(other.data, shape).astype(dtype)
        data = memory.load(real, backed, bits(rest_of), np.dtype(np.uint16) if dtype == BFLOAT16 else dtype)
        data = data.view(BFLOAT16) if dtype == BFLOAT16 else data
        if _state.choose is not None:
            data = np.where(np.broadcast_to(np.asarray(mask.data), shape) & ~backed, np.zeros(1, dtype), data)
        return Handle(data, ty)

    def store(self, pointers, value, mask, *rest, **options):
        real, backed = _state.memory.access(self, pointers, mask.data, "store")
        memory.store(real, bits(np.broadcast_to(value.data, real.shape)), backed)

    def rmw(self, op, pointers, value, mask, *rest):
        if value.data.dtype == BFLOAT16:
            raise NotImplementedError("atomics of bfloat16")
        summed = "FADD" in str(op)
        real, backed = _state.memory.access(self, pointers, mask.data, "atomic", ordered=summed)
        return stock_rmw(self, op, Handle(real, pointers.dtype), value, Handle(backed, tl.int1), *rest)

    def cas(self, pointers, *rest):
        real, backed = _state.memory.access(self, pointers, True, "atomic")
        return stock_cas(self, Handle(real, pointers.dtype), *rest) if backed.all() else rest[0]

    _Builder.create_masked_load, _Builder.create_masked_store = load, store
    _Builder.create_atomic_rmw, _Builder.create_atomic_cas = rmw, cas
    _Builder.create_barrier = lambda self: _state.memory.barrier()


def _begin(grid):
    """Note the grid of a launch and choose its programs and their order. Returns the grid that the interpreter walks."""
    grid = (*grid, 1, 1)[:3]
    for axis, size, limit in zip("xyz", grid, _GRID_LIMITS):
        if size > limit:
            raise ValueError(f"grid.{axis} must be at most {limit}, got {size}")
    n = math.prod(grid)
    programs = range(n) if _state.choose is None else sorted({i for i in _state.choose(n) if 0 <= i < n})
    _state.grid, _state.programs = grid, _state.random.sample(programs, len(programs))
    return (len(programs),)


def _wrapped(memory, floats, name, value):
    """What the kernel gets in place of an argument: for a tensor its Argument, for a number among ``floats`` a float32."""
    if isinstance(value, tuple):
        items = [_wrapped(memory, floats, f"{name}[{i}]", item) for i, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, TensorDescriptor):
        return dataclasses.replace(value, base=_wrapped(memory, floats, name, value.base))
    if isinstance(value, float) and name in floats:
        return tl.tensor(Handle(np.array([value], np.float32), tl.float32), tl.float32)
    if not isinstance(value, torch.Tensor):
        return value
    return memory.add(name, getattr(value, "kept_values", value) if value.is_meta else value)


def _install_launch():
    """What a launch may touch, and the order of its programs."""
    executor = interpreter.GridExecutor
    stock_call, stock_in, stock_out = executor.__call__, executor._init_args_hst, executor._restore_args_dev

    def set_index(self, x, y, z):
        nx, ny, _ = self.grid_dim = _state.grid
        program = _state.programs[x]
        self.grid_idx = program % nx, program // nx % ny, program // (nx * ny)
        _state.memory.barrier()

    def args_in(self, args, kwargs):
        _state.memory = memory = Memory()
        bases = [getattr(value, "base", value) for value in tree_flatten((args, kwargs))[0]]
        devices = {base.device.type for base in bases if isinstance(base, torch.Tensor)}
        if "meta" in devices and _state.choose is None:
            raise TypeError("a launch on meta tensors needs ghosts()")
        _state.on_host = stock_in(self, args, kwargs) if devices - {"cpu", "meta"} else None
        args, kwargs = _state.on_host or (args, kwargs)
        floats = {name for name in self.arg_names if name not in self.constexprs}
        args = [_wrapped(memory, floats, name, value) for name, value in zip(self.arg_names, args)]
        wrapped = {name: _wrapped(memory, floats, name, value) for name, value in kwargs.items()}
        memory.merge()
        stock_grid = self.grid
        self.grid = lambda meta: _begin(stock_grid(meta) if callable(stock_grid) else stock_grid)
        _state.constants = {n: v for n, v in kwargs.items() if not isinstance(v, torch.Tensor)}
        _state.poison = _state.random.randrange(3)
        return args, wrapped

    def args_out(self, args, args_hst, kwargs, kwargs_hst):
        if _state.on_host is not None:
            host_args, host_kwargs = _state.on_host
            stock_out(self, args, host_args, kwargs, host_kwargs)
        if _state.records is not None:
            memory = _state.memory
            record = self.fn.__name__, _state.grid, _state.constants, list(memory.arguments), list(memory.stores())
            _state.records.append(Record(*record))

    def call(self, *args, **kwargs):
        language.begin_launch()
        with np.errstate(all="ignore"):  # a NaN or an infinity is no error
            return stock_call(self, *args, **kwargs)

    executor.__call__, executor._init_args_hst, executor._restore_args_dev = call, args_in, args_out
    _Builder.set_grid_idx = set_index


class _InterpreterDriver(DriverBase):
    """What launchers and the autotuner ask of a GPU. The autotuner runs every configuration once and keeps the first."""

    @classmethod
    def is_active(cls):
        return True

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0

    def get_benchmarker(self):
        return lambda call, quantiles=None, **options: call() or [1.0] * len(quantiles or [0])

    def map_python_to_cpp_type(self, ty):
        return ty


class _Integers(TorchDispatchMode):
    """Integer meta tensors keep their values on the CPU: ids, tables and orders decide which addresses a program forms."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, known = func(*args, **(kwargs or {})), True

        def real(value):
            nonlocal known
            if isinstance(value, torch.device):
                return torch.device("cpu")
            if not isinstance(value, torch.Tensor) or not value.is_meta:
                return value
            known &= hasattr(value, "kept_values")
            return getattr(value, "kept_values", None)

        outputs = [o for o in tree_flatten(out)[0] if isinstance(o, torch.Tensor) and o.is_meta]
        if outputs and all(not o.is_floating_point() and o.numel() < 2**28 for o in outputs):
            args, kwargs = tree_map(real, (args, kwargs or {}))
            if known:
                for o, value in zip(outputs, tree_flatten(func(*args, **kwargs))[0]):
                    o.kept_values = value
        return out


class _Literals(TorchFunctionMode):
    """``torch.tensor([1, 2], device="meta")`` passes no operator that _Integers could see."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == "meta":
            return func(*args, **{**kwargs, "device": "cpu"}).to("meta")
        return func(*args, **kwargs)


def edges(n):
    """The programs at both ends of a launch, and ever fewer further in: the last ones may have nothing to do, or not all."""
    steps = [2**i for i in range(n.bit_length())]
    return {*(i - 1 for i in steps[::2]), *(n - i for i in (*steps, *range(8)))}


@contextlib.contextmanager
def recorded():
    """Inside, every launch appends a Record to the list that this yields."""
    before, _state.records = _state.records, []
    try:
        yield _state.records
    finally:
        _state.records = before


@contextlib.contextmanager
def ghosts(choose=edges):
    """Inside, a launch runs only the programs that ``choose(number of programs)`` names, and takes meta tensors.

    Addresses are checked, memory isn't touched: loads give zeros, and loops skip all but their ends. Integer tensors that are
    made inside have their values. Yields the Records of the launches.
    """
    before, _state.choose = _state.choose, choose
    arithmetic.settings.only_ends_of_loops = True
    try:
        with _Integers(), _Literals(), recorded() as records:
            yield records
    finally:
        _state.choose, arithmetic.settings.only_ends_of_loops = before, before is not None


def unwritten(tensor: torch.Tensor, records: list) -> int | None:
    """How many elements of ``tensor`` none of these launches has stored; None if none stored to it at all."""
    return strict_interpreter_memory.unwritten(tensor, [store for record in records for store in record.stores])


def unreached(records: list) -> list[str]:
    """Arguments that these launches stored to, but not as far as their last element."""
    return strict_interpreter_memory.unreached([argument for record in records for argument in record.arguments])


def reseed(seed: int) -> None:
    """Begin the sequence of program orders and of poison that ``seed`` names."""
    _state.random = random.Random(seed)


def install() -> None:
    """Make the interpreter of this process strict. Raises if Triton has changed what this builds on."""
    if getattr(_Builder, "is_strict", False):
        return
    if moved := strict_interpreter_pins.moved():
        raise RuntimeError("the strict interpreter doesn't know this Triton:\n" + "\n".join(moved))
    _Builder.is_strict = True
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = dataclasses.replace(options, debug=True, sanitize_overflow=True)
    arithmetic.install()
    _install_memory()
    _install_launch()
    language.install()
    triton.runtime.driver.set_active(_InterpreterDriver())
