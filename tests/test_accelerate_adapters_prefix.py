"""Prefix tuning of ``adapters`` accelerated in place against the same models as they were."""

import copy

import pytest
import torch

import fastadapt

from . import prefix_models
from .battery import DEVICE
from .prefix_models import MODELS, P, T, assert_equal_outcomes, batch, bert, gpt2, hf, llama, outcome, state

adapters = pytest.importorskip("adapters", reason="the library adapters is not installed (pip install fastadapt[peers])")

from adapters.composition import BatchSplit, Stack  # noqa: E402

CASES = {
    "flat": {"flat": True},
    "mlp": {"flat": False, "bottleneck_size": 16},
    "gate": {"flat": True, "use_gating": True},
    "two-gates": {"flat": False, "bottleneck_size": 16, "use_gating": True, "shared_gating": False},
}
over_cases = pytest.mark.parametrize("options", CASES.values(), ids=CASES)
over_models = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def build(make, *options, dtype=torch.float32, attention="eager"):
    """A model with a prefix for each of ``options``, stacked; of decoders the library is right with eager attention alone."""
    model = make(attn_implementation=attention)[0]
    adapters.init(model)
    names = [f"prefix{i}" for i in range(len(options))]
    for i, (name, more) in enumerate(zip(names, options)):
        model.add_adapter(name, config=adapters.PrefixTuningConfig(prefix_length=P + i, **more))
    model.train_adapter(Stack(*names))
    model.freeze_model(True)
    for name in names:
        model.apply_to_adapter_layers(lambda _, layer: layer.freeze_adapter(name, False) if hasattr(layer, "pool") else None)  # noqa: B023
    return model.to(DEVICE, dtype).train()


def pair(*args, **options):
    library = build(*args, **options)
    fast = copy.deepcopy(library)
    fastadapt.accelerate(fast)
    return library, fast


def batches(model, count=1):
    """With padding at the right: of a query that sees no token eager attention makes NaN in float64."""
    return [batch(model, side) for side in (None, "right") for _ in range(count)]


@pytest.fixture
def calls(monkeypatch):
    return prefix_models.spy(monkeypatch)


@pytest.mark.parametrize(
    "make, options",
    [
        pytest.param(make, options, id=f"{name}-{case}", marks=() if make is bert or case == "mlp" else pytest.mark.slow)
        for name, make in MODELS.items()
        for case, options in CASES.items()
    ],
)
def test_equals_the_library(calls, make, options):
    """A gate makes a prefix one of each sequence; else it is shared, and no key is as long as prefix and tokens."""
    library, fast = pair(make, options)
    ran = []
    for module in fast.modules():
        if isinstance(module, torch.nn.Embedding) and module.num_embeddings == P:
            module.register_forward_hook(lambda module, args, output: ran.append(output.shape[:-1]))
    count = assert_equal_outcomes(fast, library, lambda: batches(library, 2))
    h_kv = 2 if make is llama else 4
    prefix = (3, h_kv, P, 8) if options.get("use_gating") else (h_kv, P, 8)
    assert calls == [((3, h_kv, T, 8), prefix)] * 2 * count
    assert ran == [(P,)] * count * (not options["flat"])


@pytest.mark.parametrize("make", [bert, llama], ids=["bert", "llama"])
def test_equals_the_library_in_16_bits(calls, make):
    library, fast = pair(make, CASES["mlp"], dtype=torch.bfloat16)
    assert_equal_outcomes(fast, library, lambda: batches(library, 2))
    assert calls


@pytest.mark.parametrize("own, dtype", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)], ids=str)
@pytest.mark.parametrize("make", [bert, llama], ids=["bert", "llama"])
def test_a_prefix_narrower_than_the_model(calls, make, own, dtype):
    library, fast = pair(make, CASES["mlp"], dtype=dtype)
    for model in (library, fast):
        model.adapter_to("prefix0", dtype=own)
    assert_equal_outcomes(fast, library, lambda: batches(library, 2))
    assert calls


