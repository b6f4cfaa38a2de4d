"""Pretrain a small GPT on real text for a minute, then adapt it to another domain with each method, its weights frozen.

The model reads bytes. It learns editorials and film reviews first; what is adapted to is tweets or product reviews, of which it
continues an opening before and after. The sentences are those of finetune.py.
"""

import argparse
import copy
import html
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

if not __package__:  # run as a script: its siblings are the package `examples` of this repository
    sys.path.append(str(Path(__file__).resolve().parents[1]))

from examples import data, fetch
from examples.finetune import positive
from fastadapt import nn as adapters

BYTES = 256
SOURCES = ("nyt", "movie")


class Embedding(nn.Module):
    """Bytes and positions to vectors."""

    def __init__(self, d: int, context: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(BYTES, d), nn.Embedding(context, d)

    def forward(self, ids: Tensor) -> Tensor:
        return self.tokens(ids) + self.positions.weight[: ids.shape[1]]


class Block(nn.Module):
    """Attention and a feed-forward network, LayerNorm first. The attention has room for prefixes."""

    def __init__(self, d: int, h: int):
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attention = adapters.PrefixAttention(d, h)
        self.ffn = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), is_causal=True)
        return x + self.ffn(self.ffn_norm(x))


class Trunk(nn.Module):
    """All but the head."""

    def __init__(self, d: int, h: int, layers: int, context: int):
        super().__init__()
        self.embedding = Embedding(d, context)
        self.blocks = nn.ModuleList(Block(d, h) for _ in range(layers))
        self.norm = nn.LayerNorm(d)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class MiniGPT(nn.Module):
    """``(b, t)`` bytes to ``(b, t, 256)`` scores of the byte that follows each."""

    def __init__(self, d: int = 128, h: int = 4, layers: int = 4, context: int = 64):
        super().__init__()
        self.d, self.context = d, context
        self.trunk, self.head = Trunk(d, h, layers, context), nn.Linear(d, BYTES)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.3)  # learns faster in its first minute than from 0.02 or from 1

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.trunk(ids)[:, -ids.shape[1] :])  # a prompt's own are left out

    @torch.no_grad()
    def generate(self, opening: str, length: int, seed: int, temperature: float = 0.7) -> str:
        """Continue ``opening`` by ``length`` bytes, or to the end of the line."""
        generator, text = torch.Generator().manual_seed(seed), list(opening.encode())
        for _ in range(length):
            scores = self(torch.tensor([text[-self.context :]], device=self.head.weight.device))[0, -1].float().cpu()
            text.append(int(torch.multinomial((scores / temperature).softmax(0), 1, generator=generator)))
            if text[-1] == ord("\n"):
                break
        return bytes(text).decode(errors="replace").strip()


class Method(NamedTuple):
    title: str
    lr: float
    attach: Callable[[MiniGPT, int], object]  # (model, rank)
    kinds: tuple[str, ...] = ()  # what is trained, see fastadapt.nn.freeze_except


def _attached(name: str, sizes: tuple[str, ...] = ("r",), **options) -> Callable[[MiniGPT, int], object]:
    """A method of ``fastadapt.nn.attach``; ``sizes`` are those of its options that are the rank."""
    return lambda model, r: adapters.attach(model, name, **dict.fromkeys(sizes, r), **options)


def _in_front(model: MiniGPT, r: int) -> None:
    embedding = model.trunk.embedding  # of text that has its positions; a prompt has none
    model.trunk.embedding = nn.Sequential(embedding, adapters.PromptEmbedding.from_vocabulary(embedding.tokens, r))


def _beside(model: MiniGPT, r: int) -> None:
    model.trunk = adapters.LadderSideNetwork(model.trunk, model.d, reduction=4, causal=True)


