"""Layers of ``peft`` accelerated in place against the same layers as they were: outputs, gradients, state, files."""

import copy
import io
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from torch import nn

import fastadapt
from fastadapt.ops import dropout

from .accuracy import assert_within_reference_error
from .test_nn import DEVICE, pooled

peft = pytest.importorskip("peft", reason="the library peft is not installed (pip install fastadapt[peers])")

from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

import fastadapt.integrations.peft as ours  # noqa: E402

K, N, R, VOCAB = 40, 24, 6, 50
BASES = {
    "linear": lambda: nn.Linear(K, N),
    "linear-no-bias": lambda: nn.Linear(K, N, bias=False),
    "conv1d": lambda: Conv1D(N, K),
    "embedding": lambda: nn.Embedding(VOCAB, N, padding_idx=3),
}
DORA, OTHER = {"use_dora": True}, {"r": 3, "lora_alpha": 2}
# base, options of each adapter; all of them are active
CASES = {
    "lora": ("linear", {}),
    "no-bias": ("linear-no-bias", {}),
    "rslora": ("linear", {"use_rslora": True}),
    "lora-bias": ("linear", {"lora_bias": True}),
    "dora": ("linear", DORA),
    "dora-no-bias": ("linear-no-bias", DORA),
    "dora-dropout": ("linear", {**DORA, "lora_dropout": 0.4}),
    "mica": ("linear", {"init_lora_weights": "mica"}),
    "conv1d": ("conv1d", {"fan_in_fan_out": True}),
    "conv1d-dora": ("conv1d", {**DORA, "fan_in_fan_out": True}),
    "same-scale": ("linear", {}, {}),
    "other-scale": ("linear", {}, OTHER, {"lora_bias": True}),
    "dora-lora": ("linear", DORA, OTHER),
    "lora-dora": ("linear", OTHER, DORA),
    "embedding": ("embedding", {}),
    "embedding-two": ("embedding", {}, OTHER),
    "embedding-dora": ("embedding", DORA),
}
over_cases = pytest.mark.parametrize("base, options", [(base, tuple(options)) for base, *options in CASES.values()], ids=CASES)


def config(**options):
    return peft.LoraConfig(**{"r": R, "lora_alpha": 9, "target_modules": ["target"], **options})


def randomised(model):
    """Every parameter of the adapters away from its start; their part in the output is a third to a half of the frozen one.

    The library keeps that part in float32 where the base has 16 bits. The larger it is, the less of that shows in its error:
    the gradient of a DoRA magnitude, which is summed from the output, would err less than one from an output in 16 bits.
    """
    with torch.no_grad():
        for name, p in model.named_parameters():
            if isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D):
                p.normal_(std=0.1)  # as large as those of nn.Linear
            elif "lora_" in name:
                p.copy_(torch.randn(p.shape) * 0.1 + ("magnitude" in name))
    return model.to(DEVICE)


def build(base, *options, dtype=torch.float32):
    """A model of peft with one adapted layer and an adapter for each of ``options``, all active and trainable."""
    model = nn.Sequential()
    model.target = BASES[base]().to(dtype)
    names = [f"adapter{i}" for i in range(len(options))]
    model = peft.get_peft_model(model, config(**options[0]), adapter_name=names[0])
    for name, more in zip(names[1:], options[1:]):
        model.add_adapter(name, config(**more))
    model.base_model.set_adapter(names)
    return randomised(model)


def target(model):
    return model.base_model.model.target


def inputs(base, dtype=torch.float32, draws=16):
    if base == "embedding":
        return torch.randint(VOCAB, (draws, 5, 7), device=DEVICE), torch.randn(draws, 5, 7, N, device=DEVICE).to(dtype)
    return torch.randn(draws, 5, 7, K, device=DEVICE).to(dtype), torch.randn(draws, 5, 7, N, device=DEVICE).to(dtype)


