"""Models of the library ``adapters`` accelerated in place against the same models as they were."""

import collections
import copy
import re
from functools import partial

import pytest
import torch

import fastadapt

from .accuracy import excess
from .battery import DEVICE

adapters = pytest.importorskip("adapters", reason="the library adapters is not installed (pip install fastadapt[peers])")

from adapters import Stack  # noqa: E402
from adapters.methods import modeling  # noqa: E402
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM  # noqa: E402

from fastadapt.integrations import adapters_bottleneck  # noqa: E402
from fastadapt.ops.bottleneck import ACTIVATIONS  # noqa: E402

D = 48
compacter, compacter_plus_plus, double, single, beside, plus = (
    partial(kind, **options)
    for kind, options in (
        (adapters.CompacterConfig, {"reduction_factor": 4}),
        (adapters.CompacterPlusPlusConfig, {"reduction_factor": 4}),
        (adapters.DoubleSeqBnConfig, {}),
        (adapters.SeqBnConfig, {"non_linearity": "gelu"}),
        (adapters.ParBnConfig, {"non_linearity": "gelu"}),
        (adapters.AdapterPlusConfig, {"stochastic_depth": 0.0, "reduction_factor": 8}),
    )
)
CASES = {
    "Compacter": compacter(),
    "Compacter++": compacter_plus_plus(),
    "Compacter-factorized": compacter(factorized_phm_rule=True),
    "Compacter-own-rules": compacter(shared_phm_rule=False, phm_bias=False),
    "Compacter-own-factorized": compacter_plus_plus(shared_phm_rule=False, factorized_phm_rule=True, phm_dim=2),
    "Compacter-rank-3": compacter_plus_plus(phm_rank=3, non_linearity="gelu_new"),
    "Compacter-full": compacter_plus_plus(factorized_phm_W=False, ln_before=True, scaling="channel"),
    "Compacter-shared-weights": compacter(shared_W_phm=True),
    "Compacter-norm": compacter(ln_before=True, scaling="learned"),
    "Compacter-channel": compacter(ln_before=True, scaling="channel"),
    "Compacter-parallel": beside(phm_layer=True, reduction_factor=4, init_weights="bert"),
    "Compacter-parallel-channel": beside(phm_layer=True, reduction_factor=4, init_weights="bert", scaling="channel"),
    "SeqBn": single(),
    "SeqBn-norm": single(ln_before=True, scaling="learned"),
    "DoubleSeqBn": double(),
    "ParBn": beside(),
    "ParBn-channel": beside(scaling="channel", ln_before=True),
    "AdapterPlus": plus(),
}
CENTRAL = ("Compacter", "Compacter++", "SeqBn", "DoubleSeqBn", "ParBn")
over_cases = pytest.mark.parametrize("config", CASES.values(), ids=CASES)


def sizes(**more):
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2}
    return {"hidden_size": D, "intermediate_size": 64, "vocab_size": 50, **heads, **more}


def bert(kind=BertForSequenceClassification):
    model = kind(BertConfig(**sizes(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)))
    adapters.init(model)
    return model