METHODS = {
    "full": Method("all weights", 2e-3, lambda model, r: model.requires_grad_(True)),
    "bitfit": Method("the biases (Ben Zaken et al. 2022)", 2e-2, _attached("bitfit", ())),
    "bottleneck": Method(
        "a bottleneck after the FFN (Pfeiffer et al. 2021)", 1e-2, _attached("bottleneck", activation="gelu"), ("bottleneck",)
    ),
    "houlsby": Method("the same after attention too (Houlsby et al. 2019)", 5e-3, _attached("houlsby"), ("bottleneck",)),
    "parallel": Method("a bottleneck beside the FFN (He et al. 2022)", 5e-3, _attached("parallel"), ("bottleneck",)),
    "compacter": Method(
        "as houlsby, of Kronecker products (Karimi Mahabadi et al. 2021)", 2e-2, _attached("compacter", init_std=None),
        ("compacter",),
    ),
    "lora": Method("low-rank updates of queries and values (Hu et al. 2021)", 1e-2, _attached("lora"), ("lora",)),
    "dora": Method("the same, with magnitudes (Liu et al. 2024)", 1e-2, _attached("dora"), ("lora",)),
    "kron": Method("Kronecker products there (Edalati et al. 2022)", 3e-2, _attached("kron", ()), ("kron",)),
    "prefix": Method(
        "keys and values in front of the text's (Li and Liang 2021)", 2e-1, _attached("prefix", ("p",), init_std=0.3),
        ("prefix",),
    ),
    "mam": Method(
        "prefix and parallel (He et al. 2022)", 1e-2, _attached("mam", ("p", "r")), ("prefix", "bottleneck")
    ),
    "prompt": Method("vectors in front of the embedded text (Lester et al. 2021)", 1e-1, _in_front, ("prompt",)),
    "side": Method("a small network beside the frozen one (Sung et al. 2022)", 1e-2, _beside, ("side",)),
}  # fmt: skip


def adapted(model: MiniGPT, method: str, r: int) -> MiniGPT:
    """A copy of ``model`` with the adapters of ``method``, all else frozen."""
    model = copy.deepcopy(model).requires_grad_(False)
    METHODS[method].attach(model, r)
    model.to(model.head.weight.device)
    if kinds := METHODS[method].kinds:
        adapters.freeze_except(model, kinds)
    return model