def outcome(model, x, grad_y, **options):
    """Output and gradients of the input and of the adapters."""
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if x.is_floating_point():
        wanted = {"x": (x := x.clone().requires_grad_()), **wanted}
    torch.manual_seed(5)  # of dropout
    y = target(model)(x, **options)
    return {"y": y.detach(), **dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), grad_y.to(y.dtype))))}


def assert_equal_outcomes(fast, library, base="linear", dtype=torch.float32, autocast=False, **options):
    """The error of ``fast`` against a float64 run of the library is at most twice the library's own."""
    double = copy.deepcopy(library).double()
    x, grad_y = inputs(base, dtype)
    oracle = pooled(partial(outcome, double, **options), x.double() if x.is_floating_point() else x, grad_y.double())
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        expected, actual = (pooled(partial(outcome, model, **options), x, grad_y) for model in (library, fast))
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert value.any(), f"{name} has no part in the result"
        assert_within_reference_error(actual[name], value, oracle[name], name)


@pytest.fixture
def calls(monkeypatch):
    """The keyword arguments of each call of lora_linear."""
    seen = []

    def spy(*args, **kwargs):
        seen.append(kwargs)
        return fastadapt.lora_linear(*args, **kwargs)

    monkeypatch.setattr(ours, "lora_linear", spy)
    return seen


def dropped(expected, x, p, training=True, inplace=False):
    """Dropout with a mask that is no matter of chance."""
    if not training:
        return x
    assert p == expected
    return x * (torch.arange(x.numel(), device=x.device).view(x.shape) % 5 > 1) / (1 - p)


@pytest.mark.parametrize("dtype, autocast", [("float32", False), ("bfloat16", False), ("float32", True)])
@over_cases
def test_equals_the_library(calls, monkeypatch, base, options, dtype, autocast):
    """In bfloat16 the library keeps the adapters in float32.

    With DoRA and dropout it also computes the frozen product in float32; there it is compared as it is under autocast.
    """
    # The library drops a float32 copy of a bfloat16 input, whose mask would be another one.
    monkeypatch.setattr(nn.functional, "dropout", partial(dropped, options[0].get("lora_dropout")))
    dtype = getattr(torch, dtype)
    library = build(base, *options, dtype=dtype)
    fast = copy.deepcopy(library)
    report = fastadapt.accelerate(fast)
    assert report.rows == (("base_model.model.target", "accelerated", ""),)
    wider = dtype == torch.bfloat16 and "lora_dropout" in options[0]
    assert_equal_outcomes(fast, library, base, dtype, autocast or wider)
    assert len(calls) == (0 if base == "embedding" or options[1:] == (DORA,) else 16)


def replayed(model, x, names):
    """What the active adapters make of ``x`` with the masks that are drawn after one seed, the first by the kernels."""
    torch.manual_seed(5)
    layer = target(model)
    y = layer.base_layer(x)
    for i, name in enumerate(names):
        p = layer.lora_dropout[name].p
        if i:
            dropped = nn.functional.dropout(x, p)
        else:
            stays = dropout.kept(dropout.draw_seed(x.device), x.shape[:-1].numel(), K, p).view(x.shape)
            dropped = torch.where(stays, x * dropout.kept_scale(p), 0.0)
        y = y + layer.scaling[name] * layer.lora_B[name](layer.lora_A[name](dropped))
    return y


@pytest.mark.parametrize("count", [1, 2])
def test_each_adapter_has_a_dropout_of_its_own(calls, count):
    library = build("linear", *[{"lora_dropout": 0.4}, {**OTHER, "lora_dropout": 0.25}][:count])
    fast = copy.deepcopy(library)
    fastadapt.accelerate(fast)
    x, _ = inputs("linear", draws=1)
    names = [f"adapter{i}" for i in range(count)]
    torch.manual_seed(5)
    oracle = replayed(copy.deepcopy(library).double(), x.double(), names)
    expected = replayed(library, x, names)
    torch.manual_seed(5)
    assert_within_reference_error(target(fast)(x), expected, oracle, "y")
    assert [call["dropout_p"] for call in calls] == [0.4]
    assert_equal_outcomes(fast.eval(), library.eval())  # both adapters at once
    assert len(calls) == 1 + 16


