"""What accelerating a model of ``peft`` leaves alone: its state and files, copies of it, layers without a kernel."""

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

from .accuracy import assert_within_reference_error
from .battery import DEVICE

peft = pytest.importorskip("peft", reason="the library peft is not installed (pip install fastadapt[peers])")

from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap  # noqa: E402

import fastadapt.integrations.peft as ours  # noqa: E402

from .test_accelerate import (  # noqa: E402, F401
    DORA,
    OTHER,
    K,
    N,
    R,
    build,
    calls,
    config,
    inputs,
    outcome,
    over_cases,
    randomised,
    target,
)  # fmt: skip


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


def test_follows_every_change_of_state(calls):  # noqa: F811
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


def test_backend_reaches_the_op(calls):  # noqa: F811
    model = build("linear", {}, OTHER)
    x, _ = inputs("linear", draws=1)
    fastadapt.accelerate(model, backend="reference")
    target(model)(x)
    assert [call["backend"] for call in calls] == ["reference"]
    with pytest.raises(ValueError, match="backend must be one of"):
        fastadapt.accelerate(model, backend="cudnn")


def test_a_copy_a_pickle_and_a_second_adapter_stay_accelerated(calls):  # noqa: F811
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
    with pytest.raises(ValueError, match=r"\(LoRA layers of peft .*, LoKr and LoHa layers on linear layers.*\), got none"):
        fastadapt.accelerate(model)


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


def test_attention_of_pytorch_is_left():
    """What the report says of it is so."""
    model, x = nn.Sequential(), torch.randn(2, 5, 16, device=DEVICE)
    model.target, model.other = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 16)
    expected = copy.deepcopy(model.target).to(DEVICE)
    model = randomised(peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["target", "other"])))
    report, attention = fastadapt.accelerate(model.to(DEVICE)), model.base_model.model.target
    assert report.accelerated == ["base_model.model.other"]
    whole, projection = report.rows[:2]
    assert whole.reason == "no kernel for lora.MultiheadAttention, which adds the update of its output projection twice"
    assert projection.module == "base_model.model.target.base_layer.out_proj"
    assert projection.reason == "its attention only reads its weight"
    with torch.no_grad():
        expected.in_proj_weight += attention.get_delta_weight("default")
        expected.out_proj.weight += 2 * attention.base_layer.out_proj.get_delta_weight("default")
        torch.testing.assert_close(attention(x, x, x)[0], expected(x, x, x)[0])


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


def test_hooks_and_new_classes_that_come_later_are_respected(calls):  # noqa: F811
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


@pytest.mark.parametrize("offload", [False, True])
def test_hooks_of_device_maps(calls, offload):  # noqa: F811
    """Those that move inputs to the weights' device stand in no way; those that fetch the weights are the library's matter."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    model = build("linear", {})
    x, _ = inputs("linear", draws=1)
    expected = target(model)(x)
    layer, parts = target(model), [module for module in model.modules() if isinstance(module, nn.Linear)]
    for part in (layer, *parts):
        add_hook_to_module(part, AlignDevicesHook(DEVICE, offload=offload and part is not layer))
    before = dict(vars(layer))
    model.more = build("linear", {})
    report = fastadapt.accelerate(model)
    assert [row.state for row in report.rows] == ["left" if offload else "accelerated", "accelerated"]
    torch.testing.assert_close(layer(x), expected)
    assert len(calls) == (not offload)
    fastadapt.restore(model)
    assert vars(layer) == before and type(layer) is peft.tuners.lora.Linear
    remove_hook_from_module(layer)
    layer.forward = lambda x: x
    assert fastadapt.accelerate(model).rows[0].reason == "its forward has been replaced"


def test_layers_that_the_library_injects(calls):  # noqa: F811
    """Without a PeftModel around them, as load_adapter of transformers and diffusers does."""
    model = nn.Sequential()
    model.target = nn.Linear(K, N)
    model = randomised(peft.inject_adapter_in_model(config(bias="all"), model))
    model.target.base_layer.bias.requires_grad_()
    x, _ = inputs("linear", draws=1)
    expected = torch.autograd.grad(model(x).square().sum(), [p for p in model.parameters() if p.requires_grad])
    assert fastadapt.accelerate(model).accelerated == ["target"]
    actual = torch.autograd.grad(model(x).square().sum(), [p for p in model.parameters() if p.requires_grad])
    assert len(calls) == 1 and len(actual) == 3
    torch.testing.assert_close(actual, expected)


def test_what_cannot_be_accelerated_raises():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got dict"):
        fastadapt.accelerate({})
    with pytest.raises(ValueError, match=r"\(LoRA layers of peft .*, LoKr and LoHa layers on linear layers.*\), got none"):
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
    expected = "model must contain what can be accelerated (layers of peft or adapters, none of which is loaded), got none"
    assert done.stdout.strip() == expected


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
