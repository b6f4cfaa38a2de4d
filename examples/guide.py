"""Write the tables of docs/choosing.md anew, from what ``python examples/finetune.py --all --json FILE`` has measured."""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "demo.json"
PAGE = ROOT / "docs" / "choosing.md"

# What isn't measured: how a batch mixes several of a kind, and what becomes of the frozen model's speed at inference.
MIXED = {
    "full": "no", "head": "yes, a head for each", "bitfit": "no", "standard": "`AdapterBank`", "houlsby": "`AdapterBank`",
    "skip": "`AdapterBank`", "parallel": "`ParallelAdapter` of a bank", "compacter": "`adapter_ids` of the op",
    "compact++": "`adapter_ids` of the op", "lora": "`LoRABank`", "lora-drop": "`LoRABank`", "dora": "no",
    "lora-all": "`LoRABank`", "prefix": "`PrefixAttention`", "ptuning-2": "`PrefixAttention`", "mam": "both of its kinds",
    "prompt": "yes, a part of the input", "ptuning": "yes, a part of the input", "ladder": "no",
}  # fmt: skip
MERGED = {"full", "bitfit", "lora", "lora-drop", "dora", "lora-all"}


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _methods(record: dict) -> str:
    head = next(row["plain_ms"] for row in record["methods"] if row["method"] == "head")
    rows = []
    for row in record["methods"]:
        name, ms, peak = row["method"], row["ms"] or row["plain_ms"], row["peak"] or row["plain_peak"]
        overhead = row["inference"]
        inference = "merged: none" if name in MERGED else "none" if overhead is None else f"{max(overhead, 0.0):.0%}"
        rows.append([
            f"`{name}`", f"{row['trainable']:,}", f"{row['trainable'] / row['parameters']:.2%}", f"{row['accuracy']:.1%}",
            f"{ms:.0f}", f"{ms / head:.1f} x", f"{row['speed_up']:.2f} x" if row["speed_up"] else "", f"{peak / 2**20:.0f}",
            inference, MIXED[name],
        ])  # fmt: skip
    header = ["method", "parameters", "share", "accuracy", "ms a step", "x head alone", "x plain", "peak MiB", "inference"]
    return _table([*header, "several in one batch"], rows)


def _tasks(record: dict) -> str:
    rows = [
        [f"`{row['method']}`", f"{row['trainable']:,}", *(f"{value:.1%}" for value in row["accuracy"].values()),
         f"{statistics.fmean(row['accuracy'].values()):.1%}", f"{row['ms']:.0f}"]
        for row in record["tasks"]
    ]  # fmt: skip
    return _table(["one frozen encoder", "parameters", *record["tasks"][0]["accuracy"], "mean", "ms a step"], rows)


def _setting(record: dict) -> str:
    return f"all-MiniLM-L6-v2 on the domain {record['domain']}, {record['setting']}, torch {record['torch']}."


def _steps(record: dict) -> str:
    return f"The four domains of the corpus as four tasks, each with {record['steps_of_each']} steps:"


PARTS = {"steps": _steps, "setting": _setting, "methods": _methods, "tasks": _tasks}


def written(page: str, record: dict) -> str:
    """``page`` with what stands between its marks made from ``record``."""
    for name, make in PARTS.items():
        marks = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        if page.count(marks[0]) != 1 or page.count(marks[1]) != 1:
            raise ValueError(f"the page must have the marks {marks[0].strip()} and {marks[1].strip()} once")
        page = re.sub(f"{marks[0]}.*?{marks[1]}", lambda _: make(record).join(marks), page, flags=re.DOTALL)  # noqa: B023
    return page


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument("--page", type=Path, default=PAGE, help="default: %(default)s")
    args = parser.parse_args(argv)
    record = json.loads(args.results.read_text(encoding="utf-8"))
    args.page.write_text(written(args.page.read_text(encoding="utf-8"), record), encoding="utf-8")
    print(args.page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
