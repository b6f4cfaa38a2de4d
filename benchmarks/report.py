"""Tables for the terminal, JSON for the record, a picture on request."""

import json
import math
import os
import re
import statistics
from collections.abc import Iterable
from pathlib import Path

OURS = ("native", "triton")
BARRIER = 0.97  # a row below this share of the fastest of the others is named


def baselines(row: dict) -> list[str]:
    return [name for name in row["times"] if name not in OURS]


def ratio(row: dict, ours: str, other: str) -> float:
    """How many times faster ``ours`` is."""
    return row["times"][other]["us"] / row["times"][ours]["us"]


def against_best(row: dict, ours: str) -> float:
    """The ratio to the fastest of the others, compiled or not."""
    return min(ratio(row, ours, name) for name in baselines(row))


def memory(row: dict) -> dict[str, int]:
    """Bytes at the peak of forward, or saved for backward."""
    return row["saved_bytes"] if "saved_bytes" in row else row["peak_bytes"]


def over_part(row: dict, ours: str, part: str) -> float:
    """How much longer than a part of the call alone: 0.1 is a tenth."""
    return row["times"][ours]["us"] / row["parts"][part]["us"] - 1


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def groups(rows: list[dict], prefix: str) -> dict[str, list[dict]]:
    """The rows by that part of the case's name which is a number behind ``prefix``; those without one under "others"."""
    found = {}
    for row in rows:
        matches = (re.fullmatch(rf"{re.escape(prefix)}[\d.]+", part) for part in row["case"].split("-"))
        found.setdefault(next((m[0] for m in matches if m), "others"), []).append(row)
    return found


def by_direction(rows: list[dict]) -> dict[str, list[dict]]:
    """The rows of forward and of steps, and of backward alone where both were measured: what a step takes beyond forward.

    A case of which anything takes less than nothing, short calls on a busy machine, has no row of backward.
    """
    found = {}
    for row in rows:
        found.setdefault(row["direction"], []).append(row)
    steps = {row["case"]: row for row in found.get("forward+backward", [])}
    pairs = [(steps[row["case"]], row) for row in found.get("forward", []) if row["case"] in steps]
    backward = [
        {**step, "direction": "backward", **{name: _beyond(step[name], forward[name]) for name in ("times", "parts")},
         "floor_us": round(step["floor_us"] - forward["floor_us"], 3)} for step, forward in pairs
    ]  # fmt: skip
    times = lambda row: (row["floor_us"], *(t["us"] for kind in ("times", "parts") for t in row[kind].values()))  # noqa: E731
    backward = [row for row in backward if min(times(row)) > 0]
    return {**found, "backward": backward} if backward else found


def _beyond(step: dict, forward: dict) -> dict:
    return {name: {"us": round(step[name]["us"] - forward[name]["us"], 3)} for name in step if name in forward}


def _columns(rows: list[dict]) -> tuple[list[str], list[str]]:
    names = list(dict.fromkeys(name for row in rows for name in row["times"]))
    return [n for n in names if n not in OURS], [n for n in names if n in OURS]


