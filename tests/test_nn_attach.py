"""Methods put into plain PyTorch transformers by name: where they go, and what the model computes with them."""

import contextlib
import copy
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastadapt.nn import (
    AdapterBank,
    CompacterAdapter,
    KronALinear,
    LoRABank,
    LoRALinear,
    LoRAMultiheadAttention,
    PrefixAttention,
    attach,
    freeze_except,
    route,
)  # fmt: skip
from fastadapt.nn.attach import METHODS

from .accuracy import assert_within_reference_error
from .battery import DEVICE
from .modules import pooled, randomised
from .test_nn import plain

D, H, F, B, T = 16, 2, 24, 3, 5
IDS = torch.tensor([1, -1, 0], device=DEVICE)
# By method: options, kind, and the places in a layer.
IN_PYTORCH = {
    "bottleneck": ({"r": 4}, "bottleneck", ["linear2.attached"]),
    "houlsby": ({"r": 4}, "bottleneck", ["self_attn.attached", "linear2.attached"]),
    "pfeiffer": ({}, "bottleneck", ["linear2.attached"]),
    "adapter_plus": ({"r": 4}, "bottleneck", ["linear2.attached"]),
    "parallel": ({"r": 4}, "bottleneck", ["linear2.attached"]),
    "bank": ({"g": 2, "r": 4}, "bottleneck", ["linear2.attached"]),
    "fusion": ({"g": 2, "r": 4, "query": "learned", "activation": "gelu"}, "fusion", ["linear2.attached"]),
    "compacter": ({"r": 4}, "compacter", ["self_attn.attached", "linear2.attached"]),
    "compacter_plus_plus": ({"r": 4}, "compacter", ["linear2.attached"]),
    "hyper": ({"tasks": 2, "r": 4}, "hyper", ["self_attn.attached", "linear2.attached"]),
    "lora": ({"r": 4}, "lora", ["self_attn"]),
    "dora": ({"r": 4}, "lora", ["linear1", "linear2"]),
    "lora_bank": ({"g": 2, "r": 4}, "lora", ["linear1", "linear2"]),
    "kron": ({"rank": 2}, "kron", ["linear1", "linear2"]),
    "prefix": ({"p": 3, "gate": "scalar"}, "prefix", ["self_attn"]),
}
over_methods = pytest.mark.parametrize("method", IN_PYTORCH)


def encoder_layer(**options):
    return nn.TransformerEncoderLayer(D, H, F, dropout=0.0, batch_first=True, device=DEVICE, **options)


def encoder(norm_first=False):
    return nn.TransformerEncoder(encoder_layer(norm_first=norm_first), 2, enable_nested_tensor=not norm_first)


def ids_for(method):
    return IDS if method in ("bank", "lora_bank", "hyper") else None


def run(model, x, ids=None, **options):
    with contextlib.nullcontext() if ids is None else route(model, ids):
        return model(x, **options)


def ready(method, norm_first=False):
    """An encoder with adapters that do something, and their names."""
    model = encoder(norm_first)
    names = attach(model, method, **IN_PYTORCH[method][0])
    banks = [p for module in model.modules() if isinstance(module, AdapterBank) for p in module.parameters()]
    for parameter in (*freeze_except(model, IN_PYTORCH[method][1]).values(), *banks):  # a fusion keeps its bank frozen
        nn.init.normal_(parameter, std=0.3)
    model.requires_grad_(True)
    return model, names


def by_hand(layer, x, method):
    """A layer with norms behind, in ordinary PyTorch; its adapters are the submodules that ``attach`` made."""
    own = copy.deepcopy(layer)
    after_attention = after_feed_forward = beside = None
    if hasattr(own.self_attn, "attached"):
        after_attention = own.self_attn.attached
    if method == "parallel":
        beside = own.linear2.attached
    elif hasattr(own.linear2, "attached"):
        after_feed_forward = own.linear2.attached
    for module in own.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    own.requires_grad_(True)
    y = own.self_attn(x, x, x, need_weights=False)[0]
    x = own.norm1(x + (y if after_attention is None else plain(after_attention, y)))
    y = own.linear2(torch.relu(own.linear1(x)))
    if after_feed_forward is not None:
        y = plain(after_feed_forward, y)
    if beside is not None:
        y = plain(beside, x, y)
    return own.norm2(x + y), own