def randomised(model):
    """Every parameter of the adapters away from its start; the head's so that gradients are not next to nothing."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".adapters." in f".{name}" or "shared_parameters" in name or "adapter_fusion" in name:
                norm = "norm" in name and name.endswith("weight")
                p.copy_(torch.randn(p.shape) * 0.3 + norm)
            elif name.startswith("classifier"):
                p.normal_()
    return model.to(DEVICE).train()


def build(*configs, kind=BertForSequenceClassification):
    """A model with the adapters a, b, c, ...; the first is active, all of them can be trained."""
    model = bert(kind)
    names = "abc"[: len(configs)]
    for name, config in zip(names, configs):
        model.add_adapter(name, config=config)
    model.train_adapter(Stack(*names) if len(names) > 1 else "a")
    model.set_active_adapters("a")
    return randomised(model)


def batch():
    return {"input_ids": torch.randint(50, (4, 12), device=DEVICE), "labels": torch.randint(2, (4,), device=DEVICE)}


def accelerated(library):
    fast = copy.deepcopy(library)
    return fast, fastadapt.accelerate(fast)


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, modeling.Adapter)}


@pytest.fixture
def calls(monkeypatch):
    """The name and the keyword arguments of each call of an op."""
    seen = []

    def spy(op, *args, **kwargs):
        seen.append((op, kwargs))
        return getattr(fastadapt, op)(*args, **kwargs)

    for op in ("bottleneck", "compacter"):
        monkeypatch.setattr(adapters_bottleneck, op, partial(spy, op))
    return seen


def through_the_rank(x, down, up, *, down_bias, up_bias, residual, scale, activation, backend):
    """Compacter in plain PyTorch, but in the order of the kernels and with their float32 in between.

    The library multiplies with the whole matrix, whose error in float32 is another one, for some gradients a third of this.
    """
    wide = torch.promote_types(x.dtype, torch.float32)

    def phm(x, factors, bias):
        a, s, t = (f.to(wide) if isinstance(f, torch.Tensor) else f[0].to(wide) @ f[1].to(wide) for f in factors)
        z = torch.einsum("...ap,ipk->...aik", x.unflatten(-1, (len(a), -1)), s)
        y = torch.einsum("...bik,ikj->...bj", torch.einsum("iab,...aik->...bik", a, z), t).flatten(-2)
        return y if bias is None else y + bias.to(wide)

    with torch.autocast(DEVICE, enabled=False):
        y = scale * phm(ACTIVATIONS[activation](phm(x.to(wide), down, down_bias)), up, up_bias)
        return (y if residual is None else residual.to(wide) + y).to(x.dtype)


def results(fast, library, run, draws, autocast):
    """By name the tensors of ours, of the library's, of its float64 run, and of ours in plain PyTorch; layers are as one."""
    kinds = collections.defaultdict(lambda: ([], [], [], []))
    for i, model in enumerate((fast, library, copy.deepcopy(library).double(), fast)):
        with pytest.MonkeyPatch.context() as patch, torch.autocast(DEVICE, torch.bfloat16, enabled=autocast and i != 2):
            if i == 3:
                patch.setattr(adapters_bottleneck, "compacter", through_the_rank)
            for draw in draws:
                draw = [t.double() if i == 2 and t.is_floating_point() else t for t in draw]
                for name, value in run(model, *draw).items():
                    kinds[re.sub(r"\d+", "*", name)][i].append(value)
    return kinds


def assert_equal_outcomes(fast, library, run, draw, autocast=False):
    """``run(model, *arguments)`` gives tensors by name. Those of a name err by at most twice what plain PyTorch does, as the
    library computes them or in the order of the kernels. The error of a few numbers is luck: what ``draw()`` shows must still
    show when four times as many arguments are pooled with it."""
    pooled = collections.defaultdict(lambda: ([], [], [], []))
    for times in (1, 4):
        for name, values in results(fast, library, run, [a for _ in range(times) for a in draw()], autocast).items():
            for all_of_it, new in zip(pooled[name], values):
                all_of_it += new
        assert all(any(t.any() for t in oracle) for _, _, oracle, _ in pooled.values())
        wrong = [
            words
            for name, (*three, in_order) in pooled.items()
            for words in excess(*three, name, [[t] for t in in_order])
        ]
        if not wrong:
            return
    raise AssertionError("\n".join(wrong))


def of_sublayers(model, h, res, grad_y):
    """Output and all gradients of what follows each sublayer of the last block, in the context of a whole forward."""
    outcome = {}
    with modeling.ForwardContext(model.bert, torch.zeros(1, 1, dtype=torch.int64)):
        for sublayer in (model.bert.encoder.layer[1].attention.output, model.bert.encoder.layer[1].output):
            if "a" not in sublayer.adapters:
                continue
            h, res = (t.detach().clone().requires_grad_() for t in (h, res))
            own, shared = sublayer.adapters["a"].named_parameters(), model.bert.shared_parameters.named_parameters()
            wanted = {"h": h, "res": res, **dict(own), **dict(shared)}
            y = sublayer.bottleneck_layer_forward(h, res, sublayer.LayerNorm)
            grads = torch.autograd.grad(y, list(wanted.values()), grad_y.to(y.dtype), allow_unused=True)
            outcome |= {f"{sublayer.location_key}.{n}": g for n, g in zip(wanted, grads) if g is not None} | {"y": y.detach()}
    return outcome


