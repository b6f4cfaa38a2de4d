"""What the battery can't say of compacter."""

import pytest
import torch

import fastadapt
from fastadapt.ops.compacter import _fwd, product

from . import numerics
from .battery import BACKENDS, DEVICE, on_cpu, run
from .peak import extra_bytes
from .specs.compacter import FACTORS, SPEC, make

ours = [b for b in BACKENDS if (b, DEVICE) in _fwd.available]
backends = pytest.mark.parametrize("backend", ours)


def call(**options):
    return make(torch.float32, DEVICE, **{"shape": (19, 40), "r": 8, "residual": "none", **options})


@pytest.mark.parametrize("backend", [*ours, "reference"])
def test_a_rule_may_be_a_pair_of_factors(backend):
    arguments = call()
    s, t = ([arguments[f"{side}_{name}"] for side in ("down", "up")] for name in "st")
    pairs = [[torch.randn(4, *shape, device=DEVICE, requires_grad=True) for shape in ((4, 2), (2, 4))] for _ in range(2)]
    rules = [product("a", pair) for pair in pairs]
    outputs = []
    for down, up in (pairs, rules):
        y = fastadapt.compacter(arguments["x"], (down, s[0], t[0]), (up, s[1], t[1]), backend=backend)
        outputs.append((y, *torch.autograd.grad(y.square().sum(), [*pairs[0], *pairs[1]], retain_graph=True)))
    assert all(torch.equal(one, other) for one, other in zip(*outputs))


@backends
def test_layers_that_share_a_rule_add_their_gradients(backend):
    first, second = call(), call(shape=(7, 24), r=12)
    rule = first["down_a"].requires_grad_()
    alone = [torch.autograd.grad(SPEC.op(**{**a, "down_a": rule}, backend=backend).sum(), rule)[0] for a in (first, second)]
    total = sum(SPEC.op(**{**a, "down_a": rule}, backend=backend).sum() for a in (first, second))
    assert torch.equal(torch.autograd.grad(total, rule)[0], alone[0] + alone[1])


@backends
def test_factors_of_the_initial_size_do_not_underflow_in_float16(backend):
    """Elements of the matrix would be about 1e-8, below what float16 holds; rank space is float32."""
    numerics.rounds_where_documented(SPEC, backend, tiny_rules("down_a"), torch.float16, elements=2000)
    arguments = tiny_rules("down_a").make(torch.float16, DEVICE)
    assert run(SPEC.op, arguments, backend=backend)["down_s"].ne(0).all()


def tiny_rules(name):
    def small(dtype, device):
        arguments = make(dtype, device, shape=(64, 40), r=8, residual="none", bias=False, activation="identity", scale=1.0)
        # The up projection makes up for it, so that the output is far from the end of float16.
        return {**arguments, name: arguments[name] * 2e-4, "up_a": arguments["up_a"] * 100}

    return type(SPEC.cases[0])("tiny-rules", small)


@backends
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8])
def test_ids_of_any_integer_dtype(backend, dtype):
    arguments = SPEC.case("bank-with-everything").make(torch.float32, DEVICE)
    expected = run(SPEC.op, arguments, backend=backend)
    arguments["adapter_ids"] = arguments["adapter_ids"].to(dtype)
    actual = run(SPEC.op, arguments, backend=backend)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@backends
def test_an_adapter_reaches_no_row_but_its_own(backend):
    """Not even with NaN or infinity for parameters, nor do rows of other adapters reach its gradients."""
    good = call(g=3, ids=[0, 1, -1, 2, 0, 1, 1, -1] + [2] * 11, residual="other")
    bad = dict(good)
    for name in (*FACTORS, "down_bias", "up_bias"):
        bad[name] = good[name].clone()
        bad[name][1] = float("nan" if name.endswith("s") else "inf")
    expected, actual = (run(SPEC.op, a, backend=backend) for a in (good, bad))
    rows = good["adapter_ids"] != 1
    for name in ("y", "x"):
        assert torch.equal(actual[name][rows], expected[name][rows]) and not actual[name][~rows].isfinite().any()
    for name in (*FACTORS, "down_bias", "up_bias"):
        assert torch.equal(actual[name][[0, 2]], expected[name][[0, 2]]), name
    assert torch.equal(actual["y"][[2, 7]], good["residual"][[2, 7]])


