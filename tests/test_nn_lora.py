"""The modules of LoRA: what they start from, merging, what is frozen, quantised bases."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn

from fastadapt.nn import (
    BottleneckAdapter,
    LoRAEmbedding,
    LoRALinear,
    LoRAMultiheadAttention,
    ParallelAdapter,
    freeze_except,
)

from .accuracy import assert_within_reference_error
from .battery import DEVICE
from .test_lora_linear import Quantised

K, N, R, E, HEADS = 40, 24, 6, 24, 4
OPTIONS = {
    "lora": {},
    "rslora": {"rslora": True, "alpha": 3},
    "dora": {"dora": True},
    "lora-bias": {"lora_bias": True},
    "everything": {"dora": True, "lora_bias": True, "rslora": True, "dropout": 0.2},
}
over_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def conv1d():
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(N, K)


BASES = {"linear": lambda: nn.Linear(K, N), "no-bias": lambda: nn.Linear(K, N, bias=False), "conv1d": conv1d}
over_bases = pytest.mark.parametrize("make_base", BASES.values(), ids=BASES)


def randomised(layer):
    """Every parameter of the adapter away from its start, and the biases of the base."""
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if not name.startswith("base.") or name.endswith("bias"):
                p.copy_(torch.randn(p.shape) * 0.3 + (1.0 if name == "magnitude" else 0.0))
    return layer.to(DEVICE)


def effective_weight(layer):
    """What the layer multiplies with, as the papers write it, in float64."""
    weight, a, b = (t.double() for t in (layer.base.weight, layer.lora_A.weight, layer.lora_B.weight))
    weight = weight if isinstance(layer.base, nn.Linear) else weight.T
    total = weight + layer.scale * b @ a
    if layer.magnitude is not None:
        total = layer.magnitude.double()[:, None] * total / total.norm(dim=1, keepdim=True)
    return total if isinstance(layer.base, nn.Linear) else total.T


def saved(module):
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@over_options
@over_bases
def test_new_layer_computes_what_its_base_does(make_base, options, dtype):
    base = make_base().to(DEVICE, dtype)
    layer = LoRALinear(base, R, **options)
    assert layer.base is base and not base.weight.requires_grad and layer.lora_A.weight.dtype == torch.float32
    x = torch.randn(50, K, device=DEVICE).to(dtype)
    assert_within_reference_error(layer(x), base(x), copy.deepcopy(base).double()(x.double()), "output")


@over_options
@over_bases
def test_learns_beside_a_frozen_base(make_base, options):
    layer = randomised(LoRALinear(make_base(), R, **options))
    layer(torch.randn(5, K, device=DEVICE)).square().sum().backward()
    assert layer.base.weight.grad is None
    for name, p in layer.named_parameters():
        assert name.startswith("base.") or p.grad.any(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@over_options
@over_bases
def test_merging(make_base, options, dtype):
    """The merged weight is rounded once, the layer computes the same, and unmerging gives back the very parameters."""
    layer = randomised(LoRALinear(make_base().to(dtype), R, **options)).eval()
    x = torch.randn(50, K, device=DEVICE).to(dtype)
    with torch.no_grad():
        y = layer(x)
        oracle = copy.deepcopy(layer).double()(x.double())
    weight, bias, bits = layer.base.weight, layer.base.bias, layer.base.weight.detach().clone()
    exact = effective_weight(layer)
    layer.merge()
    assert layer.merged and layer.base.weight.stride() == weight.stride()
    error = (layer.base.weight.double() - exact).abs()
    assert (error <= (0.51 if dtype == torch.bfloat16 else 4) * torch.finfo(dtype).eps * exact.abs() + 1e-6).all()
    conv = not isinstance(layer.base, nn.Linear)
    plain = nn.functional.linear(x, (exact.T if conv else exact).to(dtype), layer.base.bias)
    assert_within_reference_error(layer(x), plain, oracle, "merged")
    with pytest.raises(RuntimeError, match="merge: the adapter is merged already"):
        layer.merge()
    layer.unmerge()
    assert layer.base.weight is weight and layer.base.bias is bias and torch.equal(weight, bits)
    assert torch.equal(layer(x), y)
    with pytest.raises(RuntimeError, match="unmerge: the adapter is not merged"):
        layer.unmerge()


def test_merged_layer_can_be_copied_and_changed():
    layer = randomised(LoRALinear(nn.Linear(K, N), R)).eval()
    x, weight = torch.randn(5, K, device=DEVICE), layer.base.weight.detach().clone()
    layer.merge()
    other = copy.deepcopy(layer)
    assert sorted(layer.state_dict()) == ["base.bias", "base.weight", "lora_A.weight", "lora_B.weight"]
    assert torch.equal(layer.state_dict()["base.weight"], layer.base.weight)  # the merged one, as documented
    other.unmerge()
    assert torch.equal(other.base.weight, weight) and layer.merged
    layer.double().unmerge()
    assert layer(x.double()).dtype == torch.float64
    torch.testing.assert_close(layer(x.double()).float(), other(x))


def test_merging_in_16_bits_for_training_warns():
    for dtype in (torch.bfloat16, torch.float16):
        layer = LoRALinear(nn.Linear(K, N, dtype=dtype), R)
        with pytest.warns(UserWarning, match=f"merged {dtype} weight loses every update below half a unit"):
            layer.merge()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LoRALinear(nn.Linear(K, N, dtype=torch.bfloat16), R).eval().merge()
        LoRALinear(nn.Linear(K, N), R).merge()


def test_dropout_acts_in_training_only():
    layer = randomised(LoRALinear(nn.Linear(K, N), R, dropout=0.5))
    x = torch.randn(5, K, device=DEVICE)
    assert not torch.equal(layer.train()(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))
    torch.testing.assert_close(layer(x), x @ effective_weight(layer).float().T + layer.base.bias)
    torch.manual_seed(7)
    first = layer.train()(x)
    torch.manual_seed(7)
    assert torch.equal(layer(x), first)


@over_options
def test_state_dict(options):
    """Ordinary keys that survive a file and another module."""
    layer = randomised(LoRALinear(nn.Linear(K, N), R, **options)).eval()
    keys = ["base.bias", "base.weight", "lora_A.weight"]
    keys += ["lora_B.bias"] * ("lora_bias" in options) + ["lora_B.weight"] + ["magnitude"] * ("dora" in options)
    assert sorted(layer.state_dict()) == keys
    other = LoRALinear(nn.Linear(K, N, device=DEVICE), R, **options).eval()
    other.load_state_dict(saved(layer))
    x = torch.randn(5, K, device=DEVICE)
    assert torch.equal(other(x), layer(x))
    with torch.device("meta"):
        empty = LoRALinear(nn.Linear(K, N), R, **options)
    empty = empty.to_empty(device=DEVICE).apply(lambda m: m.reset_parameters())
    assert torch.isfinite(empty(x)).all() and not empty.lora_B.weight.any()


@pytest.mark.parametrize("make", [lambda: LoRALinear(nn.Linear(K, N)), lambda: LoRAEmbedding(nn.Embedding(K, N))])
def test_no_new_start_while_merged(make):
    layer = randomised(make())
    layer.merge()
    before = saved(layer)
    with pytest.raises(RuntimeError, match="reset_parameters: unmerge the adapter first"):
        layer.reset_parameters()
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())


def test_embedding():
    base = nn.Embedding(20, N, padding_idx=3)
    layer = LoRAEmbedding(base.bfloat16(), R, alpha=3).to(DEVICE)
    ids = torch.tensor([[1, 3, 19], [0, 1, 3]], device=DEVICE)
    assert torch.equal(layer(ids), base(ids)) and layer.lora_B.weight.any() and layer.scale == 0.5
    randomised(layer)
    for autocast in (False, True):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            y = layer(ids)
        assert y.dtype == torch.bfloat16 and torch.equal(y, layer(ids))
    y.float().square().sum().backward()
    assert sorted(layer.lora_A.weight.grad.any(0).nonzero().flatten().tolist()) == [0, 1, 19]  # not the padding
    layer.float().eval()
    delta = layer.lora_B.weight.double() @ layer.lora_A.weight.double()
    exact = (layer.base.weight.double() + layer.scale * delta.T)[ids]
    plain = base(ids) + layer.scale * nn.functional.embedding(ids, layer.lora_A.weight.T) @ layer.lora_B.weight.T
    assert_within_reference_error(layer(ids), plain, exact, "embedding")
    weight = layer.base.weight
    layer.merge()
    assert_within_reference_error(layer(ids), plain, exact, "merged embedding")
    layer.unmerge()
    assert layer.base.weight is weight


def modules_to_compile():
    attention = LoRAMultiheadAttention(nn.MultiheadAttention(E, HEADS, batch_first=True), R, dropout=0.1)
    x, ids = torch.randn(3, 5, E, device=DEVICE), torch.tensor([1, 2, 3], device=DEVICE)
    merged = randomised(LoRALinear(nn.Linear(K, N), R))
    merged.merge()
    return {
        "attention": (attention, (x, x, x, None, False)),
        "embedding": (LoRAEmbedding(nn.Embedding(9, N), R), (ids,)),
        "merged": (merged, (torch.randn(5, K, device=DEVICE),)),
    }


@pytest.mark.parametrize("name", ["attention", "embedding", "merged"])
def test_compiles_without_graph_break(name):
    module, args = modules_to_compile()[name]
    module = module.to(DEVICE)
    torch._dynamo.reset()
    results = []
    for call in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(3)
        y = call(*args)
        results.append(y[0] if isinstance(y, tuple) else y)
    assert torch.equal(*results)


def test_freeze_except():
    model = nn.ModuleDict(
        {
            "lora_named_but_not_one": nn.Linear(K, K),
            "first": LoRALinear(nn.Linear(K, K), R, dora=True),
            "attention": LoRAMultiheadAttention(nn.MultiheadAttention(E, HEADS), R),
            "embedding": LoRAEmbedding(nn.Embedding(9, K), R),
            "norm": nn.LayerNorm(K),
            "parallel": ParallelAdapter(nn.Linear(K, K), BottleneckAdapter(K, R)),
        }
    )
    lora = {
        *(f"first.{n}" for n in ("lora_A.weight", "lora_B.weight", "magnitude")),
        *(f"embedding.lora_{n}.weight" for n in "AB"),
        *(f"attention.lora_{n}.{t}.weight" for n in "AB" for t in "qv"),
    }
    bottleneck = {f"parallel.adapter.{n}.{p}" for n in ("down", "up") for p in ("weight", "bias")}
    norm = {"norm.weight", "norm.bias"}
    linear = {"lora_named_but_not_one.weight", "lora_named_but_not_one.bias", "first.lora_A.weight", "first.lora_B.weight"}
    for kinds, expected in (
        ("lora", lora),
        ("bottleneck", bottleneck),
        (["lora", nn.LayerNorm], lora | norm),
        (("bottleneck", "lora"), bottleneck | lora),
        (LoRALinear, {n for n in lora if n.startswith("first")}),
    ):
        trainable = freeze_except(model, kinds)
        assert set(trainable) == expected
        assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
        assert all(trainable[name] is model.get_parameter(name) for name in expected)
    assert linear <= set(freeze_except(model, nn.Linear)) and "first.base.weight" not in freeze_except(model, nn.Linear)
    with pytest.raises(ValueError, match="kinds must be types of modules or some of .*, got 'sides'"):
        freeze_except(model, "sides")
    with pytest.raises(ValueError, match="model must have a module of the kind 'lora', got none"):
        freeze_except(linear := nn.Linear(3, 3), "lora")
    assert linear.weight.requires_grad  # what fails changes nothing


class Odd(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


BAD = {
    "base": (lambda: LoRALinear(nn.Conv2d(3, 3, 1)), TypeError, "base must be a torch.nn.Linear or a Conv1D .*got Conv2d"),
    "name": (lambda: LoRALinear("query"), TypeError, "base must be a module, got str"),
    "own-forward": (lambda: LoRALinear(Odd(3, 3)), TypeError, "base must be linear .*got Odd with a forward of its own"),
    "twice": (lambda: LoRALinear(LoRALinear(nn.Linear(3, 3))), TypeError, "base must be .*got LoRALinear"),
    "r": (lambda: LoRALinear(nn.Linear(3, 3), 0), ValueError, "r must be at least 1, got 0"),
    "alpha": (lambda: LoRALinear(nn.Linear(3, 3), alpha=float("nan")), ValueError, "alpha must be a finite number, got nan"),
    "dropout": (lambda: LoRALinear(nn.Linear(3, 3), dropout=1), ValueError, r"dropout must be a number in \[0, 1\), got 1"),
    "flag": (lambda: LoRALinear(nn.Linear(3, 3), dora=1), TypeError, "dora must be True or False, got int"),
    "backend": (lambda: LoRALinear(nn.Linear(3, 3), backend="gpu"), ValueError, "backend must be one of .*got 'gpu'"),
    "zero-row": (
        lambda: LoRALinear(nn.Linear(3, 3).requires_grad_(False).apply(lambda m: m.weight[1].zero_()), dora=True),
        ValueError,
        "base must have no row of zeros with dora=True",
    ),
    "embedding": (lambda: LoRAEmbedding(nn.Linear(3, 3)), TypeError, "base must be a torch.nn.Embedding.*got Linear"),
    "max-norm": (lambda: LoRAEmbedding(nn.Embedding(3, 3, max_norm=1.0)), ValueError, "max_norm=None, got 1.0"),
    "attention": (lambda: LoRAMultiheadAttention(nn.Linear(3, 3)), TypeError, "base must be a torch.nn.Multihead"),
    "bias-kv": (
        lambda: LoRAMultiheadAttention(nn.MultiheadAttention(4, 2, add_bias_kv=True)), ValueError, "add_bias_kv=False",
    ),
    "targets": (
        lambda: LoRAMultiheadAttention(nn.MultiheadAttention(4, 2), targets=("q", "o")),
        ValueError,
        r"targets must be some of .*got \('q', 'o'\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("make, error, message", BAD.values(), ids=BAD)
def test_refuses_what_it_cannot_compute(make, error, message):
    with pytest.raises(error, match=message):
        make()


def quantised_stand_in():
    base = nn.Linear(K, N, device=DEVICE)
    base.weight = Quantised(base.weight.detach())
    return base, lambda w: w.data * w.scale


def torchao_base(config, dtype):
    def make():
        torchao = pytest.importorskip("torchao.quantization", reason="the library torchao is not installed")
        model = nn.Sequential(nn.Linear(64, 48, device=DEVICE, dtype=dtype))
        torchao.quantize_(model, config(torchao))
        return model[0], lambda w: w.dequantize()

    return make


def nf4_base():
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="the library bitsandbytes is not installed")
    base = bitsandbytes.nn.Linear4bit(128, 48, quant_type="nf4", compute_dtype=torch.float32)
    base = base.to(DEVICE)
    return base, lambda w: bitsandbytes.functional.dequantize_4bit(w.data, w.quant_state)


QUANTISED = {
    "stand-in": quantised_stand_in,
    "int8": torchao_base(lambda q: q.Int8WeightOnlyConfig(), torch.float32),
    "int8-bfloat16": torchao_base(lambda q: q.Int8WeightOnlyConfig(), torch.bfloat16),
    "int4": torchao_base(lambda q: q.IntxWeightOnlyConfig(weight_dtype=torch.int4), torch.float32),
    "nf4": nf4_base,
}


@pytest.mark.parametrize("options", [{}, {"dora": True, "dropout": 0.3}], ids=["lora", "dora-dropout"])
@pytest.mark.parametrize("make", QUANTISED.values(), ids=QUANTISED)
def test_quantised_base(make, options):
    """Bit for bit what a base with the dense weight gives, in forward, backward and merging."""
    base, dequantise = make()
    weight = dequantise(base.weight)
    plain = nn.Linear(base.in_features, base.out_features).to(DEVICE, weight.dtype)
    with torch.no_grad():
        plain.weight.copy_(weight)
        plain.bias.copy_(base.bias)
    quantised, dense = LoRALinear(base, R, **options), LoRALinear(plain, R, **options)
    dense.load_state_dict({**randomised(quantised).state_dict(), "base.weight": weight}, strict=False)
    x = torch.randn(2, 5, base.in_features, device=DEVICE).to(weight.dtype)
    results = []
    for layer in (quantised, dense):
        torch.manual_seed(3)
        x = x.detach().requires_grad_()
        y = layer(x)
        grads = torch.autograd.grad(y.square().sum(), [x, *(p for p in layer.parameters() if p.requires_grad)])
        layer.eval().merge()
        results.append([y, *grads, layer.base.weight])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results))
    quantised.unmerge()
    assert torch.equal(dequantise(quantised.base.weight), weight)


def test_a_weight_packed_anew_is_refused():
    """bitsandbytes does that on some CPUs when its own layer runs in evaluation; read as before it would be another weight."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="the library bitsandbytes is not installed")
    base = bitsandbytes.nn.Linear4bit(128, 64, quant_type="nf4", compute_dtype=torch.float32).to(DEVICE)
    base.eval()(torch.randn(2, 128, device=DEVICE))
    layer = LoRALinear(base, R)
    x = torch.randn(2, 128, device=DEVICE)
    if getattr(base.weight.quant_state, "packing_format_for_cpu", False):
        with pytest.raises(ValueError, match="packed anew for a CPU"):
            layer(x)
    else:
        torch.testing.assert_close(layer(x), base(x), rtol=0.02, atol=0.02)
