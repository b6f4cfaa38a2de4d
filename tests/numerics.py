"""Checks of numbers that are sharper than a bound: bits that follow from the contract, and what a call must leave alone.

Each takes the spec of an op, a backend, a case and a dtype, and raises where the op breaks the contract. An implementation that
is no backend is checked as a spec with another ``op``, backend None and a ``unit`` (see :func:`tests.rounding.unit`).
"""

import itertools
import math

import torch

from . import rounding
from .battery import DEVICE, doubled, floats, rounded_run, run, substitute


def same(actual, expected, what):
    for name in expected:
        a, e = actual[name], expected[name]
        assert torch.equal(a, e), f"{what}: {name} differs in {(a != e).sum()} of {a.numel()} elements"


def drawn(spec, case, dtype):
    arguments = case.make(dtype, DEVICE)
    return arguments, torch.randn(spec.output(arguments).shape, device=DEVICE).to(dtype)


def wide(spec):
    """The cases with enough elements for the rounding model in a few draws."""
    return [case for case in spec.cases if case.make(torch.float32, "meta")[spec.activations[0]].numel() > 100]


def rounds_where_documented(spec, backend, case, dtype, unit=None, elements=4000):
    """At most 1 % of the elements differ from the rounding model's, by at most 2 units in the last place.

    A unit is that of the element or of half the largest element, whichever is larger: a hidden value that rounds to the other
    side moves small elements too. A few elements would say little, so draws are added up to ``elements`` of the output.
    Where the model predicts nothing, nothing is asked.

    A value halfway between two numbers that is rounded on the way moves a whole row of a gradient. An element therefore differs
    only if it also differs from the models of arguments that are off by as much as a sum in float32 is.
    """
    differing, total = {}, {}
    while total.get("y", 0) < elements:
        arguments, grad_y = drawn(spec, case, dtype)
        chosen = unit or rounding.unit(backend, grad_y)
        if not (predicted := set(spec.numerics.predicted(arguments, chosen))):
            return
        actual = run(spec.op, arguments, grad_y, backend=backend)
        varied = (lambda t: t, *[rounding.inexact] * 3)
        model, *others = [rounded_run(spec, arguments, grad_y, chosen, rounding.nearest, vary) for vary in varied]
        for name in actual.keys() & predicted:
            a, m = actual[name].double(), model[name]
            ulp = rounding.units(m.abs().clamp(min=m.abs().max() / 2), actual[name].dtype)
            worst = ((a - m).abs() / ulp).max().item()
            assert worst <= 2, f"{name}: {worst:.1f} units from the rounding model"
            unlike = torch.stack([a != one[name] for one in (model, *others)]).all(0)
            differing[name] = differing.get(name, 0) + unlike.sum().item()
            total[name] = total.get(name, 0) + a.numel()
    wrong = [f"{differing[n] / total[n]:.1%} of {n}" for n in total if differing[n] > 1 + 0.01 * total[n]]
    assert not wrong, f"rounds where the docstring does not say: {', '.join(wrong)} differ from the rounding model"


def exact_on_integers(spec, backend, case, dtype):
    """Integers whose sums are exact in any order, so that any difference is an error.

    In float32 the activations are so large that their products need more than the 11 bits of tf32 and float16. In 16 bits the
    incoming gradient of most rows has all bits that there are: a sum of rows needs more, and the second half of the rows, with
    the other sign, leaves a sum so small that it shows every rounding on the way.
    """
    arguments = case.make(dtype, DEVICE)

    def integers(name, t):
        largest = 1 if dtype != torch.float32 else 255 if name in spec.activations else spec.numerics.largest
        return torch.randint(-largest, largest + 1, t.shape, device=DEVICE).to(t.dtype)

    arguments = substitute(arguments, {n: integers(n, t) for n, t in floats(arguments).items()})
    shape = spec.output(arguments).shape
    row = torch.arange(shape[:-1].numel(), device=DEVICE)
    long = (row % 3 > 0) & (dtype != torch.float32)
    for name in spec.activations:  # few non-zeros a row keep what the kernels round within 2**8, and every sum within 2**24
        if arguments[name] is not None:
            rows = arguments[name].view(-1, arguments[name].shape[-1])
            rows[:, 8:] = 0
            rows[:, 1:].masked_fill_(long[:, None], 0)
    bits = torch.randint(1, int(2 / torch.finfo(dtype).eps), row.shape, device=DEVICE) * torch.where(row < len(row) / 2, 1, -1)
    grad_y = torch.nn.functional.one_hot(torch.where(long, row % 3, row % 8), shape[-1]) * torch.where(long, bits, 1)[:, None]
    grad_y = grad_y.view(shape)
    exact, actual = run(spec.reference, doubled(arguments), grad_y), run(spec.op, arguments, grad_y, backend=backend)
    same(actual, {n: t.to(actual[n].dtype) for n, t in exact.items()}, "integers")


