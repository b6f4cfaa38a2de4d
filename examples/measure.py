"""One training run: its steps, their time, its peak memory, its accuracy."""

import ctypes
import os
import statistics
import sys
import time
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from .adapt import trainable
from .data import Batch

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself on the terminal otherwise


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next one, in every run alike.

    Memory given back to the system is cleared page by page when it is needed again: up to 4 % of a step here, more than an
    adapter's kernel saves, and whether it happens hangs on the sizes of the last batches.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, at most 32 MiB: smaller tensors come from the heap
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD: the heap doesn't shrink


class Run:
    """A model in training; ``seconds`` and ``losses`` grow by one a step. ``rates``: learning rates of submodules by name."""

    def __init__(self, model: nn.Module, lr: float, steps: int, rates: dict[str, float] | None = None):
        self.model, self.seconds, self.losses = model, [], []
        self.device = next(model.parameters()).device  # the encoder's; a method adds to it on the CPU
        model.to(self.device)
        groups = [{"params": trainable(model.get_submodule(name)), "lr": own} for name, own in (rates or {}).items()]
        apart = {p for group in groups for p in group["params"]}
        groups.append({"params": [p for p in trainable(model) if p not in apart]})
        self.optimizer = torch.optim.AdamW(groups, lr=lr, eps=1e-6, weight_decay=0.01, fused=True)
        rise = max(1, steps // 10)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min((step + 1) / rise, max(steps - step, 1) / (steps - rise + 1))
        )

    def _loss(self, batch: Batch) -> torch.Tensor:
        return F.cross_entropy(self.model(*batch.inputs), batch.labels)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def step(self, batch: Batch) -> None:
        """Forward, backward and update; timed together."""
        start = self._now()
        loss = self._loss(batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(self._now() - start)
        self.schedule.step()
        self.losses.append(loss.item())

    def _pass(self, batch: Batch) -> None:
        self._loss(batch).backward()
        self.optimizer.zero_grad()

    def peak_bytes(self, batch: Batch) -> int:
        """The most that the tensors of a training step hold together: activations, gradients, temporaries, optimizer state.

        Counted at PyTorch's allocator, so that temporaries inside an op are seen; the weights, the same for every method, are
        left out. Changes nothing but the gradients, which are None afterwards.
        """
        state = 2 * sum(p.numel() * p.element_size() for p in trainable(self.model))  # AdamW's two moments
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._pass(batch)
            return state + torch.cuda.max_memory_allocated(self.device) - before
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            self._pass(batch)
        alive = peak = 0
        events = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
        for event in sorted(events, key=lambda event: event.start_ns()):
            alive += event.nbytes()
            peak = max(peak, alive)
        return state + peak

    @torch.no_grad()
    def accuracy(self, batches: Iterable[Batch]) -> float:
        """The share of right answers. Ends the training: adapters leave training mode."""
        self.model.eval()
        right = total = 0
        for batch in batches:
            right += (self.model(*batch.inputs).argmax(-1) == batch.labels).sum().item()
            total += len(batch.labels)
        return right / total


@torch.no_grad()
def inference(models: dict[str, nn.Module], batch: Batch, rounds: int = 9) -> dict[str, list[float]]:
    """Seconds that each of ``models`` takes for a batch, in rounds in which each is the first as often as the last."""
    seconds = {name: [] for name in models}
    order = list(models)
    for _ in range(rounds + 1):
        for name in order:
            start = time.perf_counter()
            models[name](*batch.inputs)
            if batch.labels.is_cuda:
                torch.cuda.synchronize(batch.labels.device)
            seconds[name].append(time.perf_counter() - start)
        order.append(order.pop(0))
    return {name: times[1:] for name, times in seconds.items()}


def ratio(slow: list[float], fast: list[float]) -> float:
    """How many times as long ``slow`` took: each round compared with itself, the median over the rounds."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def train(runs: list[Run], batches: Iterable[Batch]) -> None:
    """A step of each run in turn on every batch, the first one last the next time, so that noise meets all of them alike."""
    for number, batch in enumerate(batches):
        for run in runs if number % 2 == 0 else reversed(runs):
            run.step(batch)


def speed_up(ours: Run, theirs: Run) -> float:
    """How many times faster ``ours`` is: each batch compared with itself, the median over the batches.

    The run that comes second finds the frozen weights in the cache, so the two orders have a median each; their geometric mean
    cancels the order.
    """
    turns = [(theirs.seconds[first::2], ours.seconds[first::2]) for first in (0, 1)]
    return statistics.geometric_mean(ratio(slow, fast) for slow, fast in turns if fast)


def loss_difference(ours: Run, theirs: Run) -> float:
    """The largest distance between the two runs' losses at any step."""
    return max(abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True))


def curve_difference(ours: Run, theirs: Run, steps: int = 10) -> float:
    """The largest distance between the two curves, the mean losses of ``steps`` steps at a time: for runs with other masks."""
    differences = [a - b for a, b in zip(ours.losses, theirs.losses, strict=True)]
    pieces = [differences[i : i + steps] for i in range(0, max(1, len(differences) - steps + 1), steps)]
    return max(abs(statistics.fmean(piece)) for piece in pieces)
