"""Sentences with a sentiment: parsing, a fixed split, tokens, batches."""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Sentence(NamedTuple):
    text: str
    label: int


class Batch(NamedTuple):
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    tasks: Tensor | None = None  # one for each sentence, where a model has several

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What a model is called with."""
        return self[:2] if self.tasks is None else (*self[:2], self.tasks)

    def of_task(self, task: int) -> "Batch":
        """The same sentences, all of one task."""
        return self._replace(tasks=torch.full_like(self.labels, task))


def read(path: Path) -> tuple[list[Sentence], list[Sentence]]:
    """The training and the test sentences of one domain.

    A line is ``id <tab> mean rating <tab> text``; the label is 1 where the rating is above zero. A tenth of the sentences,
    chosen by a checksum of the id, is the test set: the split is the same on every machine and for every seed.
    """
    train, test = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            name, rating, text = line.split("\t", 2)
            label = int(float(rating) > 0)
        except ValueError:
            raise ValueError(f"{path}, line {number}: expected 'id<tab>rating<tab>text', got {line[:60]!r}") from None
        (test if zlib.crc32(name.encode()) % 10 == 0 else train).append(Sentence(text.strip(), label))
    return train, test


class Tokens:
    """Tokenised sentences, and batches of them."""

    def __init__(self, sentences: list[Sentence], tokenizer, device: str = "cpu", max_length: int = 64):
        self.ids = tokenizer([s.text for s in sentences], truncation=True, max_length=max_length)["input_ids"]
        self.labels = torch.tensor([s.label for s in sentences])
        self.pad, self.device = tokenizer.pad_token_id, device

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: list[int]) -> Batch:
        """The sentences ``rows``, padded to the longest of them and to a multiple of 8, so that few shapes occur."""
        lengths = [len(self.ids[i]) for i in rows]
        width = -(-max(lengths) // 8) * 8
        padded = torch.tensor([self.ids[i] + [self.pad] * (width - len(self.ids[i])) for i in rows])
        batch = Batch(padded, (torch.arange(width) < torch.tensor(lengths)[:, None]).long(), self.labels[rows])
        return Batch(*(tensor.to(self.device) for tensor in batch[:3]))

    def training(self, batch_size: int, steps: int, seed: int) -> list[Batch]:
        """``steps`` shuffled batches of sentences of similar length, so that little is padding."""
        generator = torch.Generator().manual_seed(seed)
        batches = []
        while len(batches) < steps:
            order = torch.randperm(len(self), generator=generator).tolist()
            pools = [order[i : i + 32 * batch_size] for i in range(0, len(order), 32 * batch_size)]
            rows = [row for pool in pools for row in sorted(pool, key=lambda i: len(self.ids[i]))]
            epoch = [rows[i : i + batch_size] for i in range(0, len(rows) - batch_size + 1, batch_size)]
            if not epoch:
                raise ValueError(f"batch_size must be at most {len(self)}, the number of training sentences, got {batch_size}")
            batches += [epoch[i] for i in torch.randperm(len(epoch), generator=generator).tolist()]
        return [self.batch(rows) for rows in batches[:steps]]

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        """Every sentence once, by length."""
        rows = sorted(range(len(self)), key=lambda j: len(self.ids[j]))
        for i in range(0, len(rows), batch_size):
            yield self.batch(rows[i : i + batch_size])


def mixed(tokens: list[Tokens], batch_size: int, steps: int, seed: int) -> list[Batch]:
    """Shuffled batches with as many sentences of each task, ``tokens[i]`` those of task ``i``."""
    parts = [part.training(batch_size // len(tokens), steps, seed) for part in tokens]
    return [_joined([batch.of_task(i) for i, batch in enumerate(step)]) for step in zip(*parts)]


def _joined(batches: list[Batch]) -> Batch:
    """One batch, padded to the widest."""
    width = max(batch.input_ids.shape[1] for batch in batches)
    columns = [[F.pad(t, (0, width - t.shape[1])) if t.dim() == 2 else t for t in batch] for batch in batches]
    return Batch(*map(torch.cat, zip(*columns)))
