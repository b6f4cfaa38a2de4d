"""The checks of numbers find planted errors: in a stand-in kernel, the rounding model itself, one thing at a time is wrong."""

import contextlib
import dataclasses

import pytest
import torch
from torch.overrides import TorchFunctionMode

from . import numerics, rounding
from .battery import TELLING, check, doubled, floats, substitute
from .specs import SPECS

BF16, FP32 = torch.bfloat16, torch.float32


def stand_in(spec, unit="matrix", points=None, enter=lambda a: a, end=lambda y: y, leave=lambda y, a: y):
    """The spec of a kernel in Python. ``enter`` changes what goes in, ``end`` what is rounded last, ``leave`` the output; what
    is rounded inside is rounded to ``points``, of an op that should round nothing there the products."""
    inside = contextlib.nullcontext() if points is None or spec.numerics.rounds_inside else NarrowSums(points)

    def op(backend=None, **arguments):
        dtype = arguments[spec.activations[0]].dtype
        with inside:
            y = spec.numerics.rounded(doubled(enter(arguments)), unit, rounding.Points(points or dtype, rounding.nearest))
        return leave(end(y).to(dtype), arguments)

    return dataclasses.replace(spec, op=op)


class Change(torch.autograd.Function):
    """Passes a tensor on as it is; ``change`` is done to its gradient."""

    @staticmethod
    def forward(ctx, t, change):
        ctx.change = change
        return t.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.change(grad), None


class NarrowSums(TorchFunctionMode):
    """Products of matrices come out in another dtype, as from an accumulator of 16 bits."""

    def __init__(self, dtype=BF16):
        super().__init__()
        self.points = rounding.Points(dtype, rounding.nearest)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function in (torch.nn.functional.linear, torch.einsum):
            out = self.points.value(out)
        return out


def narrow_sums(spec):
    good = stand_in(spec).op

    def op(**arguments):
        with NarrowSums():
            return good(**arguments)

    return dataclasses.replace(spec, op=op)


def change_element(t, by):
    t = t.clone()
    t[(-1,) * t.dim()] += by * t.detach().abs().max()
    return t


def change_gradients(change):
    return lambda a: substitute(a, {n: Change.apply(t, change) for n, t in floats(a).items()})


def truncated(t):
    """Rounded towards zero to bfloat16."""
    value = t.detach().float().contiguous()
    return t + ((value.view(torch.int32) & -65536).view(FP32) - value)


def to_tf32(a):
    keep = lambda t: t + ((t.detach().view(torch.int32) + 4096 & -8192).view(FP32) - t.detach())  # noqa: E731
    return substitute(a, {n: keep(t) for n, t in floats(a).items()})


def overwrite(t):
    with torch.no_grad():
        t.mul_(1)


def first_row_only(grad):
    return grad if grad.is_contiguous() else torch.cat([grad[:1], torch.zeros_like(grad[1:])])


def unsteady(a):
    """A gradient that is a little different where another argument is frozen."""
    frozen = any(not t.requires_grad for t in floats(a).values())
    return substitute(a, {n: Change.apply(t, lambda g: g * (1 + 2**-7 * frozen)) for n, t in floats(a).items()})


def leaking(y, a):
    return y + 2**-6 * y.detach().mean()


def accuracy(spec, backend, case, dtype, **options):
    check(spec, backend, lambda: case.make(dtype, "cpu"), **options)


def rounded(spec, backend, case, dtype):
    numerics.rounds_where_documented(spec, backend, case, dtype, unit="matrix", elements=6000)


def frozen(spec, backend, case, dtype):
    numerics.frozen_arguments_change_no_bit(spec, backend, case, dtype, every=False)


