"""The demo's table and picture."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

MIB = 2**20
HEADER = (
    f"{'':10}{'trainable':>22}{'test':>10}{'loss':>10}{'ms a step':>20}{'peak MiB':>20}{'speed-':>9}{'infer-':>9}{'its':>9}\n"
    f"{'method':10}{'parameters':>12}{'share':>10}{'accuracy':>10}{'diff.':>10}"
    f"{'fastadapt':>12}{'plain':>8}{'fastadapt':>12}{'plain':>8}{'up':>9}{'ence':>9}{'speed-up':>9}"
)
LEGEND = """\
plain       the same method as plain PyTorch modules; LoRA, DoRA, prefixes and prompts of peft; with --peft all of a model
            of peft
loss diff.  largest difference between the losses of the two runs at any step, on the same batches from the same weights;
            with dropout, where the masks differ, between means of ten steps
ms a step   median of forward, backward and AdamW; the two runs take turns on every batch
peak MiB    most that a step's activations, gradients, temporaries and AdamW moments hold together, weights left out,
            on the longest batch, counted at PyTorch's allocator
speed-up    median over the batches of plain / fastadapt on the same batch; methods without a kernel have one run
inference   time of a batch of middle length with the adapters over the bare encoder's, less one
its speed-up  plain / fastadapt on that batch; of both the median over rounds of turns"""


class Row(NamedTuple):
    """One method. Numbers of the run with fastadapt are None where there is no adapter."""

    method: str
    trainable: int
    parameters: int
    accuracy: float
    loss_difference: float | None
    ms: float | None
    plain_ms: float
    peak: float | None
    plain_peak: float
    speed_up: float | None
    inference: float | None = None
    inference_speed_up: float | None = None


def line(row: Row) -> str:
    def cell(value: float | None, width: int, form: str) -> str:
        return f"{'-' if value is None else format(value, form):>{width}}"

    return (
        f"{row.method:10}{row.trainable:>12,}{row.trainable / row.parameters:>10.3%}{row.accuracy:>10.1%}"
        f"{cell(row.loss_difference, 10, '.1e')}{cell(row.ms, 12, '.1f')}{row.plain_ms:>8.1f}"
        f"{cell(row.peak and row.peak / MIB, 12, '.1f')}{row.plain_peak / MIB:>8.1f}{cell(row.speed_up, 9, '.3f')}"
        f"{cell(row.inference, 9, '+.1%')}{cell(row.inference_speed_up, 9, '.3f')}"
    )


def write(path: Path, rows: Iterable[Row], tasks: Iterable[tuple], about: dict) -> None:
    """Both tables as JSON, with what they were measured on."""
    record = about | {"methods": [row._asdict() for row in rows], "tasks": [row._asdict() for row in tasks]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def plot(rows: Iterable[Row], path: Path, title: str) -> None:
    """Bars of time and memory, plain beside fastadapt, and accuracy over trainable parameters."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = list(rows)
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    figure.suptitle(title)
    bars = (
        (axes[0], "ms a step", [(row.ms, row.plain_ms) for row in rows]),
        (axes[1], "peak MiB of a step, without weights", [(row.peak and row.peak / MIB, row.plain_peak / MIB) for row in rows]),
    )
    places = range(len(rows))
    for axis, name, values in bars:
        axis.bar([i - 0.2 for i in places], [plain for _, plain in values], 0.4, label="plain PyTorch or peft", color="#9aa5b1")
        axis.bar([i + 0.2 for i in places], [fast or 0 for fast, _ in values], 0.4, label="fastadapt", color="#1f77b4")
        axis.set_xticks(places, [row.method for row in rows], rotation=30)
        axis.set_title(name)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=2)
    for row, marker in zip(rows, "ovs^DX*Ph<>d8p+", strict=False):
        axes[2].plot(row.trainable, 100 * row.accuracy, marker, label=row.method, markersize=8)
    axes[2].legend()
    axes[2].set_xscale("log")
    axes[2].set_xlabel("trainable parameters")
    axes[2].set_title("test accuracy, %")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
