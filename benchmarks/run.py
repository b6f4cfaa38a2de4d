"""Time every op against plain PyTorch, torch.compile and other libraries: ``python -m benchmarks.run [op ...]``."""

import argparse
import importlib.util
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from tests.specs import SPECS

from .bench import DIRECTIONS, Bench
from .machine import cores, machine, machine_name, software
from .report import by_direction, groups, plot, print_summary, print_table, summarize, write_json
from .timing import TIMERS

ROOT = Path(__file__).parent.parent


def positive(kind: type, text: str) -> float:
    value = kind(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="op", help=f"all of {', '.join(SPECS)} if none is named")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", type=torch.device)
    parser.add_argument("--shapes", nargs="+", metavar="PARTS", help="only cases with these parts: m512,r8 means both")
    parser.add_argument("--by", metavar="LETTER", help="one more summary for each value of this part of the names: r, p, m")
    parser.add_argument("--quick", action="store_true", help="about six cases, spread over all, and less time for each")
    direction = parser.add_mutually_exclusive_group()
    direction.add_argument("--forward", action="store_const", dest="direction", const="forward", help="forward alone")
    direction.add_argument("--backward", action="store_const", dest="direction", const="forward+backward", help="steps alone")
    parser.add_argument(
        "--compile", nargs="+", default=["default"], choices=["default", "max-autotune", "none"], help="modes of torch.compile"
    )
    parser.add_argument("--threads", type=partial(positive, int), default=cores(), help="threads on the CPU (all cores)")
    parser.add_argument(
        "--timer", nargs="+", choices=TIMERS, help="on CUDA: a graph's replay (default), plain launches, or both"
    )
    parser.add_argument("--seconds", type=partial(positive, float), help="time for a row (1, or 0.3 with --quick)")
    parser.add_argument("--out", type=Path, help="JSON file; a run of all cases goes to benchmarks/results/ if none is given")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the speed-ups")
    parser.add_argument("--no-check", action="store_true", help="measure although the tests of the op weren't run")
    parser.add_argument("--overhead", action="store_true", help="only: microseconds of a call with next to no work")
    parser.add_argument("--micro", action="store_true", help="only: the CPU micro-kernel against torch.mm on one core")
    args = parser.parse_args(argv)
    if unknown := [op for op in args.ops if op not in SPECS]:
        parser.error(f"op must be one of {', '.join(SPECS)}, got {', '.join(unknown)}")
    if args.device.type not in ("cpu", "cuda") or args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device must be cpu, or cuda where there is one, got {args.device}")
    if args.plot and not importlib.util.find_spec("matplotlib"):
        parser.error("--plot needs matplotlib, which isn't installed")
    args.load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    args.timer = args.timer or ["graph" if args.device.type == "cuda" else "wall"]
    if wrong := [name for name in args.timer if (name == "wall") != (args.device.type == "cpu")]:
        parser.error(f"--timer {wrong[0]} can't measure on {args.device.type}")
    args.ops = args.ops or list(SPECS)
    args.seconds = args.seconds or (0.3 if args.quick else 1.0)
    args.compile = [mode for mode in args.compile if mode != "none"]
    return args