@pytest.mark.skipif(("triton", DEVICE) not in _fwd.available, reason="needs a GPU or TRITON_INTERPRET=1")
def test_ids_outside_the_bank_give_nan_rows_on_the_device():
    """Reading ids on a GPU would stall its stream, so the kernels mark such rows and read nothing outside the bank."""
    arguments = SPEC.case("bank-with-everything").make(torch.float32, DEVICE)
    good = _fwd.triton(*SPEC.leaf_args(arguments))
    arguments["adapter_ids"] = arguments["adapter_ids"].clone()
    arguments["adapter_ids"][3], arguments["adapter_ids"][5] = 3, -2
    bad = _fwd.triton(*SPEC.leaf_args(arguments))
    wrong = torch.zeros(len(bad), dtype=torch.bool, device=DEVICE)
    wrong[[3, 5]] = True
    assert bad[wrong].isnan().all() and torch.equal(bad[~wrong], good[~wrong])


@on_cpu
@pytest.mark.parametrize("name", ["many-rows", "chunks-of-6", "everything", "bank-with-everything"])
def test_bits_do_not_depend_on_the_number_of_threads(name):
    numerics.threads_change_no_bit(SPEC, SPEC.case(name), torch.float32)


@on_cpu
@pytest.mark.parametrize("name", ["many-rows", "learned-scale"])  # four ranks, which one pass of backward serves where it can
def test_frozen_arguments_change_no_bit(name):
    numerics.frozen_arguments_change_no_bit(SPEC, "native", SPEC.case(name), torch.float32, every=False)


@backends
def test_what_is_kept_for_backward_is_x_and_the_factors(backend):
    arguments = call(shape=(512, 40), residual="x")
    arguments["residual"] = arguments["x"] = arguments["x"].requires_grad_()
    known = {t.untyped_storage().data_ptr() for t in arguments.values() if isinstance(t, torch.Tensor)}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        SPEC.op(**arguments, backend=backend)
    assert kept and all(t.untyped_storage().data_ptr() in known for t in kept)


@pytest.mark.parametrize(
    "down, error, message",
    [
        (torch.zeros(4), TypeError, r"down must be three factors \(a, s, t\), got Tensor"),
        ((torch.zeros(4, 4, 4),) * 2, TypeError, r"down must be three factors \(a, s, t\), got 2 of them"),
        ((None, None, None), TypeError, r"down\[0\] must be a tensor or a pair of tensors, got NoneType"),
        (((torch.zeros(4, 4, 2), torch.zeros(4, 3, 4)), None, None), ValueError,
         r"down\[0\] must be a pair \(n, i, p\) and \(n, p, j\), got \(4, 4, 2\) and \(4, 3, 4\)"),
    ],
)  # fmt: skip
def test_factors_in_another_form(down, error, message):
    arguments = call()
    up = [arguments[f"up_{name}"] for name in "ast"]
    with pytest.raises(error, match=message):
        fastadapt.compacter(arguments["x"], down, up)


@on_cpu
@pytest.mark.parametrize("shape", ["(16384, 768), 24", pytest.param("(2048, 4096), 128", marks=pytest.mark.slow)])
def test_peak_memory_of_forward_is_the_output(shape):
    setup = """
def prepare(shape, r, n=4):
    d = shape[-1]
    sizes = (n, n, n), (n, d // n, 1), (n, 1, r // n), (n, n, n), (n, r // n, 1), (n, 1, d // n)
    x, factors = torch.ones(shape), [torch.ones(size) for size in sizes]
    return x, lambda x: fastadapt.compacter(x, factors[:3], factors[3:], residual=x, backend="native")
"""
    assert extra_bytes(setup, "(64, 64), 8", shape) <= 2**20
