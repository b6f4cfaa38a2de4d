"""How many parameters are trained, and what of."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from .freeze import _BESIDE_A_BASE, KINDS


class Count(NamedTuple):
    """Modules of one type: their kind as in :func:`freeze_except`, or "model", their parameters, and those of them trained."""

    kind: str
    type: str
    modules: int
    parameters: int
    trainable: int


@dataclass(frozen=True)
class ParameterTable:
    """The parameters of a model by the types of the modules that own them; as text a table, with shares of all parameters."""

    rows: tuple[Count, ...]

    @property
    def parameters(self) -> int:
        return sum(row.parameters for row in self.rows)

    @property
    def trainable(self) -> int:
        return sum(row.trainable for row in self.rows)

    def __str__(self) -> str:
        total = Count("all", "", sum(row.modules for row in self.rows), self.parameters, self.trainable)
        lines = [("kind", "type", "modules", "parameters", "trainable", "share")]
        for row in (*self.rows, total):
            counts = (f"{count:,}" for count in row[2:])
            lines.append((*row[:2], *counts, f"{100 * row.trainable / max(1, self.parameters):.3f} %"))
        widths = [max(map(len, column)) for column in zip(*lines)]
        return "\n".join(
            "  ".join(f"{word:<{w}}" if i < 2 else f"{word:>{w}}" for i, (word, w) in enumerate(zip(line, widths)))
            for line in lines
        )


def _owners(model: nn.Module) -> dict[int, tuple[str, nn.Module]]:
    """By parameter the adapter it belongs to, and that one's kind; of adapters of several kinds in each other the inner one."""
    owners: dict[int, tuple[str, nn.Module]] = {}
    kind_of = {kind: name for name, kinds in KINDS.items() for kind in kinds}
    for module in model.modules():
        kind = next((name for type_, name in kind_of.items() if isinstance(module, type_)), None)
        if kind is None:
            continue
        base = {id(p) for p in module.base.parameters()} if isinstance(module, _BESIDE_A_BASE) else set()
        for parameter in module.parameters():
            if id(parameter) not in base and owners.get(id(parameter), ("",))[0] != kind:
                owners[id(parameter)] = kind, module
    return owners


def trainable_parameters(model: nn.Module) -> ParameterTable:
    """Count the parameters of ``model`` and those that are trained: ``print(trainable_parameters(model))`` prints a table.

    There is a row for each type of adapter, one for each other type of module of which parameters are trained, such as the
    linear layer of a head or with BitFit those with biases, and one for all that is frozen. A parameter that modules share,
    such as the rule of Compacter, counts once, with the first of them.

    A :class:`BottleneckAdapter` of width 768 and rank 64 has ``2 * 768 * 64 + 64 + 768 = 99,136`` parameters; 98,304 with
    ``bias=False``; and 98,368 are those weights and the 64 biases of ``down`` without the 768 of ``up``.
    """
    owners, seen = _owners(model), set()
    rows: dict[tuple[str, str], list] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            kind, owner = owners.get(id(parameter), ("model", module))
            frozen = kind == "model" and not parameter.requires_grad
            key = ("model", "frozen") if frozen else (kind, type(owner).__name__)
            row = rows.setdefault(key, [set(), 0, 0])
            row[0].add(id(owner))
            row[1] += parameter.numel()
            row[2] += parameter.numel() if parameter.requires_grad else 0
    ordered = sorted(rows.items(), key=lambda item: (item[0][0] == "model", item[0][1] == "frozen", item[0]))
    return ParameterTable(tuple(Count(*key, len(modules), *counts) for key, (modules, *counts) in ordered))