def test_padding_at_the_left():
    library, fast = pair(bert, CASES["mlp"], attention="sdpa")
    assert_equal_outcomes(fast, library, lambda: [batch(library, "left") for _ in range(2)])


@pytest.mark.parametrize("make", [llama, gpt2], ids=["llama", "gpt2"])
def test_decoders_with_sdpa_see_their_prefix(make):
    """With it the library hides the prefix where there is a mask, and else shows the first tokens a part of it alone."""
    model = build(make, CASES["flat"], attention="sdpa")
    right = copy.deepcopy(model)
    right.config._attn_implementation = "eager"
    report = fastadapt.accelerate(model)
    assert all(row[1:] == ("accelerated", report.rows[0].reason) and "'eager'" in row.reason for row in report.rows)
    assert_equal_outcomes(model, right, lambda: batches(model))


@pytest.mark.parametrize("options", [{"flat": True}, {"flat": False, "bottleneck_size": 16}], ids=["flat", "mlp"])
def test_dropout_draws_as_the_library_does(calls, options):
    """A mask for each sequence in training."""
    library, fast = pair(bert, options | {"dropout": 0.4})
    inputs, results = batch(library), []
    for model in (library, fast):
        torch.manual_seed(3)
        results.append(outcome(model, inputs))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, msg=name)
    assert {shapes[1] for shapes in calls} == {(3, 4, P, 8)}
    fast.eval()(**inputs)
    assert calls[-1][1] == (4, P, 8)


@pytest.mark.parametrize("case", ["gate", "mlp"])
def test_several_prefixes(calls, case):
    """Stacked ones are one; for others, in a part of the batch, the library composes."""
    library, fast = pair(bert, CASES["flat"], CASES[case])
    assert_equal_outcomes(fast, library, lambda: batches(library))
    prefix = (4, 2 * P + 1, 8) if case == "mlp" else (3, 4, 2 * P + 1, 8)
    assert {shapes[1] for shapes in calls} == {prefix}
    calls.clear()
    inputs = batch(library)
    for model in (library, fast):
        model.active_adapters = BatchSplit("prefix0", "prefix1", batch_sizes=[1, 2])
    torch.testing.assert_close(fast(**inputs).logits, library(**inputs).logits)
    assert not calls
    for model in (library, fast):
        model.set_active_adapters("prefix1")
    torch.testing.assert_close(fast(**inputs).logits, library(**inputs).logits)
    assert len(calls) == 2


@over_models
def test_gradient_checkpointing(make):
    _, model = pair(make, CASES["mlp"])
    inputs = batch(model, "right")
    model.enable_input_require_grads()
    plain = outcome(model, inputs)
    model.gradient_checkpointing_enable()
    again = outcome(model, inputs)
    assert set(again) == set(plain) and all(torch.equal(value, plain[name]) for name, value in again.items())


def test_generation(calls):
    """Without a cache, since the library's decoders lose theirs."""
    library, fast = pair(llama, CASES["mlp"])
    inputs = {name: value for name, value in batch(library).items() if name != "labels"}
    options = {"max_new_tokens": 6, "use_cache": False}
    assert torch.equal(*(model.eval().generate(**inputs, **options) for model in (library, fast))) and len(calls) == 12


