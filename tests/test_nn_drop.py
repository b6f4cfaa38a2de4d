"""AdapterDrop: dropped layers are the frozen ones, at no call of a kernel, and all of it can be undone."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from fastadapt.nn import (
    AdapterBank,
    AdapterFusion,
    BottleneckAdapter,
    CompacterAdapter,
    KronALinear,
    LoRABank,
    LoRAEmbedding,
    LoRALinear,
    LoRAMultiheadAttention,
    ParallelAdapter,
    PrefixAttention,
    attach,
    drop_adapters,
    freeze_except,
    route,
)  # fmt: skip

from .battery import DEVICE
from .modules import randomised

D, B, T, LAYERS = 16, 3, 5, 4
IDS = torch.tensor([1, -1, 0], device=DEVICE)


class Layer(nn.Module):
    """Adapters placed by hand: one after a linear layer, one beside one, LoRA around one."""

    def __init__(self):
        super().__init__()
        self.after = nn.Sequential(nn.Linear(D, D), BottleneckAdapter(D, 4, norm="pre"))
        self.beside = ParallelAdapter(nn.Linear(D, D), CompacterAdapter(D, 4, residual=False))
        self.lora = LoRALinear(nn.Linear(D, D), 2)

    def forward(self, x):
        return torch.tanh(self.lora(self.beside(self.after(x))))

    def bare(self, x):
        return torch.tanh(self.lora.base(self.beside.layer(self.after[0](x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer() for _ in range(LAYERS)])

    def forward(self, x, bare=()):
        for i, layer in enumerate(self.layers):
            x = layer.bare(x) if i in bare else layer(x)
        return x


@pytest.fixture
def model():
    return randomised(Model())


@pytest.fixture
def x():
    return torch.randn(B, T, D, device=DEVICE)


@pytest.mark.parametrize("layers", [2, [0, 3], range(LAYERS)], ids=str)
def test_dropped_layers_are_the_bare_ones(model, x, layers):
    before, numbers = model(x), range(layers) if isinstance(layers, int) else layers
    with drop_adapters(model, layers) as dropped:
        assert dropped.layers == tuple(numbers)
        y = model(x)
        assert torch.equal(y, model(x, bare=numbers)) and not torch.equal(y, before)
        y.square().sum().backward()
        trained = freeze_except(copy.deepcopy(model), ("bottleneck", "compacter", "lora"))
        idle = {name for name in trained if model.get_parameter(name).grad is None}
        assert idle == {name for name in trained if int(name.split(".")[1]) in numbers}
    assert torch.equal(model(x), before)
    assert not any("forward" in vars(module) for module in model.modules())


def test_attached_adapters_are_dropped_without_a_call(monkeypatch, x):
    """Half of the layers dropped is half of the calls of the kernel."""
    from fastadapt.nn import bottleneck

    layer = nn.TransformerEncoderLayer(D, 2, D, dropout=0.0, batch_first=True, device=DEVICE)
    model = nn.TransformerEncoder(layer, LAYERS)
    bare, calls, op = copy.deepcopy(model), [], bottleneck.bottleneck
    attach(model, "houlsby", r=4, init_std=0.5)
    monkeypatch.setattr(bottleneck, "bottleneck", lambda *args, **options: calls.append(1) or op(*args, **options))
    y = model(x)
    assert len(calls) == 2 * LAYERS
    with drop_adapters(model, LAYERS // 2):
        assert not torch.equal(model(x), y)
        assert len(calls) == 3 * LAYERS
        with drop_adapters(model, LAYERS):
            assert torch.equal(model(x), bare(x))
    assert len(calls) == 3 * LAYERS


def test_calls_may_overlap(model, x):
    before = model(x)
    first, second = drop_adapters(model, [0, 1]), drop_adapters(model, [1, 2])
    assert torch.equal(model(x), model(x, bare=[0, 1, 2]))
    first.restore()
    first.restore()
    assert torch.equal(model(x), model(x, bare=[1, 2]))
    with pytest.raises(RuntimeError, match="planted"), drop_adapters(model, [3]):
        raise RuntimeError("planted")
    second.restore()
    assert torch.equal(model(x), before)


def test_random_drop_in_training(model, x):
    expected = [model(x, bare=range(n)) for n in range(LAYERS + 1)]
    drops = drop_adapters(model, LAYERS, random=True)

    def drawn():
        torch.manual_seed(5)
        found = []
        for _ in range(25):
            y = model(x)
            found.append(len(drops.layers))
            assert torch.equal(y, expected[found[-1]])
        return found

    found = drawn()
    assert set(found) == set(range(LAYERS + 1)) and drawn() == found
    model(x).sum().backward()  # what was drawn stays for the backward pass
    assert torch.equal(model.eval()(x), expected[0]) and drops.layers == ()
    model.train()
    drops.restore()
    assert torch.equal(model(x), expected[0]) and not model._forward_pre_hooks


def test_every_kind(x):
    """Alone in a list, each beside what it is without its adapter."""
    ids, prefixed = torch.arange(B, device=DEVICE), PrefixAttention(D, 2, p=3)
    attention = nn.MultiheadAttention(D, 2, batch_first=True)
    plain_attention = copy.deepcopy(prefixed)
    plain_attention.activate(None)
    same = {"residual": torch.randn(B, T, D, device=DEVICE)}
    for adapter, args, options, bare in (
        (BottleneckAdapter(D, 4), (x,), {}, lambda _: x),
        (BottleneckAdapter(D, 4), (x,), same, lambda _: same["residual"]),
        (BottleneckAdapter(D, 4, residual=False), (x, same["residual"]), {}, lambda _: same["residual"]),
        (BottleneckAdapter(D, 4, residual=False), (x,), {}, lambda _: torch.zeros_like(x)),
        (CompacterAdapter(D, 4), (x,), {}, lambda _: x),
        (AdapterBank(2, D, 4), (x, IDS), {}, lambda _: x),
        (AdapterBank(2, D, 4, residual=False), (x, IDS), same, lambda _: same["residual"]),
        (AdapterBank(2, D, 4, residual=False), (x, IDS), {}, lambda _: torch.zeros_like(x)),
        (AdapterFusion(D, AdapterBank(2, D, 4)), (x,), {}, lambda _: x),
        (AdapterFusion(D, AdapterBank(2, D, 4, residual=False)), (x, same["residual"]), {}, lambda _: same["residual"]),
        (LoRALinear(nn.Linear(D, 8), 4, dora=True), (x,), {}, lambda m: m.base(x)),
        (KronALinear(nn.Linear(D, 8)), (x,), {}, lambda m: m.base(x)),
        (LoRAEmbedding(nn.Embedding(B, D), 4), (ids,), {}, lambda m: m.base(ids)),
        (LoRABank(nn.Linear(D, 8), 2), (x, IDS), {}, lambda m: m.base(x)),
        (LoRAMultiheadAttention(attention, 4), (x, x, x), {"need_weights": False}, lambda _: attention(x, x, x)[0]),
        (prefixed, (x,), {}, lambda _: plain_attention(x)),
    ):
        (module,) = model = nn.ModuleList([randomised(adapter)])
        plain_attention.load_state_dict(prefixed.state_dict())
        if isinstance(module, LoRABank):
            module.add(randomised(LoRALinear(nn.Linear(D, 8), 4)))
        with drop_adapters(model, 1):
            y = module(*args, **options)
        expected = bare(module)
        torch.testing.assert_close(y[0] if isinstance(y, tuple) else y, expected, rtol=1e-5, atol=1e-6)
        y = module(*args, **options)
        assert not torch.allclose(y[0] if isinstance(y, tuple) else y, expected, atol=1e-2), type(module)


def test_a_dropped_fusion_has_no_weights(x):
    model = nn.ModuleList([randomised(AdapterFusion(D, AdapterBank(2, D, 4)))])
    with drop_adapters(model, 1):
        y, weights = model[0](x, return_weights=True)
    assert torch.equal(y, x) and torch.equal(weights, torch.zeros_like(model[0](x, return_weights=True)[1]))


def test_layers_of_a_sequential_and_routed_banks(x):
    model = nn.Sequential(*[nn.Sequential(nn.Linear(D, D), randomised(AdapterBank(2, D, 4))) for _ in range(2)]).to(DEVICE)
    with route(model, IDS), drop_adapters(model, [1]):
        assert torch.equal(model(x), model[1][0](model[0](x)))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"])
def test_copies(model, x, copied):
    with drop_adapters(model, 2):
        twin, y = copied(model), model(x)
    assert torch.equal(twin(x), y) and not torch.equal(model(x), y)
    with torch.no_grad():
        twin.layers[3].after[1].up.weight.zero_()
    assert not torch.equal(twin(x), y)


def test_compiled_code_sees_it(x):
    model = nn.Sequential(nn.Linear(D, D), BottleneckAdapter(D, 4)).to(DEVICE)
    nn.init.normal_(model[1].up.weight)
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(2):
        assert torch.equal(compiled(x), model(x))
        with drop_adapters(model, [1]):
            assert torch.equal(compiled(x), model[0](x))
    assert torch.equal(compiled(x), model(x)) and counter.frame_count == 2


def test_bad_input(model, x):
    for layers in ([], 0, [1, LAYERS], LAYERS + 1, [-1], ["0"], [0.0]):
        with pytest.raises(ValueError, match=r"layers must be numbers of layers with adapters, some of \[0, 1, 2, 3\], got "):
            drop_adapters(model, layers)
    with pytest.raises(ValueError, match=r"some of \[\], got 1"):
        drop_adapters(BottleneckAdapter(D, 4), 1)
    before = model(x)
    model.layers[2].lora.merge()
    with pytest.raises(ValueError, match="layers must have no merged adapters"):
        drop_adapters(model, LAYERS)
    model.layers[2].lora.unmerge()
    assert torch.equal(model(x), before)
