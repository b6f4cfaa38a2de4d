"""What accelerating a model of ``adapters`` leaves alone: compositions, state and files, adapters without a kernel."""

import copy
import io
import warnings
from functools import partial

import pytest
import torch
from torch import nn

import fastadapt

from .battery import DEVICE

adapters = pytest.importorskip("adapters", reason="the library adapters is not installed (pip install fastadapt[peers])")

from adapters import AdapterSetup, BatchSplit, Fuse, Parallel, Split, Stack  # noqa: E402
from adapters.methods import modeling  # noqa: E402
from transformers import BertForSequenceClassification, BertModel  # noqa: E402

import fastadapt.integrations.adapters as ours  # noqa: E402

from .test_accelerate_adapters import (  # noqa: E402, F401
    accelerated,
    batch,
    bert,
    beside,
    build,
    calls,
    compacter,
    compacter_plus_plus,
    double,
    layers,
    plus,
    randomised,
    single,
)  # fmt: skip


def assert_same_output(fast, library):
    """In float64, where what is left of an error is one of arithmetic."""
    ids = batch()["input_ids"]
    expected, actual = (copy.deepcopy(model).double().bert(ids).last_hidden_state for model in (library, fast))
    torch.testing.assert_close(actual, expected)


SETUPS = {
    "a": ("a", True),
    "b": ("b", True),
    "stack": (Stack("b", "a"), True),
    "deep": (Stack("a", "b", "c"), True),
    "fuse": (Fuse("a", "b"), False),
    "stack-of-fuse": (Stack("c", Fuse("a", "b")), False),
    "split": (Split("a", "c", splits=[5, 7]), False),
    "batch-split": (BatchSplit("c", "b", "a", batch_sizes=[1, 2, 1]), False),
    "parallel": (Parallel("a", "c"), False),
    "average": (adapters.composition.Average("a", "b", weights=[0.3, 0.7]), False),
    "none": (None, None),
}


@pytest.mark.parametrize("gated", [False, True])
def test_several_adapters_and_compositions(calls, gated):  # noqa: F811
    """Switching and compositions are the library's own, with adapters that run on kernels and ones that don't."""
    library = build(compacter(), double(), compacter(factorized_phm_rule=True, use_gating=gated))
    library.add_adapter_fusion(["a", "b"])
    randomised(library).eval()
    fast, report = accelerated(library)
    assert {row.reason for row in report.rows} == {"", *(["use_gating"] if gated else [])}
    for name, (setup, one_pass) in SETUPS.items():
        del calls[:]
        for model in (library, fast):
            model.set_active_adapters(setup)
        assert_same_output(fast, library)
        assert bool(calls) == (setup is not None), name
        assert one_pass is None or all((kwargs["residual"] is not None) == one_pass for _, kwargs in calls), name
    for model in (library, fast):
        model.set_active_adapters("a")
    with AdapterSetup(Fuse("a", "b")):  # takes the place of what is active
        assert_same_output(fast, library)
    fast.delete_adapter("a")
    library.delete_adapter("a")
    for model in (library, fast):
        model.set_active_adapters("b")
    assert_same_output(fast, library)


def snapshot(model):
    keep = lambda v: v if not isinstance(v, dict) else sorted(map(str, v))  # noqa: E731
    return [
        (type(m), {k: keep(v) for k, v in vars(m).items()}, [(n, id(p), p._version) for n, p in m.named_parameters()])
        for m in model.modules()
    ]


def test_twice_has_no_effect_and_restore_undoes_it(calls):  # noqa: F811
    model = build(compacter())
    before, keys = snapshot(model), list(model.state_dict())
    first = fastadapt.accelerate(model)
    after = snapshot(model)
    assert fastadapt.accelerate(model) == first and snapshot(model) == after != before
    assert list(model.state_dict()) == keys
    assert all(type(layer) is ours.Adapter and isinstance(layer, modeling.Adapter) for layer in layers(model).values())
    fastadapt.accelerate(model, backend="reference")
    model(**batch())
    assert {kwargs["backend"] for _, kwargs in calls} == {"reference"}
    fastadapt.restore(model)
    assert snapshot(model) == before
    model.add_adapter("b", config=single())
    assert len(fastadapt.accelerate(model).rows) == 6


