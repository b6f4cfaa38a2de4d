"""What the battery and the benchmarks need to know of an op."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Case:
    """One call: ``make(dtype, device)`` returns its arguments by name; every floating tensor among them is differentiable."""

    name: str
    make: Callable[[torch.dtype, str], dict]
    flops: int = 0  # of the forward pass
    backward_flops: int | None = None  # not counting what is computed again; twice those of the forward pass if None
    bytes: Callable[[int], int] | None = None  # compulsory traffic of the forward pass for an item size


@dataclass(frozen=True)
class Bad:
    """A call that must raise: ``change`` edits the arguments of a good call."""

    name: str
    change: Callable[[dict], dict]
    error: type[Exception]
    message: str  # regular expression; names the argument, the expectation and the value
    cpu_only: bool = False  # the fault is in values that stay on the device


@dataclass(frozen=True)
class Compiled:
    """A call whose kernels are compiled for every chip. ``quick`` names the chips that the short run compiles it for."""

    case: Case
    dtype: torch.dtype
    quick: tuple[int | str, ...] = ()  # as in gpuless.offline.CHIPS
    precision: str = "ieee"  # of float32 products, as in torch.backends
    aligned: bool = True  # rows begin at multiples of 16 bytes, so that tiles can be loaded 16 bytes at a time

    @property
    def name(self) -> str:
        return f"{self.case.name} {str(self.dtype)[6:] if self.precision == 'ieee' else self.precision}"


@dataclass(frozen=True)
class Numerics:
    """What the checks of numbers need to know of an op.

    ``rounded(arguments, unit, points)`` is the formula in float64 with the roundings of the op's docstring: ``points.value(t)``
    rounds ``t``, ``points.gradient(t)`` the gradient that comes back to ``t``; ``unit`` is that of ``rounding.unit``. The
    caller rounds the output and the gradients.
    """

    rounded: Callable
    predicted: Callable[[dict, str], tuple]  # (arguments, unit) -> names, with "y", of what ``rounded`` predicts to the bit
    exact: tuple[Case, ...]  # with small integers for its floating arguments, every sum of such a case is exact
    rows: tuple[str, ...]  # arguments with an entry for each entry of the input's leading dim, beside ``activations``
    alone: dict[str, int]  # backend -> the most rows of a call among which a row has the bits that it has alone; else any
    paths: tuple[Case, ...]  # sizes that together take every path of the kernels
    fuzz: Callable  # (draw, hypothesis.strategies) -> a case
    largest: int = 7  # integer of a parameter in ``exact`` in float32; less where a path multiplies by many parameters
    along: dict[str, int] = field(default_factory=dict)  # dims of ``activations`` and ``rows`` that are those of rows, if not 0
    rounds_inside: bool = True  # whether matrix units round anything beside the output and the gradients
    ordered: Callable | None = None  # the reference in the kernels' order of products, where infinities cancel as in theirs


@dataclass(frozen=True)
class OpSpec:
    op: Callable
    reference: Callable
    fwd: object  # the leaves
    bwd: object
    leaf_args: Callable[[dict], tuple]  # arguments of a case -> arguments of the forward leaf
    bwd_leaf_args: Callable[[torch.Tensor, tuple, list], tuple]  # grad_y, forward leaf arguments, output mask
    bwd_outputs: tuple  # names of the arguments whose gradients the backward leaf returns
    activations: tuple  # arguments as large as the input, that first: they come in any strides
    cases: tuple
    bench: tuple
    bad: tuple
    numerics: Numerics
    large: Callable[[int], Case]  # number -> a case with all that a call can have, its activation (m, d) of more elements
    # Like ``large``, by other ways; run for their addresses alone, without memory. The last programs own the last rows.
    huge: tuple[Case, ...] = ()
    # More than 2**16 blocks of a launch, with the gradients of which, as of the output, the last blocks write the last entries.
    many: tuple[tuple[Case, tuple[str, ...]], ...] = ()
    tiled: tuple[Case, ...] = ()  # a tile and a bit in every direction; together they reach every key of the tables of tiles
    planted: tuple[Case, ...] = ()  # loops of every kernel run three times, so that each of their barriers and waits counts
    copies_scattered_rows: bool = False  # on a CPU, where a library multiplies: as torch.nn.functional.linear copies them
    bench_cuda: tuple = ()  # on a GPU in place of ``bench``, whose sizes are bound by launches there
    compiled: tuple[Compiled, ...] = ()  # together they reach every entry of the tables of tiles in kernels/
    autocast: tuple = ()  # arguments that autocast casts; the other ones keep their dtype
    frozen: tuple = ()  # arguments that have no gradient in a training step that is measured
    quiet: tuple = ()  # (argument, value) pairs: what makes a result random, and for which values it isn't
    dtypes: tuple = (torch.float32, torch.bfloat16, torch.float16)

    def output(self, arguments: dict) -> torch.Tensor:
        """An uninitialised tensor like the output of a call."""
        outputs = self.fwd.fake(*self.leaf_args(arguments))
        return outputs if isinstance(outputs, torch.Tensor) else outputs[0]

    def case(self, name: str) -> Case:
        return next(c for c in self.cases if c.name == name)
