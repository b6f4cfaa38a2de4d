"""AdapterFusion as a module against its formula."""

import copy
import re
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastadapt.nn import AdapterBank, AdapterFusion, BottleneckAdapter, freeze_except, load_adapters, save_adapters

from .accuracy import assert_within_reference_error
from .battery import DEVICE
from .modules import call, pooled, randomised
from .test_nn import D, R, plain

G = 3


def build(**options):
    adapters = [randomised(BottleneckAdapter(D, r, activation="gelu")) for r in (R, R - 2, R)]
    fusion = AdapterFusion(D, adapters, **options).to(DEVICE)
    with torch.no_grad():
        for name, p in fusion.named_parameters():
            if not name.startswith("adapters."):
                p.copy_(torch.randn_like(p) / D**0.5 + (torch.eye(D, device=DEVICE) if name == "value.weight" else 0.0))
    return fusion


def formula(fusion, x, residual=None, hidden=None):
    """Pfeiffer et al. 2021, word for word: all keys and all values projected."""
    residual, hidden = x if residual is None else residual, x if hidden is None else hidden
    branches = torch.stack([plain(fusion.adapters.adapter(i).to(x), x) - x for i in range(G)], -2)
    query = fusion.query if fusion.key is None else fusion.query(hidden)
    keys = branches if fusion.key is None else fusion.key(branches)
    values = branches if fusion.value is None else fusion.value(branches)
    weights = ((keys * query[..., None, :]).sum(-1) / fusion.temperature).softmax(-1)
    return residual + (weights[..., None] * values).sum(-2)


