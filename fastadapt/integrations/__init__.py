"""Bridges to other adapter libraries; each module needs its library, and nothing else needs the modules.

A library that :func:`accelerate` knows has a module of its name here with ``LAYERS``, what it looks for in words,
``accelerate(model, backend)``, which returns a :class:`Row` for each layer of the library, and ``restore(model)``.
"""

import re
import sys
from collections import Counter
from dataclasses import dataclass
from importlib import import_module
from typing import NamedTuple

from torch import nn

from .._leaf import BACKENDS

# Each library by the module of it that has loaded when a model can hold its layers.
_LIBRARIES = {"peft": "peft", "adapters": "adapters.methods.modeling"}


class Row(NamedTuple):
    """What became of one layer: ``state`` is "accelerated", "in part" or "left", and ``reason`` why it isn't the first."""

    module: str
    state: str
    reason: str = ""


def summary(reasons: dict[str, tuple[str | None, str | None]]) -> tuple[str, str]:
    """State and reason of a layer from two reasons of each of its adapters: why it never runs on kernels, why only at times."""
    words = "; ".join(f"adapter {name!r}: {never or partly}" for name, (never, partly) in reasons.items() if never or partly)
    left = reasons and all(never for never, _ in reasons.values())
    return ("left" if left else "in part" if words else "accelerated"), words


def hooked(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its class says."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in vars(module)


@dataclass(frozen=True)
class Report:
    """The layers of adapter libraries in a model; as text a table in which layers that differ in their number are one line."""

    rows: tuple[Row, ...]

    @property
    def accelerated(self) -> list[str]:
        """The names of the layers that run on kernels, also those that do only with some of their adapters."""
        return [row.module for row in self.rows if row.state != "left"]

    @property
    def left(self) -> list[str]:
        """The names of the layers that are as they were."""
        return [row.module for row in self.rows if row.state == "left"]

    def __str__(self) -> str:
        lines = Counter(row._replace(module=re.sub(r"(?<=\.)\d+(?=\.|$)", "*", row.module)) for row in self.rows)
        width = max(len(row.module) for row in lines)
        return "\n".join(
            f"{row.module:{width}}  {count:5}  {row.state:11}  {row.reason}".rstrip() for row, count in lines.items()
        )


def _integrations():
    """The modules for those libraries that are loaded: a model can hold layers of no other."""
    return [import_module(f".{name}", __name__) for name, loaded in _LIBRARIES.items() if loaded in sys.modules]


def accelerate(model: nn.Module, *, backend: str | None = None) -> Report:
    """Let the adapter layers of a live model of ``peft`` or ``adapters`` run on the kernels here.

    Only the classes of the layers change, to subclasses with another ``forward``: no tensor is copied, and parameters,
    ``state_dict``, saving and loading, ``isinstance``, merging, hot-swapping, switching, adding and deleting adapters stay the
    library's own. A prefix is given to the attention layers for the time of a call, in place of the cache or the concatenation
    of the library. Whatever a layer is asked for that no kernel computes goes through the library's own ``forward``. A second
    call looks for layers that were added since, and changes nothing else but ``backend``. Threads may share a model; where it
    has prefixes of ``peft``, their calls run one after another, a whole ``generate`` each.

    Args:
        model: a ``PeftModel``, a model after ``adapters.init``, or any module that contains layers of one of the libraries.
        backend: as in :func:`fastadapt.lora_linear`, for every layer.

    Returns:
        A table with a row for each layer: its name, its state, and a reason where it isn't, or isn't wholly, accelerated.

    Raises:
        ValueError: there is nothing to accelerate; ``model`` is as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend must be one of {(None, *BACKENDS)}, got {backend!r}")
    integrations = _integrations()
    report = Report(tuple(row for integration in integrations for row in integration.accelerate(model, backend)))
    if not report.accelerated:
        sought = "; ".join(integration.LAYERS for integration in integrations)
        sought = sought or f"layers of {' or '.join(_LIBRARIES)}, none of which is loaded"
        found = f"only\n{report}" if report.rows else "none"
        raise ValueError(f"model must contain what can be accelerated ({sought}), got {found}")
    return report


def restore(model: nn.Module) -> None:
    """Undo :func:`accelerate`: every layer of ``model`` gets its own class back."""
    for integration in _integrations():
        integration.restore(model)
