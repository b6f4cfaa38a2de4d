"""The modules: parameters under ordinary names, identity at the start, and the op's mathematics whatever the option."""

import collections
import copy
import io
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastadapt.nn import AdapterBank, BottleneckAdapter, ParallelAdapter, Switched
from fastadapt.ops.bottleneck import ACTIVATIONS

from .accuracy import assert_within_reference_error
from .battery import DEVICE
from .modules import assert_equal_to, call, gradients, randomised

D, R, G = 24, 5, 3
OPTIONS = {
    "plain": {},
    "no-bias": {"bias": False},
    "norm": {"norm": "pre", "norm_eps": 1e-3},
    "learned-scale": {"scale": "learned", "activation": "gelu"},
    "channel-scale": {"scale": "channel", "activation": "silu"},
    "number-scale": {"scale": 0.3, "activation": "tanh"},
    "channel-skip": {"skip": "channel", "activation": "gelu_tanh"},
    "hidden-skip": {"skip": "hidden", "scale": 2},
    "branch": {"residual": False, "activation": "identity"},
    "everything": {"norm": "pre", "scale": "channel", "skip": "hidden", "activation": "gelu"},
}
over_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
PRESETS = ("houlsby", "pfeiffer", "parallel", "adapter_plus")


def plain(adapter, x, residual=None):
    """What the module stands for, in ordinary PyTorch with its own submodules."""
    if residual is None and adapter.residual:
        residual = x
    z = adapter.down(x if adapter.norm is None else adapter.norm(x))
    hidden = ACTIVATIONS[adapter.activation](z)
    if adapter.hidden_skip_weight is not None:
        hidden = hidden + adapter.hidden_skip_weight * z
    y = adapter.scale * adapter.up(hidden)
    if adapter.skip_weight is not None:
        y = y + adapter.skip_weight * x
    return y if residual is None else residual + y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@over_options
def test_new_adapter_is_the_identity(options, dtype):
    adapter = BottleneckAdapter(D, R, **options, device=DEVICE, dtype=dtype)
    x, residual = torch.randn(2, 3, 4, D, device=DEVICE).to(dtype)
    assert torch.equal(adapter(x), x if adapter.residual else torch.zeros_like(x))
    assert torch.equal(adapter(x, residual), residual)
    bank = AdapterBank(G, D, R, **options, device=DEVICE, dtype=dtype)
    ids = torch.tensor([2, -1, 0], device=DEVICE)
    assert torch.equal(bank(x, ids), x if adapter.residual else torch.zeros_like(x))
    assert torch.equal(bank(x, ids, residual), residual)


def test_new_adapter_learns():
    adapter = BottleneckAdapter(D, R, device=DEVICE)
    adapter(torch.randn(4, D, device=DEVICE)).square().sum().backward()
    assert adapter.up.weight.grad.abs().sum() > 0 and adapter.down.weight.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@over_options
def test_equals_ordinary_modules(options, dtype):
    if dtype == torch.bfloat16:  # the slope of relu jumps at zero, where rounding decides on which side: luck, for both
        options = {"activation": "gelu", **options}
    adapter = randomised(BottleneckAdapter(D, R, **options), dtype)
    x, residual, grad_y = torch.randn(3, 16, 6, 7, D, device=DEVICE).to(dtype)
    assert_equal_to(plain, call, adapter, grad_y, x)
    assert_equal_to(plain, call, adapter, grad_y, x, residual)


def test_float32_parameters_serve_bfloat16_activations():
    adapter = randomised(BottleneckAdapter(D, R, **OPTIONS["everything"]))
    x = torch.randn(4, D, device=DEVICE).bfloat16()
    y = adapter(x)
    expected, oracle = plain(copy.deepcopy(adapter).bfloat16(), x), plain(copy.deepcopy(adapter).double(), x.double())
    assert_within_reference_error(y, expected, oracle, "output")
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(adapter(x), y)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_backend_reaches_the_op(backend):
    adapter = BottleneckAdapter(D, R, backend=backend, device=DEVICE)
    assert adapter(torch.randn(2, D, device=DEVICE)).shape == (2, D)
    adapter.backend = "abacus"
    with pytest.raises(ValueError, match="backend must be None or one of .*'abacus'"):
        adapter(torch.randn(2, D, device=DEVICE))


