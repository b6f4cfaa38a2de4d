"""How an adapter comes into a model that exists: after a module, beside one, or around one.

What is put after or beside a module is its submodule ``attached``, which a forward hook runs. The module stays the one it was,
under its name and with its type, parameters and keys of ``state_dict``, since models look at these.
"""

import inspect
import threading
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .structure import is_adapter


def _with_first(out, change: Callable[[Tensor], Tensor]):
    """``out``, a tensor or a tuple that starts with one, with another tensor in its place."""
    first = out[0] if isinstance(out, tuple) and out else out
    if not isinstance(first, Tensor):
        raise TypeError(f"what has an adapter must return a tensor or a tuple that starts with one, got {type(out).__name__}")
    if first is out:
        return change(first)
    return type(out)._make((change(first), *out[1:])) if hasattr(out, "_make") else (change(first), *out[1:])


def _adapt(module: nn.Module, args: tuple, out):
    return _with_first(out, module.attached)


class _Beside(threading.local):
    """Keeps what the first module of a sublayer reads for the adapter, which adds to what the last one puts out; for each
    thread that runs the model what it reads itself."""

    def __init__(self, name: str):
        self.name, self.x = name, None

    def __reduce__(self):
        return type(self), (self.name,)

    def enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.x = args[0] if args else kwargs[self.name]

    def leave(self, module: nn.Module, args: tuple, out):
        x, self.x = self.x, None
        return _with_first(out, lambda y: module.attached(x.to(y.dtype), residual=y))


def check_free(found: dict[str, nn.Module], around: bool) -> None:
    """Refuse targets that have an adapter; one may follow a layer that has another around it."""
    for name, module in found.items():
        if hasattr(module, "attached") or is_adapter(module) and (around or not hasattr(module, "base")):
            raise ValueError(f"targets must have no adapter yet, got {name!r}, which has one")


def put_after(found: dict[str, nn.Module], adapters: Iterable[nn.Module]) -> list[str]:
    """Run each adapter on the output of its module; returns the adapters' names."""
    for module, adapter in zip(found.values(), adapters):
        module.add_module("attached", adapter.train(module.training))
        module.register_forward_hook(_adapt)
    return [f"{name}.attached" for name in found]


def put_beside(enters: dict[str, nn.Module], found: dict[str, nn.Module], adapters: Iterable[nn.Module]) -> list[str]:
    """Run each adapter on the input of a module of ``enters``, and add to the output of that of ``found`` of the same key."""
    for enter, leave, adapter in zip(enters.values(), found.values(), adapters):
        leave.add_module("attached", adapter.train(leave.training))
        beside = _Beside(next(iter(inspect.signature(enter.forward).parameters), "x"))
        enter.register_forward_pre_hook(beside.enter, with_kwargs=True)
        leave.register_forward_hook(beside.leave)
    return [f"{name}.attached" for name in found]


def put_around(model: nn.Module, found: dict[str, nn.Module], adapters: Iterable[nn.Module]) -> list[str]:
    """Put each adapter, which contains its module, in the place of it, or in all places of one that is shared."""
    new = {id(module): adapter.train(module.training) for module, adapter in zip(found.values(), adapters)}
    for parent in list(model.modules()):
        for last, child in list(parent._modules.items()):
            if id(child) in new:
                setattr(parent, last, new[id(child)])
    return list(found)


def leave_nested_tensors(model: nn.Module, changed: Iterable[nn.Module]) -> None:
    """Let PyTorch's encoders make no nested tensors of padded batches in evaluation.

    They are for one function of the frozen weights alone, which layers leave where a submodule has a hook, as every place of an
    adapter has.
    """
    changed = {id(module) for module in changed}
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(id(m) in changed for m in module.modules()):
            module.use_nested_tensor = False


def factory(module: nn.Module) -> dict:
    """``device`` and ``dtype`` for an adapter at ``module``, whose 16-bit parameters get adapters in float32."""
    like = next((p for p in module.parameters() if p.is_floating_point()), None)
    dtype = like.dtype if like is not None and like.dtype in (torch.float32, torch.float64) else torch.float32
    return {"device": None if like is None else like.device, "dtype": dtype}
