"""Runs sections as processes of their own within a limit of time, and keeps the table whatever becomes of them."""

import contextlib
import json
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
GRACE = 10  # seconds between an interrupt, on which a benchmark writes what it has, and the end
LEAST = 5  # a section isn't begun with fewer seconds
GOOD = ("passed", "skipped")


@dataclass(frozen=True)
class Section:
    """``command`` gets the results so far and returns the arguments of a process; ``refusal`` says why it can't run here."""

    name: str
    command: Callable[[dict], list[str]]
    seconds: float
    pytest: bool = False  # the tests that ran are counted, and none at all is a failure
    refusal: str | None = None
    environment: dict = field(default_factory=dict)


@dataclass
class Result:
    """``result``: passed, failed, stopped (out of time), skipped (all its tests say why), not run."""

    name: str
    result: str
    seconds: float = 0.0
    detail: str = ""  # the first line of the failure, or the reason
    tests: int = 0
    skipped: list = field(default_factory=list)  # reasons
    measured: dict = field(default_factory=dict)
    end_of_log: list = field(default_factory=list)  # of a section that didn't pass


class Run:
    """Runs groups of sections; those of a group run side by side. Everything ends within ``seconds``."""

    def __init__(self, folder: Path, seconds: float):
        self.folder, self.start, self.deadline = folder, time.monotonic(), time.monotonic() + seconds
        self.results, self.processes, self.interrupted, self.machine = {}, set(), False, None
        self.writing = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gpu.log").write_text("")

    def groups(self, groups: list[list[Section]]) -> bool:
        """Run all; an interrupt, or a first group that doesn't pass, leaves the others as not run. True if all is well."""
        try:
            for number, group in enumerate(groups):
                if number and not all(self.results[s.name].result in GOOD for s in groups[0]):
                    self.leave(group, f"{groups[0][0].name} didn't pass")
                    continue
                with ThreadPoolExecutor(min(len(group), max(1, (os.cpu_count() or 1) // 2))) as pool:
                    try:
                        list(pool.map(self.section, group))
                    except BaseException:
                        self.interrupted = True
                        for process in list(self.processes):
                            end(process)
                        raise
        except KeyboardInterrupt:
            for group in groups:
                self.leave([s for s in group if s.name not in self.results], "interrupted")
        self.write()
        print(self.table(), flush=True)
        results = [r.result for r in self.results.values()]
        return "passed" in results and all(result in GOOD for result in results)

    def leave(self, group: list[Section], why: str) -> None:
        for section in group:
            self.results[section.name] = Result(section.name, "not run", detail=section.refusal or why)

    def section(self, section: Section) -> None:
        """Run one section; whatever goes wrong in here is its failure too."""
        start = time.monotonic()
        try:
            result = self.attempt(section)
        except Exception as error:
            result = Result(section.name, "failed", detail=f"harness: {type(error).__name__}: {error}")
        result.seconds = round(time.monotonic() - start, 1)
        self.results[section.name] = result
        print(f"{result.name}: {result.result}, {result.seconds} s {result.detail}", flush=True)
        self.write()

    def attempt(self, section: Section) -> Result:
        left = self.deadline - time.monotonic() - GRACE
        if section.refusal or self.interrupted or left < LEAST:
            why = section.refusal or ("interrupted" if self.interrupted else "no time left")
            return Result(section.name, "not run", detail=why)
        with tempfile.TemporaryDirectory() as folder:
            log, report = Path(folder) / "log", Path(folder) / "report.xml"
            command = section.command(self.results) + ([f"--junitxml={report}"] if section.pytest else [])
            with log.open("wb") as file:
                process = subprocess.Popen(
                    command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
                    env={**os.environ, "PYTHONUNBUFFERED": "1", **section.environment},
                )  # fmt: skip
            self.processes.add(process)
            limit = min(section.seconds, left)
            try:
                process.wait(limit)
                stopped = None
            except subprocess.TimeoutExpired:
                stopped = f"stopped after {limit:.0f} s"
            end(process)
            self.processes.discard(process)
            text = log.read_text(errors="replace")
            with self.writing, (self.folder / "gpu.log").open("a") as whole:
                whole.write(f"==== {section.name}: {' '.join(map(str, command))}\n{text}\n")
            result = judge(section, process.returncode, text.splitlines(), report if report.exists() else None)
        if stopped or self.interrupted:
            stopped = stopped or "interrupted"
            result.result, result.detail = "stopped", f"{stopped}; {result.detail}".removesuffix("; ")
        if section.name == "machine":
            self.machine = next((json.loads(line) for line in text.splitlines() if line.startswith("{")), None)
        return result

    def write(self) -> None:
        """The record so far, whole at every moment."""
        fresh = self.folder / f"gpu.json.{os.getpid()}"
        record = {
            "machine": self.machine, "seconds": round(time.monotonic() - self.start, 1),
            "sections": [asdict(r) for r in list(self.results.values())],
        }  # fmt: skip
        with self.writing:
            fresh.write_text(json.dumps(record, indent=1) + "\n")
            os.replace(fresh, self.folder / "gpu.json")

    def table(self) -> str:
        rows = [("section", "result", "seconds", "first line")]
        for r in self.results.values():
            tests = f"{r.tests - len(r.skipped)} tests" if r.tests > len(r.skipped) else ""
            reasons = "; ".join(dict.fromkeys(r.skipped))
            detail = r.detail or ", ".join(filter(None, (tests, reasons and f"{len(r.skipped)} skipped: {reasons}")))
            rows.append((r.name, r.result, f"{r.seconds:.1f}", detail[:140]))
        widths = [max(map(len, column)) for column in zip(*rows)]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)


def end(process: subprocess.Popen) -> None:
    """Interrupt the process if it still runs, then kill everything that it started."""
    for sign in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            if sign == signal.SIGKILL or process.poll() is None:
                os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


def judge(section: Section, code: int, lines: list[str], report: Path | None) -> Result:
    result = Result(section.name, "passed" if code == 0 else "failed")
    if code < 0:
        result.detail = f"killed by {signal.Signals(-code).name}"
    if section.pytest:
        if report is None:
            result.result = "failed"
            fatal = next((line for line in lines if line.startswith("Fatal Python error")), last(lines))
            result.detail = f"{result.detail}: {fatal}".removeprefix(": ")
        else:
            count(result, report)
    elif code:
        result.detail = result.detail or first_error(lines)
    if result.result not in GOOD:
        result.end_of_log = lines[-60:]
    return result


def count(result: Result, report: Path) -> None:
    """Read pytest's own report: what ran, what was skipped and why, what failed first, what was measured."""
    failures = []
    for case in ET.parse(report).iter("testcase"):
        result.tests += 1
        result.measured |= {f"{case.get('name')} {p.get('name')}": p.get("value") for p in case.iter("property")}
        for child in case:
            if child.tag == "skipped":
                result.skipped.append(child.get("message") or "")
            elif child.tag in ("failure", "error"):
                failures.append(f"{case.get('name')}: {first_line(child.get('message'), child.text)}")
    if failures:
        result.result, result.detail = "failed", f"{len(failures)} of {result.tests}: {failures[0]}"
    elif not result.tests:
        result.result, result.detail = "failed", "no test ran"
    elif result.result == "passed" and result.tests == len(result.skipped):
        result.result, result.detail = "skipped", "; ".join(dict.fromkeys(result.skipped))


def first_line(message: str | None, text: str | None) -> str:
    """What failed; the report of a file that can't be imported says so only in its text."""
    errors = [line[1:].strip() for line in (text or "").splitlines() if line.startswith("E ")]
    if message and message != "collection failure" or not errors:
        return (message or "").partition("\n")[0]
    return errors[-1]


def last(lines: list[str]) -> str:
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


def first_error(lines: list[str]) -> str:
    """The line that tells most: the first report of a sanitizer or a compiler, or the last line, as of an exception."""
    for line in lines:
        report = line.removeprefix("========= ")
        if report != line and report.strip() and report != "COMPUTE-SANITIZER" or re.search(r"(^|\W)error: ", line):
            return report.strip()
    return last(lines)
