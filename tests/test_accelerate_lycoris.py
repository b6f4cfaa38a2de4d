"""LoKr and LoHa layers of ``peft`` accelerated in place against the same layers as they were."""

import copy
import functools

import pytest
import torch
from torch import nn

import fastadapt
import fastadapt.integrations.peft as ours
from fastadapt.integrations import peft_lycoris

from . import rounding
from .accuracy import assert_within_reference_error, excess
from .battery import DEVICE
from .modules import pooled, spied
from .test_accelerate import outcome, target
from .test_accelerate_state import snapshot
from .test_peft_library import K, N

peft = pytest.importorskip("peft", reason="the library peft is not installed (pip install fastadapt[peers])")

TWO = {"r": 2, "alpha": 1.0}
# kind, options of each adapter; all of them are active. The factors of (N, K) are w1 (4, 5) and w2 (6, 8).
CASES = {
    "lokr": ("lokr", {}),
    "lokr-dense": ("lokr", {"r": 6, "alpha": 9}),
    "lokr-both": ("lokr", {**TWO, "decompose_both": True}),
    "lokr-w1-alone": ("lokr", {"decompose_both": True, "decompose_factor": 8}),
    "lokr-long": ("lokr", {"decompose_factor": 2}),
    "lokr-two": ("lokr", {}, {**TWO, "decompose_both": True}),
    "lokr-two-dense": ("lokr", {"r": 6, "alpha": 9}, TWO),
    "loha": ("loha", {}),
    "loha-two": ("loha", {}, {"r": 2, "alpha": 3}),
    "loha-two-scales": ("loha", {}, TWO),
    "loha-large-rank": ("loha", {"r": 4, "alpha": 6}, TWO),
}
over_cases = pytest.mark.parametrize("kind, options", [(kind, tuple(options)) for kind, *options in CASES.values()], ids=CASES)
CALLS = {"lokr-two": 2, "lokr-two-dense": 2}  # of kernels, one if not named


def config(kind, **options):
    make = {"lokr": peft.LoKrConfig, "loha": peft.LoHaConfig}[kind]
    return make(**{"r": 3, "alpha": 4.5, "target_modules": ["target"], "init_weights": False, **options})


@torch.no_grad()
def randomised(model):
    """Every parameter of the adapters in such a size that their part in the output is about that of the frozen layer."""
    for name, p in model.named_parameters():
        if "lokr_" in name or "hada_" in name:
            p.copy_(torch.randn(p.shape) * (0.3 if "lokr_" in name else 0.4))
    return model.to(DEVICE)


def build(kind, *options, dtype=torch.float32, base=nn.Linear):
    """A model of peft with one adapted layer and an adapter for each of ``options``, all active and trainable."""
    model = nn.Sequential()
    model.target = base(K, N).to(dtype)
    names = [f"adapter{i}" for i in range(len(options))]
    model = peft.get_peft_model(model, config(kind, **options[0]), adapter_name=names[0])
    for name, more in zip(names[1:], options[1:]):
        model.add_adapter(name, config(kind, **more))
    model.base_model.set_adapter(names)
    return randomised(model)


def inputs(draws=1, dtype=torch.float32):
    """Few rows: the model of rounding holds for sums of some hundred terms, and a factor's gradient has as many for a row."""
    return torch.randn(draws, 2, 4, K, device=DEVICE).to(dtype), torch.randn(draws, 2, 4, N, device=DEVICE).to(dtype)


@pytest.fixture
def calls(monkeypatch):
    return spied(monkeypatch, peft_lycoris, "kron_linear", "lora_linear")