def test_copies_and_pickles_stay_accelerated(calls):  # noqa: F811
    model, _ = accelerated(build(compacter_plus_plus()))
    drawn = batch()
    expected = model(**drawn).logits
    layer = next(iter(layers(model).values()))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert type(torch.load(file, weights_only=False)) is ours.Adapter
    for other in (copy.deepcopy(model), model.float()):
        del calls[:]
        assert torch.equal(other(**drawn).logits, expected) and len(calls) == 2
    other = copy.deepcopy(model)
    other.add_adapter("b", config=single())
    other.add_adapter_fusion(["a", "b"])
    other.set_active_adapters(Fuse("a", "b"))
    other(**drawn)  # the copy looks at its own active adapters
    assert calls[-1][1]["residual"] is None
    assert torch.equal(model(**drawn).logits, expected) and calls[-1][1]["residual"] is not None


def test_training_with_dropout_is_the_library_s(calls):  # noqa: F811
    library = build(compacter(dropout=0.3))
    fast, report = accelerated(library)
    assert {(row.state, row.reason) for row in report.rows} == {("in part", "dropout=0.3 in training")}
    drawn = batch()
    outputs = []
    for model in (library, fast):
        torch.manual_seed(5)
        outputs.append(model(**drawn).logits)
    assert torch.equal(*outputs) and not calls
    assert_same_output(fast.eval(), library.eval())
    assert calls


class Depth(nn.Module):
    """As torchvision's, which may not be installed."""

    p = 0.5

    def forward(self, x):
        return x * 2 if self.training else x


@pytest.mark.parametrize("parallel", [False, True])
def test_stochastic_depth(calls, parallel):  # noqa: F811
    """Left to the library in training; its parallel adapters pass it by."""
    library = build(beside() if parallel else plus())
    for layer in layers(library).values():
        layer.DropPath = Depth().train()
    fast, report = accelerated(library)
    state = ("accelerated", "") if parallel else ("in part", "stochastic_depth=0.5 in training")
    assert {(row.state, row.reason) for row in report.rows} == {state}
    drawn = batch()
    torch.testing.assert_close(fast(**drawn).logits, library(**drawn).logits)
    assert bool(calls) == parallel
    torch.testing.assert_close(fast.eval()(**drawn).logits, library.eval()(**drawn).logits)
    assert calls


def with_a_hook(part):
    model = build(compacter_plus_plus())
    for layer in layers(model).values():
        target = layer if part is None else getattr(layer, part)
        target.register_forward_hook(lambda module, args, y: (2 * y[0], *y[1:]) if part is None else 2 * y)
    return model


def replaced():
    model = build(single())
    for layer in layers(model).values():
        layer.forward = partial(type(layer).forward, layer)
    return model


LEFT = {
    "gating": (lambda: build(single(use_gating=True)), "use_gating"),
    "norm-after": (lambda: build(compacter(ln_after=True)), "ln_after"),
    "activation": (lambda: build(single(non_linearity="relu6")), "the activation ReLU6"),
    "function": (lambda: build(compacter(non_linearity="leakyrelu")), "the activation leaky_relu"),
    "hook": (lambda: with_a_hook("adapter_up"), "hooks in it"),
    "own-hook": (lambda: with_a_hook(None), "its forward has been replaced, or has hooks"),
    "forward": (replaced, "its forward has been replaced, or has hooks"),
    "ia3": (lambda: build(adapters.IA3Config()), "no kernel for IA3"),
}


@pytest.mark.parametrize("make, reason", LEFT.values(), ids=LEFT)
def test_what_is_not_covered_is_left_and_named(make, reason):
    library = make()
    before = snapshot(library)
    with pytest.raises(ValueError, match=f"(?s)got only\n.*left +{reason}"):
        fastadapt.accelerate(library)
    assert snapshot(library) == before


