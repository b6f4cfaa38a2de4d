"""Modules of Kronecker products: Compacter, PHM layers, KronA; what they start from, shared rules, merging."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastadapt
from fastadapt.nn import (
    BottleneckAdapter,
    CompacterAdapter,
    KronALinear,
    KronLinear,
    ParallelAdapter,
    PHMLinear,
    freeze_except,
    phm_rule,
)
from fastadapt.ops.bottleneck import ACTIVATIONS

from .accuracy import assert_within_reference_error
from .battery import DEVICE
from .modules import call, gradients, randomised

D, R, K, N = 24, 8, 24, 36
OPTIONS = {
    "plain": {},
    "no-bias": {"bias": False},
    "rank-3": {"rank": 3, "activation": "silu"},
    "n2": {"n": 2, "scale": 0.3},
    "full": {"rank": None, "activation": "gelu_tanh"},
    "factorized": {"factorized_rule": True, "activation": "tanh"},
    "learned-scale": {"scale": "learned"},
    "norm": {"norm": "pre", "norm_eps": 1e-3},
    "branch": {"residual": False},
    "full-with-everything": {"rank": None, "norm": "pre", "scale": "learned", "factorized_rule": True},
    "everything": {"n": 2, "rank": 2, "norm": "pre", "scale": "learned", "factorized_rule": True},
}
over_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
LAYERS = {
    "phm": lambda **o: PHMLinear(K, N, **o),
    "phm-full": lambda **o: PHMLinear(K, N, n=2, rank=None, factorized_rule=True, bias=False, **o),
    "phm-factorized": lambda **o: PHMLinear(K, N, rank=2, factorized_rule=True, **o),
    "kron": lambda **o: KronLinear(K, N, **o),
    "kron-sum": lambda **o: KronLinear(K, N, a_shape=(2, 9), terms=3, bias=False, **o),
    "kron-low-rank": lambda **o: KronLinear(K, N, a_shape=(3, 4), rank=2, **o),
}
over_layers = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def matrix(layer):
    """``(in_features, out_features)``, term by term."""
    a, b = (t if isinstance(t, torch.Tensor) else t[0] @ t[1] for t in layer.factors)
    return sum(torch.kron(*pair) for pair in zip(a, b))


def plain_layer(layer, x):
    return F.linear(x, matrix(layer).T, layer.bias)


def plain(adapter, x, residual=None):
    """What the module stands for, in ordinary PyTorch with its own submodules."""
    if residual is None and adapter.residual:
        residual = x
    z = plain_layer(adapter.down, x if adapter.norm is None else adapter.norm(x))
    y = adapter.scale * plain_layer(adapter.up, ACTIVATIONS[adapter.activation](z))
    return y if residual is None else residual + y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@over_options
def test_new_adapter_is_the_identity_and_learns(options, dtype):
    adapter = CompacterAdapter(D, R, **options, device=DEVICE, dtype=dtype)
    x, residual = torch.randn(2, 3, 4, D, device=DEVICE).to(dtype)
    assert torch.equal(adapter(x), x if adapter.residual else torch.zeros_like(x))
    assert torch.equal(adapter(x, residual), residual)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for last in (False, True):
        adapter(x, residual).float().square().sum().backward()
        if not last:
            optimizer.step()
            optimizer.zero_grad()
    for name, parameter in adapter.named_parameters():  # one step is enough to reach all of them
        assert parameter.grad.any(), name


def assert_same(expected_fn, module, grad_y, *inputs, fn=call, exact=False):
    """Output and every gradient, in float64 unless to the bit."""
    cast = (lambda t: t) if exact else (lambda t: t.double())
    module, (grad_y, *inputs) = cast(module), map(cast, (grad_y, *inputs))
    expected, actual = (gradients(f, module, grad_y, *inputs) for f in (expected_fn, fn))
    for name in expected:
        assert expected[name].any(), f"{name} has no part in the result"
        torch.testing.assert_close(actual[name], expected[name], **({"rtol": 0, "atol": 0} if exact else {}))


@over_options
def test_equals_ordinary_modules(options):
    adapter = randomised(CompacterAdapter(D, R, **options))
    x, residual, grad_y = torch.randn(3, 6, 7, D, device=DEVICE)
    assert_same(plain, adapter, grad_y, x)
    assert_same(plain, adapter, grad_y, x, residual)


def by_hand(adapter, x, residual):
    """The op that the module stands for; its own tests say how far that may be from plain PyTorch."""
    down, up, scale = adapter.down, adapter.up, adapter.scale
    options = {
        "down_bias": down.bias, "up_bias": up.bias, "residual": residual, "activation": adapter.activation,
        "scale": scale.view(()) if isinstance(scale, torch.Tensor) else scale,
    }  # fmt: skip
    if down.rank is None:
        norm = {"norm_weight": adapter.norm.weight, "norm_bias": adapter.norm.bias} if adapter.norm else {}
        return fastadapt.bottleneck(x, down.dense_weight(), up.dense_weight(), **options, **norm)
    if adapter.norm:
        x = F.layer_norm(x, (D,), adapter.norm.weight.to(x.dtype), adapter.norm.bias.to(x.dtype), adapter.norm.eps)
    factors = ((phm.factors[0], phm.s, phm.t) for phm in (down, up))
    return fastadapt.compacter(x, *factors, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@over_options
def test_is_one_call_of_the_op(options, dtype):
    x, residual, grad_y = torch.randn(3, 6, 7, D, device=DEVICE).to(dtype)
    for parameters in {dtype, torch.float32}:
        adapter = randomised(CompacterAdapter(D, R, **options), parameters)
        assert_same(by_hand, adapter, grad_y, x, residual, exact=True)


@over_layers
def test_layers_equal_ordinary_ones(make):
    layer = randomised(make())
    assert_same(plain_layer, layer, torch.randn(6, 7, N, device=DEVICE), torch.randn(6, 7, K, device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@over_layers
def test_dense_weight(make, dtype):
    """Rounded once, and what a linear layer needs."""
    layer = randomised(make(), dtype)
    exact = matrix(copy.deepcopy(layer).double()).T
    with torch.autocast(DEVICE, torch.bfloat16):
        weight = layer.dense_weight()
    assert weight.dtype == dtype and weight.shape == (N, K)
    eps = torch.finfo(dtype).eps
    assert ((weight.double() - exact).abs() <= 0.51 * eps * exact.abs() + 64 * torch.finfo(torch.float32).eps).all()
    weight.sum().backward()
    assert all(p.grad.any() for name, p in layer.named_parameters() if name != "bias")


@over_layers
def test_layers_start_like_nn_linear(make):
    variance = torch.stack([make().dense_weight().detach().var() for _ in range(400)]).mean()
    assert abs(variance * 3 * K - 1) < 0.2  # the mean of 400 matrices of dependent elements
    layer = make()
    assert layer.bias is None or not layer.bias.any()


def sharing(layers, factorized, **options):
    rule = phm_rule(4, factorized=factorized)
    options = {"activation": "gelu", "shared_rule": rule, **options}
    return nn.Sequential(*(CompacterAdapter(D, R, **options) for _ in range(layers)))


@pytest.mark.parametrize("factorized", [False, True])
def test_a_shared_rule_gets_the_gradients_of_all_layers(factorized):
    model = randomised(sharing(3, factorized))
    names = [name for name, _ in model.named_parameters() if "rule" in name]
    assert names == (["0.down.rule_left", "0.down.rule_right"] if factorized else ["0.down.rule"])
    x, grad_y = torch.randn(2, 5, D, device=DEVICE)

    def ordinary(model, x):
        for adapter in model:
            x = plain(adapter, x)
        return x

    assert_same(ordinary, model, grad_y, x)
    # The same with a rule for each projection, whose gradients are then added.
    apart = nn.Sequential(*(CompacterAdapter(D, R, factorized_rule=factorized, dtype=torch.float64) for _ in range(3)))
    apart.to(DEVICE).load_state_dict(model.state_dict())
    tied, own = (gradients(call, m, grad_y.double(), x.double()) for m in (model.double(), apart))
    for name in names:
        parts = [grad for key, grad in own.items() if key.split(".")[-1] == name.split(".")[-1]]
        assert len(parts) == 6
        torch.testing.assert_close(tied[name], sum(parts))


def test_a_shared_rule_stays_one_parameter():
    """Through copies, files, casts and a new start, which leaves it as it is."""
    model = randomised(sharing(2, False))
    whole = io.BytesIO()
    torch.save(model, whole)
    whole.seek(0)
    for other in (copy.deepcopy(model), torch.load(whole, weights_only=False), copy.deepcopy(model).double()):
        rule = other[0].down.rule
        assert all(phm.rule is rule for adapter in other for phm in (adapter.down, adapter.up))
        assert rule is not model[0].down.rule
        before = rule.detach().clone()
        for adapter in other:
            adapter.reset_parameters()
        assert torch.equal(rule, before) and not other[0].up.t.any()
        other.load_state_dict(model.state_dict())
        assert torch.equal(rule, model[0].down.rule.to(rule.dtype))
    keys = ["down.bias", "down.rule", "down.s", "down.t", "up.bias", "up.rule", "up.s", "up.t"]
    assert sorted(model[0].state_dict()) == keys
    assert sorted(CompacterAdapter(D, R, rank=None, bias=False, factorized_rule=True).state_dict()) == [
        "down.b", "down.rule_left", "down.rule_right", "up.b", "up.rule_left", "up.rule_right",
    ]  # fmt: skip


def test_presets():
    pairs = CompacterAdapter.compacter(3, 768)
    single = CompacterAdapter.compacter_plus_plus(3, 768, 48, n=12, rank=None, activation="relu", dtype=torch.float64)
    assert len(pairs) == len(single) == 3 and all(len(pair) == 2 for pair in pairs)
    adapters = [adapter for pair in pairs for adapter in pair]
    assert {id(phm.rule) for a in adapters for phm in (a.down, a.up)} == {id(adapters[0].up.rule)}
    assert {id(phm.rule) for a in single for phm in (a.down, a.up)} == {id(single[0].down.rule)}
    assert all(a.options()["activation"] == "gelu_tanh" and (a.r, a.down.n, a.down.rank) == (24, 4, 1) for a in adapters)
    assert all(a.options()["activation"] == "relu" and (a.r, a.down.n, a.down.rank) == (48, 12, None) for a in single)
    assert single[0].up.b.dtype == single[0].down.rule.dtype == torch.float64
    assert abs(single[0].down.rule.std() * 1e4 - 1) < 0.1  # 1728 numbers
    for bound, factor in ((12 / (192 + 1), adapters[0].down.s), (12 / (64 + 4), single[0].down.b)):
        assert 0.9 * bound < factor.square().max() <= bound  # Glorot's, with gain sqrt(2)
    x = torch.randn(5, 768)
    assert 0 < (pairs[0][0](x) - x).abs().max() < 1e-3
    identical = CompacterAdapter.compacter(1, 768, init_std=None)[0][1]
    assert torch.equal(identical(x), x) and identical.up.rule.std() > 0.1
    given = phm_rule(2)
    assert CompacterAdapter.compacter_plus_plus(1, D, n=2, shared_rule=given)[0].up.rule is given
    assert [CompacterAdapter.compacter_plus_plus(1, d)[0].r for d in (32, 384, 1024)] == [4, 12, 32]


@pytest.mark.parametrize("rank", [2, None])
def test_autocast_keeps_the_dtype_of_x(rank):
    if rank and not {("native", DEVICE), ("triton", DEVICE)} & fastadapt.compacter.leaf.available:
        pytest.skip("compacter has no kernel here")
    adapter = randomised(CompacterAdapter(D, R, rank=rank, norm="pre", factorized_rule=True))
    x = torch.randn(4, D, device=DEVICE)
    y = adapter(x)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(adapter(x), y)


BASES = {
    "linear": lambda: nn.Linear(K, N),
    "no-bias": lambda: nn.Linear(K, N, bias=False),
    "conv1d": lambda: pytest.importorskip("transformers.pytorch_utils").Conv1D(N, K),
}
KRONA = {"dense": {}, "sum": {"terms": 3, "a_shape": (4, 2), "scale": 2}, "low-rank": {"rank": 2, "scale": 0.5}}


def krona(base, options, dtype=torch.float32):
    layer = KronALinear(BASES[base]().to(DEVICE, dtype), **options)
    with torch.no_grad():
        for p in layer.kron.parameters():
            p.normal_(std=0.5)
    return layer.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", KRONA.values(), ids=KRONA)
@pytest.mark.parametrize("base", BASES)
def test_krona(base, options, dtype):
    """A new layer is its base; the frozen weight gets no gradient; merging is exact but for one rounding, and undone."""
    frozen = BASES[base]().to(DEVICE, dtype)
    new = KronALinear(frozen, **options)
    x = torch.randn(50, K, device=DEVICE).to(dtype)
    assert torch.equal(new(x), frozen(x)) and new.base is frozen
    new(x).float().square().sum().backward()
    first = new.kron.t if options.get("rank") else new.kron.b
    assert first.grad.any() and frozen.weight.grad is None and first.dtype == torch.float32

    layer = krona(base, options, dtype)
    double = copy.deepcopy(layer).double()
    weight = double.base.weight.T if base == "conv1d" else double.base.weight
    exact = weight + layer.scale * matrix(double.kron).T
    oracle = F.linear(x.double(), exact, double.base.bias)
    ordinary = layer.base(x) + layer.scale * (x @ matrix(layer.kron).to(dtype))
    assert_within_reference_error(layer(x), ordinary, oracle, "y")
    kept, y = layer.base.weight, layer(x)
    layer.merge()
    merged = layer.base.weight.T if base == "conv1d" else layer.base.weight
    eps = torch.finfo(dtype).eps
    assert ((merged.double() - exact).abs() <= 0.51 * eps * exact.abs() + 64 * torch.finfo(torch.float32).eps).all()
    assert_within_reference_error(layer(x), F.linear(x, exact.to(dtype), layer.base.bias), oracle, "merged")
    with pytest.raises(RuntimeError, match="reset_parameters: unmerge the adapter first"):
        layer.reset_parameters()
    layer.unmerge()
    assert layer.base.weight is kept and torch.equal(layer(x), y)


def test_krona_under_autocast():
    layer = krona("linear", KRONA["dense"])
    x = torch.randn(5, K, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_freeze_except():
    model = nn.Sequential(nn.Linear(D, D), sharing(2, False), KronALinear(nn.Linear(D, D)), BottleneckAdapter(D, R))
    assert list(freeze_except(model, "kron")) == ["2.kron.b", "2.kron.a"]
    trained = freeze_except(model, "compacter")
    assert len(trained) == 1 + 2 * 6 and "1.0.down.rule" in trained
    assert not any(p.requires_grad for p in model[2].parameters())
    assert list(freeze_except(KronALinear(nn.Linear(D, D)), (nn.Linear, "kron"))) == ["kron.b", "kron.a"]


def test_parallel_adapter():
    adapter = randomised(CompacterAdapter(D, R, residual=False))
    wrapped = ParallelAdapter(nn.Linear(D, D).to(DEVICE), adapter)
    x = torch.randn(2, 3, D, device=DEVICE)
    torch.testing.assert_close(wrapped(x), plain(adapter, x, wrapped.layer(x)))


def compiled_cases():
    yield "shared", sharing(2, False), D
    yield "shared-factorized", sharing(1, True), D
    yield "everything", CompacterAdapter(D, R, **OPTIONS["everything"]), D
    yield "full", CompacterAdapter(D, R, rank=None, norm="pre"), D
    yield "krona", KronALinear(nn.Linear(K, N), rank=2), K


@pytest.mark.parametrize("module, width", [pytest.param(m, w, id=n) for n, m, w in compiled_cases()])
def test_compiles_and_checkpoints(module, width):
    """One graph, and a replay of forward, give the same bits."""
    module = randomised(module)
    x = torch.randn(6, width, device=DEVICE)
    grad_y = torch.randn_like(module(x))
    wanted = {name: p for name, p in module.named_parameters() if p.requires_grad}
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    replay = lambda x: torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)  # noqa: E731
    eager, *others = (torch.autograd.grad(f(x), list(wanted.values()), grad_y) for f in (module, compiled, replay))
    for other in others:
        for name, expected, actual in zip(wanted, eager, other):
            assert torch.equal(actual, expected), name


def test_meta_device():
    model = CompacterAdapter(D, R, norm="pre", scale="learned", device="meta")
    model.to_empty(device=DEVICE).reset_parameters()
    x = torch.randn(3, D, device=DEVICE)
    assert torch.equal(model(x), x) and all(p.isfinite().all() for p in model.parameters())


LEFT, _ = phm_rule(4, factorized=True)
BAD = {
    "d": ({"d": 25}, ValueError, "d must be a multiple of n = 4, got 25"),
    "r": ({"r": 6}, ValueError, "r must be a multiple of n = 4, got 6"),
    "n": ({"n": 0}, ValueError, "n must be at least 1, got 0"),
    "rank": ({"rank": 0}, ValueError, "rank must be at least 1, got 0"),
    "scale": ({"scale": "channel"}, ValueError, "scale must be a number or 'learned', got 'channel'"),
    "init_std": ({"init_std": 0}, ValueError, "init_std must be None or a positive number, got 0"),
    "rule-size": ({"shared_rule": phm_rule(2)}, ValueError, r"shared_rule must be a .* \(4, 4, 4\).*got \[\(2, 2, 2\)\]"),
    "rule-pair": ({"shared_rule": (LEFT, LEFT)}, ValueError, r"shared_rule must be .*got \[\(4, 4, 1\), \(4, 4, 1\)\]"),
    "rule-tensor": ({"shared_rule": LEFT.detach()}, ValueError, r"shared_rule must be a Parameter.*got \['Tensor'\]"),
}


@pytest.mark.parametrize("change, error, message", BAD.values(), ids=BAD)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        CompacterAdapter(**{"d": D, "r": R, **change})


def test_bad_arguments_of_layers():
    with pytest.raises(ValueError, match=r"a_shape\[1\] must divide 36, got 5"):
        KronLinear(K, N, a_shape=(2, 5))
    with pytest.raises(ValueError, match=r"a_shape must be \(a_in, a_out\) or None, got 2"):
        KronALinear(nn.Linear(K, N), a_shape=2)
    with pytest.raises(TypeError, match="bias must be True or False, got NoneType"):
        PHMLinear(K, N, bias=None)
    with pytest.raises(ValueError, match="backend must be one of .*got 'abacus'"):
        KronLinear(K, N, backend="abacus")
    with pytest.raises(ValueError, match="scale must be a finite number, got inf"):
        KronALinear(nn.Linear(K, N), scale=float("inf"))
    with pytest.raises(TypeError, match="base must be a torch.nn.Linear or a Conv1D of transformers, got Identity"):
        KronALinear(nn.Identity())