@pytest.mark.parametrize("method", ["bottleneck", "houlsby", "adapter_plus", "parallel"])
def test_layer_with_adapters_is_what_the_paper_says(method):
    layer = encoder_layer()
    names = attach(layer, method, r=4)
    randomised(layer)
    x, grad_y = torch.randn(2, 8, B, T, D, device=DEVICE)
    hand, double = partial(by_hand, method=method), copy.deepcopy(layer).double()

    def values(fn, layer, x, grad_y):
        y, layer = fn(layer, x.requires_grad_())
        parameters = dict(layer.named_parameters())
        grads = torch.autograd.grad(y, [x, *parameters.values()], grad_y)
        return dict(zip(["y", "x", *parameters], (y.detach(), *grads)))

    expected = pooled(partial(values, hand, layer), x, grad_y)
    oracle = pooled(partial(values, hand, double), x.double(), grad_y.double())
    actual = pooled(partial(values, lambda m, x: (m(x), m), layer), x, grad_y)
    assert actual.keys() == expected.keys() and any(name.startswith(names[0]) for name in actual)
    for name, value in actual.items():
        assert_within_reference_error(value, expected[name], oracle[name], name)


@over_methods
def test_places_kinds_and_start(method):
    """The names are those of modules of one kind; a new adapter changes nothing, or next to nothing where the paper says so."""
    model, x = encoder(), torch.randn(B, T, D, device=DEVICE)
    before, keys = model(x), set(model.state_dict())
    options, kind, places = IN_PYTORCH[method]
    names = attach(model, method, **options)
    assert names == (["hyper"] if method == "hyper" else []) + [f"layers.{i}.{place}" for i in range(2) for place in places]
    around = [f"{name}." for name in names] if method in ("lora", "dora", "lora_bank", "kron", "prefix") else []
    moved = {next((key.replace(name, f"{name}base.") for name in around if key.startswith(name)), key) for key in keys}
    assert moved <= set(model.state_dict()) and bool(around) == bool(moved - keys)
    y = run(model, x, ids_for(method))
    small = method in ("houlsby", "pfeiffer", "adapter_plus", "compacter", "compacter_plus_plus")
    torch.testing.assert_close(y, before, **({"rtol": 0.1, "atol": 0.1} if small else {"rtol": 1e-5, "atol": 1e-5}))
    trained = freeze_except(model, kind)
    y.square().sum().backward()
    assert trained and all(any(name.startswith(f"{n}.") for n in names) and ".base." not in name for name in trained)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    ("method", "norm_first"), [*((method, False) for method in IN_PYTORCH), ("houlsby", True), ("parallel", True)]
)
def test_evaluation_runs_the_adapters(method, norm_first):
    """PyTorch has one function for a whole layer in evaluation, and makes nested tensors of padded batches for it."""
    model, _ = ready(method, norm_first)
    bare, x = encoder(norm_first), torch.randn(B, T, D, device=DEVICE)
    padding = torch.zeros(B, T, dtype=torch.bool, device=DEVICE)
    padding[0, 3:] = True
    bare.load_state_dict({re.sub(r"\.base\b", "", k): v for k, v in model.state_dict().items()}, strict=False)
    for options in ({}, {"src_key_padding_mask": padding}):
        trained = run(model.train(), x, ids_for(method), **options)
        for grad in (torch.enable_grad(), torch.no_grad()):
            with grad:
                y = run(model.eval(), x, ids_for(method), **options)
                frozen = bare.eval()(x, **options)
            seen = ~padding if options else ~torch.zeros_like(padding)
            torch.testing.assert_close(y[seen], trained[seen], rtol=1e-5, atol=1e-5)
            assert not torch.allclose(y[seen], frozen[seen], atol=1e-2)


def test_decoder_has_adapters_after_both_attentions():
    layer = nn.TransformerDecoderLayer(D, H, F, dropout=0.0, batch_first=True, device=DEVICE)
    assert attach(layer, "houlsby") == ["self_attn.attached", "multihead_attn.attached", "linear2.attached"]
    assert layer.self_attn.attached.d == D and layer.linear2.attached.r == D // 16
    assert attach(layer, "lora", targets="linear1") == ["linear1"]


class Block(nn.Module):
    """As people write it: names of their own, and a feed-forward block in one module."""

    def __init__(self):
        super().__init__()
        self.mix = PrefixAttention(D, H)
        self.mlp = nn.Sequential(nn.Linear(D, F), nn.GELU(), nn.Linear(F, D))

    def forward(self, x):
        x = x + self.mix(x)
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.blocks, self.head = nn.Embedding(9, D), nn.Sequential(Block(), Block()), nn.Linear(D, 9)

    def forward(self, ids):
        return self.head(self.blocks(self.embed(ids)))