def print_rows(table: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*table)]
    for line in table:
        print("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))))


def print_table(rows: list[dict]) -> None:
    """Microseconds of everyone; for each kernel its speed-ups, what it takes over parts of the call alone, its share of the
    floor, and the peak memory of its forward or what it saves for backward."""
    others, ours = _columns(rows)
    parts = list(dict.fromkeys(name for row in rows for name in row["parts"]))
    head = ["case", *others, *parts]
    for name in ours:
        head += [f"{name} µs", *(f"x {other}" for other in others), *(f"% over {part}" for part in parts), "% floor", "MiB"]
    head += ["floor µs", "bound"]
    table = [head]
    for row in rows:
        times = row["times"]
        both = {**times, **row["parts"]}
        line = [row["case"], *(f"{both[n]['us']:.1f}" if n in both else "-" for n in (*others, *parts))]
        for name in ours:
            if name not in times:
                line += ["-"] * (len(others) + len(parts) + 3)
                continue
            line.append(f"{times[name]['us']:.1f}")
            line += [f"{ratio(row, name, n):.2f}" if n in times else "-" for n in others]
            line += [f"{100 * over_part(row, name, part):.1f}" if part in row["parts"] else "-" for part in parts]
            line += [f"{100 * row['floor_us'] / times[name]['us']:.0f}", f"{memory(row)[name] / 2**20:.2f}"]
        table.append([*line, f"{row['floor_us']:.1f}", row["bound"]])
    print_rows(table)


def summarize(rows: list[dict]) -> dict:
    """For each kernel: means and lowest ratios over the rows that have both, likewise to the fastest of the others in each row,
    and the rows that lose to it."""
    others, ours = _columns(rows)
    parts = list(dict.fromkeys(name for row in rows for name in row["parts"]))
    summary = {}
    for name in ours:
        mine = [row for row in rows if name in row["times"]]
        means, lowest, shares, costs = {}, {}, {}, {}
        for other in others:
            if both := [row for row in mine if other in row["times"]]:
                means[other] = round(geometric_mean(ratio(row, name, other) for row in both), 3)
                lowest[other] = round(min(ratio(row, name, other) for row in both), 3)
                theirs = sum(memory(row)[other] for row in both)
                shares[other] = round(sum(memory(row)[name] for row in both) / theirs, 3) if theirs else None
        for part in parts:
            over = {row["case"]: over_part(row, name, part) for row in mine if part in row["parts"]}
            highest = max(over, key=over.get)
            mean = geometric_mean(1 + value for value in over.values()) - 1
            costs[part] = {"geometric_mean": round(mean, 3), "highest": round(over[highest], 3), "case": highest}
        best = {row["case"]: against_best(row, name) for row in mine}
        summary[name] = {
            "geometric_mean_over": means, "lowest_over": lowest,
            "over_fastest": {"geometric_mean": round(geometric_mean(best.values()), 3), "lowest": round(min(best.values()), 3)},
            "share_of_memory": shares, "over_parts": costs,
            "geometric_mean_of_floor": round(geometric_mean(row["floor_us"] / row["times"][name]["us"] for row in mine), 3),
            "rows": len(mine),
            "below": {case: round(value, 3) for case, value in best.items() if value < BARRIER},
        }  # fmt: skip
    return summary


def print_summary(summary: dict) -> None:
    for name, found in summary.items():
        lowest, shares = found["lowest_over"], found["share_of_memory"]
        means = ", ".join(f"{mean:.2f} x {o} (lowest {lowest[o]:.2f})" for o, mean in found["geometric_mean_over"].items())
        floor = 100 * found["geometric_mean_of_floor"]
        print(f"{name}: geometric mean {means}; {floor:.0f} % of the floor ({found['rows']} rows)")
        for part, cost in found["over_parts"].items():
            mean, highest = (f"{100 * cost[key]:.1f} %" for key in ("geometric_mean", "highest"))
            print(f"  over the {part} alone: {mean} (geometric mean), at most {highest} ({cost['case']})")
        print(f"  memory: {', '.join(f'{share:.2f} of {other}' for other, share in shares.items() if share is not None)}")
        below = ", ".join(f"{case} {value:.2f}" for case, value in found["below"].items())
        mean, lowest = found["over_fastest"]["geometric_mean"], found["over_fastest"]["lowest"]
        print(f"  over the fastest of the others: {mean:.2f} (lowest {lowest:.2f}); below {BARRIER}: {below or 'none'}")


def write_json(path: Path, sections: dict) -> None:
    """Replace these sections of the file and keep its others: each is one op, dtype and timer out of one run."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    fresh.write_text(_members({name: _members(section, 1) for name, section in {**kept, **sections}.items()}, 0) + "\n")
    os.replace(fresh, path)


def _members(values: dict, depth: int) -> str:
    """A JSON object with a line for each member and each row, so that two records can be compared line by line."""
    margin = "\n" + " " * depth
    lines = []
    for name, value in values.items():
        if name == "rows":
            value = "[" + ",".join(f"{margin}  {json.dumps(row, ensure_ascii=False)}" for row in value) + f"{margin} ]"
        elif depth:
            value = json.dumps(value, ensure_ascii=False)
        lines.append(f"{margin} {json.dumps(name)}: {value}")
    return "{" + ",".join(lines) + margin + "}"


def plot(path: Path, sections: dict) -> None:
    """Speed-ups over plain PyTorch, one panel a section and direction, one line a kernel and baseline."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [
        (f"{title}, {direction}", rows)
        for title, section in sections.items() for direction, rows in by_direction(section["rows"]).items()
    ]  # fmt: skip
    width = max(6.0, 0.2 * max(len(rows) for _, rows in panels))
    figure, axes = plt.subplots(len(panels), 1, figsize=(width, 3.6 * len(panels)), squeeze=False, layout="constrained")
    for axis, (title, rows) in zip(axes[:, 0], panels):
        others, ours = _columns(rows)
        for name in ours:
            for other in others:
                values = [ratio(r, name, other) if {name, other} <= r["times"].keys() else math.nan for r in rows]
                axis.plot(values, marker="o", markersize=3, linewidth=1, label=f"{name} over {other}")
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set(title=title, ylabel="speed-up", ylim=(0, None))
        axis.set_xticks(range(len(rows)), [r["case"] for r in rows], rotation=90, fontsize=6)
        axis.grid(axis="y", linewidth=0.3)
        if ours:
            axis.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
