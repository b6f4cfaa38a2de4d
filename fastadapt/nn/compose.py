"""Adapters made of adapters: one after another, their average, and one of several by name."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from inspect import signature
from numbers import Real

import torch
from torch import Tensor, nn


def _check(adapters: Mapping[str, nn.Module]) -> bool:
    """Refuse what can't stand in one place; return whether the adapters add to ``x`` where they are given no residual."""
    if not adapters:
        raise ValueError("adapters must be at least one, got none")
    for name, adapter in adapters.items():
        if not isinstance(adapter, nn.Module):
            raise TypeError(f"adapters must be modules, got {type(adapter).__name__} for {name}")
    for what, default in (("d", None), ("residual", True)):
        values = {name: getattr(adapter, what, default) for name, adapter in adapters.items()}
        if len({value for value in values.values() if value is not None}) > 1:
            raise ValueError(f"adapters must have one {what}, got {values}")
    return getattr(next(iter(adapters.values())), "residual", True)


def _numbered(adapters: Iterable[nn.Module]) -> dict[str, nn.Module]:
    return {str(i): adapter for i, adapter in enumerate(adapters)}


def _weights(weights: Sequence[float], count: int) -> tuple[float, ...]:
    weights = tuple(weights)
    if len(weights) != count or any(not isinstance(w, Real) or isinstance(w, bool) for w in weights):
        raise ValueError(f"weights must be a number for each of {count} adapters, got {weights}")
    return tuple(map(float, weights))


class Stacked(nn.Module):
    """Adapters one after another, each on what the one before puts out: ``b(a(x))``.

    A residual goes to the first; the second adds to what the first has made of it. Keys of ``state_dict``: those of the
    adapters under ``adapters.0``, ``adapters.1``. Source: Pfeiffer et al. 2020 (MAD-X: a task on top of a language).

    Args:
        adapters: modules called as ``adapter(x, residual=None)``, such as :class:`BottleneckAdapter`.
    """

    def __init__(self, *adapters: nn.Module):
        super().__init__()
        self.residual = _check(_numbered(adapters))
        self.adapters = nn.ModuleList(adapters)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Adapt ``x`` ``(..., d)``; ``residual`` takes the place of ``x`` as what the first branch is added to."""
        first, *others = self.adapters
        y = first(x, residual=residual)
        for adapter in others:
            y = adapter(y)
        return y


class Averaged(nn.Module):
    """The weighted sum of adapters of the same input: ``y = residual + sum_i weights[i] * branch_i(x)``.

    Each adapter takes the output of the one before as its residual, and its weight into the scale of its kernel: no pass is
    made for the sum or for the weights. Keys of ``state_dict``: those of the adapters under ``adapters.0``, ``adapters.1``, and
    ``weights`` if they are learned. For another average, see :func:`average_adapters`: of parameters, at the cost of one
    adapter. Source: Wang et al. 2021 (ensembles of adapters).

    Args:
        adapters: modules called as ``adapter(x, residual=None, weight=...)``: :class:`BottleneckAdapter`,
            :class:`CompacterAdapter`, :class:`Averaged`, or a :class:`Switched` of them.
        weights: a number for each adapter; ``"learned"``: a parameter ``(n,)`` that starts at ``1 / n`` and isn't bounded; None
            for ``1 / n``.
    """

    def __init__(self, *adapters: nn.Module, weights: Sequence[float] | str | None = None):
        super().__init__()
        self.residual = _check(_numbered(adapters))
        for adapter in adapters:
            if "weight" not in signature(adapter.forward).parameters:
                raise TypeError(f"adapters must take a weight, as BottleneckAdapter does, got {type(adapter).__name__}")
        count = len(adapters)
        if isinstance(weights, str) and weights != "learned":
            raise ValueError(f"weights must be numbers, 'learned' or None, got {weights!r}")
        self.adapters = nn.ModuleList(adapters)
        if weights == "learned":
            like = next((p for p in self.parameters() if p.is_floating_point()), None)
            factory = {} if like is None else {"device": like.device, "dtype": like.dtype}
            self.weights = nn.Parameter(torch.full((count,), 1 / count, **factory))
        else:
            self.weights = (1 / count,) * count if weights is None else _weights(weights, count)

    def forward(self, x: Tensor, residual: Tensor | None = None, *, weight: float | Tensor | None = None) -> Tensor:
        """Adapt ``x`` ``(..., d)``; ``residual`` and ``weight`` as in :class:`BottleneckAdapter`."""
        y = residual
        weights = self.weights.unbind() if isinstance(self.weights, Tensor) else self.weights
        for adapter, own in zip(self.adapters, weights):
            y = adapter(x, residual=y, weight=own if weight is None else own * weight)
        return y

    def options(self) -> dict:
        """The constructor's arguments that decide what is computed."""
        return {"weights": "learned" if isinstance(self.weights, Tensor) else list(self.weights)}

    def extra_repr(self) -> str:
        return f"weights={self.options()['weights']!r}"


