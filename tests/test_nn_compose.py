"""Adapters made of adapters, and several kinds of them in one model: the mathematics of plain PyTorch."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastadapt.nn import (
    AdapterBank,
    Averaged,
    BottleneckAdapter,
    CompacterAdapter,
    LoRALinear,
    ParallelAdapter,
    PrefixAttention,
    Stacked,
    Switched,
    average_adapters,
    drop_adapters,
    freeze_except,
    load_adapters,
    route,
    save_adapters,
)

from .battery import DEVICE
from .modules import assert_equal_to, call, gradients, randomised
from .test_nn import D, R, plain

SKIP = {"skip": "channel", "scale": "learned", "activation": "gelu"}


def stacked(module, x, residual=None):
    first, *others = module.adapters
    y = plain(first, x, residual)
    for adapter in others:
        y = plain(adapter, y)
    return y




def averaged(module, x, residual=None):
    total, nothing = (x if module.residual else 0) if residual is None else residual, torch.zeros_like(x)
    for weight, adapter in zip(module.weights, module.adapters):
        total = total + weight * (averaged if isinstance(adapter, Averaged) else plain)(adapter, x, nothing)
    return total


CASES = {
    "stacked": (stacked, lambda: Stacked(BottleneckAdapter(D, R), BottleneckAdapter(D, 3, norm="pre"))),
    "mean": (averaged, lambda: Averaged(BottleneckAdapter(D, R), BottleneckAdapter(D, 3, norm="pre"))),
    "numbers": (averaged, lambda: Averaged(*(BottleneckAdapter(D, R) for _ in range(3)), weights=[0.5, -2, 0])),
    "learned": (averaged, lambda: Averaged(BottleneckAdapter(D, R), BottleneckAdapter(D, 3, **SKIP), weights="learned")),
    "channel": (averaged, lambda: Averaged(*(BottleneckAdapter(D, 3, scale="channel") for _ in range(2)), weights="learned")),
    "branches": (averaged, lambda: Averaged(*(BottleneckAdapter.parallel(D, R) for _ in range(2)), weights="learned")),
    "nested": (averaged, lambda: Averaged(Averaged(BottleneckAdapter(D, R)), BottleneckAdapter(D, 3), weights="learned")),
}


@pytest.mark.parametrize("expected, make", CASES.values(), ids=CASES)
def test_compositions_are_plain_sums(expected, make):
    module = randomised(make())
    x, residual, grad_y = torch.randn(3, 16, 6, 7, D, device=DEVICE)
    assert_equal_to(expected, call, module, grad_y, x)
    assert_equal_to(expected, call, module, grad_y, x, residual)


@pytest.mark.parametrize("rank", [1, None])
def test_compacter_takes_a_weight(rank):
    adapters = [randomised(CompacterAdapter(D, 8, rank=rank, scale=scale)).double() for scale in (2.0, "learned")]
    module = Averaged(*adapters, weights="learned").double()
    x = torch.randn(3, D, device=DEVICE, dtype=torch.float64)
    expected = x.clone()
    for weight, a in zip(module.weights, adapters):
        hidden = F.gelu(F.linear(x, a.down.dense_weight(), a.down.bias))
        expected = expected + weight * a.scale * F.linear(hidden, a.up.dense_weight(), a.up.bias)
    y, grad_y = module(x), torch.randn_like(x)
    torch.testing.assert_close(y, expected)
    parameters = list(module.parameters())
    torch.testing.assert_close(torch.autograd.grad(y, parameters, grad_y), torch.autograd.grad(expected, parameters, grad_y))


class Outputs(TorchDispatchMode):
    """The names of the operators whose output is as large as ``x``."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.names = numel, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, tuple | list) and out else out
        if isinstance(first, torch.Tensor) and first.numel() >= self.numel and not func.is_view:
            self.names.append(func.namespace)
        return out


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 3.0], "learned"])
def test_an_average_costs_no_pass_of_its_own(weights):
    module = randomised(Averaged(*(BottleneckAdapter(D, R) for _ in range(3)), weights=weights))
    x = torch.randn(50, D, device=DEVICE)
    with Outputs(x.numel()) as seen:
        module(x)
    assert seen.names == ["fastadapt"] * 3


