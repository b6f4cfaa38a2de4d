"""fastadapt.explain of the public functions."""

import pytest
import torch

import fastadapt

from .battery import DEVICE


def ones(*shape):
    return torch.ones(shape, device=DEVICE)


FACTORS = [ones(2, 2, 2), ones(2, 4, 1), ones(2, 1, 2)], [ones(2, 2, 2), ones(2, 2, 1), ones(2, 1, 4)]
CALLS = {
    "adapter_fusion": (ones(3, 8), ones(2, 3, 8), ones(2, 3, 8)),
    "bottleneck": (ones(3, 8), ones(2, 8), ones(8, 2)),
    "compacter": (ones(3, 8), *FACTORS),
    "kron_linear": (ones(3, 8), ones(2, 2, 2), (ones(2, 4, 1), ones(2, 1, 4))),
    "lora_linear": (ones(3, 8), ones(4, 8), None, ones(2, 8), ones(4, 2)),
    "prefix_attention": (*[ones(1, 2, 3, 8)] * 3, *[ones(2, 3, 8)] * 2),
}


@pytest.mark.parametrize("name", [name for name, op in vars(fastadapt).items() if hasattr(op, "leaf")])
def test_of_every_op(name):
    op = getattr(fastadapt, name)
    asked = fastadapt.explain(op, *CALLS[name], backend="reference")
    assert asked == f"{name}_fwd on {DEVICE}: reference (asked for)"
    assert fastadapt.explain(op, *CALLS[name]).startswith(f"{name}_fwd on {DEVICE}: ")
    with pytest.raises(TypeError, match=r"(x|q|query) must be a tensor, got list"):
        fastadapt.explain(op, [1.0], *CALLS[name][1:])


def test_options_that_no_kernel_sees():
    asked = fastadapt.explain(fastadapt.adapter_fusion, *CALLS["adapter_fusion"], return_weights=True, backend="reference")
    assert asked == f"adapter_fusion_fwd on {DEVICE}: reference (asked for)"


@pytest.mark.parametrize("function", [torch.relu, fastadapt.lora_merge])
def test_of_what_has_no_backends(function):
    with pytest.raises(TypeError, match="op must be an op of fastadapt that has backends, got <"):
        fastadapt.explain(function, torch.ones(1))
