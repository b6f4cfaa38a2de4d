"""AdapterDrop: the time of the adapters that half of the layers' being dropped saves: ``python -m benchmarks.drop``."""

import argparse
import copy

import torch

from fastadapt.nn import attach, drop_adapters

from .machine import cores
from .report import print_rows
from .tasks import encoder
from .timing import WallTimer, interleave

B, T = 8, 64
METHODS = {"houlsby": {"r": 96}, "pfeiffer": {"r": 192}, "parallel": {"r": 192}, "lora": {"r": 64}}


def twin(model: torch.nn.Module) -> torch.nn.Module:
    """A copy with the same weights in the same place: where they lie in memory moves a pass by more than an adapter takes."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def saved(method: str, seconds: float) -> list[str]:
    """One row: inference without adapters, with them in all layers, and in the upper half alone."""
    model = encoder().eval()
    bare = twin(model)
    attach(model, method, **METHODS[method])
    half = twin(model)
    drop_adapters(half, model.config.num_hidden_layers // 2)
    tokens = torch.randint(model.config.vocab_size, (B, T))
    calls = {name: lambda m=m: m(tokens) for name, m in (("bare", bare), ("all", model), ("half", half))}
    with torch.inference_mode():
        times = interleave(calls, WallTimer(), seconds)
    none, every, upper = (times[name].median * 1e3 for name in calls)
    share = (every - upper) / (every - none)
    return [method, f"{none:.2f}", f"{every:.2f}", f"{upper:.2f}", f"{share:.0%}"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drop", description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument("--threads", type=int, default=cores(), help="threads on the CPU (all cores)")
    parser.add_argument("--seconds", type=float, default=5.0, help="time for a row")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"inference of an encoder of MiniLM's sizes, {B} sequences of {T} tokens, float32, {args.threads} threads")
    header = ["method", "bare ms", "adapters ms", "half dropped ms", "of the adapters' time saved"]
    print_rows([header, *(saved(method, args.seconds) for method in args.methods)])


if __name__ == "__main__":
    main()
