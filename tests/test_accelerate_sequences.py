"""Random sequences of what users do to a model of ``peft``: after each step the accelerated one computes the same."""

import copy
import random
import warnings

import pytest
import torch
from torch import nn

import fastadapt

from .accuracy import excess
from .battery import DEVICE

peft = pytest.importorskip("peft", reason="the library peft is not installed (pip install fastadapt[peers])")

from transformers.pytorch_utils import Conv1D  # noqa: E402

from .test_accelerate import calls  # noqa: E402, F401

LoraLayer = peft.tuners.lora.LoraLayer


class Net(nn.Module):
    """Layers side by side: behind another, one would show that one's error too."""

    def __init__(self):
        super().__init__()
        self.table, self.linear, self.conv = nn.Embedding(30, 20), nn.Linear(20, 24), Conv1D(16, 20)
        self.out = nn.Linear(20, 8, bias=False)
        for bias in (self.linear.bias, self.conv.bias):
            nn.init.normal_(bias)
        nn.init.normal_(self.conv.weight, std=0.2)
        self.register_buffer("rows", torch.randn(30, 20))

    def forward(self, ids):
        x = self.rows[ids]
        return torch.cat([self.table(ids), self.linear(x), self.conv(x), self.out(x)], -1)


def random_config(rng):
    targets = rng.sample(["table", "linear", "conv", "out"], rng.randint(1, 4))
    kind = rng.choice(["lora", "lora", "use_dora", "use_rslora", "lora_bias"])
    options = {} if kind == "lora" or (kind == "lora_bias" and "table" in targets) else {kind: True}
    sizes = {"r": rng.choice([1, 2, 5]), "lora_alpha": rng.choice([1, 3, 8]), "lora_dropout": rng.choice([0.0, 0.3])}
    return peft.LoraConfig(target_modules=targets, init_lora_weights=False, **sizes, **options)


def layers(model):
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def merged(model):
    return any(layer.merged for layer in layers(model))


def scale(model, name, value):
    for layer in layers(model):
        layer.set_scale(name, value)


def stir(model):
    """Other weights of the adapters, as large as they were; the state of the generator decides on them."""
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data.copy_(torch.randn(p.shape).to(p.device) * p.data.square().mean().sqrt())


def random_step(rng, model):
    """A function of a model: one thing that a user may do to it now, and the ``adapter_names`` of the next forward."""
    names = list(model.peft_config)
    some, one, value, new = rng.sample(names, rng.randint(1, len(names))), rng.choice(names), rng.random(), random_config(rng)
    steps = {
        "switch": lambda m: m.base_model.set_adapter(some),
        "scale": lambda m: scale(m, one, value),
        "weights": stir,
        "eval": lambda m: m.eval(),
        "train": lambda m: m.train(),
        "disable": lambda m: m.base_model.disable_adapter_layers(),
        "enable": lambda m: m.base_model.enable_adapter_layers(),
        "unmerge": lambda m: m.unmerge_adapter(),
        "mix": lambda m: m.eval(),
        "again": lambda m: fastadapt.accelerate(m) if m.is_fast else None,
        "restore": lambda m: fastadapt.restore(m) if m.is_fast else None,
    }
    if not merged(model):
        steps["merge"] = lambda m: m.merge_adapter(some)
        if len(names) > 1:
            steps["delete"] = lambda m: m.delete_adapter(one)
        if len(names) < 4:
            steps["add"] = lambda m: m.add_adapter(f"adapter{int(1e6 * value)}", copy.deepcopy(new))
    word = rng.choice(list(steps))
    return word, steps[word], [rng.choice([*names, "__base__"]) for _ in range(4)] if word == "mix" else None


def outcome(model, act):
    """What ``act`` returns, or the type of what it raises."""
    try:
        return act(model)
    except (ValueError, RuntimeError, KeyError) as error:  # of the library: merges and batches that it refuses, a lost name
        return type(error)


def gradients(model, y):
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(y.square().sum(), list(wanted.values()), allow_unused=True)
    return {name: grad for name, grad in zip(wanted, grads) if grad is not None}


def forward(model, ids, names):
    """Output and gradients. Dropout is off, whose masks differ."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    y = model(ids) if names is None else model(ids, adapter_names=names)
    return {"y": y.detach(), **(gradients(model, y) if y.requires_grad else {})}


def too_far(fast, library, ids, names):
    """What errs more than the rule of accuracy allows with these weights, with eight draws of others, and with more of them.

    The error of one draw is luck, and some draws, as those with a row that the update nearly takes away, outweigh all others.
    """
    models = fast, library
    for count in (1, 8, 64):
        draws = []
        for _ in range(count):
            draws.append([forward(model, ids, names) for model in (*models, copy.deepcopy(models[1]).double())])
            models, random_state = copy.deepcopy((fast, library)), torch.get_rng_state()
            for model in models:
                torch.set_rng_state(random_state)
                stir(model)
        pooled = {name: [[results[i][name] for results in draws] for i in range(3)] for name in draws[0][0]}
        errors = [error for name, values in pooled.items() for error in excess(*values, name)]
        if not errors:
            break
    return errors


@pytest.mark.parametrize("seeds", [range(20), pytest.param(range(20, 300), marks=pytest.mark.slow)], ids=["few", "many"])
def test_random_sequences(calls, seeds):  # noqa: F811
    warnings.simplefilter("ignore")  # of the library, on merging and on adapters that aren't there
    words = set()
    for seed in seeds:
        rng = random.Random(seed)
        torch.manual_seed(seed)
        library = peft.get_peft_model(Net(), random_config(rng), "first").to(DEVICE)
        stir(library)  # or each magnitude would be the norm of its row, and never near zero
        fast = copy.deepcopy(library)
        fastadapt.accelerate(fast)
        library.is_fast, fast.is_fast, done = False, True, [seed]
        for _ in range(12):
            word, step, names = random_step(rng, library)
            done.append(word)
            ids, random_state = torch.randint(30, (4, 3), device=DEVICE), torch.get_rng_state()
            results = []
            for model in (library, fast):
                torch.set_rng_state(random_state)
                results.append([outcome(model, act) for act in (step, lambda m, ids=ids, names=names: forward(m, ids, names))])
            refused = [result[0] if isinstance(result[0], type) else None for result in results]
            assert refused[0] == refused[1], (done, refused)
            expected, actual = (result[1] for result in results)
            if isinstance(expected, type):
                assert actual == expected, done
                continue
            assert actual.keys() == expected.keys(), done
            assert not (errors := too_far(fast, library, ids, names)), (done, errors)
        assert list(library.state_dict()) == list(fast.state_dict())
        words |= set(done[1:])
    assert len(words) == 14 and len(calls) > 10 * len(seeds) / 2
