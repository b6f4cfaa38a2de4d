"""Measures the cases of one op in one dtype."""

import datetime

import torch

from .agreement import Judge
from .contestants import backends, differentiated, enter, floats, parts, quiet
from .floor import Rates
from .machine import machine, software
from .memory import peak_extra, saved_extra
from .report import by_direction, summarize
from .timing import TIMERS, interleave

DIRECTIONS = {"forward": False, "forward+backward": True}


class Bench:
    """One op, one dtype: measures case by case and collects rows and notes."""

    def __init__(self, op: str, spec, dtype: torch.dtype, device: torch.device, timer: str, seconds: float, compile_modes):
        self.op, self.spec, self.dtype, self.device = op, spec, dtype, device
        self.compile_modes, self.seconds = compile_modes, seconds
        self.timer = TIMERS[timer](device)
        self.rates = Rates(dtype, device, self.timer)
        self.rows, self.notes = [], []

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def ready(self, case, training: bool, arguments: dict) -> tuple[dict, dict]:
        """Contestants that agree with eager, and parts of the op, as calls for the timer, and the memory that contestants take;
        failures become notes."""
        grad_y, calls, memory, judge = None, {}, {}, Judge(quiet(self.op, self.spec, arguments))
        held = list(floats(arguments).values())
        for name, contestant in enter(self.op, self.spec, arguments, self.device, self.compile_modes).items():
            ours = name == "eager" or name in backends(self.spec, arguments, self.device)
            try:
                if training and grad_y is None:
                    grad_y = torch.randn_like(contestant.forward())
                if wrong := judge.fault(contestant, grad_y):
                    raise RuntimeError(wrong)
                calls[name] = self.timer.prepare(contestant.call(grad_y))
                forward = contestant.forward
                memory[name] = saved_extra(forward, held) if training else peak_extra(forward, self.device)
            except Exception as error:
                if ours:
                    raise RuntimeError(f"{self.op} {case.name} {name}: {error}") from error
                self.note(f"{case.name}: {name} is left out: {str(error).splitlines()[0]}")
        for name, part in parts(self.op, arguments).items():
            calls[name] = self.timer.prepare(part.call(grad_y))
        return calls, memory

    def measure(self, case, direction: str) -> None:
        training = DIRECTIONS[direction]
        torch._dynamo.reset()  # each shape gets code of its own, and no guards of the ones before it
        torch.manual_seed(0)
        arguments = case.make(self.dtype, str(self.device))
        for value in differentiated(self.spec, arguments).values():
            value.requires_grad_(training)
        with torch.set_grad_enabled(training):
            calls, memory = self.ready(case, training, arguments)
            bytes_ = case.bytes(self.dtype.itemsize)
            timings = interleave({**calls, **self.rates.calls(bytes_, self.timer)}, self.timer, self.seconds)
        floor = self.rates.floor(case, timings, training)
        self.rows.append({
            "case": case.name, "direction": direction, "flops": case.flops, "bytes": bytes_,
            "floor_us": round(floor.seconds * 1e6, 3), "bound": floor.bound,
            "mm_gflops": round(self.rates.flops / timings["mm"].median / 1e9, 1),
            "copy_gbps": round(bytes_ / timings["copy"].median / 1e9, 2),
            "times": {name: timings[name].json() for name in memory},
            "parts": {name: timings[name].json() for name in calls if name not in memory},
            "saved_bytes" if training else "peak_bytes": memory,
        })  # fmt: skip

    def section(self, checked: bool, complete: bool) -> dict:
        return {
            "op": self.op, "dtype": str(self.dtype)[6:], "timer": self.timer.name, "checked": checked, "complete": complete,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "threads": torch.get_num_threads(), "machine": machine(self.device), "software": software(),
            "notes": self.notes, "rows": self.rows,
            "summary": {direction: summarize(rows) for direction, rows in by_direction(self.rows).items()},
        }  # fmt: skip
