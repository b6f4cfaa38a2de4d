"""Several tasks in one model: mixed batches, generated adapters, two heads on one pass: ``python -m benchmarks.tasks``."""

import argparse
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadapt.nn import AdapterBank, BottleneckAdapter, HyperAdapter, HyperWeights, ParallelAdapter
from fastadapt.ops.bottleneck import ACTIVATIONS

from .machine import cores
from .report import print_rows
from .timing import WallTimer, interleave

# MiniLM-L6, a batch of 32 sequences of 64 tokens from 4 tasks.
LAYERS, POSITIONS, D, TASKS, B, T = 6, 2, 384, 4, 32, 64
RANKS = (12, 48)


def make(r: int) -> tuple[HyperAdapter, Tensor]:
    """A hypernetwork away from its start, and the tasks of a batch."""
    hyper = HyperAdapter(TASKS, LAYERS, D, r, positions=POSITIONS, init_std=1e-2)
    return hyper, torch.arange(B) % TASKS


def encoder() -> nn.Module:
    """A frozen BERT of MiniLM's sizes, its weights random."""
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=12, intermediate_size=4 * D)
    return BertModel(config, add_pooling_layer=False).requires_grad_(False)


def with_sites(model: nn.Module, hyper: HyperAdapter) -> nn.Module:
    """Put the adapters of a hypernetwork after both sublayers of each layer."""
    for i, layer in enumerate(model.encoder.layer):
        for position, sublayer in enumerate((layer.attention.output, layer.output)):
            sublayer.dense = nn.Sequential(sublayer.dense, hyper.site(i, position))
    return model


def flat(weights: tuple[tuple[HyperWeights, ...], ...]) -> list[Tensor]:
    return [value for layer in weights for place in layer for value in place[:-1]]


def generation(r: int, seconds: float) -> list[str]:
    """Generating all weights, forward and backward, beside the training step that uses them."""
    hyper, ids = make(r)
    model, head = with_sites(encoder(), hyper), nn.Linear(D, 2)
    tokens = torch.randint(model.config.vocab_size, (B, T))
    grads = [torch.randn_like(value) for value in flat(hyper(ids))]
    optimizer = torch.optim.AdamW([*hyper.parameters(), *head.parameters()])

    def generate():
        torch.autograd.backward(flat(hyper(ids)), grads)
        hyper.zero_grad()

    def step():
        with hyper.use(ids):
            loss = F.cross_entropy(head(model(tokens).last_hidden_state[:, 0]), ids % 2)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    times = interleave({"generate": generate, "step": step}, WallTimer(), seconds)
    generating, training = (times[name].median * 1e3 for name in ("generate", "step"))
    return [str(r), f"{generating:.2f}", f"{training:.0f}", f"{generating / training:.1%}"]


def by_task(hyper: HyperAdapter, x: Tensor, weights: HyperWeights) -> Tensor:
    """The batch split by task, each part through its adapter in PyTorch, and put together again."""
    y = torch.empty_like(x)
    for task in range(TASKS):
        down, up, down_bias, up_bias, norm_weight, norm_bias = (value[task] for value in weights[:-1])
        rows = (weights.adapter_ids == task).nonzero().squeeze(1)
        part = x[rows]
        z = F.linear(ACTIVATIONS[hyper.activation](F.linear(part, down, down_bias)), up, up_bias)
        y[rows] = part + F.layer_norm(z, (D,), norm_weight, norm_bias, hyper.norm_eps)
    return y


def mixed(r: int, seconds: float) -> list[str]:
    """One adapter layer, forward and backward, on a batch of mixed tasks."""
    hyper, ids = make(r)
    generated = hyper(ids)[0][0][:-1]
    weights = HyperWeights(*(value.detach().contiguous().requires_grad_() for value in generated), ids)
    x, grad_y = torch.randn(B, T, D, requires_grad=True), torch.randn(B, T, D)
    torch.testing.assert_close(hyper.adapt(x, weights), by_task(hyper, x, weights))

    def step(forward):
        return torch.autograd.grad(forward(), [x, *weights[:-1]], grad_y)

    calls = {"one call": partial(hyper.adapt, x, weights), "split": partial(by_task, hyper, x, weights)}
    times = interleave({name: partial(step, call) for name, call in calls.items()}, WallTimer(), seconds)
    one, split = (times[name].median * 1e3 for name in calls)
    return [str(r), f"{one:.2f}", f"{split:.2f}", f"{split / one:.2f} x"]


def heads(seconds: float) -> list[list[str]]:
    """A sentence is classified and its tokens tagged on one frozen encoder, with adapters beside its last layer: one pass for
    both tasks against one for the sentence alone."""
    model, r = encoder(), RANKS[-1]
    *layers, last = model.encoder.layer
    model.encoder.layer = nn.ModuleList(layers)
    both = ParallelAdapter(last, AdapterBank(2, D, r, init_std=1e-2))
    one = ParallelAdapter(last, BottleneckAdapter(D, r, init_std=1e-2))
    sentence, token = nn.Linear(D, 2), nn.Linear(D, 9)
    tokens, tags = torch.randint(model.config.vocab_size, (B, T)), torch.randint(9, (B * T,))

    def first(out):
        return out[0] if isinstance(out, tuple) else out

    def below():
        with torch.no_grad():
            return model(tokens).last_hidden_state

    def classify():
        return F.cross_entropy(sentence(first(one(below()))[:, 0]), tags[:B] % 2)

    def classify_and_tag():
        classified, tagged = first(both(below(), adapter_ids="every"))
        loss = F.cross_entropy(sentence(classified[:, 0]), tags[:B] % 2)
        return loss + F.cross_entropy(token(tagged).flatten(0, 1), tags)

    calls = {
        "forward": [torch.no_grad()(call) for call in (classify, classify_and_tag)],
        "forward+backward": [lambda call=call: call().backward() for call in (classify, classify_and_tag)],
    }
    rows = []
    for name, (one_task, two_tasks) in calls.items():
        times = interleave({"one": one_task, "two": two_tasks}, WallTimer(), seconds)
        one_ms, two_ms = (times[which].median * 1e3 for which in ("one", "two"))
        rows.append([name, f"{one_ms:.1f}", f"{two_ms:.1f}", f"{two_ms / one_ms:.3f} x"])
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tasks", description=__doc__)
    parser.add_argument("--threads", type=int, default=cores(), help="threads on the CPU (all cores)")
    parser.add_argument("--seconds", type=float, default=4.0, help="time for a row")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    batch = f"{B} sequences of {T} tokens, d {D}, {TASKS} tasks, float32, {args.threads} threads"
    print(f"one adapter layer, forward+backward, {batch}")
    print_rows([["rank", "one call ms", "split by task ms", "ratio"], *(mixed(r, args.seconds) for r in RANKS)])
    print(f"\nadapters of {LAYERS} layers x {POSITIONS} positions x {TASKS} tasks, forward+backward, {batch}")
    header = ["rank", "generating ms", "training step ms", "share"]
    print_rows([header, *(generation(r, args.seconds) for r in RANKS)])
    print(f"\nadapters and heads of two tasks on one frozen encoder, {B} sequences of {T} tokens, {args.threads} threads")
    print_rows([["pass", "one task ms", "two tasks ms", "ratio"], *heads(args.seconds)])


if __name__ == "__main__":
    main()