def test_switched():
    one, two = (randomised(BottleneckAdapter(D, R)) for _ in range(2))
    module = Switched({"one": one, "two": two}, active="two")
    x, residual = torch.randn(2, 5, D, device=DEVICE)
    assert torch.equal(module(x), two(x)) and torch.equal(module(x, residual), two(x, residual))
    module.use("one")
    module(x).sum().backward()
    assert all(p.grad is not None for p in one.parameters()) and all(p.grad is None for p in two.parameters())
    assert torch.equal(Averaged(module, two)(x), Averaged(one, two)(x))
    module.use(None)
    assert module(x) is x and module(x, residual) is residual and module.names == ["one", "two"]
    assert torch.equal(Averaged(module, two)(x), Averaged(two, weights=[0.5])(x))
    branch = Switched({"only": BottleneckAdapter.parallel(D, R)})
    assert not branch(x).any() and branch(x, residual) is residual
    assert sorted(module.state_dict())[0] == "adapters.one.down.bias" and "active=None" in repr(module)


def test_average_of_parameters():
    adapters = [randomised(BottleneckAdapter(D, R, scale="learned", norm="pre")) for _ in range(3)]
    for weights, w in ((None, [1 / 3] * 3), ([0.5, 0.25, 2], [0.5, 0.25, 2])):
        average = average_adapters(adapters, weights)
        for name, p in average.named_parameters():
            torch.testing.assert_close(p, sum(x * a.get_parameter(name) for x, a in zip(w, adapters)))
            assert p.requires_grad and all(p is not a.get_parameter(name) for a in adapters)
    halves = [copy.deepcopy(a).half() for a in adapters]
    oracle = sum(a.up.weight.double() for a in halves) / 3
    assert torch.equal(average_adapters(halves).up.weight, oracle.float().half())
    assert torch.equal(average_adapters([adapters[0]], [2]).up.weight, 2 * adapters[0].up.weight)
    banks = [randomised(AdapterBank(2, D, R)) for _ in range(2)]
    torch.testing.assert_close(average_adapters(banks).up_weight, (banks[0].up_weight + banks[1].up_weight) / 2)


def test_average_keeps_what_is_shared():
    one, two = CompacterAdapter.compacter_plus_plus(2, D, 8)
    average = average_adapters([one, two])
    assert average.down.rule is one.down.rule and average.up.rule is one.up.rule
    torch.testing.assert_close(average.down.s, (one.down.s + two.down.s) / 2)
    other = CompacterAdapter.compacter_plus_plus(1, D, 8)[0]
    apart = average_adapters([one, other])
    assert apart.down.rule is apart.up.rule is not one.down.rule
    torch.testing.assert_close(apart.down.rule, (one.down.rule + other.down.rule) / 2)


class Block(nn.Module):
    """A transformer's layer with four kinds of adapters: prefix and parallel (MAM), LoRA, and a stack of two bottlenecks."""

    def __init__(self):
        super().__init__()
        self.norm, self.other_norm = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attention = PrefixAttention(D, 4, p=5)
        self.attention.q_proj = LoRALinear(self.attention.q_proj, 2)
        ffn = nn.Sequential(LoRALinear(nn.Linear(D, 2 * D), 3), nn.GELU(), nn.Linear(2 * D, D))
        branches = [BottleneckAdapter.parallel(D, R, activation="gelu") for _ in range(2)]
        self.ffn = ParallelAdapter(ffn, Averaged(*branches, weights="learned"))
        tasks = {name: BottleneckAdapter(D, R, activation="gelu") for name in ("a", "b")}
        self.after = Stacked(BottleneckAdapter(D, R, activation="tanh"), Switched(tasks, active="b"))

    def forward(self, x):
        x = x + self.attention(self.norm(x), is_causal=True)
        return self.after(x + self.ffn(self.other_norm(x)))


def by_hand(block, x):
    def lora(layer, x):
        return layer.base(x) + layer.scale * F.linear(F.linear(x, layer.lora_A.weight), layer.lora_B.weight)

    attention, ffn, h = block.attention, block.ffn.layer, block.norm(x)
    prefix = attention.prefixes["default"].prefix[0].unsqueeze(1).expand(-1, len(x), -1, -1, -1)
    q, k, v = (
        y.unflatten(-1, (4, -1)).transpose(1, 2) for y in (lora(attention.q_proj, h), attention.k_proj(h), attention.v_proj(h))
    )
    t = x.shape[1]
    mask = torch.cat([torch.ones(t, 5), torch.ones(t, t).tril()], 1).bool().to(x.device)
    y = F.scaled_dot_product_attention(q, torch.cat([prefix[0], k], 2), torch.cat([prefix[1], v], 2), attn_mask=mask)
    x = x + attention.o_proj(y.transpose(1, 2).flatten(2))
    h = block.other_norm(x)
    y = ffn[2](F.gelu(lora(ffn[0], h)))
    x = x + averaged(block.ffn.adapter, h, y)
    first, switched = block.after.adapters
    return plain(switched.adapters["b"], plain(first, x))