def results(run, fusion, grad_y, *inputs):
    """Output and gradients of the inputs and of what is trained, by name."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    trained = {name: p for name, p in fusion.named_parameters() if p.requires_grad}
    y = run(fusion, *leaves)
    grads = torch.autograd.grad(y, [*leaves, *trained.values()], grad_y)
    return dict(zip(["y", *map(str, range(len(inputs))), *trained], (y.detach(), *grads)))


OPTIONS = {
    "paper": {},
    "learned-query": {"query": "learned"},
    "warm": {"temperature": 4.0},
    "without-value": {"value": False},
}
over_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@pytest.mark.parametrize("rows", [(4, 2), (9, 11)], ids=["fewer-rows-than-columns", "more-rows"])
@over_options
def test_equals_the_formula(options, rows):
    fusion = build(**options).double()
    x, residual, hidden, grad_y = torch.randn(4, *rows, D, device=DEVICE, dtype=torch.float64)
    for inputs in ((x,), (x, residual), (x, residual, hidden)[: 2 if fusion.key is None else 3]):
        expected, actual = (results(run, fusion, grad_y, *inputs) for run in (formula, call))
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("rows", [(2, 3), (8, 9)], ids=["few-rows", "many-rows"])
@pytest.mark.parametrize(
    "parameters, dtype", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float32, torch.bfloat16)], ids=str
)
@over_options
def test_errs_as_little_as_plain_pytorch(options, parameters, dtype, rows):
    fusion = build(**options).to(parameters)
    double, narrow = copy.deepcopy(fusion).double(), copy.deepcopy(fusion).to(dtype)
    x, grad_y = torch.randn(2, 16, *rows, D, device=DEVICE).to(dtype)
    oracle = pooled(partial(results, formula, double), grad_y.double(), x.double())
    expected = pooled(partial(results, formula, narrow), grad_y, x)
    actual = pooled(partial(results, call, fusion), grad_y, x)
    assert actual["y"].dtype == dtype
    for name in expected:
        assert_within_reference_error(actual[name], expected[name].to(actual[name].dtype), oracle[name], name)


@over_options
def test_weights_sum_to_one_and_start_even(options):
    fusion = AdapterFusion(D, [randomised(BottleneckAdapter(D, R)) for _ in range(G)], init_std=1e-9, **options).to(DEVICE)
    x = torch.randn(2, 5, D, device=DEVICE)
    y, weights = fusion(x, return_weights=True)
    torch.testing.assert_close(weights, torch.full((2, 5, G), 1 / G, device=DEVICE))
    torch.testing.assert_close(y, torch.stack([fusion.adapters.adapter(i)(x) for i in range(G)]).mean(0))
    assert not weights.requires_grad


def test_adapters_are_frozen_and_a_bank_is_taken_as_it_is():
    bank = randomised(AdapterBank(G, D, R, residual=False))
    fusion = AdapterFusion(D, bank)
    assert fusion.adapters is bank and not any(p.requires_grad for p in bank.parameters())
    model = nn.Sequential(nn.Linear(D, D, device=DEVICE), fusion.to(DEVICE))
    assert list(freeze_except(model, "fusion")) == ["1.query.weight", "1.query.bias", "1.key.weight", "1.value.weight"]
    x = torch.randn(3, D, device=DEVICE)
    model(x).sum().backward()
    assert all(p.grad is None for p in bank.parameters()) and fusion.key.weight.grad is not None
    assert torch.equal(fusion(x), fusion(x, torch.zeros_like(x)))  # a bank without a residual of its own adds none


def test_files_of_another_temperature_are_refused(tmp_path):
    warm, cold = (nn.Sequential(build(temperature=t)) for t in (4.0, 1.0))
    save_adapters(warm, tmp_path / "warm.safetensors")
    with pytest.raises(ValueError, match="temperature=4.0 in the file, temperature=1.0 in the model"):
        load_adapters(cold, tmp_path / "warm.safetensors")
    other = nn.Sequential(build(temperature=4.0))
    load_adapters(other, tmp_path / "warm.safetensors")
    x = torch.randn(2, 3, D, device=DEVICE)
    assert torch.equal(other(x), warm(x))


def test_products_of_width_d_do_not_grow_with_the_adapters():
    flops = {}
    for g in (2, 16):
        fusion = AdapterFusion(D, AdapterBank(g, D, 1)).to(DEVICE)
        with FlopCounterMode(display=False) as counter:
            fusion(torch.randn(64, D, device=DEVICE))
        counts = counter.get_flop_counts()["Global"]
        flops[g] = sum(counts[op] for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    assert flops[2] == flops[16] == 2 * D * D * (2 * 64 + D)  # two of the rows, one of the weights


def test_regularization():
    fusion = build()
    value = fusion.value.weight
    numbers = value.tolist()
    expected = 0.01 * sum((numbers[i][j] - (i == j)) ** 2 for i in range(D) for j in range(D))
    assert fusion.regularization().item() == pytest.approx(expected, rel=1e-5)
    fusion.regularization(0.5).backward()
    torch.testing.assert_close(value.grad, value.detach() - torch.eye(D, device=DEVICE))
    assert AdapterFusion(D, AdapterBank(2, D, R), value=False).regularization().item() == 0
    assert AdapterFusion(D, AdapterBank(2, D, R)).regularization().item() == 0


@over_options
def test_compiles_without_graph_break(options):
    fusion = build(**options)
    x = torch.randn(6, 9, D, device=DEVICE)
    torch._dynamo.reset()
    compiled = torch.compile(fusion, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), fusion(x))


def test_exports_for_every_batch():
    fusion, dynamic = build(), torch.export.Dim.DYNAMIC
    xs = [torch.randn(*rows, D, device=DEVICE) for rows in ((9, 11), (8, 10))]
    program = torch.export.export(fusion, (xs[0],), dynamic_shapes=({0: dynamic, 1: dynamic},))
    with torch.no_grad():
        assert all(torch.equal(program.module()(x), fusion(x)) for x in xs)


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((0, []), {}, ValueError, "d must be at least 1, got 0"),
        ((D, []), {}, ValueError, "adapters must be an AdapterBank or at least one BottleneckAdapter, got none"),
        ((D, [nn.Linear(D, D)]), {}, TypeError, "adapters must be an AdapterBank or BottleneckAdapters, got Linear"),
        ((D + 1, AdapterBank(2, D, R)), {}, ValueError, f"adapters must have d = {D + 1}, got {D}"),
        ((D, [BottleneckAdapter(D, R), BottleneckAdapter(D + 1, R)]), {}, ValueError,
         f"adapter must have d = {D} like the bank, got {D + 1}"),
        ((D, [BottleneckAdapter(D, R), BottleneckAdapter(D, R, activation="silu")]), {}, ValueError,
         "adapter must have activation='relu' like the bank, got 'silu'"),
        ((D, AdapterBank(2, D, R)), {"query": "none"}, ValueError, "query must be 'hidden' or 'learned', got 'none'"),
        ((D, AdapterBank(2, D, R)), {"temperature": 0}, ValueError, "temperature must be above 0, got 0"),
        ((D, AdapterBank(2, D, R)), {"backend": "fast"}, ValueError, "backend must be one of .*, got 'fast'"),
        ((D, BottleneckAdapter(D, R)), {}, TypeError, "AdapterBank or a sequence of BottleneckAdapters, got BottleneckAdapter"),
    ],
)  # fmt: skip
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        AdapterFusion(*arguments, **options)


@pytest.mark.parametrize("name", ["x", "residual", "hidden"])
@pytest.mark.parametrize("rows", [(), (1,), (2, 3), (1, 2, 3)])
def test_shapes(name, rows):
    """Nothing is broadcast, which would hide a mistake; one row needs no leading dimension."""
    fusion, x = build(), torch.randn(2, 3, D, device=DEVICE)
    row = torch.randn(D, device=DEVICE)
    torch.testing.assert_close(fusion(row), fusion(row[None])[0])
    wrong = torch.randn(*rows, D + 1 if name == "x" or rows == (2, 3) else D, device=DEVICE)
    with pytest.raises(ValueError, match=f"{name} must be .*, got {re.escape(str(tuple(wrong.shape)))}"):
        fusion(**{"x": x, name: wrong})
