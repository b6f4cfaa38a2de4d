"""Triton launchers on a simulated GPU: what they launch is compiled for a real one and runs as PTX."""

import contextlib
import inspect
import struct

import torch
from triton import knobs
from triton.compiler import compiler
from triton.runtime.jit import KernelInterface

from .. import offline
from .machine import Launch
from .memory import Memory

SCALARS = {
    "i1": "?", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u8": "B", "u16": "H", "u32": "I", "u64": "Q", "fp32": "f"
}  # fmt: skip


def bytes_of(storage):
    return torch.tensor([], dtype=torch.uint8).set_(storage).numpy()


class Buffers:
    """The allocations behind some tensors, copied to the simulated memory and back.

    A kernel can reach the elements of the tensors it was given, and not what lies between the rows of a view.
    """

    def __init__(self, memory: Memory):
        self.memory, self.homes = memory, {}

    def address(self, tensor: torch.Tensor, name: str) -> int:
        """Where the first element of ``tensor`` lies."""
        memory, storage, item = self.memory, tensor.untyped_storage(), tensor.element_size()
        if storage.data_ptr() not in self.homes:
            start = memory.add(storage.nbytes(), name)
            self.homes[storage.data_ptr()] = start, storage
            memory.data[start : start + storage.nbytes()] = bytes_of(storage)
            memory.forbid(start, storage.nbytes())
        first = self.homes[storage.data_ptr()][0] + tensor.storage_offset() * item
        memory.allow(first, item, tensor.shape, [s * item for s in tensor.stride()])
        return memory.origin + first

    def copy_back(self):
        for start, storage in self.homes.values():
            bytes_of(storage)[:] = self.memory.data[start : start + storage.nbytes()]


def like_meta(tensor):
    """The tensor without its data: shape, strides and place in its allocation are kept."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    return torch.empty(size, dtype=tensor.dtype, device="meta").as_strided(
        tensor.shape, tensor.stride(), tensor.storage_offset()
    )


def on_meta(args):
    """Arguments of a leaf on the meta device; what was one tensor stays one tensor."""
    seen = {id(a): like_meta(a) for a in args if isinstance(a, torch.Tensor)}
    return [seen.get(id(a), a) for a in args]


def same(planned, actual):
    if isinstance(planned, torch.Tensor) and isinstance(actual, torch.Tensor):
        place = lambda t: (t.shape, t.stride(), t.dtype, t.storage_offset())  # noqa: E731
        return place(planned) == place(actual)
    return type(planned) is type(actual) and planned == actual


def flattened(kinds, values):
    """Name, kind and value of each argument, and of each item of a tuple."""
    for name, kind in kinds.items():
        if isinstance(kind, tuple):
            items = [f"{name}[{i}]" for i in range(len(kind))]
            yield from flattened(dict(zip(items, kind, strict=True)), dict(zip(items, values[name], strict=True)))
        else:
            yield name, kind, values.get(name)


@contextlib.contextmanager
def up_to_ptx():
    """Inside, Triton's compiler leaves out the machine code, which nobody runs here; such kernels are cached apart."""

    def hook(backend=None, stages=None, *_):
        if stages is not None:
            stages["cubin"] = lambda ptx, metadata: b""
        return "up to ptx", "up to ptx"  # for the keys of the caches, when it is called without stages

    if "inspection_hook" not in inspect.getsource(compiler):  # Triton 3.6, whose caches would take these kernels for whole ones
        yield
        return
    before, knobs.runtime.add_stages_inspection_hook = knobs.runtime.add_stages_inspection_hook, hook
    try:
        yield
    finally:
        knobs.runtime.add_stages_inspection_hook = before


def prepared(planned, args):
    """The launch that was captured on meta tensors, on the tensors ``args``, and its buffers."""
    with up_to_ptx():
        kernel, buffers = offline.compiled(planned), Buffers(Memory())
    values = dict(zip(planned.kernel.arg_names, args)) | planned.kwargs
    arguments = []
    for name, kind, value in flattened(kernel.src.signature, values):
        if kind == "constexpr":  # also what the specialisation has folded in: None and 1
            continue
        if kind.startswith("*"):
            arguments.append(struct.pack("<Q", buffers.address(value, name)))
        elif kind in SCALARS:
            arguments.append(struct.pack("<" + SCALARS[kind], value))
        else:
            raise NotImplementedError(f"{planned.name}: argument {name} of type {kind}")
    grid, about = (*planned.grid, 1, 1)[:3], kernel.metadata
    return Launch(kernel.asm["ptx"], about.name, buffers.memory, grid, about.num_warps * 32, about.shared, arguments), buffers


@contextlib.contextmanager
def executed(planned, run):
    """Inside, ``kernel[grid](...)`` runs as the next of the ``planned`` launches."""
    remaining, stock = list(planned), KernelInterface.__getitem__

    def execute(kernel, grid, args):
        assert remaining, f"{kernel.fn.__name__} is launched on the CPU, not on meta tensors"
        plan = remaining.pop(0)
        assert plan.kernel is kernel and plan.grid == grid and len(plan.args) == len(args), f"{plan} and {kernel} {grid}"
        assert all(map(same, plan.args, args)), f"{plan.name}: {plan.args} and {args}"
        launch, buffers = prepared(plan, args)
        run(launch)
        buffers.copy_back()

    KernelInterface.__getitem__ = lambda kernel, grid: lambda *a, **k: execute(kernel, grid, a)
    try:
        yield
        assert not remaining, f"launched on meta tensors only: {remaining}"
    finally:
        KernelInterface.__getitem__ = stock


def implementation(leaf, arch, run):
    def call(*args):
        with offline.target(arch):
            with offline.captured() as planned:
                leaf.launcher(*on_meta(args))
            with executed(planned, run):
                return leaf.launcher(*args)

    return call


def install(monkeypatch, spec, arch: int, run=Launch.run):
    """Until the test ends, ``backend="triton"`` of the op runs on the CPU as PTX for ``arch``; ``run`` gets each launch."""
    for leaf in (spec.fwd, spec.bwd):
        monkeypatch.setattr(leaf, "triton", implementation(leaf, arch, run))
        monkeypatch.setattr(leaf, "available", leaf.available | {("triton", "cpu")})