def test_model_written_by_hand():
    model, ids = Model().to(DEVICE), torch.randint(9, (B, T), device=DEVICE)
    assert attach(model, "lora", r=2) == [f"blocks.{i}.mix.{name}_proj" for i in range(2) for name in "qv"]
    assert attach(model, "mam", p=3, gate="scalar", r=2) == [
        *(f"blocks.{i}.mix.prefixes.default" for i in range(2)), *(f"blocks.{i}.mlp.2.attached" for i in range(2)),
    ]  # fmt: skip
    assert model.blocks[0].mix.gate is None and model.blocks[0].mix.prefixes["default"].gate.shape == (1, 1)
    assert attach(model, "houlsby", targets="mix", r=2) == ["blocks.0.mix.attached", "blocks.1.mix.attached"]
    before = model(ids)
    assert attach(model, "prompt", targets="embed", p=4, init_std=0.1) == ["embed.attached"]
    y = model(ids)
    assert y.shape == (B, T + 4, 9) and not torch.equal(y[:, 4:], before)
    trained = freeze_except(model, ("lora", "prefix", "bottleneck", "prompt"))
    y.sum().backward()
    assert all(p.grad is not None for p in trained.values()) and model.head.weight.grad is None


def test_compacter_shares_one_rule():
    model = encoder()
    adapters = [model.get_submodule(name) for name in attach(model, "compacter", r=8, n=2)]
    assert len(adapters) == 4 and len({id(layer.rule) for a in adapters for layer in (a.down, a.up)}) == 1
    assert all(isinstance(a, CompacterAdapter) and a.down.n == 2 for a in adapters)


def test_types_and_options_arrive():
    model = encoder().double()
    attach(model, "lora", targets=nn.MultiheadAttention, r=2, alpha=6)
    attach(model, "lora_bank", targets=["layers.0.linear?", "layers.1.linear1"], g=3, r=2, rslora=True)
    attach(model, "kron", targets="1.linear2", terms=2)
    attach(model, "bank", targets="norm2", g=2, r=3, activation="silu")
    first, second = model.layers
    assert isinstance(first.self_attn, LoRAMultiheadAttention) and first.self_attn.scale == 3
    assert isinstance(first.linear2, LoRABank) and first.linear2.slots == [0, 1, 2]
    assert float(first.linear2.scale[0]) == pytest.approx(16 / 2**0.5)
    assert isinstance(second.linear2, KronALinear) and second.linear2.kron.a.shape[0] == 2
    assert isinstance(second.norm2.attached, AdapterBank) and second.norm2.attached._options["activation"] == "silu"
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    half = encoder().bfloat16()
    attach(half, "bottleneck", r=2)
    attach(half, "bottleneck", targets="norm2", r=2, dtype=torch.bfloat16)
    assert half.layers[0].linear2.attached.up.weight.dtype == torch.float32
    assert half.layers[0].norm2.attached.up.weight.dtype == torch.bfloat16
    assert half(torch.randn(B, T, D, dtype=torch.bfloat16, device=DEVICE)).dtype == torch.bfloat16


def test_shared_layers_get_one_adapter():
    layer = encoder_layer()
    model = nn.Sequential(layer, layer)
    assert attach(model, "lora", targets="linear1", r=2) == ["0.linear1"]
    assert attach(model, "parallel", r=2) == ["0.linear2.attached"]
    assert model[0] is model[1] and isinstance(model[1].linear1, LoRALinear) and len(layer.linear2._forward_hooks) == 1


def test_no_lora_around_what_an_adapter_beside_a_block_reads():
    layer, x = encoder_layer(), torch.randn(B, T, D, device=DEVICE)
    attach(layer, "parallel", r=2)
    y = layer(x)
    with pytest.raises(ValueError, match="base must have no hooks, which would not run any more, got a Linear with hooks"):
        attach(layer, "lora", targets="linear1", r=2)
    assert torch.equal(layer(x), y) and layer.linear1.weight.requires_grad


@pytest.mark.parametrize("method", ["houlsby", "parallel", "lora"])
def test_copies_have_adapters_of_their_own(method):
    model, names = ready(method)
    x, twin = torch.randn(B, T, D, device=DEVICE), copy.deepcopy(model)
    y = model(x)
    assert torch.equal(twin(x), y)
    with torch.no_grad():
        for parameter in twin.get_submodule(names[0]).parameters():
            parameter.zero_()
    assert torch.equal(model(x), y) and not torch.equal(twin(x), y)