def outcomes(fast, library, x, grad_y, autocast):
    """What ``excess`` compares, by name: of ``fast``, of the library, in float64, and what rounding may make of the last."""
    run = lambda model, *drawn: pooled(functools.partial(outcome, model), *drawn)  # noqa: E731
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        actual, expected = (run(model, x, grad_y) for model in (fast, library))
    oracle = run(copy.deepcopy(library).double(), x.double(), grad_y.double())
    samples = []
    for round, vary in [(rounding.nearest, lambda t: t), *[(rounding.randomly, rounding.inexact)] * 2]:
        double = copy.deepcopy(library).double()
        for p in double.parameters():
            p.data = vary(p.data)
        results = run(double, vary(x.double()), grad_y.double())
        samples.append({name: round(t, expected[name].dtype) for name, t in results.items()})
    assert set(actual) == set(expected) and all(t.any() for t in expected.values())
    return {name: (actual[name], expected[name], oracle[name], [s[name] for s in samples]) for name in expected}


def assert_equal_outcomes(fast, library, dtype=torch.float32, autocast=False):
    """The rule of the battery, since gradients of factors are sums of other terms than in the library, in another order.

    As there, what some draws show must still show when more are pooled with them. Returns how many there were.
    """
    found = {}
    for draws in (8, 24):
        for name, results in outcomes(fast, library, *inputs(draws, dtype), autocast).items():
            found.setdefault(name, []).append(results)
        errors = []
        for name, parts in found.items():
            *three, samples = zip(*parts)
            errors += excess(*three, name, samples)
        if not errors:
            return sum(len(part[0]) for part in found["y"])
    raise AssertionError("; ".join(errors))


@pytest.mark.parametrize(
    "case, dtype, autocast",
    [(case, *how) for how in (("float32", False), ("bfloat16", False)) for case in CASES]
    + [pytest.param(case, "float32", True, marks=() if case in ("lokr", "loha") else pytest.mark.slow) for case in CASES],
)
def test_equals_the_library(calls, case, dtype, autocast):
    """In bfloat16 the library keeps the adapters in float32."""
    kind, *options = CASES[case]
    library = build(kind, *options, dtype=getattr(torch, dtype))
    fast = copy.deepcopy(library)
    (row,) = fastadapt.accelerate(fast).rows
    large = "adapter 'adapter0': rank 4 squared costs more than the (24, 40) matrix"
    assert row == ("base_model.model.target", *(("in part", large) if "large-rank" in case else ("accelerated", "")))
    draws = assert_equal_outcomes(fast, library, dtype=getattr(torch, dtype), autocast=autocast)
    assert len(calls) == draws * CALLS.get(case, 1)


@pytest.mark.parametrize("kind", ["lokr", "loha"])
def test_adapters_in_16_bits(calls, kind):
    """As wide as the layer, or narrower, which the library casts the input to."""
    library = build(kind, {}, {})
    fast = copy.deepcopy(library)
    fastadapt.accelerate(fast)
    x, _ = inputs()
    for model in (library, fast):
        for name, p in model.named_parameters():
            p.data = p.data.bfloat16() if "adapter" in name else p.data
    assert torch.equal(target(fast)(x), target(library)(x)) and not calls
    draws = assert_equal_outcomes(fast.bfloat16(), library.bfloat16(), dtype=torch.bfloat16)
    assert len(calls) == draws * (2 if kind == "lokr" else 1)


def merged(model):
    model.merge_adapter()


def unmerged(model):
    model.unmerge_adapter()


def disabled(model):
    model.base_model.disable_adapter_layers()


def enabled(model):
    model.base_model.enable_adapter_layers()


def new_weights(model):
    for name, p in model.named_parameters():
        p.data.mul_(1.5 if "adapter0" in name else 1.0)


def steps(kind):
    return {
        "set_scale": lambda model: target(model).set_scale("adapter0", 0.25),
        "scale_layer": lambda model: target(model).scale_layer(3.0),
        "unscale_layer": lambda model: target(model).unscale_layer(),
        "new weights": new_weights,
        "eval": lambda model: model.eval(),
        "merge": merged,
        "unmerge": unmerged,
        "disable": disabled,
        "enable": enabled,
        "merge again": merged,
        "disable unmerges": disabled,
        "enable again": enabled,
        "add": lambda model: model.add_adapter("new", config(kind, **TWO)),
        "switch": lambda model: model.set_adapter("new"),
        "both": lambda model: model.base_model.set_adapter(["adapter0", "new"]),
        "delete": lambda model: model.delete_adapter("adapter0"),
        "train": lambda model: model.train(),
        "another model's merge": lambda model: model.base_model.merge_adapter(["new"]),
    }