def test_presets():
    made = {name: getattr(BottleneckAdapter, name)(768, 64) for name in PRESETS}
    options = {name: adapter.options() for name, adapter in made.items()}
    assert [options[name]["activation"] for name in PRESETS] == ["gelu", "relu", "relu", "gelu"]
    assert [options[name]["scale"] for name in PRESETS] == [1.0, 1.0, 4.0, "channel"]
    assert [options[name]["norm"] for name in PRESETS] == ["pre", None, None, None]
    assert [options[name]["residual"] for name in PRESETS] == [True, True, False, True]
    for name, std in (("houlsby", 0.01), ("pfeiffer", 0.02), ("adapter_plus", 0.01)):
        for linear in (made[name].down, made[name].up):
            # a normal distribution cut at two deviations has 0.88 of its deviation left
            assert linear.weight.abs().max() <= 2 * std and abs(linear.weight.std() / std - 0.88) < 0.02
            assert not linear.bias.any()
    assert not made["parallel"].up.weight.any()
    overridden = BottleneckAdapter.houlsby(D, R, norm=None, activation="silu", dtype=torch.float64)
    assert overridden.norm is None and overridden.activation == "silu" and overridden.up.weight.dtype == torch.float64


KEYS = {
    "plain": ["down.bias", "down.weight", "up.bias", "up.weight"],
    "no-bias": ["down.weight", "up.weight"],
    "norm": ["down.bias", "down.weight", "norm.bias", "norm.weight", "up.bias", "up.weight"],
    "channel-scale": ["down.bias", "down.weight", "scale", "up.bias", "up.weight"],
    "channel-skip": ["down.bias", "down.weight", "skip_weight", "up.bias", "up.weight"],
    "hidden-skip": ["down.bias", "down.weight", "hidden_skip_weight", "up.bias", "up.weight"],
}


@pytest.mark.parametrize("name", KEYS)
def test_state_dict(name):
    """Ordinary keys that survive a file, a copy and another module."""
    for module, keys in (
        (BottleneckAdapter(D, R, **OPTIONS[name]), KEYS[name]),
        (AdapterBank(G, D, R, **OPTIONS[name]), [key.replace(".", "_") for key in KEYS[name]]),
    ):
        randomised(module)
        assert sorted(module.state_dict()) == keys
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        other = copy.deepcopy(module)
        other.reset_parameters()
        other.load_state_dict(torch.load(file))
        assert all(torch.equal(t, other.state_dict()[key]) for key, t in module.state_dict().items())
        x = torch.randn(2, D, device=DEVICE)
        ids = (torch.tensor([1, 0], device=DEVICE),) if isinstance(module, AdapterBank) else ()
        assert torch.equal(module(x, *ids), other(x, *ids))
        whole = io.BytesIO()
        torch.save(module, whole)
        whole.seek(0)
        assert torch.equal(module(x, *ids), torch.load(whole, weights_only=False)(x, *ids))
        assert module.half()(x.half(), *ids).dtype == torch.float16


def test_parameters_have_ordinary_homes():
    adapter = BottleneckAdapter(D, R, norm="pre", scale="learned")
    assert type(adapter.down) is type(adapter.up) is nn.Linear and type(adapter.norm) is nn.LayerNorm
    assert adapter.scale.shape == (1,) and BottleneckAdapter(D, R, scale=2).scale == 2.0
    assert "scale='learned'" in repr(adapter) and "g=3" in repr(AdapterBank(3, D, R))


@pytest.mark.parametrize("make", [BottleneckAdapter.houlsby, lambda d, r, **k: AdapterBank(G, d, r, norm="pre", **k)])
def test_meta_device(make):
    module = make(D, R, device="meta")
    module.to_empty(device=DEVICE).apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
    fresh = make(D, R, device=DEVICE)
    for name, parameter in module.named_parameters():
        assert parameter.isfinite().all(), name
        assert torch.equal(parameter == 0, fresh.get_parameter(name) == 0), name


Output = collections.namedtuple("Output", ["hidden", "other"])


class Layer(nn.Module):
    """A sublayer that takes and returns what those of real models do."""

    def __init__(self, wrap):
        super().__init__()
        self.linear, self.wrap = nn.Linear(D, D), wrap

    def forward(self, hidden_states, shift=0.0, *, factor=1.0):
        return self.wrap(factor * self.linear(hidden_states) + shift)