def test_a_dropout_in_evaluation_of_the_layer_alone_is_off():
    """The library asks the dropout itself whether it is in training, not the layer."""
    fast = build("linear", {"lora_dropout": 0.9})
    fastadapt.accelerate(fast)
    target(fast).lora_dropout.eval()
    x, _ = inputs("linear", draws=1)
    assert torch.equal(target(fast)(x), target(fast)(x))


def merged(model):
    model.merge_adapter()


def unmerged(model):
    model.unmerge_adapter()


def disabled(model):
    model.base_model.disable_adapter_layers()


STEPS = {
    "set_scale": lambda model: target(model).set_scale("adapter0", 0.25),
    "scale_layer": lambda model: target(model).scale_layer(3.0),
    "unscale_layer": lambda model: target(model).unscale_layer(),
    "new weights": lambda model: target(model).lora_A["adapter0"].weight.data.mul_(1.5),
    "eval": lambda model: model.eval(),
    "merge": merged,
    "unmerge": unmerged,
    "disable": disabled,
    "enable": lambda model: model.base_model.enable_adapter_layers(),
    "merge again": merged,
    "disable unmerges": disabled,
    "enable again": lambda model: model.base_model.enable_adapter_layers(),
    "add": lambda model: model.add_adapter("new", config(**OTHER, init_lora_weights=False)),
    "switch": lambda model: model.set_adapter("new"),
    "both": lambda model: model.base_model.set_adapter(["adapter0", "new"]),
    "delete": lambda model: model.delete_adapter("adapter0"),
    "tensor scales": lambda model: prepare_model_for_compiled_hotswap(model, target_rank=8),
    "set_scale of a tensor": lambda model: target(model).scaling["new"].mul_(0.5),
    "train": lambda model: model.train(),
    "another model's merge": lambda model: model.base_model.merge_adapter(["new"]),
}


def test_follows_every_change_of_state(calls, tmp_path):
    library = build("linear", {})
    fast = copy.deepcopy(library)
    fastadapt.accelerate(fast)
    kernel = set()
    for name, step in STEPS.items():
        for model in (library, fast):
            torch.manual_seed(9)
            step(model)
        x, _ = inputs("linear", draws=1)
        before = len(calls)
        with torch.no_grad():
            actual, expected, oracle = target(fast)(x), target(library)(x), target(copy.deepcopy(library).double())(x.double())
        assert_within_reference_error(actual, expected, oracle, name)
        kernel |= {name} if len(calls) > before else set()
    without = {"merge", "disable", "merge again", "disable unmerges", "another model's merge"}
    assert kernel == set(STEPS) - without
    assert target(fast).merged and target(library).merged
    fastadapt.restore(fast)
    assert type(target(fast)) is peft.tuners.lora.Linear
    target(fast).unmerge()
    target(library).unmerge()
    assert torch.equal(target(fast)(x), target(library)(x))


def test_disable_adapter_is_the_base_layer():
    fast = build("linear", {})
    fastadapt.accelerate(fast)
    x, _ = inputs("linear", draws=1)
    with fast.disable_adapter():
        assert torch.equal(target(fast)(x), target(fast).base_layer(x))
    assert not torch.equal(target(fast)(x), target(fast).base_layer(x))


