"""Ids for all modules of a model at once: the same outputs and gradients as with ids in each call."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from fastadapt.nn import AdapterBank, HyperAdapter, LoRABank, LoRALinear, PrefixAttention, route

from .battery import DEVICE
from .modules import randomised

D, G, B, T = 16, 3, 4, 5
IDS = torch.tensor([2, -1, 0, 2], device=DEVICE)


class Model(nn.Module):
    """A layer of every kind that takes ids, which are given to each or to none."""

    def __init__(self):
        super().__init__()
        self.attention = PrefixAttention(D, 2)
        for name in "abc"[:G]:
            self.attention.add(name, 3)
        self.lora = LoRABank(nn.Linear(D, D), G, 4)
        self.bank = AdapterBank(G, D, 4, norm="pre")

    def forward(self, x, ids=None):
        return self.bank(self.lora(self.attention(x, adapter_ids=ids), ids), ids)


def made():
    model = randomised(Model())
    for slot in range(G):
        model.lora.replace(slot, randomised(LoRALinear(nn.Linear(D, D), 4)))
    return model, torch.randn(B, T, D, device=DEVICE)


def test_routed_ids_are_those_of_each_call():
    model, x = made()
    given = copy.deepcopy(model)
    with route(model, IDS):
        y = model(x)
        y.square().sum().backward()
    expected = given(x, IDS)
    expected.square().sum().backward()
    assert torch.equal(y, expected)
    for (name, p), q in zip(model.named_parameters(), given.parameters()):
        assert (p.grad is None) == (q.grad is None) and (p.grad is None or torch.equal(p.grad, q.grad)), name
    assert sum(p.grad is not None and bool(p.grad.any()) for p in model.parameters()) > 10


def test_contexts_restore_what_was_set():
    model, x = made()
    other = torch.zeros(B, dtype=torch.int64, device=DEVICE)
    model.bank.set_ids(other)
    with route(model, IDS):
        with pytest.raises(RuntimeError, match="planted"), route(model, other):
            assert torch.equal(model(x), model(x, other))
            raise RuntimeError("planted")
        assert torch.equal(model(x), model(x, IDS))
        assert torch.equal(model(x, other), model(x, other.clone()))  # those of a call come first
        with route(model, None), pytest.raises(ValueError, match="adapter_ids must be given, or set for the whole model"):
            model(x)
    assert model.bank.set_ids(None) is other
    assert model.lora.set_ids(None) is model.attention.set_ids(None) is None


def test_one_thread_at_a_time():
    model, x = made()
    model.hyper = HyperAdapter(["one", "two", "three"], 1, D, 4).to(DEVICE)
    other = torch.zeros(B, dtype=torch.int64, device=DEVICE)

    def routed(ids, inside=model):
        with route(inside, ids):
            return model(x)

    with ThreadPoolExecutor(1) as another:
        with route(model, IDS), model.hyper.use("one"):
            for refused in (lambda: routed(other), lambda: routed(other, model.bank), model.hyper.use("two").__enter__):
                with pytest.raises(RuntimeError, match="inside another thread's `route` or `use`: one at a time"):
                    another.submit(refused).result()
            assert torch.equal(model(x), model(x, IDS)) and torch.equal(routed(other), model(x, other))
            assert torch.equal(another.submit(model, x).result(), model(x, IDS))  # as a backward pass does
        assert torch.equal(another.submit(routed, other).result(), model(x, other))
    assert model.bank.set_ids(None) is model.hyper.set_ids(None) is None


def test_attention_without_prefixes_leaves_ids_to_others():
    attention, x = PrefixAttention(D, 2, device=DEVICE), torch.randn(B, T, D, device=DEVICE)
    with route(attention, IDS):
        assert torch.equal(attention(x), attention(x))
        with pytest.raises(ValueError, match="adapter_ids need prefixes, got none"):
            attention(x, adapter_ids=IDS)


def test_bad_input():
    with pytest.raises(ValueError, match="a module that takes ids, such as an AdapterBank; Linear has none"):
        route(nn.Linear(2, 2), IDS).__enter__()
    for module in (AdapterBank(G, D, 4, device=DEVICE), LoRABank(nn.Linear(D, D, device=DEVICE), G)):
        with pytest.raises(ValueError, match="adapter_ids must be given"):
            module(torch.randn(B, D, device=DEVICE))


def test_compiled_without_a_graph_for_each_ids():
    bank, x = randomised(AdapterBank(G, D, 4)), torch.randn(B, T, D, device=DEVICE)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(bank, backend=count, fullgraph=True)
    for ids in (IDS, IDS.flip(0), IDS.roll(1)):
        with route(bank, ids):
            assert torch.equal(compiled(x), bank(x, ids))
    assert len(graphs) == 1
