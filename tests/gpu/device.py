"""The device of the checks: a CUDA GPU, or the CPU as a stand-in for it where a check has a meaning there."""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def moved(arguments, device):
    """The arguments of a call on another device; what was one tensor stays one tensor."""
    tensors = {id(t): t.to(device) for t in arguments.values() if isinstance(t, torch.Tensor)}
    return {name: tensors.get(id(value), value) for name, value in arguments.items()}


# What would wait for a GPU: it hands a value, or a size that depends on values, to the host.
WAITS = {
    getattr(torch.ops.aten, name)
    for name in ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2", "unique_dim")
}


class Cuda:
    type, large, repeats = "cuda", 2**31, 200

    def capture(self, call):
        """The outputs of ``call``, captured in a CUDA graph, and what replays it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles and loads kernels, which a capture forbids
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = call()
        return outputs, graph.replay

    @contextlib.contextmanager
    def never_waiting(self):
        """Inside, an operation that makes the host wait for the device raises."""
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def free_bytes(self):
        return torch.cuda.mem_get_info()[0]


class _Recorder(TorchDispatchMode):
    """Notes every operation, as a graph does; like a capture it forbids to wait."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in WAITS:
            raise RuntimeError(f"{func} waits for the device")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        """The same operations on the same memory: what the host did in between isn't done again."""
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs))):
                if isinstance(old, torch.Tensor) and old is not new:
                    old.copy_(new)


class StandIn:
    """The CPU: one device, no streams, small numbers."""

    type, large, repeats = "cpu", 2**18, 10

    def capture(self, call):
        with _Recorder() as recorder:
            outputs = call()
        return outputs, recorder.replay

    @contextlib.contextmanager
    def never_waiting(self):
        with _Recorder():
            yield

    def free_bytes(self):
        return 2**30