def test_subclasses_are_left():
    library = build(compacter())
    kind = type("Mine", (modeling.Adapter,), {})
    first, *others = layers(library).values()
    first.__class__ = kind
    fast, report = accelerated(library)
    assert [row.reason for row in report.rows] == ["no kernel for Mine"] + [""] * len(others)
    assert_same_output(fast, library)


def test_hooks_that_come_later_are_respected(calls):  # noqa: F811
    fast, _ = accelerated(build(compacter_plus_plus()))
    drawn = batch()
    before = fast(**drawn).logits
    for layer in layers(fast).values():
        for part in (layer.adapter_up, layer.adapter_down, layer.adapter_down[0], layer.non_linearity, layer.non_linearity.f):
            handle = part.register_forward_hook(lambda module, args, y: 2 * y + 1)
            assert not torch.allclose(fast(**drawn).logits, before)
            handle.remove()
            assert torch.equal(fast(**drawn).logits, before)


FILES = {"safetensors": {"use_safetensors": True}, "bin": {}}
over_files = pytest.mark.parametrize("options", FILES.values(), ids=FILES)


@over_files
@pytest.mark.parametrize("config", [compacter(factorized_phm_rule=True), compacter_plus_plus(shared_phm_rule=False), single()])
def test_files_are_the_library_s_own(tmp_path, config, options):
    library = build(config)
    fast, _ = accelerated(library)
    library.save_adapter(str(tmp_path / "library"), "a", **options)
    fast.save_adapter(str(tmp_path / "fast"), "a", **options)
    ours.save_adapter(fast, tmp_path / "ours", "a", **options)
    weights = "adapter.safetensors" if options else "pytorch_adapter.bin"
    for path in (tmp_path / "library").iterdir():
        if options or path.name != weights:  # pickles hold names of storages
            for other in ("fast", "ours"):
                assert (tmp_path / other / path.name).read_bytes() == path.read_bytes()
    other = bert().to(DEVICE)
    other.load_state_dict({k: v for k, v in fast.state_dict().items() if k in other.state_dict()})
    other.load_adapter(str(tmp_path / "fast"), load_as="new", set_active=True, **options)
    fastadapt.accelerate(other)
    drawn = batch()
    assert torch.equal(other(**drawn).logits, fast.eval()(**drawn).logits)


@over_files
@pytest.mark.parametrize("into", [BertModel, BertForSequenceClassification])
@pytest.mark.parametrize("config", [compacter(), compacter_plus_plus(factorized_phm_rule=True), compacter(shared_W_phm=True)])
def test_a_model_without_a_head_keeps_what_it_shares(tmp_path, config, into, options):
    """The library's save_adapter loses it, of which accelerate warns; the one here writes a file that the library reads."""
    model = build(config, kind=BertModel).eval()
    with pytest.warns(UserWarning, match="save_adapter of a BertModel.* leaves out the rule"):
        fastadapt.accelerate(model)
    ids = batch()["input_ids"]
    expected = model(ids).last_hidden_state
    ours.save_adapter(model, tmp_path / "ours", "a", **options)
    model.save_adapter(str(tmp_path / "theirs"), "a", **options)
    for folder, equal in (("ours", True), ("theirs", False)):
        other = bert(into).to(DEVICE).eval()
        other.base_model.load_state_dict(model.state_dict(), strict=False)
        other.load_adapter(str(tmp_path / folder), load_as="new", set_active=True, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fastadapt.accelerate(other)
        assert torch.equal(other.base_model(ids).last_hidden_state, expected) == equal


def test_no_warning_where_nothing_is_lost(recwarn):
    fastadapt.accelerate(nn.ModuleList([build(compacter()), build(single(), kind=BertModel)]))
    fastadapt.accelerate(build(compacter(shared_phm_rule=False), kind=BertModel))
    assert not [w for w in recwarn if "save_adapter" in str(w.message)]
