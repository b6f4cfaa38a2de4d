"""AdapterFusion of one layer, branches and all, beside the library ``adapters``: ``python -m benchmarks.fusion``."""

import argparse
import itertools
from functools import partial

import torch
from torch import Tensor, nn

from fastadapt.nn import AdapterFusion

from .machine import cores
from .report import print_rows
from .timing import WallTimer, interleave

B, T = 32, 64
WIDTHS, ADAPTERS = (384, 768), (2, 4, 8)


class OfAdapters(nn.Module):
    """What ``adapters`` computes in a layer of BERT: every adapter by itself, their outputs stacked, BertFusion on those."""

    def __init__(self, d: int, g: int):
        super().__init__()
        from adapters import SeqBnConfig
        from adapters.configuration import DynamicAdapterFusionConfig
        from adapters.methods.modeling import Adapter, BertFusion

        config = SeqBnConfig(non_linearity="gelu")
        self.adapters = nn.ModuleList(Adapter(str(i), d, d // config.reduction_factor, config) for i in range(g))
        self.adapters.requires_grad_(False)
        self.fusion = BertFusion(DynamicAdapterFusionConfig(), d, 0.0)
        with torch.no_grad():
            for p in self.parameters():
                p.normal_(std=d**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        branches = torch.stack([adapter(x, residual_input=x)[2] for adapter in self.adapters]).permute(1, 2, 0, 3)
        return self.fusion(x, branches, branches, x)


def ours(theirs: OfAdapters, d: int) -> AdapterFusion:
    """The same with the same weights."""
    from fastadapt.integrations.adapters import from_adapters

    fusion = AdapterFusion(d, [from_adapters(adapter) for adapter in theirs.adapters])
    fusion.load_state_dict(theirs.fusion.state_dict() | fusion.adapters.state_dict(prefix="adapters."), strict=False)
    return fusion


def row(d: int, g: int, seconds: float) -> tuple[float, list[str]]:
    """One layer, forward and backward to its input and to what is trained."""
    theirs = OfAdapters(d, g)
    modules = {"adapters": theirs, "fastadapt": ours(theirs, d)}
    x, grad_y = torch.randn(B, T, d, requires_grad=True), torch.randn(B, T, d)
    calls = {"adapters": partial(theirs, x), "fastadapt": partial(modules["fastadapt"], x, residual=x)}
    torch.testing.assert_close(*(call() for call in calls.values()), rtol=1e-3, atol=1e-4)

    def step(name):
        trained = [p for p in modules[name].parameters() if p.requires_grad]
        return torch.autograd.grad(calls[name](), [x, *trained], grad_y)

    times = interleave({name: partial(step, name) for name in calls}, WallTimer(), seconds)
    fast, slow = (times[name].median * 1e3 for name in ("fastadapt", "adapters"))
    return fast, [f"{d}", f"{g}", f"{fast:.1f}", f"{slow:.1f}", f"{slow / fast:.2f} x"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fusion", description=__doc__)
    parser.add_argument("--threads", type=int, default=cores(), help="threads on the CPU (all cores)")
    parser.add_argument("--seconds", type=float, default=4.0, help="time for a row")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"AdapterFusion of a layer, forward+backward, {B} sequences of {T} tokens, float32, {args.threads} threads")
    table, least = [["d", "adapters", "fastadapt ms", "adapters ms", "ratio", "over two adapters"]], {}
    for d, g in itertools.product(WIDTHS, ADAPTERS):
        fast, cells = row(d, g, args.seconds)
        table.append([*cells, f"{fast / least.setdefault(d, fast):.2f} x"])
    print_rows(table)


if __name__ == "__main__":
    main()