@over_cases
def test_files_are_the_library_s_own(tmp_path, base, options):
    """Keys and bytes; what either writes either reads."""
    library = build(base, *options)
    fast = copy.deepcopy(library)
    fastadapt.accelerate(fast)
    assert {name: id(type(p)) for name, p in fast.state_dict().items()} == {
        name: id(type(p)) for name, p in library.state_dict().items()
    }
    library.save_pretrained(tmp_path / "library")
    fast.save_pretrained(tmp_path / "fast")
    files = {path.relative_to(tmp_path / "library") for path in (tmp_path / "library").rglob("*") if path.is_file()}
    assert len([path for path in files if path.suffix == ".safetensors"]) == len(options)
    for path in files:
        assert (tmp_path / "library" / path).read_bytes() == (tmp_path / "fast" / path).read_bytes(), path
    model = nn.Sequential()
    model.target = copy.deepcopy(target(library).base_layer)
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "fast" / "adapter0", adapter_name="adapter0", is_trainable=True)
    for i in range(1, len(options)):
        loaded.load_adapter(tmp_path / "fast" / f"adapter{i}", f"adapter{i}", is_trainable=True)
    loaded.base_model.set_adapter([f"adapter{i}" for i in range(len(options))])
    fastadapt.accelerate(loaded)
    x, grad_y = (t[0] for t in inputs(base, draws=1))
    assert all(torch.equal(value, outcome(fast, x, grad_y)[name]) for name, value in outcome(loaded, x, grad_y).items())


@pytest.mark.parametrize("prepared", [False, True])
def test_hot_swap(tmp_path, prepared):
    """Into the same tensors, or with another rank and a scale that is a tensor."""
    others = build("linear", {"r": 4 if prepared else R, "lora_alpha": 5 if prepared else 9})
    others.save_pretrained(tmp_path)
    library = build("linear", {})
    fast = copy.deepcopy(library)
    fastadapt.accelerate(fast)
    for model in (library, fast):
        target(model)(torch.zeros(1, K, device=DEVICE))
        if prepared:
            prepare_model_for_compiled_hotswap(model, target_rank=8)
        hotswap_adapter(model, tmp_path / "adapter0", adapter_name="adapter0", torch_device=DEVICE)
    x, _ = inputs("linear", draws=1)
    expected, oracle = (target(model)(x.to(dtype)) for model, dtype in ((library, x.dtype), (others.double(), torch.float64)))
    assert_within_reference_error(target(fast)(x), expected, oracle, "y")


def test_caching_of_dora(calls):
    """The library's switch; norms are kept until training, for its own forward too."""
    library = build("linear", DORA)
    fast = copy.deepcopy(library).eval()
    fastadapt.accelerate(fast)
    x, _ = inputs("linear", draws=1)
    with peft.helpers.DoraCaching():
        assert_equal_outcomes(fast, library.eval())
        assert not any("magnitude" in call for call in calls)
        first = target(fast)(x)
        with torch.no_grad():
            target(fast).base_layer.weight.mul_(2)
        assert not torch.allclose(target(fast)(x), first)  # the product, with the norms of before
        kept = target(fast).lora_magnitude_vector["adapter0"]._dora_cache
        assert list(kept) == ["weight-norm-adapter0"]
        fast.train()
        assert not kept
        target(fast)(x)
    assert "magnitude" in calls[-1]


def snapshot(model):
    """Classes and attributes of every module, and where its tensors lie."""
    return [
        (type(m), {k: copy.copy(v) for k, v in vars(m).items() if not k.startswith("_parameters") and not isinstance(v, dict)},
         [(name, id(p), p.data_ptr(), p._version) for name, p in m.named_parameters(recurse=False)])
        for m in model.modules()
    ]  # fmt: skip


def test_twice_has_no_effect_and_restore_undoes_it():
    model = build("linear", {})
    before = snapshot(model)
    first = fastadapt.accelerate(model)
    after = snapshot(model)
    assert fastadapt.accelerate(model) == first and snapshot(model) == after != before
    assert isinstance(target(model), peft.tuners.lora.Linear)
    fastadapt.accelerate(model, backend="reference")
    assert target(model)._fastadapt_backend == "reference"
    fastadapt.restore(model)
    assert snapshot(model) == before
    fastadapt.restore(model)
    assert snapshot(model) == before


