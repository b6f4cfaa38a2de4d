"""The bank: each row is what its own adapter makes of it."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from fastadapt.nn import AdapterBank, BottleneckAdapter, ParallelAdapter

from .accuracy import assert_within_reference_error
from .battery import DEVICE
from .modules import gradients, pooled, randomised
from .test_nn import D, G, R, over_options, plain


def rows_of(ids, shape):
    """The id of each row of an input of this shape."""
    return ids.reshape(ids.shape + (1,) * (len(shape) - 1 - ids.dim())).expand(shape[:-1])


def one_by_one(singles, ids):
    """Each row through its own adapter in ordinary PyTorch."""

    def run(_, x, *residual):
        rows = rows_of(ids, x.shape)
        start = residual[0] if residual else x if singles[0].residual else torch.zeros_like(x)
        y = start.clone()
        for i, single in enumerate(singles):
            at = (rows == i).nonzero(as_tuple=True)
            y = y.index_put(at, plain(single, x[at], *(r[at] for r in residual)))
        return y + sum(0 * p.sum() for p in singles.parameters())  # an adapter without rows has gradients of zero

    return run


def through(ids):
    """A call of a bank with these ids."""
    return lambda bank, x, *residual: bank(x, ids, *residual)


def stacked(grads, name, dim=1):
    """The gradients of single adapters as a bank has them: ``down_weight`` is ``i.down.weight`` for every ``i``, stacked along
    ``dim``, the second one where gradients are pooled."""
    single = name if "skip" in name or "_" not in name else name.replace("_", ".")
    return torch.stack([grads[f"{i}.{single}"] for i in range(G)], dim)


IDS = {
    "sequences": torch.tensor([1, -1, 0, 1]),
    "tokens": torch.tensor([[1, -1, 0], [0, 0, 1], [-1, -1, -1], [1, 0, 1]], dtype=torch.int32),
}


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
@over_options
def test_bank_equals_its_adapters(options, ids):
    """Outputs and gradients; adapter 2 gets no row, and rows of -1 get the residual."""
    ids = ids.to(DEVICE)
    bank = AdapterBank(G, D, R, **options, device=DEVICE)
    singles = nn.ModuleList(randomised(BottleneckAdapter(D, R, **options)) for _ in range(G))
    for i, single in enumerate(singles):
        bank.load_adapter(i, single)
    x, residual, grad_y = torch.randn(3, 8, 4, 3, D, device=DEVICE)
    for inputs in ((x,), (x, residual)):
        # The folds are exact as mathematics, so float64 shows them; in float32 they round in places of their own, so what the
        # kernel may err is measured by the same folds in plain PyTorch.
        double, double_bank, plain_bank = copy.deepcopy(singles).double(), copy.deepcopy(bank).double(), copy.deepcopy(bank)
        plain_bank.backend = "reference"
        doubles = grad_y.double(), *(t.double() for t in inputs)
        oracle = pooled(partial(gradients, one_by_one(double, ids), double), *doubles)
        folded = pooled(partial(gradients, through(ids), double_bank), *doubles)
        expected, actual = (pooled(partial(gradients, through(ids), m), grad_y, *inputs) for m in (plain_bank, bank))
        for name, value in actual.items():
            exact = oracle[name] if name in oracle else stacked(oracle, name)
            torch.testing.assert_close(folded[name], exact, rtol=1e-12, atol=1e-12)
            assert_within_reference_error(value, expected[name], exact, name)
        absent = rows_of(ids, x.shape[1:]).expand(x.shape[:-1]) == -1
        kept = inputs[-1] if len(inputs) > 1 or bank.adapter(0).residual else torch.zeros_like(x)
        assert torch.equal(actual["y"][absent], kept[absent])


@over_options
def test_bank_gives_back_what_was_loaded(options):
    bank = randomised(AdapterBank(G, D, R, **options))
    before = copy.deepcopy(bank.state_dict())
    single = randomised(BottleneckAdapter(D, R, **options))
    bank.load_adapter(1, single)
    out = bank.adapter(1)
    assert out.options() == single.options()
    assert all(torch.equal(t, single.state_dict()[key]) for key, t in out.state_dict().items())
    assert all(torch.equal(t[[0, 2]], before[key][[0, 2]]) for key, t in bank.state_dict().items())
    out.up.weight.data.zero_()  # a copy, not a view
    assert torch.equal(bank.adapter(1).up.weight, single.up.weight)


@over_options
def test_bank_pads_smaller_ranks(options):
    """Exact, and still exact after training: the padding gets no gradient."""
    bank = randomised(AdapterBank(G, D, R, **options))
    single = randomised(BottleneckAdapter(D, R - 2, **options))
    bank.load_adapter(1, single)
    x, ids = torch.randn(6, D, device=DEVICE), torch.ones(6, dtype=torch.int64, device=DEVICE)
    torch.testing.assert_close(bank(x, ids), single(x))
    bank(x, ids).square().sum().backward()
    for grad in (bank.down_weight.grad[1, R - 2 :], bank.up_weight.grad[1, :, R - 2 :]):
        assert not grad.any()


def test_bank_refuses_strangers():
    bank = AdapterBank(G, D, R, device=DEVICE)
    for adapter, error, message in (
        (nn.Linear(D, D), TypeError, "adapter must be a BottleneckAdapter, got Linear"),
        (BottleneckAdapter(D + 1, R), ValueError, f"adapter must have d = {D} like the bank, got {D + 1}"),
        (BottleneckAdapter(D, R + 1), ValueError, f"rank of at most {R}, the bank's, got {R + 1}"),
        (BottleneckAdapter(D, R, activation="gelu"), ValueError, "activation='relu' like the bank, got 'gelu'"),
        (BottleneckAdapter(D, R, scale=4.0), ValueError, "scale=1.0 like the bank, got 4.0"),
        (BottleneckAdapter(D, R, skip="hidden"), ValueError, "skip=None like the bank, got 'hidden'"),
        (BottleneckAdapter(D, R, bias=False), ValueError, "bias=True like the bank, got False"),
    ):
        with pytest.raises(error, match=message):
            bank.load_adapter(0, adapter)
    for i, error in ((G, IndexError), (-1, IndexError), (1.0, TypeError)):
        with pytest.raises(error, match="i must"):
            bank.adapter(i)
    x = torch.randn(2, D, device=DEVICE)
    with pytest.raises(ValueError, match="adapter_ids must be"):
        bank(x, torch.zeros(3, dtype=torch.int64, device=DEVICE))
    with pytest.raises(TypeError, match="adapter_ids must be"):
        bank(x, torch.zeros(2, device=DEVICE))
    if DEVICE == "cpu":
        for options in ({}, {"skip": "channel"}):
            with pytest.raises(ValueError, match=rf"adapter_ids must lie in \[-1, {G - 1}\].*got {G}"):
                AdapterBank(G, D, R, **options)(x, torch.tensor([0, G]))


@over_options
def test_float32_bank_serves_bfloat16_activations(options):
    """Autocast changes nothing: not the dtype of the output and not the precision of the folds."""
    bank = randomised(AdapterBank(G, D, R, **options))
    x, ids = torch.randn(4, D, device=DEVICE).bfloat16(), torch.tensor([0, 2, -1, 2], device=DEVICE)
    y = bank(x, ids)
    assert y.dtype == torch.bfloat16
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(bank(x, ids), y)


@over_options
def test_every_adapter_on_the_same_input(options):
    """Outputs and gradients of ``g`` adapters in one call, with and without a residual and with ``x`` given as one."""
    bank = randomised(AdapterBank(G, D, R, **options))
    double = copy.deepcopy(bank).double()
    singles = nn.ModuleList(double.adapter(i) for i in range(G))
    x, residual = torch.randn(2, 4, 3, D, device=DEVICE)
    grad_y = torch.randn(G, 4, 3, D, device=DEVICE)
    for inputs in ((x,), (x, residual)):
        doubles = [t.double() for t in inputs]
        oracle = gradients(lambda m, *i: torch.stack([plain(single, *i) for single in m]), singles, grad_y.double(), *doubles)
        folded = gradients(lambda m, *i: m.every(*i), double, grad_y.double(), *doubles)
        for name, value in folded.items():
            exact = oracle[name] if name in oracle else stacked(oracle, name, 0)
            torch.testing.assert_close(value, exact, rtol=1e-12, atol=1e-12)
    ids = torch.arange(G, device=DEVICE)
    copies = x.repeat(G, 1, 1, 1)
    assert torch.equal(bank.every(x), bank(copies, ids))
    assert torch.equal(bank.every(x, residual), bank(copies, ids, residual.repeat(G, 1, 1, 1)))
    assert torch.equal(bank.every(x, x), bank(copies, ids, copies))
    assert torch.equal(bank.every(x[0, 0]), bank(copies[:, 0, 0], ids))


def test_every_adapter_reads_one_x():
    """What is saved for the backward pass is ``x`` itself, and nothing else of its size."""
    bank = randomised(AdapterBank(G, D, R))
    x, kept = torch.randn(64, 7, D, device=DEVICE, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = bank.every(x)
    large = [t for t in kept if t.numel() >= x.numel()]
    assert y.shape == (G, 64, 7, D) and len(large) == 1
    assert large[0].data_ptr() == x.data_ptr() and large[0].stride() == (0, *x.stride())


def test_every_adapter_beside_one_run_of_a_layer():
    """Two tasks, two heads, one pass of the frozen layer."""
    runs = []
    layer = nn.Linear(D, D, device=DEVICE).requires_grad_(False)
    layer.register_forward_hook(lambda *_: runs.append(1))
    bank = randomised(AdapterBank(2, D, R, residual=False))
    wrapped = ParallelAdapter(layer, bank)
    x = torch.randn(4, 3, D, device=DEVICE)
    y = wrapped(x, adapter_ids="every")
    assert len(runs) == 1
    for i in range(2):
        torch.testing.assert_close(y[i], ParallelAdapter(layer, bank.adapter(i))(x))
    for adapter, ids in ((bank, "all"), (bank.adapter(0), "every")):
        with pytest.raises(ValueError, match=f"adapter_ids must be a tensor, or 'every' with an AdapterBank, got '{ids}'"):
            ParallelAdapter(layer, adapter)(x, adapter_ids=ids)