def read(folder: Path, domains: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """The bytes of all sentences to train on and of those to test with, a line each."""
    texts = zip(*(data.read(folder / f"{domain}.tsv") for domain in domains))
    joined = ("\n".join(html.unescape(s.text) for part in split for s in part) for split in texts)
    train, test = (torch.tensor(list(text.encode()), dtype=torch.int64) for text in joined)
    return train, test


def windows(text: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Windows of a text, and the bytes that follow each of theirs."""
    rows = text[starts[:, None] + torch.arange(context + 1)]
    return rows[:, :-1], rows[:, 1:]


def loss_of(model: MiniGPT, batch: tuple[Tensor, Tensor]) -> Tensor:
    ids, following = (part.to(model.head.weight.device) for part in batch)
    return F.cross_entropy(model(ids).flatten(0, 1), following.flatten())


@torch.no_grad()
def evaluate(model: MiniGPT, text: Tensor, batch_size: int, most: int = 256) -> float:
    """Mean cross entropy of a byte, in windows that follow each other, of a large text ``most`` from all over it."""
    starts = torch.arange(0, len(text) - model.context, model.context)
    starts = starts[:: -(-len(starts) // most)]
    return statistics.fmean(loss_of(model, windows(text, part, model.context)).item() for part in starts.split(batch_size))


def train(model: MiniGPT, text: Tensor, lr: float, batch_size: int, seed: int, progress: Iterator[float]) -> list[float]:
    """Steps on windows from anywhere in a text until ``progress`` ends, from 0 to 1. Returns the seconds of each."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    generator, seconds = torch.Generator().manual_seed(seed), []
    for done in progress:
        start = time.perf_counter()
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (len(seconds) + 1) / 20) * (0.05 + 0.95 * math.cos(math.pi / 2 * done))
        starts = torch.randint(len(text) - model.context, (batch_size,), generator=generator)
        loss_of(model, windows(text, starts, model.context)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if model.head.weight.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds


def for_seconds(limit: float, bar: tqdm) -> Iterator[float]:
    start = time.perf_counter()
    while (passed := time.perf_counter() - start) < limit:
        bar.update(passed - bar.n)
        yield passed / limit


def for_steps(steps: int, bar: tqdm) -> Iterator[float]:
    for step in range(steps):
        yield step / steps
        bar.update()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="methods:\n" + "\n".join(f"  {name:12}{method.title}" for name, method in METHODS.items()),
    )  # fmt: skip
    option = parser.add_argument
    option("--methods", nargs="+", choices=METHODS, metavar="METHOD", default=list(METHODS), help="default: all")
    option("--domain", choices=[d for d in fetch.DOMAINS if d not in SOURCES], default="tweets", help="default: %(default)s")
    option("--pretrain-seconds", type=float, default=60.0, help="default: %(default)s")
    option("--steps", type=positive, default=300, help="of each method (default: %(default)s)")
    option("--batch-size", type=positive, default=8, help="windows of 64 bytes (default: %(default)s)")
    option("--rank", type=positive, default=16, help="of adapters, length of prefixes (default: %(default)s)")
    option("--opening", default="I ", help="what the model continues (default: %(default)r)")
    option("--length", type=positive, default=100, help="how far it does, in bytes (default: %(default)s)")
    option("--save", type=Path, metavar="FOLDER", help="also write the adapters, one file a method that has some")
    option("--quick", action="store_true", help="a tiny model and a few steps, to see that all works")
    option("--seed", type=int, default=0, help="default: %(default)s")
    option("--threads", type=positive, default=torch.get_num_threads(), help="CPU threads (default: %(default)s)")
    option("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.rank % 4:
        parser.error(f"--rank must be a multiple of 4, got {args.rank}")
    if not args.opening:
        parser.error("--opening must have at least one character, got none")
    if args.quick:
        args.pretrain_seconds, args.steps, args.batch_size, args.length = 0.3, 2, 4, 8
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    try:
        folder = fetch.sentences()
        if args.save:
            args.save.mkdir(parents=True, exist_ok=True)
    except (fetch.FetchError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    (old, old_test), (new, new_test) = read(folder, SOURCES), read(folder, (args.domain,))
    model = (MiniGPT(d=32, h=2, layers=2, context=32) if args.quick else MiniGPT()).to(args.device)
    total = sum(p.numel() for p in model.parameters())
    options = {"leave": False, "mininterval": 0.2 if sys.stderr.isatty() else 10}
    shape = "{desc} {bar} {n:.0f}/{total:.0f} s"
    with tqdm(total=args.pretrain_seconds, desc="pretraining", bar_format=shape, **options) as bar:
        steps = len(train(model, old, 3e-3, args.batch_size, args.seed, for_seconds(args.pretrain_seconds, bar)))
    print(f"{total} parameters, pretrained on {' and '.join(SOURCES)}: {steps} steps of {args.batch_size} windows, ", end="")
    print(f"loss {evaluate(model, old_test, args.batch_size):.3f} nats a byte there, {args.threads} threads\n")

    def row(name: str, trained: int, model: MiniGPT, seconds: list[float]) -> str:
        ms = f"{1e3 * statistics.median(seconds):11.1f}" if seconds else f"{'-':>11}"
        loss = evaluate(model, new_test, args.batch_size)
        return f"{name:12}{trained:10}{100 * trained / total:8.2f} %{loss:18.3f}{ms}"

    print(f"{'method':12}{'trainable':>10}{'':>10}{f'loss on {args.domain}':>18}{'ms a step':>11}")
    print(row("none", 0, model, []))
    samples = {"none": model.generate(args.opening, args.length, args.seed)}
    methods = list(dict.fromkeys(args.methods))
    with tqdm(total=args.steps * len(methods), unit="step", **options) as bar:
        for name in methods:
            bar.set_description(name)
            torch.manual_seed(args.seed)
            changed = adapted(model, name, args.rank)
            trained = sum(p.numel() for p in changed.parameters() if p.requires_grad)
            seconds = train(changed, new, METHODS[name].lr, args.batch_size, args.seed, for_steps(args.steps, bar))
            bar.write(row(name, trained, changed, seconds))
            samples[name] = changed.generate(args.opening, args.length, args.seed)
            if args.save and METHODS[name].kinds:
                adapters.save_adapters(changed, args.save / f"{name}.safetensors")
    print(f"\nContinuations of {args.opening!r}, before ('none') and after:")
    print("\n".join(f"{name:12}{text}" for name, text in samples.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