WRAPS = {"tensor": lambda y: y, "tuple": lambda y: (y, "weights"), "named": lambda y: Output(y, 1)}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_parallel_adapter(wrap):
    adapter = randomised(BottleneckAdapter.parallel(D, R))
    wrapped = ParallelAdapter(Layer(wrap).to(DEVICE), adapter)
    wrapped.layer.requires_grad_(False)
    x = torch.randn(2, 3, D, device=DEVICE)
    below = wrapped.layer(x, 0.5, factor=2.0)
    for out in (wrapped(x, 0.5, factor=2.0), wrapped(hidden_states=x, shift=0.5, factor=2.0)):
        assert type(out) is type(below)
        y, h = (out[0], below[0]) if isinstance(out, tuple) else (out, below)
        torch.testing.assert_close(y, plain(adapter, x, h))
        if isinstance(out, tuple):
            assert out[1:] == below[1:]
    y.sum().backward()
    assert wrapped.layer.linear.weight.grad is None and all(p.grad is not None for p in adapter.parameters())
    assert sorted(wrapped.state_dict())[0] == "adapter.down.bias" and "layer.linear.weight" in wrapped.state_dict()


@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["channel-skip"]], ids=["plain", "channel-skip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parallel_adapter_gradients(options, dtype):
    def ordinary(m, x):
        return plain(m.adapter, x, m.layer(x))

    wrapped = randomised(ParallelAdapter(nn.Linear(D, D), BottleneckAdapter(D, R, **options)), dtype)
    x, grad_y = torch.randn(2, 16, 5, D, device=DEVICE).to(dtype)
    assert_equal_to(ordinary, call, wrapped, grad_y, x)


def test_parallel_adapter_with_a_bank_and_under_autocast():
    bank = randomised(AdapterBank(G, D, R))
    x, ids = torch.randn(4, D, device=DEVICE), torch.tensor([0, 2, -1, 1], device=DEVICE)
    wrapped = ParallelAdapter(nn.Linear(D, D).to(DEVICE), bank)
    y = wrapped(x, adapter_ids=ids)
    torch.testing.assert_close(y, bank(x, ids, wrapped.layer(x)))
    torch.testing.assert_close(y[2], wrapped.layer(x)[2])
    assert torch.equal(ParallelAdapter(wrapped.layer, Switched({"one": bank}, "one"))(x, adapter_ids=ids), y)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert ParallelAdapter(wrapped.layer, randomised(BottleneckAdapter(D, R)))(x).dtype == torch.bfloat16


def test_parallel_adapter_refuses():
    adapter = BottleneckAdapter(D, R, device=DEVICE)
    with pytest.raises(TypeError, match="layer must be a torch.nn.Module, got"):
        ParallelAdapter(F.relu, adapter)
    with pytest.raises(TypeError, match="adapter must be a torch.nn.Module, got NoneType"):
        ParallelAdapter(adapter, None)
    with pytest.raises(TypeError, match="layer must return a tensor or a tuple that starts with one, got dict"):
        ParallelAdapter(Layer(lambda y: {"y": y}).to(DEVICE), adapter)(torch.randn(2, D, device=DEVICE))
    with pytest.raises(TypeError, match=r"hidden_states must be given.*got \('shift',\)"):
        ParallelAdapter(Layer(lambda y: y), adapter)(shift=1.0)
    with pytest.raises(ValueError, match=rf"residual must be \(2, {D}\).*got \(2, 7\)"):
        ParallelAdapter(nn.Linear(D, 7, device=DEVICE), adapter)(torch.randn(2, D, device=DEVICE))


def compiled_cases():
    yield "everything", BottleneckAdapter(D, R, **OPTIONS["everything"]), ()
    yield "learned-scale", BottleneckAdapter(D, R, **OPTIONS["learned-scale"]), ()
    yield "parallel", ParallelAdapter(nn.Linear(D, D), BottleneckAdapter.parallel(D, R)), ()
    yield "bank", AdapterBank(G, D, R, norm="pre", scale="channel", skip="channel"), (torch.tensor([1, -1]),)


@pytest.mark.parametrize("module, ids", [pytest.param(m, i, id=n) for n, m, i in compiled_cases()])
def test_compiles_without_graph_break(module, ids):
    module, ids = randomised(module), [i.to(DEVICE) for i in ids]
    x, grad_y = torch.randn(2, 2, 6, D, device=DEVICE)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    eager, traced = (gradients(lambda _, x, f=f: f(x, *ids), module, grad_y, x) for f in (module, compiled))
    for name in eager:
        assert torch.equal(traced[name], eager[name]), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    adapter = randomised(BottleneckAdapter(D, R, **OPTIONS["everything"]))
    x, grad_y = torch.randn(2, 6, D, device=DEVICE)
    replay = lambda m, x: torch.utils.checkpoint.checkpoint(m, x, use_reentrant=reentrant)  # noqa: E731
    kept, replayed = gradients(call, adapter, grad_y, x), {}
    leaf = x.clone().requires_grad_()
    replay(adapter, leaf).backward(grad_y)
    replayed = {"input 0": leaf.grad, **{name: p.grad for name, p in adapter.named_parameters()}}
    assert all(torch.equal(kept[name], grad) for name, grad in replayed.items())


@pytest.mark.parametrize("frozen", ["down", "up", "norm", "scale", "hidden_skip_weight", "all"])
def test_frozen_parameters(frozen):
    """What is frozen gets no gradient; what is not gets the same one as before."""
    adapter = randomised(BottleneckAdapter(D, R, **OPTIONS["everything"]))
    x, grad_y = torch.randn(2, 6, D, device=DEVICE)
    expected = gradients(call, adapter, grad_y, x)
    for name, parameter in adapter.named_parameters():
        parameter.requires_grad_(not (frozen == "all" or name.startswith(frozen)))
    leaf = x.clone().requires_grad_()
    adapter(leaf).backward(grad_y)
    torch.testing.assert_close(leaf.grad, expected["input 0"])
    for name, parameter in adapter.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name])
        else:
            assert parameter.grad is None
    assert adapter(x).requires_grad == (frozen != "all")


