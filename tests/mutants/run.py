"""Plants errors in copies of the sources and requires that the checks see them: ``python -m tests.mutants.run [name ...]``.

A rung must pass on the sources as they are, and fail on the edited ones with the message that the error deserves: a kernel
that no longer compiles proves nothing.
"""

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from . import ROOT, Mutant, Rung, extension, plant, table

FOLDERS, FILES = ("csrc", "fastadapt", "kernels", "tests"), ("pyproject.toml", "setup.py")


def _environment(**more: str) -> dict:
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH", "PYTEST_ADDOPTS")}
    return kept | more


class Nursery:
    """nursery.py, which runs pytest in forks of itself, one at a time."""

    def __init__(self, interpret: bool):
        # Triton decides at import whether it interprets. Many runs of an edited module would write the same bytecode.
        env = _environment(PYTHONDONTWRITEBYTECODE="1", TRITON_INTERPRET=str(int(interpret)))
        command = [sys.executable, Path(__file__).with_name("nursery.py")]
        self.process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, tree: Path, arguments: list, environment: dict) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of pytest in ``tree``."""
        stdout, stderr = tree.with_name("stdout"), tree.with_name("stderr")
        request = [str(tree), arguments, environment, str(stdout), str(stderr)]
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline())
        return code, stdout.read_text(errors="replace"), stderr.read_text(errors="replace")

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class Workshop:
    """Copies of the sources in a temporary folder, and what rungs say about them. Threads may share one.

    Of ``mutants``, rungs that differ in the selected tests alone run together on the sources as they are.
    """

    def __init__(self, folder: Path, root: Path = ROOT, mutants: Iterable[Mutant] = ()):
        self.folder = Path(folder)
        self.objects = self.folder / "objects"
        self.objects.mkdir()
        self._green, self._locks, self._together = {}, {}, {}
        self._idle = {True: [], False: []}  # nurseries by whether they interpret
        for rung in dict.fromkeys(rung for mutant in mutants for rung in mutant.seen):
            self._together.setdefault(replace(rung, select=""), []).append(f"({rung.select})")
        self.tree = self.folder / "clean"
        for source in FOLDERS:
            ignored = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(root / source, self.tree / source, symlinks=True, ignore=ignored)
        for source in FILES:
            shutil.copy(root / source, self.tree)
        if not (self.tree / "fastadapt/kernels").exists():
            (self.tree / "fastadapt/kernels").symlink_to("../kernels")  # where an installed package has them
        # Much of what a run costs is Python's and pytest's compilation of all modules: the copies of this tree bring it along.
        # A module that is edited then is newer than what was made of it.
        tests = {file for together in self._together for file in together.tests.split()}
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-pno:cacheprovider", *sorted(tests)]
        subprocess.run(command, cwd=self.tree, env=_environment(), capture_output=True)

    def run(self, rung: Rung, edits: tuple = ()) -> tuple[bool, str]:
        """Whether every selected test passes after the edits, and the messages of those that don't."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            tree = shutil.copytree(self.tree, Path(folder) / "edited", symlinks=True)
            plant((*rung.edits, *edits), tree)
            return self._run(rung, tree)

    def _run(self, rung: Rung, tree: Path) -> tuple[bool, str]:
        plugins = ["no:cacheprovider", *rung.plugins]
        if "tests.mutants.extension_plugin" in plugins:
            try:
                extension.build(tree, self.objects, f"{rung.tests} {rung.select}")
            except subprocess.CalledProcessError as error:
                return False, f"the extension can't be built: {error}"
        options = ["-x", "-o", "addopts=", *(f"-p{plugin}" for plugin in plugins), "--tb=short"]
        idle = self._idle[rung.interpret]
        try:
            nursery = idle.pop()
        except IndexError:
            nursery = Nursery(rung.interpret)
        code, stdout, stderr = nursery.run(
            tree, [*options, *rung.tests.split(), "-k", rung.select], {"FASTADAPT_MUTANTS_OBJECTS": str(self.objects)}
        )
        idle.append(nursery)
        summary = stdout.strip().rpartition("\n")[2]
        green = code == 0 and " passed" in summary and "skipped" not in summary
        lines = [line for line in stdout.splitlines() if re.match(r"E  |INTERNALERROR|ERROR", line)]
        lines += [line for line in stderr.splitlines() if re.match(r"Fatal|E  |.*Error", line)]
        return green, "\n".join([*lines, summary or stderr[-500:]])

    def close(self):
        for nursery in (*self._idle[True], *self._idle[False]):
            nursery.close()

    def green(self, rung: Rung) -> str | None:
        """None if the rung passes on the sources as they are, else what it says."""
        alike = replace(rung, select="")
        together = replace(rung, select=" or ".join(self._together.get(alike, [rung.select])))
        with self._locks.setdefault(alike, threading.Lock()):
            for tried in (together, rung):  # alone where another one fails
                green, text = self._green.get(tried) or self._green.setdefault(tried, self.run(tried))
                if green:
                    return None
        return text

    def survives(self, mutant: Mutant) -> str | None:
        """None if every rung of the mutant sees it for the right reason, else what happened."""
        for rung, error in mutant.seen.items():
            where = f"{rung.tests} -k {rung.select!r}"
            if (text := self.green(rung)) is not None:
                return f"{where} fails without the error: {text}"
            green, text = self.run(rung, mutant.edits)
            if green:
                return f"{where} passes with the error"
            if not re.search(error, text):
                return f"{where} fails, but not with {error!r}: {text}"
        return None


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="words: mutants whose '<op>_<kind> <name>' contains one; all if none is given")
    parser.add_argument("--fast", action="store_true", help="only those that every run of the tests plants")
    parser.add_argument("--jobs", type=int, default=2, help="how many are planted at once")
    options = parser.parse_args()
    chosen = {f"{op}_{kind} {mutant.name}": mutant for (op, kind), mutants in table().items() for mutant in mutants}
    chosen = {
        name: mutant
        for name, mutant in chosen.items()
        if (mutant.fast or not options.fast) and (not options.names or any(word in name for word in options.names))
    }
    outcomes = {"seen": [], "skipped": [], "SURVIVES": []}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        workshop = Workshop(folder, mutants=chosen.values())

        def verdict(mutant):
            start = time.time()
            if reason := mutant.missing():
                return "skipped", reason, 0.0
            try:
                reason = workshop.survives(mutant)
            except ValueError as error:  # the sources have moved on
                reason = str(error)
            return "seen" if reason is None else "SURVIVES", reason, time.time() - start

        for name, (outcome, reason, seconds) in zip(chosen, pool.map(verdict, chosen.values())):
            print(f"{outcome:9}{seconds:6.1f} s  {name}", flush=True)
            outcomes[outcome].append(name)
            if reason:
                print(reason)
        workshop.close()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seen, skipped, survivors = outcomes.values()
    seconds = used.ru_utime + used.ru_stime
    print(f"{len(seen)} of {len(chosen)} errors seen in {seconds:.0f} s of processors, {len(skipped)} skipped")
    print("".join(f"  not seen: {name}\n" for name in survivors), end="")
    sys.exit(1 if survivors or not seen else 0)


if __name__ == "__main__":
    main()
