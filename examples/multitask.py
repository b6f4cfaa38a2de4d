"""Four domains on one frozen encoder: an adapter for each, trained alone; a bank, generated adapters and a fusion, trained on
batches that mix the domains."""

import copy
import statistics
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fastadapt.nn

from . import adapt, data, measure

LR = 2e-3
# Learning rates of submodules. What is generated is a sum over an embedding, whose 64 terms all move at once.
RATES = {"separate": {}, "bank": {}, "hyper": {"encoder.hyper": 5e-4}, "fusion": {}}
HEADER = "{:10}{:>12}" + "{:>9}" * 5 + "{:>12}"
LEGEND = """\
separate    a model for each domain: frozen encoder, bottlenecks after the FFN, head; trained one after the other
bank        one model, batches of all domains: every sentence runs through the adapter of its domain (AdapterBank)
hyper       the same, the adapters generated from an embedding for each domain (HyperAdapter)
fusion      the separate adapters, frozen, mixed for each token by attention that is trained on all domains (AdapterFusion)
ms a step   median of forward, backward and AdamW of a batch: of one domain for separate, of all for the others"""


class Row(NamedTuple):
    method: str
    trainable: int
    accuracy: dict[str, float]  # by domain
    ms: float


class Tasks(nn.Module):
    """``heads[task](mean over the sentence of encoder(tokens))``: each sentence of a batch has a task of its own."""

    def __init__(self, encoder: nn.Module, tasks: int, labels: int = 2):
        super().__init__()
        heads = [nn.Linear(encoder.config.hidden_size, labels) for _ in range(tasks)]
        self.encoder = encoder
        self.weight = nn.Parameter(torch.stack([head.weight for head in heads]).detach())
        self.bias = nn.Parameter(torch.stack([head.bias for head in heads]).detach())
        self.routed = any(hasattr(module, "set_ids") for module in encoder.modules())

    def forward(self, input_ids: Tensor, attention_mask: Tensor, ids: Tensor) -> Tensor:
        with fastadapt.nn.route(self.encoder, ids) if self.routed else nullcontext():
            hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mean = adapt.mean_over_sentence(hidden, attention_mask)
        return (self.weight[ids] @ mean[..., None]).squeeze(-1) + self.bias[ids]


def _around_ffn(encoder: nn.Module, adapter: Callable[[int], nn.Module]) -> nn.Module:
    """A copy of ``encoder``, its frozen weights shared, with ``adapter(layer)`` after the feed-forward block of each layer."""
    encoder = copy.deepcopy(encoder, {id(p): p for p in encoder.requires_grad_(False).parameters()}).eval()
    for i, layer in enumerate(encoder.encoder.layer):
        layer.output.dense = nn.Sequential(layer.output.dense, adapter(i))
    return encoder


def _bank(encoder: nn.Module, tasks: int, r: int) -> nn.Module:
    d = encoder.config.hidden_size
    return _around_ffn(encoder, lambda i: fastadapt.nn.AdapterBank(tasks, d, r, activation=adapt.ACTIVATION))


def _hyper(encoder: nn.Module, tasks: int, r: int) -> nn.Module:
    layers, d = encoder.config.num_hidden_layers, encoder.config.hidden_size
    hyper = fastadapt.nn.HyperAdapter(tasks, layers, d, r, positions=1, activation=adapt.ACTIVATION, norm=None)
    encoder = _around_ffn(encoder, lambda i: hyper.site(i, 0))
    encoder.hyper = hyper
    return encoder


def _fusion(encoder: nn.Module, models: list[nn.Module]) -> nn.Module:
    """The adapters of ``models``, each of one domain, under a fusion in each layer."""
    d = encoder.config.hidden_size
    of_layer = lambda i: [model.encoder.encoder.layer[i].output.dense[1] for model in models]  # noqa: E731
    return _around_ffn(encoder, lambda i: fastadapt.nn.AdapterFusion(d, of_layer(i)))


def compare(
    encoder: nn.Module, train: dict[str, data.Tokens], test: dict[str, data.Tokens], *, r: int, steps: int, batch_size: int,
    seed: int, backend: str | None, progress: Callable[[], None],
) -> Iterator[Row]:  # fmt: skip
    """Train on all domains, ``steps`` steps for each: row by row, with the accuracies by domain."""
    domains, tasks = list(train), len(train)
    batches = {name: tokens.training(batch_size, steps, seed) for name, tokens in train.items()}
    mixed = data.mixed(list(train.values()), batch_size, tasks * steps, seed)

    def watched(of_batches):
        for batch in of_batches:
            yield batch
            progress()

    def trained(kind, model, of_batches):
        adapt.set_backend(model, backend)
        run = measure.Run(model, LR, len(of_batches), RATES[kind])
        measure.train([run], watched(of_batches))
        return run

    runs = {}
    for name in domains:
        model = adapt.build(encoder, "standard", fastadapt.nn, r=r, seed=seed)
        runs[name] = trained("separate", model, batches[name])
    models = [run.model for run in runs.values()]
    yield Row(
        "separate", sum(adapt.count(model)[0] for model in models),
        {name: run.accuracy(test[name].in_order(64)) for name, run in runs.items()},
        1e3 * statistics.median(seconds for run in runs.values() for seconds in run.seconds),
    )  # fmt: skip
    kinds = {
        "bank": lambda: _bank(encoder, tasks, r), "hyper": lambda: _hyper(encoder, tasks, r),
        "fusion": lambda: _fusion(encoder, models),
    }  # fmt: skip
    for kind, make in kinds.items():
        torch.manual_seed(seed)
        model = Tasks(make(), tasks)
        if kind == "fusion":
            with torch.no_grad():
                model.weight.copy_(torch.stack([m.head.weight for m in models]))
                model.bias.copy_(torch.stack([m.head.bias for m in models]))
        run = trained(kind, model, mixed)
        accuracy = {name: run.accuracy(batch.of_task(i) for batch in test[name].in_order(64)) for i, name in enumerate(domains)}
        yield Row(kind, adapt.count(model)[0], accuracy, 1e3 * statistics.median(run.seconds))


def header(domains: list[str]) -> str:
    above = HEADER.format("", "trainable", "test", *[""] * len(domains), "")
    return f"{above.rstrip()}\n{HEADER.format('method', 'parameters', *domains, 'mean', 'ms a step')}"


def line(row: Row) -> str:
    cells = [f"{value:.1%}" for value in (*row.accuracy.values(), statistics.fmean(row.accuracy.values()))]
    return HEADER.format(row.method, f"{row.trainable:,}", *cells, f"{row.ms:.1f}")
