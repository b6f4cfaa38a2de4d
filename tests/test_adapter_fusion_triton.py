"""What the battery can't say of the Triton kernels of adapter_fusion, since an interpreter has no layouts, fuses no operations
and leaves nothing out: what the compiler makes of them."""

import re

import pytest
import torch

from fastadapt._leaf import INTERPRET

from . import numerics
from .gpuless import offline
from .gpuless.ptx import triton_device
from .specs.adapter_fusion import SPEC, case, make

pytestmark = pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1 leaves nothing to compile")


@pytest.mark.parametrize("bits", [numerics.rows_alone, numerics.expanded_gradients_change_no_bit])
def test_layouts_change_no_bit(monkeypatch, bits):
    """Rows of an odd number of columns: what the compiler knows of their alignment would depend on how many there are."""
    triton_device.install(monkeypatch, SPEC, 80)
    bits(SPEC, "triton", case("odd", shape=(5, 35), g=3), torch.float32)


def test_what_all_products_share_leaves_no_rounding(monkeypatch):
    """The gradient of a softmax is one of differences, which are exact here, however large what they are differences of is."""
    triton_device.install(monkeypatch, SPEC, 80)
    query, keys, values = torch.randn(5, 48), torch.randn(4, 5, 48), torch.randint(-8, 9, (4, 5, 48)).float()
    grad_y, weights = torch.zeros(5, 48), torch.randn(5, 4).softmax(-1)
    grad_y[:, 7] = 1.0
    small, large = (
        SPEC.bwd.triton(grad_y, weights, query, keys, t, None, 1.0, [True, False, False, False])[0]
        for t in (values, values + 2.0**20)
    )
    assert small.any() and torch.equal(small, large)


EVERY = {"grad", "weights", "query", "keys", "values", "scale"}


@pytest.mark.parametrize(
    "wanted, loaded",
    [
        ("query", EVERY - {"query"}),
        pytest.param("keys", EVERY - {"keys"}, marks=pytest.mark.slow),
        pytest.param("values", {"grad", "weights"}, marks=pytest.mark.slow),
        pytest.param("scale", EVERY - {"scale"}, marks=pytest.mark.slow),
    ],
)
def test_loads_only_what_a_gradient_needs(wanted, loaded):
    arguments = make(torch.bfloat16, "meta", shape=(512, 768), g=3, scale="0-d")
    args = SPEC.leaf_args(arguments)
    mask = [name == wanted for name in SPEC.bwd_outputs]
    with offline.target(90), offline.captured() as launches:
        SPEC.bwd.launcher(*SPEC.bwd_leaf_args(SPEC.output(arguments), args, mask))
    (launch,) = launches
    with offline.target(90):
        code = offline.compiled(launch).asm["ttir"].partition("{\n")[2]
    assert {name for name in EVERY if re.search(rf"(?:addptr|splat|load) %{name}_ptr\b", code)} == loaded
