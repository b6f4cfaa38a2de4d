"""Compacter modules of the library ``adapters``, against the modules built from them."""

import copy

import pytest
import torch

import fastadapt

from .battery import DEVICE

adapters = pytest.importorskip("adapters", reason="the library adapters is not installed (pip install fastadapt[peers])")

from adapters.methods.modeling import ForwardContext  # noqa: E402

from fastadapt.integrations.adapters import from_adapters, save_adapter, shared_rule, to_adapters  # noqa: E402

from .test_accelerate_adapters import D, bert, beside, build, compacter, compacter_plus_plus, layers  # noqa: E402

CASES = {
    "Compacter": compacter(),
    "Compacter++": compacter_plus_plus(),
    "factorized": compacter(factorized_phm_rule=True, scaling="learned"),
    "own-rules": compacter(shared_phm_rule=False, phm_bias=False),
    "own-factorized": compacter_plus_plus(shared_phm_rule=False, factorized_phm_rule=True, phm_dim=2, phm_rank=3),
    "full": compacter_plus_plus(factorized_phm_W=False, ln_before=True),
    "parallel": beside(phm_layer=True, reduction_factor=4, init_weights="bert"),
}
over_cases = pytest.mark.parametrize("config", CASES.values(), ids=CASES)
NAMES = {
    "adapter_down.0.": "down.", "adapter_down.1.": "down.", "adapter_up.": "up.", "adapter_norm_before.": "norm.",
    "scaling": "scale", "W_left": "s", "W_right": "t", "phm_rule": "rule",
}  # fmt: skip


def our_name(name):
    for theirs, mine in NAMES.items():
        name = name.replace(theirs, mine)
    return name[:-1] + "bias" if name.endswith(".b") else name[:-1] + "b" if name.endswith(".W") else name


def converted(model):
    """The adapters of the model by their paths, with one rule where theirs have one."""
    shares = "a" in model.base_model.shared_parameters
    rule = copy.deepcopy(shared_rule(model, "a")) if shares else None
    return {path: from_adapters(module, rule) for path, module in layers(model).items()}


@over_cases
def test_equals_the_library(config):
    """Output and the gradient of every parameter; that of the rule is the sum over all adapters."""
    model = build(config).double()
    new, modules = converted(model), layers(model)
    x, residual, grad_y = torch.randn(3, 5, D, dtype=torch.float64, device=DEVICE)
    total_theirs, total_ours = 0, 0
    with ForwardContext(model.bert, torch.zeros(1, 1, dtype=torch.int64)):
        for path, module in modules.items():
            expected, actual = module(x, residual)[0], new[path](x, None if config.is_parallel else residual)
            torch.testing.assert_close(actual, expected)
            total_theirs, total_ours = total_theirs + (grad_y * expected).sum(), total_ours + (grad_y * actual).sum()
    total_theirs.backward()
    total_ours.backward()
    shared = {f"down.{our_name(name)}": p for name, p in model.bert.shared_parameters["a"].items()} if "a" in (
        model.bert.shared_parameters
    ) else {}  # fmt: skip
    for path, module in modules.items():
        theirs = {our_name(name): p for name, p in module.named_parameters()} | shared
        mine = dict(new[path].named_parameters())
        assert set(theirs) == set(mine)
        for name, p in theirs.items():
            assert p.grad.any()
            torch.testing.assert_close(mine[name].grad, p.grad)


@over_cases
def test_round_trip(config):
    """Weights go there and back without a change; a shared rule only where it is asked for."""
    model = build(config)
    before, new = copy.deepcopy(model.state_dict()), converted(model)
    theirs = shared_rule(model, "a") if "a" in model.bert.shared_parameters else None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adapters" in name or "shared" in name:
                parameter.zero_()
    for path, module in layers(model).items():
        to_adapters(new[path], module)
    after = model.state_dict()
    assert all(torch.equal(after[name], t) != ("shared" in name) for name, t in before.items())
    for path, module in layers(model).items():
        to_adapters(new[path], module, theirs)
    assert all(torch.equal(after[name], t) for name, t in before.items())


def test_the_library_loads_what_was_trained_here(tmp_path):
    model = build(compacter())
    new = converted(model)
    with torch.no_grad():
        for adapter in new.values():
            adapter.up.t.add_(1.0)
        adapter.down.rule.mul_(-0.5)
    for path, module in layers(model).items():
        to_adapters(new[path], module, shared_rule(model, "a"))
    save_adapter(model.bert, tmp_path, "a", use_safetensors=True)
    other = bert().to(DEVICE)
    other.load_adapter(str(tmp_path), use_safetensors=True)
    loaded = converted(other)
    for path, adapter in new.items():
        state = adapter.state_dict()
        assert all(torch.equal(t, state[name]) for name, t in loaded[path].state_dict().items())


def test_what_is_accelerated_converts_too():
    model = build(compacter())
    expected = converted(model)
    fastadapt.accelerate(model)
    for path, adapter in converted(model).items():
        assert all(torch.equal(t, expected[path].state_dict()[name]) for name, t in adapter.state_dict().items())


def test_a_rule_that_is_not_learned_stays_so():
    model = build(compacter(shared_phm_rule=False, learn_phm=False))
    for module in layers(model).values():
        module.adapter_up.phm_rule.requires_grad_(False)
        adapter = from_adapters(module)
        assert adapter.down.rule.requires_grad and not adapter.up.rule.requires_grad


def test_refuses_what_it_cannot_compute():
    module = next(iter(layers(build(compacter())).values()))
    with pytest.raises(ValueError, match="shared_rule must be a Parameter or a pair for .*shared_phm_rule=True, got None"):
        from_adapters(module)
    own = next(iter(layers(build(compacter(shared_phm_rule=False))).values()))
    with pytest.raises(ValueError, match="shared_rule must be None for .*shared_phm_rule=False, got Parameter"):
        from_adapters(own, fastadapt.nn.phm_rule(4))
    for options, message in (
        ({"shared_W_phm": True}, "shared_W_phm=False, got True"),
        ({"scaling": "channel"}, "a scaling of one number with phm_layer=True, got 'channel'"),
        ({"ln_after": True}, "ln_after=False, got True"),
    ):
        with pytest.raises(ValueError, match=f"module must have {message}"):
            from_adapters(next(iter(layers(build(compacter(**options))).values())))
    other = from_adapters(next(iter(layers(build(compacter(reduction_factor=2, shared_phm_rule=False))).values())))
    with pytest.raises(ValueError, match=r"shapes of module, got \(4, 1, 6\) for \(4, 1, 3\)"):
        to_adapters(other, own)
    with pytest.raises(ValueError, match="adapter must have rank=1 like module, got 2"):
        to_adapters(from_adapters(next(iter(layers(build(compacter(phm_rank=2, shared_phm_rule=False))).values()))), own)