def test_backend_reaches_the_op(calls):
    model = build("linear", {}, OTHER)
    x, _ = inputs("linear", draws=1)
    fastadapt.accelerate(model, backend="reference")
    target(model)(x)
    assert [call["backend"] for call in calls] == ["reference"]
    with pytest.raises(ValueError, match="backend must be one of"):
        fastadapt.accelerate(model, backend="cudnn")


def test_a_copy_a_pickle_and_a_second_adapter_stay_accelerated(calls):
    model = build("linear", {})
    fastadapt.accelerate(model)
    file = io.BytesIO()
    torch.save(model, file)
    x, _ = inputs("linear", draws=1)
    expected = target(model)(x)
    for other in (copy.deepcopy(model), torch.load(io.BytesIO(file.getvalue()), weights_only=False)):
        del calls[:]
        assert torch.equal(target(other)(x), expected) and len(calls) == 1
        assert type(target(other)) is ours.Linear


def test_layers_that_are_added_later_are_found_by_a_second_call():
    model = nn.Sequential()
    model.target, model.later = nn.Linear(K, N), nn.Linear(N, N)
    model = peft.get_peft_model(model, config())
    assert fastadapt.accelerate(model).accelerated == ["base_model.model.target"]
    model.add_adapter("second", config(target_modules=["target", "later"]))
    assert type(model.base_model.model.later) is peft.tuners.lora.Linear
    assert fastadapt.accelerate(model).accelerated == ["base_model.model.target", "base_model.model.later"]
    model.unload()
    with pytest.raises(ValueError, match=r"\(LoRA layers of peft on linear layers or embeddings\), got none"):
        fastadapt.accelerate(model)


@pytest.mark.parametrize("options", [{}, DORA, {"lora_dropout": 0.3}], ids=["lora", "dora", "dropout"])
def test_checkpointing_and_compilation(options):
    """Forward runs again in backward with the same masks; one graph, and for another scale no other result."""
    model = build("linear", options)
    fastadapt.accelerate(model)
    layer = target(model)
    x, grad_y = (t[0] for t in inputs("linear", draws=1))
    plain = outcome(model, x, grad_y)
    forward = layer.forward
    layer.forward = lambda x: torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=False)
    assert all(torch.equal(value, plain[name]) for name, value in outcome(model, x, grad_y).items())
    del layer.forward
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for scale in (1.0, 0.5):
        layer.set_scale("adapter0", scale)
        torch.manual_seed(5)
        expected = layer(x)
        torch.manual_seed(5)
        torch.testing.assert_close(compiled.base_model.model.target(x), expected)


def left(kind):
    """A model of peft in which nothing is accelerated, or only in part, and what the report says."""
    lora = peft.tuners.lora
    if kind == "conv2d":
        model = nn.Sequential()
        model.target = nn.Conv2d(4, 4, 1)
        return peft.get_peft_model(model, config(r=4)), "left", "no kernel for lora.Conv2d"
    if kind == "ia3":
        model = nn.Sequential()
        model.target = nn.Linear(K, N)
        model = peft.get_peft_model(model, peft.IA3Config(target_modules=["target"], feedforward_modules=[]))
        return model, "left", "no kernel for ia3.Linear"
    if kind == "hook":
        model = build("linear", {})
        target(model).base_layer.register_forward_hook(lambda module, args, y: y + 1)
        return model, "left", "its base layer has hooks, or its weight elsewhere"
    if kind == "subclass":
        model = nn.Sequential()
        model.target = type("Doubled", (nn.Linear,), {"forward": lambda self, x: 2 * nn.Linear.forward(self, x)})(K, N)
        return randomised(peft.get_peft_model(model, config())), "left", "its base layer is a Doubled"
    if kind == "variant":
        return build("linear", {"use_bdlora": lora.BdLoraConfig(target_modules_bd_a=["target"], nblocks=2)}), "left", "BdLora"
    assert kind == "one of two"
    model = build("linear", {}, {})
    target(model).lora_B["adapter1"].register_forward_hook(lambda module, args, y: y + 1)
    return model, "in part", "adapter 'adapter1': Linear in it, or hooks"


