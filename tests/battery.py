"""What the tests of ops share: which calls they go over, how a call is run, and the rule for its error."""

import pytest
import torch

import fastadapt
from fastadapt._leaf import INTERPRET

from . import rounding
from .accuracy import excess
from .specs import SPECS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("triton",) if INTERPRET else ("native", "triton")
on_cpu = pytest.mark.skipif(
    INTERPRET or DEVICE != "cpu" or not hasattr(fastadapt, "_C"), reason="needs the compiled CPU kernels as those under test"
)
# The interpreter takes a hundred times as long, and dtypes and sizes change nothing in what some tests look at.
FEW = (torch.float32,) if INTERPRET else (torch.float32, torch.bfloat16)
# One case without extras, those with all that goes together, one bank.
TELLING = ("m33-d65-r17", "everything", "dora-with-everything", "gated-with-everything", "bank-with-everything")


def over(*case_names, cases=lambda spec: spec.cases, dtypes=None, turns=False, thin=False, whole=TELLING, quick=None):
    """Parametrize a test over ops, backends that exist here, cases (all if none is named) and dtypes. ``turns``: each case in
    one dtype or another. ``thin``: so does the short run, but takes the cases named in ``whole`` in every dtype. ``quick``: the
    short run takes the cases named here alone."""

    def slow(i, j, case, n):
        return thin and i % n != j and case.name not in whole or quick is not None and case.name not in quick

    return pytest.mark.parametrize(
        "spec, backend, case, dtype",
        [
            pytest.param(
                spec, backend, case, dtype, id=f"{name}-{backend}-{case.name}-{str(dtype)[6:]}",
                marks=[pytest.mark.slow] if slow(i, j, case, len(dtypes or spec.dtypes)) else [],
            )
            for name, spec in SPECS.items()
            for backend in BACKENDS
            if (backend, DEVICE) in spec.fwd.available
            for i, case in enumerate(cases(spec))
            if not case_names or case.name in case_names
            for j, dtype in enumerate(dtypes or spec.dtypes)
            if not turns or i % len(dtypes or spec.dtypes) == j
        ],
    )


def floats(arguments):
    """The differentiable arguments: one entry a tensor, under its first name."""
    seen = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            seen.setdefault(id(value), (name, value))
    return dict(seen.values())


def substitute(arguments, tensors):
    """``arguments`` with the tensors of ``floats`` replaced; what was one tensor stays one tensor."""
    swap = {id(value): tensors[name] for name, value in floats(arguments).items()}
    return {name: swap.get(id(value), value) for name, value in arguments.items()}


def doubled(arguments):
    return substitute(arguments, {n: t.double() for n, t in floats(arguments).items()})


def run(fn, arguments, grad_y=None, wanted=None, layout=lambda name, t: t, **options):
    """Output and gradients of ``fn`` by name. ``layout`` makes a differentiable view of an argument or of ``grad_y``."""
    leaves = {n: t.detach().clone().requires_grad_(wanted is None or n in wanted) for n, t in floats(arguments).items()}
    y = fn(**substitute(arguments, {n: layout(n, t) for n, t in leaves.items()}), **options)
    wanted = {n: t for n, t in leaves.items() if t.requires_grad}
    grad_y = layout("grad_y", torch.ones_like(y) if grad_y is None else grad_y.to(y.dtype))
    grads = torch.autograd.grad(y, list(wanted.values()), grad_y, allow_unused=True)
    zeros = (torch.zeros_like(t) if g is None else g for t, g in zip(wanted.values(), grads))
    return {"y": y.detach(), **dict(zip(wanted, zeros))}


def rounded_run(spec, arguments, grad_y, unit, round, vary=lambda t: t, **options):
    """``run`` of the rounding model of the op, with ``round(t, dtype)`` at its points and at its ends."""
    dtypes = {n: t.dtype for n, t in floats(arguments).items()}
    dtypes["y"] = spec.output(arguments).dtype

    def model(**a):
        a = substitute(a, {n: vary(t) for n, t in floats(a).items()})
        return spec.numerics.rounded(a, unit, rounding.Points(dtypes["y"], round))

    results = run(model, doubled(arguments), grad_y, **options)
    return {n: round(t, dtypes[n]) for n, t in results.items()}


def samples(spec, arguments, grad_y, unit, **options):
    """What unavoidable rounding makes of the output and the gradients.

    First the documented roundings to nearest: where they move a value over the kink of an activation, they move the kernel's.
    Then random ones, of arguments that are a little inexact.
    """
    kinds = [(rounding.nearest, lambda t: t), *[(rounding.randomly, rounding.inexact)] * 2]
    return [rounded_run(spec, arguments, grad_y, unit, round, vary, **options) for round, vary in kinds]


def check(spec, backend, make, wanted=None, layout=lambda name, t: t, unit=None):
    """Output and gradients of the call that ``make`` draws the arguments of, against the rule of ``excess``.

    The error of a few numbers is luck. What one draw shows must therefore still show when eight more are pooled with it.
    """
    names = {}
    for draws in (1, 8):
        for arguments in (make() for _ in range(draws)):
            y = spec.output(arguments)
            grad_y = torch.randn(y.shape, device=y.device).to(y.dtype)
            options = {"wanted": wanted, "layout": layout}
            actual = run(spec.op, arguments, grad_y, backend=backend, **options)
            reference, oracle = (run(spec.reference, a, grad_y, **options) for a in (arguments, doubled(arguments)))
            chosen = unit or rounding.unit(backend, y)
            sampled = samples(spec, arguments, grad_y, chosen, **options)
            for name in actual:
                rounded = [s[name] for s in sampled]
                names.setdefault(name, []).append((actual[name], reference[name], oracle[name], rounded))
        errors = []
        for name, pooled in names.items():
            *three, rounded = zip(*pooled)
            errors += excess(*three, "output" if name == "y" else f"grad of {name}", rounded)
        if not errors:
            return
    raise AssertionError("; ".join(errors))