def test_several_kinds_in_one_model(tmp_path):
    model = randomised(nn.Sequential(Block(), Block()), torch.float64)
    trained = freeze_except(model, ("prefix", "lora", "bottleneck", "composed"))
    assert "0.ffn.adapter.weights" in trained and not any(".base." in name for name in trained)
    x, grad_y = torch.randn(2, 2, 6, D, device=DEVICE, dtype=torch.float64)
    y, expected = model(x), by_hand(model[1], by_hand(model[0], x))
    torch.testing.assert_close(y, expected)
    used = {name: p for name, p in trained.items() if ".adapters.a." not in name}
    assert len(used) == len(trained) - 8
    grads = [torch.autograd.grad(out, list(used.values()), grad_y) for out in (y, expected)]
    for name, ours, theirs in zip(used, *grads):
        torch.testing.assert_close(ours, theirs, msg=name)
    other = copy.deepcopy(model)
    for p in other.parameters():
        if p.requires_grad:
            nn.init.ones_(p)
    pytest.importorskip("safetensors.torch")
    assert sorted(save_adapters(model, tmp_path / "mam")) == sorted(trained)
    load_adapters(other, tmp_path / "mam")
    assert torch.equal(other(x), y) and list(other.state_dict()) == list(model.state_dict())
    other[1].after.adapters[1] = Averaged(BottleneckAdapter(D, R), weights=[0.5])
    with pytest.raises(ValueError, match=r"1\.after\.adapters\.1 is a Switched in the file, a Averaged in the model"):
        load_adapters(other, tmp_path / "mam")


def make(d=D, **options):
    return BottleneckAdapter(d, R, **options)


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        (lambda: Stacked(), ValueError, "adapters must be at least one, got none"),
        (lambda: Stacked(F.relu), TypeError, "adapters must be modules, got function for 0"),
        (lambda: Stacked(make(), make(8)), ValueError, "adapters must have one d, got {'0': 24, '1': 8}"),
        (lambda: Averaged(make(), make(residual=False)), ValueError, "adapters must have one residual, got"),
        (lambda: Averaged(make(), Stacked(make())), TypeError, "adapters must take a weight, .* got Stacked"),
        (lambda: Averaged(make(), weights=[1, 2]), ValueError, r"weights must be a number for each of 1 .*\(1, 2\)"),
        (lambda: Averaged(make(), weights="softmax"), ValueError, "weights must be numbers, 'learned' or None, got 'softmax'"),
        (lambda: Switched([make()]), TypeError, "adapters must be modules by their names, got list"),
        (lambda: Switched({"a": make()}, "b"), ValueError, r"name must be one of \['a'\] or None, got 'b'"),
        (lambda: Switched({"a": make(), "b": make(8)}), ValueError, "adapters must have one d, got {'a': 24, 'b': 8}"),
        (lambda: average_adapters([]), ValueError, "adapters must be at least one, got none"),
        (lambda: average_adapters([make(), make(8)]), ValueError, "adapters must have one d, got"),
        (lambda: average_adapters([make(), BottleneckAdapter(D, 2)]), ValueError, "adapters must have the same shapes, got"),
        (lambda: average_adapters([make(), make(scale=2)]), ValueError, "adapters must have the same type and options, got"),
        (lambda: average_adapters([LoRALinear(nn.Linear(3, 3))]), TypeError, "adapters must stand alone, got LoRALinear"),
    ],
)
def test_refuses(wrong, error, message):
    with pytest.raises(error, match=message):
        wrong()


def test_compositions_are_routed_and_dropped():
    bank, one, two = AdapterBank(2, D, R), BottleneckAdapter(D, R), BottleneckAdapter(D, R)
    model = randomised(nn.Sequential(Stacked(bank, Switched({"a": one}, active="a")), Averaged(two)))
    x, ids = torch.randn(3, D, device=DEVICE), torch.tensor([1, -1, 0], device=DEVICE)
    with route(model, ids):
        assert torch.equal(model(x), two(one(bank(x, ids))))
        with drop_adapters(model, [0]):
            assert torch.equal(model(x), two(x))
        with drop_adapters(model, [1]):
            assert torch.equal(model(x), one(bank(x, ids)))


def test_compositions_compile_without_graph_break():
    tasks = Switched({"a": BottleneckAdapter(D, R)}, active="a")
    module = randomised(Stacked(Averaged(BottleneckAdapter(D, R), BottleneckAdapter(D, 3, **SKIP), weights="learned"), tasks))
    x, grad_y = torch.randn(2, 6, D, device=DEVICE)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    eager, traced = (gradients(lambda _, x, f=f: f(x), module, grad_y, x) for f in (module, compiled))
    for name in eager:
        assert torch.equal(traced[name], eager[name]), name
