"""Memory that a call takes beyond what is held before it: at its peak, its output included, and saved for backward."""

import contextlib
import os
from collections.abc import Iterable

import torch

from .timing import Call


@contextlib.contextmanager
def _silence():
    """The profiler announces itself on the process's stderr, which no Python setting reaches."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def _peak_on_cpu(call: Call) -> int:
    with _silence(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        output = call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del output
    return peak


def saved_extra(call: Call, held: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors that autograd saves, each memory once, without that of ``held``."""
    storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()
    del output
    for tensor in held:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def peak_extra(call: Call, device: torch.device) -> int:
    """Bytes from the tensor allocator, the largest sum alive at one moment of the call."""
    call()
    if device.type == "cpu":
        return _peak_on_cpu(call)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    output = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del output
    return peak