@pytest.mark.parametrize("kind", ["lokr", "loha"])
def test_follows_every_change_of_state(calls, kind):
    library = build(kind, {})
    fast = copy.deepcopy(library)
    fastadapt.accelerate(fast)
    kernel = set()
    for name, step in steps(kind).items():
        for model in (library, fast):
            torch.manual_seed(9)
            step(model)
        x, _ = inputs()
        before = len(calls)
        with torch.no_grad():
            actual, expected, oracle = target(fast)(x), target(library)(x), target(copy.deepcopy(library).double())(x.double())
        assert_within_reference_error(actual, expected, oracle, name)
        kernel |= {name} if len(calls) > before else set()
    assert kernel == set(steps(kind)) - {"merge", "disable", "merge again", "disable unmerges", "another model's merge"}
    fastadapt.restore(fast)
    assert type(target(fast)) is type(target(library))
    target(fast).unmerge()
    target(library).unmerge()
    assert torch.equal(target(fast)(x), target(library)(x))


@over_cases
def test_files_are_the_library_s_own(tmp_path, kind, options):
    """Keys and bytes; what either writes either reads."""
    library = build(kind, *options)
    fast = copy.deepcopy(library)
    fastadapt.accelerate(fast)
    assert list(fast.state_dict()) == list(library.state_dict())
    for name, model in (("library", library), ("fast", fast)):
        model.save_pretrained(tmp_path / name)
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
    x, grad_y = (t[0] for t in inputs())
    assert all(torch.equal(value, outcome(fast, x, grad_y)[name]) for name, value in outcome(loaded, x, grad_y).items())