class Switched(nn.Module):
    """Several adapters by name in one place, of which one is in use; the others cost nothing and get no gradient.

    Keys of ``state_dict``: those of the adapters under ``adapters.<name>``. Which one is in use isn't part of it. For one
    adapter a row of the batch, see :class:`AdapterBank`.

    Args:
        adapters: modules called as ``adapter(x, residual=None)``, by their names.
        active: the name of the one in use; None for none, which leaves what it is given as it is.
    """

    def __init__(self, adapters: Mapping[str, nn.Module], active: str | None = None):
        super().__init__()
        if not hasattr(adapters, "items"):
            raise TypeError(f"adapters must be modules by their names, got {type(adapters).__name__}")
        self.residual = _check(adapters)
        self.adapters = nn.ModuleDict(adapters)
        self.active: str | None = None
        self.use(active)

    @property
    def names(self) -> list[str]:
        """The names of the adapters."""
        return list(self.adapters)

    def use(self, name: str | None) -> None:
        """Use the adapter ``name`` from here on, or with None no adapter."""
        if name is not None and name not in self.adapters:
            raise ValueError(f"name must be one of {self.names} or None, got {name!r}")
        self.active = name

    def forward(self, x: Tensor, residual: Tensor | None = None, *, weight: float | Tensor | None = None, **options) -> Tensor:
        """Adapt ``x`` ``(..., d)``; ``residual``, ``weight`` and ``options``, such as the ``adapter_ids`` of a bank, go to the
        adapter in use."""
        if self.active is not None:
            options |= {} if weight is None else {"weight": weight}
            return self.adapters[self.active](x, residual=residual, **options)
        if residual is not None:
            return residual
        return x if self.residual else torch.zeros_like(x)

    def extra_repr(self) -> str:
        return f"active={self.active!r}"


@torch.no_grad()
def average_adapters(adapters: Iterable[nn.Module], weights: Sequence[float] | None = None) -> nn.Module:
    """A new adapter whose parameters are the weighted averages of those of ``adapters``, which have one type and shape.

    Sums are made in float32 or wider. A parameter that all of them share, such as the rule of Compacter, is shared by the new
    one too. Source: Chronopoulou et al. 2023 (AdapterSoup).

    Args:
        adapters: of one type with the same options, without a frozen layer of their own.
        weights: a number for each; None for ``1 / n``.
    """
    adapters = list(adapters)
    _check(_numbered(adapters))
    count = len(adapters)
    weights = (1 / count,) * count if weights is None else _weights(weights, count)
    first = adapters[0]
    if hasattr(first, "base"):
        raise TypeError(f"adapters must stand alone, got {type(first).__name__} with a frozen layer in it")
    about = [(type(a).__name__, a.options() if hasattr(a, "options") else {}) for a in adapters]
    tensors = [dict([*a.named_parameters(), *a.named_buffers()]) for a in adapters]
    shapes = [{name: tuple(t.shape) for name, t in named.items()} for named in tensors]
    for i in range(1, count):
        for what, values in (("type and options", about), ("shapes", shapes)):
            if values[i] != values[0]:
                raise ValueError(f"adapters must have the same {what}, got {values[0]} and {values[i]}")
    shared = {id(t): t for name, t in tensors[0].items() if count > 1 and all(named[name] is t for named in tensors)}
    average = copy.deepcopy(first, dict(shared))
    for name, target in [*average.named_parameters(), *average.named_buffers()]:
        if id(target) in shared:
            continue
        if not target.is_floating_point():
            if not all(torch.equal(named[name], target) for named in tensors):
                raise ValueError(f"adapters must have one {name}, got several values of {target.dtype}")
            continue
        wide = torch.promote_types(target.dtype, torch.float32)
        target.copy_(sum(weight * named[name].to(target.device, wide) for weight, named in zip(weights, tensors)))
    return average
