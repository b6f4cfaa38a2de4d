"""What each compiled kernel may use: one JSON file an op and language, which ``python -m tests.gpuless.budgets`` writes.

A file names the compiler that it is of, and holds for each kernel and chip the values of ``columns``.
"""

import json
from pathlib import Path

FOLDER = Path(__file__).parent
GROWTH = 1.1  # what a change may cost unnoticed
REGENERATE = "if it is meant, run `make budgets` and commit the difference"


def read(file: str) -> dict:
    """The budget file, or an empty one: then every kernel is reported as new."""
    path = FOLDER / f"{file}.json"
    return json.loads(path.read_text()) if path.exists() else {"compiler": None, "columns": [], "kernels": {}}


def write(file: str, compiler: str, measured: dict) -> None:
    """``measured``: kernel -> chip -> {column: value}. One line a kernel, so that a difference can be read."""
    columns = list(next(iter(next(iter(measured.values())).values())))
    lines = (
        f"{json.dumps(name)}: {json.dumps({str(chip): list(row.values()) for chip, row in chips.items()})}"
        for name, chips in sorted(measured.items())
    )
    head = f'{{"compiler": {json.dumps(compiler)}, "columns": {json.dumps(columns)}, "kernels": {{\n'
    (FOLDER / f"{file}.json").write_text(head + ",\n".join(lines) + "\n}}\n")


def exceeded(budget: dict, measured: dict, chip: int | str, complete: bool) -> list[str]:
    """Where ``measured`` (kernel -> {column: value}) leaves the budget. A number may grow by a tenth, a text must not change, a
    kernel must have an entry; if ``measured`` is ``complete`` for the chip, an entry must have a kernel."""
    known = {name: chips[str(chip)] for name, chips in budget["kernels"].items() if str(chip) in chips}
    found = [f"{name} has a budget, but no kernel: {REGENERATE}" for name in known if complete and name not in measured]
    for name, row in measured.items():
        if name not in known:
            found.append(f"{name} has no budget: {REGENERATE}")
            continue
        for (column, now), before in zip(row.items(), known[name], strict=True):
            if now > before * GROWTH if isinstance(now, int) else now != before:
                found.append(f"{name} uses {column} {now!r}, its budget is {before!r}: {REGENERATE}")
    return [f"{chip} {line}" for line in found]