@pytest.mark.parametrize("kind", ["lokr", "loha"])
def test_twice_has_no_effect_and_restore_undoes_it(calls, kind):
    model = build(kind, {})
    before = snapshot(model)
    first = fastadapt.accelerate(model, backend="reference")
    after = snapshot(model)
    assert type(target(model)) is {"lokr": ours.LoKrLinear, "loha": ours.LoHaLinear}[kind]
    assert fastadapt.accelerate(model, backend="reference") == first and snapshot(model) == after != before
    x, _ = inputs()
    other = copy.deepcopy(model)
    assert torch.equal(target(other)(x), target(model)(x))
    assert [call["backend"] for call in calls] == ["reference"] * 2
    fastadapt.restore(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("option", ["rank_dropout", "module_dropout"])
@pytest.mark.parametrize("kind", ["lokr", "loha"])
def test_dropout_is_the_library_s(calls, kind, option):
    """In training, with its own draws; without any in evaluation."""
    library = build(kind, {option: 0.5}, {})
    fast = copy.deepcopy(library)
    (row,) = fastadapt.accelerate(fast).rows
    assert row[1:] == ("in part", f"adapter 'adapter0': {option} in training")
    x, grad_y = (t[0] for t in inputs())
    expected, actual = (outcome(model, x, grad_y) for model in (library, fast))
    assert all(torch.equal(value, actual[name]) for name, value in expected.items()) and not calls
    draws = assert_equal_outcomes(fast.eval(), library.eval())
    assert len(calls) == draws * (2 if kind == "lokr" else 1)
    fast.train().set_adapter("adapter1")
    target(fast)(x)
    assert calls[-1]["scale"] == 1.5 and len(calls) % draws == 1


@pytest.mark.parametrize("kind", ["lokr", "loha"])
def test_what_is_not_covered_is_left_and_named(kind):
    conv = nn.Sequential()
    conv.target = nn.Conv2d(4, 6, 3)
    conv = randomised(peft.get_peft_model(conv, config(kind)))
    doubled = build(kind, {}, base=type("Doubled", (nn.Linear,), {"forward": lambda self, x: 2 * nn.Linear.forward(self, x)}))
    large = build(kind, {"r": 4})
    replaced = build(kind, {})
    target(replaced).forward = functools.partial(type(target(replaced)).forward, target(replaced))
    expected = {
        "no kernel": (conv, torch.randn(2, 4, 5, 5), f"no kernel for {kind}.Conv2d"),
        "replaced": (replaced, torch.randn(2, K), "its forward has been replaced"),
    }
    if kind == "loha":  # kron_linear adds to whatever the base layer computes
        expected["base"] = doubled, torch.randn(2, K), "its base layer is a Doubled"
        expected["rank"] = large, torch.randn(2, K), "adapter 'adapter0': rank 4 squared costs more than the (24, 40) matrix"
    for library, x, reason in expected.values():
        fast = copy.deepcopy(library)
        fast.more = build(kind, {})
        row = fastadapt.accelerate(fast).rows[0]
        assert row == ("base_model.model.target", "left", reason)
        assert type(target(fast)) is type(target(library))
        assert torch.equal(target(fast)(x.to(DEVICE)), target(library)(x.to(DEVICE)))
    if kind == "lokr":
        fast = copy.deepcopy(doubled)
        assert fastadapt.accelerate(fast).rows[0].state == "accelerated"
        assert_equal_outcomes(fast, doubled)


def test_adapters_over_adapters(calls):
    """In a model that mixes them, the lowest is the one whose base layer says what it computes."""
    model = nn.Sequential()
    model.target = nn.Linear(K, N)
    library = peft.PeftMixedModel(model, peft.LoraConfig(r=2, target_modules=["target"]), "lora")
    for kind in ("loha", "lokr"):
        library.add_adapter(kind, config(kind))
    library.set_adapter(["lora", "loha", "lokr"])
    library = randomised(library).to(DEVICE)
    fast, (x, _) = copy.deepcopy(library), inputs()
    rows = fastadapt.accelerate(fast).rows
    assert [row.module.count("base_layer") for row in rows] == [0, 1, 2]
    over = "left", "its base layer is another adapter's"
    assert [row[1:] for row in rows] == [("accelerated", ""), over, ("accelerated", "")]
    torch.testing.assert_close(fast(x), library(x))
    assert len(calls) == 1


@over_cases
def test_checkpointing(kind, options):
    model = build(kind, *options)
    fastadapt.accelerate(model)
    layer = target(model)
    x, grad_y = (t[0] for t in inputs())
    plain = outcome(model, x, grad_y)
    forward = layer.forward
    layer.forward = lambda x: torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=False)
    assert all(torch.equal(value, plain[name]) for name, value in outcome(model, x, grad_y).items())


@pytest.mark.parametrize(
    "case", [case if case == "lokr" else pytest.param(case, marks=pytest.mark.slow) for case in CASES if "two" not in case]
)
def test_compilation(case):
    """One graph, and for another scale no other result."""
    kind, *options = CASES[case]
    model = build(kind, *options)
    fastadapt.accelerate(model)
    layer, (x, _) = target(model), inputs()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for scale in (1.0, 0.5):
        layer.set_scale("adapter0", scale)
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("kind", ["lokr", "loha"])
def test_nothing_as_large_as_the_weight_is_made(kind):
    """Neither in forward nor in backward, for one row."""
    model = nn.Sequential()
    model.target = nn.Linear(512, 512)
    model = randomised(peft.get_peft_model(model, config(kind)))
    fastadapt.accelerate(model)
    x = torch.randn(1, 512, device=DEVICE, requires_grad=True)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            results = out if isinstance(out, tuple | list) else (out,)
            known = target(model).base_layer.weight.untyped_storage().data_ptr()
            fresh = [t for t in results if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() != known]
            sizes.extend(t.untyped_storage().nbytes() // t.element_size() for t in fresh)
            return out

    with Watch():
        target(model)(x).square().sum().backward()
    assert sizes and max(sizes) < 512 * 512 / 8