BAD = {
    "d-zero": ({"d": 0}, ValueError, "d must be at least 1, got 0"),
    "r-negative": ({"r": -3}, ValueError, "r must be at least 1, got -3"),
    "r-float": ({"r": 4.0}, TypeError, "r must be an integer, got float"),
    "activation": ({"activation": "swoosh"}, ValueError, "activation must be one of .*'relu'.*got 'swoosh'"),
    "norm": ({"norm": "post"}, ValueError, r"norm must be one of \(None, 'pre'\), got 'post'"),
    "skip": ({"skip": "row"}, ValueError, "skip must be one of .*got 'row'"),
    "backend": ({"backend": "abacus"}, ValueError, "backend must be one of .*got 'abacus'"),
    "scale-name": ({"scale": "big"}, ValueError, "scale must be a number, 'learned' or 'channel', got 'big'"),
    "scale-tensor": ({"scale": torch.ones(D)}, TypeError, "scale must be a number, 'learned' or 'channel', got Tensor"),
    "residual": ({"residual": torch.ones(D)}, TypeError, "residual must be True or False, got Tensor"),
    "bias": ({"bias": None}, TypeError, "bias must be True or False, got NoneType"),
    "init_std": ({"init_std": -1.0}, ValueError, "init_std must be None or a positive number, got -1.0"),
}


@pytest.mark.parametrize("change, error, message", BAD.values(), ids=BAD)
def test_bad_arguments(change, error, message):
    for make, sizes in ((BottleneckAdapter, {}), (AdapterBank, {"g": G})):
        with pytest.raises(error, match=message):
            make(**{**sizes, "d": D, "r": R, **change})


def test_bad_input():
    adapter = BottleneckAdapter(D, R, device=DEVICE)
    with pytest.raises(ValueError, match=rf"down_weight must be \(r, d\) = \({R}, 7\), got \({R}, {D}\)"):
        adapter(torch.randn(2, 7, device=DEVICE))
    with pytest.raises(TypeError, match="x must be float16, .*got torch.int64"):
        adapter(torch.ones(2, D, dtype=torch.int64, device=DEVICE))
    with pytest.raises(ValueError, match="residual must be"):
        adapter(torch.randn(2, D, device=DEVICE), torch.randn(3, D, device=DEVICE))
    assert adapter(torch.randn(0, D, device=DEVICE)).shape == (0, D)


def test_fully_sharded():
    """FSDP2 swaps the parameters for shards and back around forward and backward."""
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed._composable.fsdp import fully_shard
    from torch.distributed.device_mesh import init_device_mesh

    adapter = randomised(BottleneckAdapter(D, R, norm="pre", scale="learned", skip="hidden"))
    x, grad_y = torch.randn(2, 6, D, device=DEVICE)
    expected = gradients(call, adapter, grad_y, x)
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        sharded = fully_shard(copy.deepcopy(adapter), mesh=init_device_mesh(DEVICE, (1,)))
        sharded(x).backward(grad_y)
        for name, parameter in sharded.named_parameters():
            torch.testing.assert_close(parameter.grad.full_tensor(), expected[name])
    finally:
        destroy_process_group()


def test_import_needs_no_other_library():
    code = "import sys, fastadapt.nn; print([m for m in ('transformers', 'adapters', 'peft', 'triton') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
