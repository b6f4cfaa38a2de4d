"""What the battery can't say of kron_linear: factors in pairs, a dense b, and the orders of contraction."""

from dataclasses import replace
from functools import partial

import pytest
import torch

import fastadapt
from fastadapt.ops.compacter import product
from fastadapt.ops.kron_linear import _fwd, _order, cheapest_order

from . import numerics
from .battery import BACKENDS, DEVICE, check, on_cpu
from .specs.kron_linear import SPEC, make

ours = [b for b in BACKENDS if (b, DEVICE) in _fwd.available]

# m, sizes of a and b, rank, terms: each order is the cheapest for one of them.
ORDERS = {
    "factors": {"leading": (40,), "a": (4, 5), "b": (12, 14), "q": 2},
    "b first": {"leading": (40,), "a": (6, 5), "b": (12, 3), "q": 12, "terms": 2},
    "a first": {"leading": (40,), "a": (5, 6), "b": (3, 12), "q": 12, "terms": 2},
    "matrix": {"leading": (200,), "a": (2, 2), "b": (3, 3), "q": 3, "terms": 4},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", ORDERS)
def test_plain_pytorch_in_every_order(order, dtype):
    make_call = partial(make, dtype, DEVICE, **ORDERS[order])
    c = make_call()
    assert _order(*(c[name] for name in ("x", "a", "s", "t"))) == order
    check(SPEC, "reference", make_call)
    if order != "factors":
        assert _order(c["x"], c["a"], c["s"] @ c["t"], None) == order
    multiplied_out = lambda x, a, s, t, **options: fastadapt.kron_linear(x, a, s @ t, **options)  # noqa: E731
    check(replace(SPEC, op=multiplied_out), "reference", make_call)


def test_the_order_is_the_cheapest_by_count():
    """Against a count of multiplications of each order, by hand for one call."""
    m, terms, a_in, a_out, b_in, b_out, q = 10, 2, 3, 5, 7, 11, 4
    counts = {
        "factors": m * (a_in * b_in * terms * q + a_in * a_out * terms * q + a_out * terms * q * b_out),
        "b first": m * (a_in * b_in * terms * b_out + a_in * a_out * terms * b_out),
        "a first": m * (a_in * a_out * terms * b_in + a_out * terms * b_in * b_out),
        "matrix": terms * a_in * a_out * b_in * b_out + m * a_in * b_in * a_out * b_out,
    }
    assert cheapest_order(m, terms, a_in, a_out, b_in, b_out, q) == min(counts, key=counts.get)
    assert cheapest_order(m, terms, a_in, a_out, b_in, b_out, 1) == "factors"
    assert cheapest_order(4096, 4, 4, 4, 192, 6, None) == "matrix"  # a full PHM layer: as many terms as rows of a
    assert cheapest_order(4096, 4, 4, 4, 192, 6, None, dense=False) == "b first"
    assert cheapest_order(4096, 1, 64, 64, 64, 64, None) in ("a first", "b first")


@on_cpu
def test_explain_names_the_order_of_a_dense_b():
    x, a, b = torch.randn(100, 40), torch.randn(4, 4, 4), torch.randn(4, 10, 12)
    text = fastadapt.explain(fastadapt.kron_linear, x, a, b)
    assert text.endswith("'native' computes b = (s, t); a dense b takes PyTorch's own products, matrix")


def test_a_dense_b_in_float16_never_forms_the_matrix():
    """Its elements, products of factors of the initial size, are below what float16 holds."""
    x, b = torch.randn(64, 40, device=DEVICE).half(), torch.randn(4, 10, 12, device=DEVICE).half() * 1e-2
    a = (torch.randn(4, 4, 4, device=DEVICE) * 1e-4).half()
    exact = SPEC.reference(x.double(), a.double(), b.double(), None)
    error = (fastadapt.kron_linear(x, a, b).double() - exact).norm() / exact.norm()
    through_the_matrix = (SPEC.reference(x, a, b, None).double() - exact).norm() / exact.norm()
    assert 10 * error < through_the_matrix


@pytest.mark.parametrize("backend", [*ours, "reference"])
def test_a_may_be_a_pair_of_factors(backend):
    c = make(torch.float32, DEVICE, leading=(9,), a=(4, 5), b=(6, 7), q=2, scale="0-d")
    pair = [torch.randn(1, *shape, device=DEVICE, requires_grad=True) for shape in ((4, 2), (2, 5))]
    results = []
    for a in (pair, product("a", pair)):
        y = fastadapt.kron_linear(c["x"], a, (c["s"], c["t"]), scale=c["scale"], backend=backend)
        results.append((y, *torch.autograd.grad(y.square().sum(), pair)))
    assert all(torch.equal(one, other) for one, other in zip(*results))


@on_cpu
@pytest.mark.parametrize("name", ["many-rows", "large-a", "everything"])
def test_bits_do_not_depend_on_the_number_of_threads(name):
    numerics.threads_change_no_bit(SPEC, SPEC.case(name), torch.float32)


def test_factors_in_another_form():
    c = make(torch.float32, DEVICE, leading=(9,), a=(4, 5), b=(6, 7), q=2)
    with pytest.raises(TypeError, match=r"b must be a tensor or two factors \(s, t\), got tuple"):
        fastadapt.kron_linear(c["x"], c["a"], (c["s"],))
    message = r"b must be \(terms, b_in, b_out\) with a_in \* b_in the width of x = \(1, 6, 7\), got \(1, 5, 7\)"
    with pytest.raises(ValueError, match=message):
        fastadapt.kron_linear(c["x"], c["a"], torch.zeros(1, 5, 7, device=DEVICE))
    with pytest.raises(ValueError, match=r"scale must be 0-d = \(\), got \(4,\)"):
        fastadapt.kron_linear(c["x"], c["a"], (c["s"], c["t"]), scale=torch.zeros(4, device=DEVICE))
    with pytest.raises(TypeError, match="a must be a tensor or a pair of tensors, got NoneType"):
        fastadapt.kron_linear(c["x"], None, (c["s"], c["t"]))