def rows_alone(spec, backend, case, dtype):
    """A row has the same bits alone, or among other rows, as in its batch."""
    arguments, _ = drawn(spec, case, dtype)
    names = [n for n in (*spec.activations, *spec.numerics.rows) if arguments.get(n) is not None]
    x = arguments[spec.activations[0]]

    def call(change):
        dims = {n: spec.numerics.along.get(n, 0) for n in names}
        changed = {id(arguments[n]): change(arguments[n].movedim(dim, 0)).movedim(0, dim) for n, dim in dims.items()}
        return spec.op(**{n: changed.get(id(v), v) for n, v in arguments.items()}, backend=backend)

    whole = call(lambda t: t)
    for i in {0, len(x) // 2, len(x) - 1}:
        others = call(lambda t: torch.cat([t[:i].flip(0), t[i : i + 1], t[i + 1 :].flip(0)]))  # noqa: B023
        assert torch.equal(others[i], whole[i]), f"row {i} depends on the values of other rows"
        if x.shape[:-1].numel() <= spec.numerics.alone.get(backend, 2**63):
            assert torch.equal(call(lambda t: t[i : i + 1])[0], whole[i]), f"row {i} alone has other bits"  # noqa: B023


def bad_values_spread_as_in_pytorch(spec, backend, case, dtype):
    """NaN and infinity, in an activation or in ``grad_y``, reach the elements that they reach in PyTorch, and no other.

    What an infinity reaches may be NaN instead, and the reverse: that depends on the order of a sum. An element is wrong if it
    is neither as in float64 nor as in the dtype: PyTorch's own bfloat16 product, which an op may use, lets a NaN leak into
    other rows where the width isn't even.
    """
    for bad, name in itertools.product((float("nan"), float("inf"), -float("inf")), (*spec.activations, "grad_y")):
        arguments, grad_y = drawn(spec, case, dtype)
        tensors = {**arguments, "grad_y": grad_y}
        if tensors.get(name) is None:
            continue
        rows = tensors[name].view(-1, tensors[name].shape[-1])
        rows[min(2, len(rows) - 1), min(3, rows.shape[-1] - 1)] = bad
        reference = spec.numerics.ordered or spec.reference
        exact, plain = (run(reference, a, grad_y) for a in (doubled(arguments), arguments))
        for result, actual in run(spec.op, arguments, grad_y, backend=backend).items():
            other = lambda is_, e: is_(actual) != is_(e[result])  # noqa: E731, B023
            wrong = other(torch.isfinite, exact) & other(torch.isfinite, plain)
            if math.isnan(bad) or result == "y":
                wrong |= other(torch.isnan, exact) & other(torch.isnan, plain)
            assert not wrong.any(), f"{bad} in {name} spreads otherwise: {wrong.sum()} of {wrong.numel()} in {result}"


def leaves_its_inputs_alone(spec, backend, case, dtype):
    arguments, grad_y = drawn(spec, case, dtype)
    tensors = {n: t.detach() for n, t in {**arguments, "grad_y": grad_y}.items() if isinstance(t, torch.Tensor)}
    copies = {n: t.clone() for n, t in tensors.items()}
    versions = {n: t._version for n, t in tensors.items()}  # shared with what detach() comes from
    leaves = {n: t.requires_grad_() for n, t in floats(arguments).items()}
    y = spec.op(**arguments, backend=backend)
    torch.autograd.grad(y, list(leaves.values()), grad_y, allow_unused=True)
    for n, t in tensors.items():
        assert torch.equal(t, copies[n]) and t._version == versions[n], f"{n} was written to"


def threads_change_no_bit(spec, case, dtype, but=()):
    """The number of threads of a CPU changes no result, ``but`` those that a library has a part in."""
    arguments = case.make(dtype, "cpu")
    grad_y = torch.randn_like(spec.output(arguments))
    results, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(run(spec.op, arguments, grad_y, backend="native"))
    finally:
        torch.set_num_threads(threads)
    for i, result in enumerate(results):
        same(result, {n: t for n, t in results[0].items() if n not in but}, f"{i + 1} threads")


def subsets(names, every):
    """All subsets but the full one; or so few that of each two arguments each is frozen while the other isn't, and both are."""
    if every:
        return [s for k in range(1, len(names)) for s in itertools.combinations(names, k)]
    bits = range((len(names) - 1).bit_length())
    codes = [[n for i, n in enumerate(names) if (i >> b & 1) == value] for b in bits for value in (0, 1)]
    return [s for s in codes if s]


def frozen_arguments_change_no_bit(spec, backend, case, dtype, every):
    """Each gradient has the same bits whichever of the other arguments are frozen."""
    arguments, grad_y = drawn(spec, case, dtype)
    full = run(spec.op, arguments, grad_y, backend=backend)
    for wanted in subsets(list(floats(arguments)), every):
        some = run(spec.op, arguments, grad_y, wanted=wanted, backend=backend)
        same(some, {n: full[n] for n in some}, f"only {', '.join(wanted)} wanted")


def expanded_gradients_change_no_bit(spec, backend, case, dtype):
    """An incoming gradient that repeats its memory, as those of sum() and of a broadcast do, gives the bits of its copy."""
    arguments, grad_y = drawn(spec, case, dtype)
    for part in (grad_y.flatten()[:1], grad_y[:1], grad_y[..., :1]):
        expanded = part.expand(grad_y.shape)
        results = [
            run(spec.op, arguments, torch.ones_like(grad_y), layout=lambda n, t: g if n == "grad_y" else t, backend=backend)  # noqa: B023
            for g in (expanded, expanded.contiguous())
        ]
        same(*results, f"grad_y with strides {expanded.stride()}")