CHECKS = (
    accuracy, rounded, frozen, numerics.exact_on_integers, numerics.rows_alone, numerics.bad_values_spread_as_in_pytorch,
    numerics.leaves_its_inputs_alone, numerics.expanded_gradients_change_no_bit,
)  # fmt: skip
# What is wrong -> the stand-in, the check that must see it, the dtype.
PLANTED = {
    "two-percent-too-large": (lambda s: stand_in(s, leave=lambda y, a: y * 1.02), accuracy, BF16),
    "too-large-by-some-units": (lambda s: stand_in(s, leave=lambda y, a: y * (1 + 2**-19)), accuracy, FP32),
    "one-element": (lambda s: stand_in(s, leave=lambda y, a: change_element(y, 2**-5)), accuracy, BF16),
    "one-element-of-float32": (lambda s: stand_in(s, leave=lambda y, a: change_element(y, 2**-18)), accuracy, FP32),
    "one-element-of-a-gradient": (
        lambda s: stand_in(s, enter=change_gradients(lambda g: change_element(g, 2**-5))), accuracy, BF16
    ),
    "gradients-two-percent-too-small": (lambda s: stand_in(s, enter=change_gradients(lambda g: g * 0.98)), accuracy, BF16),
    "hole": (lambda s: stand_in(s, leave=lambda y, a: change_element(y, float("nan"))), accuracy, FP32),
    "bfloat16-inside": (lambda s: stand_in(s, points=BF16), accuracy, FP32),
    "tf32": (lambda s: stand_in(s, enter=to_tf32), accuracy, FP32),
    "narrow-sums-of-float32": (narrow_sums, accuracy, FP32),
    "narrow-sums": (narrow_sums, rounded, BF16),
    "truncated": (lambda s: stand_in(s, end=truncated), rounded, BF16),
    "not-rounded-where-documented": (lambda s: stand_in(s, unit="vector"), rounded, BF16),
    "rounded-twice": (lambda s: stand_in(s, points=torch.float8_e5m2), rounded, BF16),
    "integers-off-by-one": (lambda s: stand_in(s, leave=lambda y, a: y + (y == 3)), numerics.exact_on_integers, BF16),
    "tf32-of-integers": (lambda s: stand_in(s, points=torch.float16), numerics.exact_on_integers, FP32),
    "leaks-between-rows": (lambda s: stand_in(s, leave=leaking), numerics.rows_alone, BF16),
    "nan-swallowed": (
        lambda s: stand_in(s, leave=lambda y, a: y.nan_to_num(posinf=torch.inf)), numerics.bad_values_spread_as_in_pytorch, FP32
    ),
    "nan-times-zero": (
        lambda s: stand_in(s, enter=change_gradients(lambda g: g + 0 * g.sum())), numerics.bad_values_spread_as_in_pytorch, FP32
    ),
    "writes-to-an-input": (
        lambda s: stand_in(s, enter=lambda a: overwrite(a[s.activations[0]]) or a), numerics.leaves_its_inputs_alone, FP32
    ),
    "writes-to-the-incoming-gradient": (
        lambda s: stand_in(s, leave=lambda y, a: Change.apply(y, lambda g: overwrite(g) or g)),
        numerics.leaves_its_inputs_alone, FP32,
    ),
    "frozen-arguments-change-others": (lambda s: stand_in(s, enter=unsteady), frozen, FP32),
    "contiguous-gradient-assumed": (
        lambda s: stand_in(s, leave=lambda y, a: Change.apply(y, first_row_only)),
        numerics.expanded_gradients_change_no_bit, FP32,
    ),
}  # fmt: skip


def cases(spec, check):
    if check is numerics.exact_on_integers:
        return spec.numerics.exact
    return [case for case in spec.cases if case.name in (TELLING[:1] if check is accuracy else TELLING)]


@pytest.mark.parametrize("op", SPECS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_a_right_kernel_passes(op, check):
    spec = SPECS[op]
    for case in cases(spec, check):
        for dtype in (FP32, BF16):
            if check is not rounded or dtype == BF16:
                check(stand_in(spec), None, case, dtype)


def of_documented_rounding(spec, error):
    """Where matrix units round in an order that the model doesn't know, it predicts nothing, and sees no such error."""
    if not spec.numerics.predicted(spec.cases[0].make(BF16, "cpu"), "matrix"):
        return PLANTED[error][1] is not rounded
    return spec.numerics.rounds_inside or error != "not-rounded-where-documented"


def plants():
    """Every error in every op; the short run takes a third of the ops for each, in turns."""
    for i, error in enumerate(PLANTED):
        for j, op in enumerate(op for op, spec in SPECS.items() if of_documented_rounding(spec, error)):
            yield pytest.param(op, error, marks=[pytest.mark.slow] if (i + j) % 3 else [])


@pytest.mark.parametrize("op, error", list(plants()))
def test_a_planted_error_is_found(op, error):
    plant, check, dtype = PLANTED[error]
    for case in cases(SPECS[op], check):
        with pytest.raises(AssertionError):
            check(plant(SPECS[op]), None, case, dtype)
