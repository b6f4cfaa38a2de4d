"""Leaf ops: one direction of one op, as the dispatcher sees it, and the choice among its implementations."""

import functools
import importlib
import importlib.util
import inspect
import os
import re
from collections.abc import Callable

import torch
from torch.autograd import forward_ad

from . import _check as check

BACKENDS = ("reference", "native", "triton")
# The first implementation that exists and supports the call wins; the reference runs where none does.
ORDER = {"cuda": ("triton", "native"), "cpu": ("native",)}
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


def _on_one_device(fake: Callable, first: str) -> Callable:
    """``fake``, which a call with one meta tensor among real ones would end up in."""

    @functools.wraps(fake)
    def checked(x, *args):
        for t in args:
            if isinstance(t, torch.Tensor) and t.device != x.device:
                raise ValueError(f"all tensors must be on {x.device} like {first}, got one on {t.device}")
        return fake(x, *args)

    return checked


class Leaf:
    """A schema and a fake kernel that every implementation of one leaf op shares.

    ``fastadapt::<name>`` is implemented in csrc/ (keys CPU and CUDA) and ``fastadapt::<name>_triton`` in kernels/.
    ``unsupported(backend, args)`` is None, or the reason why a backend can't run these arguments of the leaf.
    """

    def __init__(self, name: str, schema: str, fake: Callable, unsupported: Callable = lambda backend, args: None):
        fake = _on_one_device(fake, re.match(r"\(Tensor (\w+)", schema)[1])
        for op in (name, f"{name}_triton"):
            torch.library.define(f"fastadapt::{op}", schema, tags=(torch.Tag.pt2_compliant_tag,))
            torch.library.register_fake(f"fastadapt::{op}")(fake)
        self.name, self.fake, self.unsupported = name, fake, unsupported
        # Plain Python data: Dynamo can't trace a query of the dispatcher.
        self.available = {
            ("native", key.lower())
            for key in ("CPU", "CUDA")
            if torch._C._dispatch_has_kernel_for_dispatch_key(f"fastadapt::{name}", key)
        }
        self.native = getattr(torch.ops.fastadapt, name).default
        self.triton = getattr(torch.ops.fastadapt, f"{name}_triton").default

    def launch(self, module: str) -> None:
        """Register the Triton launcher, the function of the leaf's name in ``kernels/<module>.py``, imported at its first call;
        under Triton's interpreter it also runs on CPU tensors."""
        if importlib.util.find_spec("triton") is None:
            return
        self.launcher = lambda *args: getattr(importlib.import_module(f"fastadapt.kernels.{module}"), self.name)(*args)
        for key in ("CUDA", "CPU") if INTERPRET else ("CUDA",):
            torch.library.impl(f"fastadapt::{self.name}_triton", key, self.launcher)
            self.available.add(("triton", key.lower()))

    def refusal(self, backend: str, device_type: str, args: tuple) -> str | None:
        """Why ``backend`` can't run this call, or None if it can."""
        if backend == "reference":
            return None
        if (backend, device_type) not in self.available:
            return f"{self.name} has no {backend!r} implementation for {device_type}"
        reason = self.unsupported(backend, args)
        return reason and f"{self.name}: backend {backend!r} {reason}"

    def choose(self, backend: str | None, device_type: str, args: tuple) -> str:
        """Name the implementation that a call uses: the one asked for, or the first of the device's order that can.

        Kernels see no batched or dual tensors: inside a torch.func transform, and where forward-mode derivatives are taken, the
        order is the reference alone.
        """
        transformed = not torch.compiler.is_compiling() and (
            torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
        )
        if backend is None:
            if not transformed:
                for name in ORDER.get(device_type, ()):
                    if (name, device_type) in self.available and self.unsupported(name, args) is None:
                        return name
            return "reference"
        if backend not in BACKENDS:
            raise ValueError(f"backend must be None or one of {BACKENDS}, got {backend!r}")
        if reason := self.refusal(backend, device_type, args):
            raise RuntimeError(reason)
        if transformed and backend != "reference":
            raise RuntimeError(
                f"{self.name}: backend {backend!r} supports neither torch.func transforms nor forward-mode AD, use 'reference'"
            )
        return backend

    def explain(self, backend: str | None, device_type: str, args: tuple) -> str:
        """One line for the chosen implementation and one for each that was passed over."""
        chosen = self.choose(backend, device_type, args)
        order = (*ORDER.get(device_type, ()), "reference") if backend is None else (backend,)
        lines = [f"{self.name} on {device_type}: {chosen} ({'asked for' if backend else 'first of ' + ' > '.join(order)})"]
        lines += [f"  not {name}: {self.refusal(name, device_type, args)}" for name in order[: order.index(chosen)]]
        return "\n".join(lines)


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd records a call with these arguments. A plain loop: small calls feel a generator or a call into C++."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def record(function: type[torch.autograd.Function], *args):
    """``function.apply(*args)``, past its Python: that serves torch.func transforms, inside which no kernel is chosen."""
    if torch.compiler.is_compiling():  # Dynamo takes no tensor twice in an autograd.Function
        again = (isinstance(t, torch.Tensor) and any(t is other for other in args[:i]) for i, t in enumerate(args))
        return function.apply(*(t.view_as(t) if twice else t for t, twice in zip(args, again)))
    return super(torch.autograd.Function, function).apply(*args)


class _Guarded(torch.autograd.Function):
    """The first ``count`` tensors, as functions of all of them that can't be differentiated."""

    @staticmethod
    def forward(ctx, count, *tensors):
        return tuple(t.detach() for t in tensors[:count])

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("fastadapt: the backward pass can't be differentiated (create_graph=True); use backend='reference'")


def differentiable_once(backward: Callable) -> Callable:
    """Let a second differentiation of an autograd.Function raise, whose ``backward`` is given what it saved.

    Unlike torch's once_differentiable also where grad_y needs no gradient itself, as in a gradient penalty: its term would
    be dropped without a word. What the gradients are made of goes in too, so that whoever asks for the gradient of one tensor
    alone gets there by this way.
    """

    @functools.wraps(backward)
    def wrapper(ctx, *grads):
        saved = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return backward(ctx, saved, *grads)
        with torch.no_grad():
            outputs = backward(ctx, saved, *grads)
        present = [t for t in outputs if t is not None]
        origins = [t for t in (*grads, *saved) if t is not None and t.requires_grad]
        guarded = iter(_Guarded.apply(len(present), *present, *origins))
        return tuple(None if t is None else next(guarded) for t in outputs)

    return wrapper


def explain(op: Callable, *args, **kwargs) -> str:
    """Say which implementation a call would run and why, without running it.

    Args:
        op: an op of this package that has backends, for example ``fastadapt.bottleneck``.
        args, kwargs: the arguments of the call.

    Returns:
        Text: the chosen backend on the first line, then the ones passed over, each with its reason.
    """
    if not hasattr(op, "leaf"):
        raise TypeError(f"op must be an op of fastadapt that has backends, got {op!r}")
    bound = inspect.signature(op).bind(*args, **kwargs)
    bound.apply_defaults()
    (first, value), *_ = bound.arguments.items()
    check.tensor(first, value)
    leaf_args = op.arguments(*(bound.arguments[name] for name in inspect.signature(op.arguments).parameters))
    return op.leaf.explain(bound.arguments["backend"], value.device.type, leaf_args)