def of_models(model, ids, labels):
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    result = model(ids, labels=labels)
    return {"logits": result.logits.detach(), **dict(zip(wanted, torch.autograd.grad(result.loss, list(wanted.values()))))}


def sequences(count):
    return [(torch.randint(50, (4, 12), device=DEVICE), torch.randint(2, (4,), device=DEVICE)) for _ in range(count)]


KINDS = {"float32": (torch.float32, False), "bfloat16": (torch.bfloat16, False), "autocast": (torch.float32, True)}


@pytest.mark.parametrize(
    "config, dtype, autocast",
    [
        pytest.param(config, *kind, id=f"{name}-{word}")
        for name, config in CASES.items()
        for word, kind in KINDS.items()
        if word == "float32" or name in CENTRAL
    ],
)
def test_equals_the_library(calls, config, dtype, autocast):
    """Output and all gradients, those of the shared parameters too."""
    library = build(config).to(dtype)
    fast, report = accelerated(library)
    assert not report.left and set(report.accelerated) == set(layers(library))
    assert_equal_outcomes(fast, library, of_sublayers, lambda: torch.randn(8, 3, 3, 7, D, device=DEVICE).to(dtype), autocast)
    op = "compacter" if config.phm_layer and config.factorized_phm_W else "bottleneck"
    assert {name for name, _ in calls} == {op}
    branch = config.is_parallel or (op == "compacter" and config.scaling == "channel")
    assert autocast or all((kwargs["residual"] is None) == branch for _, kwargs in calls)


@pytest.mark.parametrize("name", CENTRAL)
def test_whole_models_equal_the_library_s(name):
    library = build(CASES[name])
    assert_equal_outcomes(accelerated(library)[0], library, of_models, partial(sequences, 4))


def llama():
    model = LlamaForCausalLM(LlamaConfig(**sizes()))
    adapters.init(model)
    model.add_adapter("a", config=adapters.CompacterConfig(reduction_factor=4))
    model.train_adapter("a")
    return randomised(model)


def test_a_decoder():
    library = llama()
    fast, report = accelerated(library)
    assert len(report.accelerated) == 4
    assert_equal_outcomes(fast, library, of_models, lambda: [(ids, ids) for ids, _ in sequences(3)])


@pytest.mark.parametrize("config", [compacter(), single(ln_before=True), beside(scaling="learned")])
def test_dtypes_under_autocast_are_the_library_s(config):
    library = build(config)
    fast, _ = accelerated(library)
    x = torch.randn(2, 3, D, device=DEVICE)
    context = modeling.ForwardContext(library.bert, torch.zeros(1, 1, dtype=torch.int64))
    with torch.autocast(DEVICE, torch.bfloat16), context:
        for name, layer in layers(fast).items():
            for residual in (x, x.bfloat16()):
                assert layer(x, residual)[0].dtype == library.get_submodule(name)(x, residual)[0].dtype


@pytest.mark.slow
@over_cases
def test_compiles_without_graph_break(config):
    """The library's own PHM layers don't compile."""
    fast, _ = accelerated(build(config).eval())
    drawn = batch()
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**drawn).logits, fast(**drawn).logits)


def test_gradient_checkpointing():
    fast, _ = accelerated(build(compacter()))
    drawn, wanted = batch(), [p for p in fast.parameters() if p.requires_grad]
    expected = torch.autograd.grad(fast(**drawn).loss, wanted)
    fast.gradient_checkpointing_enable()
    assert all(map(torch.equal, torch.autograd.grad(fast(**drawn).loss, wanted), expected))
