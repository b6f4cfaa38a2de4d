"""What the tests of modules share: parameters away from their start, gradients by name, comparisons over draws, spies."""

import copy
import functools
from functools import partial

import torch

from .accuracy import assert_within_reference_error
from .battery import DEVICE


def randomised(module, dtype=torch.float32):
    """Every parameter away from its start, so that each has a part in the output."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            spread = 0.3 if "weight" in name and parameter.dim() > 1 else 0.5
            parameter.copy_(torch.randn(parameter.shape) * spread + (1.0 if "norm.weight" in name else 0.0))
    return module.to(DEVICE, dtype)


def gradients(fn, module, grad_y, *inputs):
    """Output, gradients of the inputs and of the parameters, by name."""
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    parameters = dict(module.named_parameters())
    y = fn(module, *inputs)
    values = torch.autograd.grad(y, [*inputs, *parameters.values()], grad_y.to(y.dtype))
    return dict(zip(["y", *(f"input {i}" for i in range(len(inputs))), *parameters], (y.detach(), *values)))


def spied(monkeypatch, module, *names):
    """The keyword arguments of each call of the functions ``names`` of ``module``, from here on."""
    seen = []

    def spy(op):
        @functools.wraps(op)
        def call(*args, **kwargs):
            seen.append(kwargs)
            return op(*args, **kwargs)

        return call

    for name in names:
        monkeypatch.setattr(module, name, spy(getattr(module, name)))
    return seen


def pooled(run, *inputs):
    """The results of ``run`` on each of the draws along the leading dim. One draw says little of the error of one number."""
    draws = [run(*(t[i] for t in inputs)) for i in range(len(inputs[0]))]
    return {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}


def assert_equal_to(expected_fn, fn, module, grad_y, *inputs):
    """On average over the draws along the leading dim of ``grad_y`` and ``inputs``."""
    double = copy.deepcopy(module).double()
    oracle = pooled(partial(gradients, expected_fn, double), grad_y.double(), *(t.double() for t in inputs))
    expected, actual = (pooled(partial(gradients, f, module), grad_y, *inputs) for f in (expected_fn, fn))
    for name in expected:
        assert_within_reference_error(actual[name], expected[name], oracle[name], name)


def call(module, *inputs):
    return module(*inputs)
