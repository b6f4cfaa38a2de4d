"""AdapterFusion of the library ``adapters``, accelerated in place, against the same as it was."""

import copy
from functools import partial

import pytest
import torch

import fastadapt

from .accuracy import assert_within_reference_error
from .battery import DEVICE
from .modules import pooled, spied

adapters = pytest.importorskip("adapters", reason="the library adapters is not installed (pip install fastadapt[peers])")

from adapters import Fuse  # noqa: E402
from adapters.configuration import DynamicAdapterFusionConfig, StaticAdapterFusionConfig  # noqa: E402
from adapters.methods import modeling  # noqa: E402

from fastadapt.integrations import adapters_fusion as ours  # noqa: E402

from .test_accelerate_adapters import D, accelerated, batch, build, randomised, single  # noqa: E402

CONFIGS = {
    "dynamic": DynamicAdapterFusionConfig(),
    "static": StaticAdapterFusionConfig(),
    "residual-before": DynamicAdapterFusionConfig(residual_before=True),
    "temperature": DynamicAdapterFusionConfig(temperature=True),
    "value-after": DynamicAdapterFusionConfig(value_before_softmax=False),
    "value-alone": DynamicAdapterFusionConfig(query=False, key=False, value_initialized=False),
    "key-alone": DynamicAdapterFusionConfig(query=False, value=False),
    "query-alone": DynamicAdapterFusionConfig(key=False, value=False),
}
over_configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def pair(config, p=0.0):
    library = modeling.BertFusion(config, D, p).to(DEVICE).double()
    with torch.no_grad():
        for parameter in library.parameters():
            parameter.normal_(std=D**-0.5)
    fast = copy.deepcopy(library)
    return library, fast, ours.accelerate(fast, None)


def outcome(layer, seed, query, stacked, residual, grad_y):
    """Output and all gradients of a call as the library makes it; ``stacked`` is ``(g, b, t, d)``."""
    torch.manual_seed(seed)
    inputs = [t.clone().requires_grad_() for t in (query, stacked, residual)]
    branches = (1.0 * inputs[1]).permute(1, 2, 0, 3)  # a tensor that the library may write to
    y = layer(inputs[0], branches, branches, inputs[2])
    leaves = {**dict(enumerate(inputs)), **{n: p for n, p in layer.named_parameters() if not n.startswith("dense")}}
    grads = torch.autograd.grad(y, list(leaves.values()), grad_y, allow_unused=True)
    zeros = (torch.zeros_like(t) if g is None else g for t, g in zip(leaves.values(), grads))
    return {"y": y.detach(), **dict(zip(leaves, zeros))}


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("t", [3, 40], ids=["few-rows", "many-rows"])
@over_configs
def test_same_output_and_gradients(config, t, p):
    """With dropout too, where the same seed drops the same scores."""
    library, fast, rows = pair(config, p)
    assert [row.state for row in rows] == ["in part" if p and config.residual_before else "accelerated"]
    query, residual, grad_y = torch.randn(3, 2, t, D, device=DEVICE, dtype=torch.float64)
    stacked = torch.randn(3, 2, t, D, device=DEVICE, dtype=torch.float64)
    for seed in range(2):  # the second call has another temperature
        expected, actual = (outcome(layer, seed, query, stacked, residual, grad_y) for layer in (library, fast))
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], msg=lambda text, name=name: f"{name}: {text}")
    assert fast.T == library.T
    with torch.no_grad():
        branches = stacked.permute(1, 2, 0, 3)
        (_, weights), (_, expected) = (
            layer.eval()(query, v, v, residual, output_attentions=True) for layer in (fast, library) for v in [branches.clone()]
        )
    torch.testing.assert_close(torch.from_numpy(weights), torch.from_numpy(expected))


@over_configs
def test_autocast(monkeypatch, config):
    """Adapters then give 16 bits, and what chooses among them has 32."""
    calls = spied(monkeypatch, ours, "adapter_fusion")
    double, fast, _ = pair(config)
    library, fast = copy.deepcopy(double).float(), fast.float()
    query, residual, grad_y, *stacked = torch.randn(6, 16, 2, 3, D, device=DEVICE)
    drawn = [0.25 * query, torch.stack(stacked, 1).bfloat16(), residual, grad_y.bfloat16()]
    oracle = pooled(partial(outcome, double, 0), *(t.double() for t in drawn))
    autocast = torch.autocast(DEVICE, torch.bfloat16)
    expected, actual = (pooled(autocast(partial(outcome, layer, 0)), *drawn) for layer in (library, fast))
    for name, value in expected.items():
        assert_within_reference_error(actual[name], value, oracle[name], name)
    assert len(calls) == 16


def test_two_tensors_are_left_to_the_library():
    library, fast, _ = pair(DynamicAdapterFusionConfig())
    query, residual, *_ = torch.randn(2, 2, 3, D, device=DEVICE, dtype=torch.float64)
    key, value = torch.randn(2, 2, 3, 4, D, device=DEVICE, dtype=torch.float64)
    assert torch.equal(fast(query, key, value, residual.clone()), library(query, key, value, residual.clone()))


def fused(**options):
    model = build(single(), single(), **options)
    model.add_adapter_fusion(["a", "b"])
    model.train_adapter_fusion(Fuse("a", "b"))
    return randomised(model).double()


def test_a_model_trains_as_before():
    library = fused()
    fast, report = accelerated(library)
    assert {row.state for row in report.rows} == {"accelerated"} and len(report.rows) == 2 * 3
    inputs = batch()
    losses = []
    for model in (library, fast):
        loss = model(**inputs).loss + model.get_fusion_regularization_loss()
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0])
    trained = {name: p.grad for name, p in library.named_parameters() if p.grad is not None}
    assert any("adapter_fusion" in name for name in trained) and not any(".adapters." in name for name in trained)
    for name, grad in trained.items():
        torch.testing.assert_close(fast.get_parameter(name).grad, grad, msg=lambda text, name=name: f"{name}: {text}")


def test_files_and_restore(tmp_path):
    library = fused()
    fast, report = accelerated(library)
    fast.save_adapter_fusion(str(tmp_path), "a,b")
    assert list(fast.state_dict()) == list(library.state_dict())
    assert fastadapt.accelerate(fast) == report
    fastadapt.restore(fast)
    layers = [m for m in fast.modules() if isinstance(m, modeling.BertFusion)]
    assert layers and all(type(m) is modeling.BertFusion and "_fastadapt_backend" not in vars(m) for m in layers)
    other = fused()
    other.load_adapter_fusion(str(tmp_path), set_active=True)
    for name, tensor in library.state_dict().items():
        if "adapter_fusion" in name:
            assert torch.equal(other.state_dict()[name].double(), tensor), name


def test_layers_that_are_more_than_their_class_are_left():
    layer = modeling.BertFusion(DynamicAdapterFusionConfig(), D, 0.0)
    layer.query.register_forward_hook(lambda *_: None)
    (row,) = ours.accelerate(layer, None)
    assert (row.state, row.reason) == ("left", "its forward has been replaced, or has hooks")
    assert type(layer) is modeling.BertFusion