def test_follows_every_change_of_state(calls):
    library, fast = pair(bert, CASES["mlp"])
    inputs = batch(library, "right")

    def add(model):
        torch.manual_seed(1)
        model.add_adapter("more", config=adapters.PrefixTuningConfig(prefix_length=3), set_active=True)

    steps = {
        "eval": (lambda model: model.eval(), 2), "add": (add, 2),
        "back": (lambda model: model.set_active_adapters("prefix0"), 2),
        "skip": (lambda model: model.set_active_adapters("prefix0", skip_layers=[0]), 1),
        "none": (lambda model: model.set_active_adapters(None), 0),
        "eject": (lambda model: (model.set_active_adapters("prefix0"), model.eject_prefix_tuning("prefix0")), 2),
        "delete": (lambda model: model.delete_adapter("more"), 2),
    }  # fmt: skip
    for name, (step, count) in steps.items():
        for model in (library, fast):
            step(model)
        if name in ("add", "eject"):  # modules that are new
            torch.testing.assert_close(fast(**inputs).logits, library(**inputs).logits)
            assert not calls
        fastadapt.accelerate(fast)
        torch.testing.assert_close(fast(**inputs).logits, library(**inputs).logits)
        assert len(calls) == count, name
        calls.clear()
    expected, actual = (model(**inputs, output_attentions=True) for model in (library, fast))
    assert (
        torch.equal(actual.logits, expected.logits) and torch.equal(actual.attentions[1], expected.attentions[1]) and not calls
    )


def test_with_adapters_of_other_kinds():
    """One name for a prefix and a bottleneck adapter."""
    model = bert()[0]
    adapters.init(model)
    model.add_adapter("both", config=adapters.MAMConfig(adapters.PrefixTuningConfig(bottleneck_size=16)))
    model.train_adapter("both")
    for p in model.parameters():  # a new bottleneck adapter changes nothing, and the first of its layers gets no gradient
        p.data = torch.randn(p.shape) * 0.1 if p.requires_grad else p.data
    model.to(DEVICE)
    fast = copy.deepcopy(model)
    report = fastadapt.accelerate(fast)
    assert len(report.accelerated) == 4 and not report.left
    assert_equal_outcomes(fast, model, lambda: [batch(model, "right") for _ in range(2)])


@over_cases
def test_files_are_the_library_s_own(tmp_path, options):
    library, fast = pair(bert, options)
    assert list(fast.state_dict()) == list(library.state_dict())
    for name, model in (("library", library), ("fast", fast)):
        model.save_adapter(str(tmp_path / name), "prefix0")
    for path in (tmp_path / "library").iterdir():
        if path.suffix == ".json":
            assert path.read_bytes() == (tmp_path / "fast" / path.name).read_bytes(), path
    inputs = batch(library)
    expected = library(**inputs).logits
    for source, faster in (("library", True), ("fast", False)):
        model = copy.deepcopy(library)
        model.delete_adapter("prefix0")
        model.load_adapter(str(tmp_path / source), load_as="again", set_active=True)
        if faster:
            fastadapt.accelerate(model)
        torch.testing.assert_close(model.to(DEVICE)(**inputs).logits, expected)


@over_models
def test_twice_has_no_effect_and_restore_undoes_it(calls, make):
    model = build(make, CASES["mlp"])
    inputs, before = batch(model, "right"), state(model)
    expected = model(**inputs).logits
    first = fastadapt.accelerate(model, backend="reference")
    after = state(model)
    assert fastadapt.accelerate(model, backend="reference") == first and state(model) == after != before
    assert len(first.rows) == 2 and not first.left
    torch.testing.assert_close(copy.deepcopy(model)(**inputs).logits, expected)
    assert len(calls) == 2
    fastadapt.restore(model)
    assert torch.equal(model(**inputs).logits, expected) and len(calls) == 2 and state(model) == before


def test_what_is_not_covered_is_left_and_named():
    options = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": 40}
    cases = {
        "distilbert has attention code of its own": hf.DistilBertForSequenceClassification(hf.DistilBertConfig(**options)),
        "its attention has positions in its scores": bert(position_embedding_type="relative_key")[0],
        "its attention has scales that PyTorch's": gpt2(scale_attn_by_inverse_layer_idx=True)[0],
    }
    for reason, model in cases.items():
        adapters.init(model)
        model.add_adapter("prefix", config="prefix_tuning", set_active=True)
        kinds = [type(module) for module in model.modules()]
        with pytest.raises(ValueError, match=f"left +{reason}"):
            fastadapt.accelerate(model)
        assert [type(module) for module in model.modules()] == kinds