@pytest.mark.parametrize("kind", ["conv2d", "ia3", "hook", "subclass", "variant", "one of two"])
def test_what_is_not_covered_is_left_and_named(kind):
    library, state, reason = left(kind)
    fast = copy.deepcopy(library)
    fast.more = build("linear", {}) if state == "left" else nn.Identity()
    report = fastadapt.accelerate(fast)
    row = report.rows[0]
    assert row.module == "base_model.model.target" and row.state == state and reason in row.reason
    assert (report.left == [row.module]) == (state == "left") and row.reason in str(report)
    x = torch.randn(2, 4, 3, 3) if kind == "conv2d" else torch.randn(2, K)
    x = x.to(DEVICE)
    torch.testing.assert_close(target(fast)(x), target(library)(x))
    if state == "left":
        assert type(target(fast)) is type(target(library))
        before = snapshot(library)
        with pytest.raises(ValueError, match="(?s)model must contain what can be .*got only\nbase_model.model.target"):
            fastadapt.accelerate(library)
        assert snapshot(library) == before


def test_hooks_and_new_classes_that_come_later_are_respected(calls):
    """What a wrapper does to the parts of a layer after acceleration must not be passed by."""
    model = build("linear", {})
    fastadapt.accelerate(model)
    layer = target(model)
    x, _ = inputs("linear", draws=1)
    for part in (layer.base_layer, layer.lora_A["adapter0"], layer.lora_B["adapter0"]):
        before = layer(x)
        handle = part.register_forward_pre_hook(lambda module, args: (2 * args[0],))
        assert not torch.allclose(layer(x), before)
        handle.remove()
        assert torch.equal(layer(x), before)
        part.forward = partial(type(part).forward, part)  # as offloading does
        count = len(calls)
        layer(x)
        assert len(calls) == count
        del part.forward


def test_other_dtypes_are_the_library_s(calls):
    """Adapters in 16 bits under float32 have no kernel; the library casts the input."""
    model = build("linear", {})
    fast = copy.deepcopy(model)
    fastadapt.accelerate(fast)
    x, _ = inputs("linear", draws=1)
    for m in (model, fast):
        target(m).lora_A.bfloat16()
        target(m).lora_B.bfloat16()
    assert torch.equal(target(fast)(x), target(model)(x)) and not calls


def test_what_cannot_be_accelerated_raises():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got dict"):
        fastadapt.accelerate({})
    with pytest.raises(ValueError, match=r"\(LoRA layers of peft on linear layers or embeddings\), got none"):
        fastadapt.accelerate(nn.Linear(3, 3))


def test_the_package_does_not_load_the_library():
    code = """
import sys, torch, fastadapt
assert not {'peft', 'transformers', 'adapters'} & set(sys.modules)
fastadapt.restore(torch.nn.Linear(2, 2))
try:
    fastadapt.accelerate(torch.nn.Linear(2, 2))
except ValueError as error:
    print(error)
assert 'peft' not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "model must contain what can be accelerated (layers of peft, which is not loaded), got none"


def test_a_large_model_takes_no_time_and_no_memory():
    """Seven linear layers in each of 32 blocks."""
    names = ["q", "k", "v", "o", "gate", "up", "down"]
    for device in ("cpu", "meta"):
        with torch.device(device):
            blocks = nn.ModuleList(nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in names}) for _ in range(32))
        model = peft.get_peft_model(nn.Sequential(blocks), config(target_modules=names))
        tensors = {name: (id(p), p.data_ptr()) for name, p in model.state_dict(keep_vars=True).items()}
        start = time.process_time()
        report = fastadapt.accelerate(model)
        assert time.process_time() - start < 1
        assert len(report.accelerated) == len(report.rows) == 7 * 32
        assert {name: (id(p), p.data_ptr()) for name, p in model.state_dict(keep_vars=True).items()} == tensors
        assert str(report).splitlines()[0].split() == ["base_model.model.*.*.q", "32", "accelerated"]