def test_checkpointing_and_compilation():
    """What keeps the input of a sublayer for the adapter beside it does so when a layer runs again, and in one graph."""
    model, _ = ready("parallel")
    x = torch.randn(B, T, D, device=DEVICE)
    model(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    assert all(torch.equal(p.grad, expected[name]) for name, p in model.named_parameters())
    torch.compiler.reset()
    layer = model.layers[0]
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


class Together(nn.Module):
    """Waits for the other thread."""

    def __init__(self, barrier):
        super().__init__()
        self.barrier = barrier

    def forward(self, x):
        self.barrier.wait(30)
        return x


def test_threads_run_one_model():
    model, _ = ready("parallel")
    xs = torch.randn(2, B, T, D, device=DEVICE)
    expected = [model(x) for x in xs]
    barrier = threading.Barrier(2)
    for layer in model.layers:
        layer.dropout = Together(barrier)  # in the midst of what has the adapter beside it
    with ThreadPoolExecutor(2) as threads:
        assert all(map(torch.equal, threads.map(model, xs), expected))


def test_generated_adapters_of_stacks_with_other_layers():
    """The layers of an encoder and of a decoder are numbered together."""
    model = nn.Transformer(D, H, 1, 1, F, dropout=0.0, batch_first=True, device=DEVICE)
    names = attach(model, "hyper", tasks=["one", "two"], r=2)
    assert (model.hyper.layers, model.hyper.positions, model.hyper.names) == (2, 3, ["one", "two"])
    sites = [model.get_submodule(name) for name in names[1:]]
    assert [(site.layer, site.position) for site in sites] == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    assert not any(".attached." in key for key in model.state_dict())
    with pytest.raises(ValueError, match="model must have no module 'hyper' yet"):
        attach(model, "hyper", targets="norm1", tasks=2)


def test_bad_input():
    model = encoder()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = r"layers.\*.self_attn \(MultiheadAttention\), layers.\*.linear1 \(Linear\), .*layers.\*.norm2 \(LayerNorm\)"
    for method, options, error, message in (
        ("adapters", {}, ValueError, rf"method must be one of {re.escape(str(METHODS))}, got 'adapters'"),
        ("lora", {"targets": "q_proj"}, ValueError, f"TransformerEncoder, which has no 'q_proj' but {found}"),
        ("lora", {"targets": ("linear1", nn.Conv1d)}, ValueError, f"which has no Conv1d but {found}"),
        ("lora", {"targets": "out_proj"}, ValueError, "which has no 'out_proj' but"),  # nothing calls it
        ("lora", {"targets": ()}, ValueError, f"targets must be given, got none; TransformerEncoder has {found}"),
        ("lora", {"targets": (3,)}, TypeError, "targets must be names or types of modules, got int"),
        ("lora", {"targets": ("linear1", "norm1")}, TypeError, "base must be a torch.nn.Linear .* got LayerNorm"),
        ("bottleneck", {"targets": "dropout1"}, ValueError, "that show their width, got 'layers.0.dropout1', a Dropout"),
        ("bottleneck", {"rank": 4}, TypeError, "unexpected keyword argument 'rank'"),
        ("bank", {}, TypeError, "^g must be an integer, got NoneType"),
        ("fusion", {}, TypeError, "^g must be an integer, got NoneType"),
        ("lora_bank", {}, TypeError, "^g must be an integer, got NoneType"),
        ("hyper", {}, TypeError, "^tasks must be a number or a sequence of names, got NoneType"),
        ("hyper", {"tasks": 2, "targets": ("linear1", "linear2")}, ValueError, r"one width for .* got \[16, 24\]"),
        ("prefix", {"targets": "linear1"}, TypeError, "base must be a torch.nn.MultiheadAttention, got Linear"),
        ("mam", {"p": 0}, ValueError, "p must be at least 1, got 0"),
        ("prompt", {}, ValueError, "targets must name the embedding for a prompt in a model not of Hugging Face"),
    ):
        with pytest.raises(error, match=message):
            attach(model, method, **options)
    with pytest.raises(ValueError, match="be given for Sequential, in which no layer .* but . .Linear., . .Embedding."):
        attach(nn.Sequential(nn.Linear(2, 2), nn.Embedding(2, 2)), "lora")
    with pytest.raises(ValueError, match="model must be one of Hugging Face, or have PrefixAttention or nn.MultiheadAttention"):
        attach(nn.Linear(2, 2), "prefix")
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got dict"):
        attach({}, "lora")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert len(before) == len(model.state_dict()) and all(p.requires_grad for p in model.parameters())


def test_attaching_twice():
    model = encoder()
    attach(model, "lora", targets="layers.0.linear2", r=2)
    attach(model, "bottleneck", targets=nn.LayerNorm, r=2)
    attach(model, "parallel", targets="layers.1.linear2", r=2)
    for method, options, name in (
        ("kron", {"targets": "linear2"}, "layers.0.linear2"),
        ("bottleneck", {"targets": "norm1"}, "layers.0.norm1"),
        ("lora", {"targets": "1.linear2"}, "layers.1.linear2"),
        ("houlsby", {}, "layers.1.linear2"),
    ):
        keys = list(model.state_dict())
        with pytest.raises(ValueError, match=f"targets must have no adapter yet, got '{name}', which has one"):
            attach(model, method, **options)
        assert list(model.state_dict()) == keys
