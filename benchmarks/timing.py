"""Interleaved timing: every contestant meets the same state of the machine."""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median and the quartiles of ``samples`` samples."""

    median: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, seconds: list[float]) -> "Timing":
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, low, high, len(seconds))

    def json(self) -> dict:
        return {
            "us": round(self.median * 1e6, 3), "low": round(self.low * 1e6, 3), "high": round(self.high * 1e6, 3),
            "samples": self.samples,
        }  # fmt: skip


class WallTimer:
    """CPU: calls back to back, so a short one finds its data in the cache."""

    name = "wall"
    sample = 300e-6  # short calls are repeated until a sample is well above the clock's noise
    warm = 2e-3  # shorter calls run once before a sample: what is in the cache is theirs, not the last contestant's

    def __init__(self):
        # Once a block of this size is freed, glibc keeps freed memory, as in any process that has trained for a while. Before,
        # it gives the pages of an output back to the kernel, now and then: a lottery of page faults that outlast the call.
        torch.empty(2**25 - 2**16, dtype=torch.uint8)

    def prepare(self, call: Call) -> Call:
        return call

    def time(self, call: Call, repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats


class LaunchTimer:
    """CUDA, plain launches: between events, the L2 cache cold; what the host fails to launch in time is included."""

    name = "launch"
    sample = warm = 0.0  # one call a sample: a second one would find a warm cache

    def __init__(self, device: torch.device):
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(max(4 * l2, 2**28), dtype=torch.uint8, device=device)
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def prepare(self, call: Call) -> Call:
        return call

    def time(self, call: Call, repeats: int) -> float:
        start, end = self.events
        self.flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


class GraphTimer(LaunchTimer):
    """CUDA, replaying a graph of the call: the kernels alone, the L2 cache cold."""

    name = "graph"

    def prepare(self, call: Call) -> Call:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # lazy set-up may allocate or synchronise, which a capture forbids
                call()
            try:  # a call that waits for the device is refused here: a capture that fails leaves torch's generator unusable
                torch.cuda.set_sync_debug_mode("error")
                call()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()

        def replay(_reads_from=call):  # keeps the inputs alive
            graph.replay()

        return replay


TIMERS = {"wall": lambda device: WallTimer(), "launch": LaunchTimer, "graph": GraphTimer}


def interleave(calls: dict[str, Call], timer: WallTimer, seconds: float) -> dict[str, Timing]:
    """Time the calls in rounds, about ``seconds`` in all; each round has an order of its own."""
    once = {}
    for name, call in calls.items():
        once[name] = timer.time(call, 1)
        if once[name] < 0.01:  # of a longer one nothing but its order of magnitude is needed
            once[name] = min(once[name], *(timer.time(call, 1) for _ in range(4)))
    samples, order = {name: [] for name in calls}, list(calls)
    shuffle = random.Random(0).shuffle
    collecting = gc.isenabled()
    gc.disable()
    try:
        start, done = time.perf_counter(), 0
        least = 8 if sum(once.values()) < 0.5 else 5  # the medians of long calls are less noisy
        while done < least or (done < 400 and time.perf_counter() - start < seconds):
            shuffle(order)
            for name in order:
                if once[name] < timer.warm:
                    calls[name]()
                samples[name].append(timer.time(calls[name], max(1, math.ceil(timer.sample / once[name]))))
            done += 1
    finally:
        if collecting:
            gc.enable()
    return {name: Timing.of(values[1:]) for name, values in samples.items()}  # the first round is a warm-up