def select(spec, args: argparse.Namespace) -> list:
    """The cases to measure: all, those that ``--shapes`` names, or a few with ``--quick``."""
    cases = list(getattr(spec, f"bench_{args.device.type}", ()) or spec.bench)
    if args.shapes:
        parts = lambda case: {*case.name.split("-"), case.name}  # noqa: E731
        cases = [case for case in cases if any(set(text.split(",")) <= parts(case) for text in args.shapes)]
    if args.quick and len(cases) > 6:
        cases = [cases[i * (len(cases) - 1) // 5] for i in range(6)]
    return cases


def battery(op: str) -> bool:
    """Run the part of the tests that compares the op's kernels with its reference; False if it is red."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "tests/test_ops.py"]
    run = subprocess.run(
        [*command, "-k", f"{op}- and (test_matches_reference or test_any_strides or test_deterministic)"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if run.returncode:
        print(run.stdout[-4000:] + run.stderr[-2000:], file=sys.stderr)
    return run.returncode == 0


def progress(tasks: list, label: str) -> Iterator:
    """The tasks, under a bar if tqdm is there and the terminal can show one."""
    if importlib.util.find_spec("tqdm") and sys.stderr.isatty():
        from tqdm import tqdm

        return iter(tqdm(tasks, desc=label, unit="row", leave=False))
    return _counted(tasks, label)


def _counted(tasks: list, label: str) -> Iterator:
    for i, task in enumerate(tasks):
        if i % 8 == 0:
            print(f"{label}: row {i} of {len(tasks)}", file=sys.stderr, flush=True)
        yield task


def run_op(op: str, dtype: torch.dtype, timer: str, args: argparse.Namespace, checked: bool) -> dict:
    """Measure one op in one dtype and print its tables; an interrupt or a kernel that fails keeps what is measured."""
    bench, complete = Bench(op, SPECS[op], dtype, args.device, timer, args.seconds, args.compile), True
    directions = [args.direction] if args.direction else list(DIRECTIONS)
    if not (cases := select(bench.spec, args)):
        print(f"{op} has no case with the parts {' or '.join(args.shapes)}; one is {bench.spec.bench[0].name}", file=sys.stderr)
    tasks = [(case, direction) for case in cases for direction in directions]
    try:
        for case, direction in progress(tasks, f"{op} {str(dtype)[6:]}"):
            bench.measure(case, direction)
    except (KeyboardInterrupt, Exception) as stop:
        print(f"{op}: {stop!r} after {len(bench.rows)} of {len(tasks)} rows", file=sys.stderr)
        complete = False
    section = bench.section(checked, complete)
    how = timer + ("" if args.device.type == "cuda" else f", {section['threads']} threads")
    for direction, rows in by_direction(bench.rows).items():
        print(f"\n{op}, {section['dtype']}, {direction} ({how}); medians in µs, ratios above 1 are speed-ups")
        print_table(rows)
        print_summary(section["summary"][direction])
        for part, group in groups(rows, args.by).items() if args.by else ():
            print(f"{part} alone:")
            print_summary(summarize(group))
    for note in bench.notes:
        print(f"note: {note}")
    return section


def measure(args: argparse.Namespace) -> tuple[dict, list[str]]:
    """The sections of the record by name, and the ops that are refused or weren't measured to the end."""
    sections, red = {}, []
    for op in args.ops:
        if args.no_check:
            print(f"warning: the tests of {op} were not run; these figures may be of wrong results")
        elif not battery(op):
            print(f"{op}: its tests are red or none could run, so there is nothing to report", file=sys.stderr)
            red.append(op)
            continue
        for dtype, timer in itertools.product(args.dtype, args.timer):
            section = run_op(op, getattr(torch, dtype), timer, args, checked=not args.no_check)
            if section["rows"]:
                section["load_before"] = round(args.load, 2)
                sections[f"{op} {dtype} {timer}"] = section
            if not section["complete"]:
                return sections, [*red, op]  # a device on which a kernel failed may run no other
    return sections, red


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    print(" · ".join(f"{k} {v}" for k, v in {**machine(args.device), "threads": args.threads, **software()}.items() if v))
    if args.overhead or args.micro:
        from . import micro, overhead

        if args.overhead:
            overhead.main(args.ops, SPECS, args.device, args.seconds)
        if args.micro:
            micro.main(args.seconds)
        return 0
    if args.load > cores() / 4:
        print(f"warning: load {args.load:.1f} on {cores()} cores before the start; other work makes these figures noisy")
    sections, red = measure(args)
    whole = not (args.shapes or args.quick or args.direction or args.no_check) and all(s["complete"] for s in sections.values())
    out = args.out or (ROOT / "benchmarks" / "results" / f"{machine_name(args.device)}.json" if whole else None)
    if out and sections:
        write_json(out, sections)
        print(f"written: {out}")
    if args.plot and sections:
        plot(args.plot, sections)
        print(f"written: {args.plot}")
    return 0 if sections and not red else 1


if __name__ == "__main__":
    sys.exit(main())
