"""The harness of a GPU run: sections that fail, hang, crash or prove nothing spoil neither the table nor the record."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .gpu import harness
from .gpu.harness import Run, Section

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def little_grace(monkeypatch):
    monkeypatch.setattr(harness, "GRACE", 2)


def script(name, code, seconds=30, **options):
    return Section(name, lambda results: [sys.executable, "-c", code], seconds, **options)


def pytests(name, folder, code):
    file = folder / f"test_{name}.py"
    file.write_text("import pytest\n" + code)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", folder, file]
    return Section(name, lambda results: list(map(str, command)), 30, pytest=True)


def run(folder, groups, seconds=60):
    well = Run(folder / "out", seconds).groups(groups)
    record = json.loads((folder / "out" / "gpu.json").read_text())
    return well, {s["name"]: s for s in record["sections"]}


def test_the_table_and_the_record_survive(tmp_path, capsys):
    child = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    well, found = run(tmp_path, [
        [script("machine", "print('{\"gpu\": \"none\"}')")],
        [
            script("compiler", "print('a.cu(3): error: no such thing'); print('ninja: stopped'); exit(1)"),
            script("crash", "import os; os.abort()"),
            script("hang", "import time; print('begun', flush=True); time.sleep(60)", seconds=1),
            script("deaf", "import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(60)", seconds=1),
            script("orphan", child),
            script("sanitizer", "print('========= COMPUTE-SANITIZER\\n========= Invalid read\\n=====  at f'); exit(9)"),
            script("absent", "", refusal="the tool isn't installed"),
            Section("no-program", lambda results: ["no-such-program"], 5),
            Section("no-command", lambda results: results["missing"], 5),
        ],
        [
            pytests("mixed", tmp_path, "def test_a(): assert 1 == 2, 'what\\nelse'\ndef test_b(): pass"),
            pytests("unmet", tmp_path, "def test_a(): pytest.skip('one device')"),
            pytests("partly", tmp_path, "def test_a(record_property): record_property('b', 7)\ndef test_c(): pytest.skip('1')"),
            pytests("nothing", tmp_path, ""),
            pytests("segfault", tmp_path, "def test_a():\n    import ctypes; ctypes.string_at(0)"),
            pytests("broken", tmp_path, "import no_such_module"),
            pytests("exits", tmp_path, "import os; os._exit(0)"),
        ],
    ])  # fmt: skip
    assert not well
    assert {name: (s["result"], s["detail"]) for name, s in found.items()} == {
        "machine": ("passed", ""),
        "compiler": ("failed", "a.cu(3): error: no such thing"),
        "crash": ("failed", "killed by SIGABRT"),
        "hang": ("stopped", "stopped after 1 s; killed by SIGINT"),
        "deaf": ("stopped", "stopped after 1 s; killed by SIGKILL"),
        "orphan": ("passed", ""),
        "sanitizer": ("failed", "Invalid read"),
        "absent": ("not run", "the tool isn't installed"),
        "no-program": ("failed", "harness: FileNotFoundError: [Errno 2] No such file or directory: 'no-such-program'"),
        "no-command": ("failed", "harness: KeyError: 'missing'"),
        "mixed": ("failed", "1 of 2: test_a: AssertionError: what"),
        "unmet": ("skipped", "one device"),
        "partly": ("passed", ""),
        "nothing": ("failed", "no test ran"),
        "segfault": ("failed", "killed by SIGSEGV: Fatal Python error: Segmentation fault"),
        "broken": ("failed", found["broken"]["detail"]),
        "exits": ("failed", "no output"),
    }
    assert "No module named 'no_such_module'" in found["broken"]["detail"]
    assert found["partly"]["measured"] == {"test_a b": "7"} and found["partly"]["skipped"] == ["1"]
    assert found["hang"]["end_of_log"][0] == "begun"
    table = capsys.readouterr().out.splitlines()[-len(found) - 1 :]
    assert [line.split()[0] for line in table] == ["section", *found]
    assert "begun" in (tmp_path / "out" / "gpu.log").read_text()


def test_time_is_shared_and_the_first_group_is_needed(tmp_path):
    _, found = run(tmp_path, [[script("machine", "import time; time.sleep(2); print('{}')")], [script("late", "")]], seconds=8)
    assert found["late"]["result"] == "not run" and found["late"]["detail"] == "no time left"
    well, found = run(tmp_path, [[script("machine", "exit('no device')")], [script("battery", "")]])
    assert not well and found["machine"]["detail"] == "no device"
    assert (found["battery"]["result"], found["battery"]["detail"]) == ("not run", "machine didn't pass")


def test_a_signal_leaves_the_table(tmp_path):
    code = (
        "import signal, sys; from pathlib import Path; from tests.gpu.harness import Run, Section\n"
        "signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        "sleep = lambda results: [sys.executable, '-c', 'import time; time.sleep(60)']\n"
        f"Run(Path({str(tmp_path)!r}), 90).groups([[Section('a', sleep, 60)], [Section('b', sleep, 60)]])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    found = {s["name"]: s for s in json.loads((tmp_path / "gpu.json").read_text())["sections"]}
    assert found["a"]["result"] == "stopped" and found["b"]["result"] == "not run"
    assert "interrupted" in output.splitlines()[-1]


@pytest.mark.parametrize("device", ["cuda", "stand-in"])
def test_every_section_has_a_program(device, tmp_path):
    """What the table names exists: test functions, modules, files."""
    from .gpu import test_configurations, test_device
    from .gpu.__main__ import CHECKS, sections

    functions = [name for name in (*vars(test_device), *vars(test_configurations)) if name.startswith("test_")]
    chosen = {check: [name for name in functions if f"test_{check}" in name] for check in CHECKS}
    assert all(chosen.values()) and sorted(sum(chosen.values(), [])) == sorted(functions), chosen
    for section in (s for group in sections(tmp_path, device) for s in group):
        if section.name != "build":
            words = section.command({})
            assert all((ROOT / word.split("::")[0]).exists() for word in words if word.startswith("tests/")), words
            modules = [b for a, b in zip(words, words[1:]) if a == "-m" and "." in b]
            assert all((ROOT / f"{name.replace('.', '/')}.py").exists() for name in modules), words
        assert device == "cuda" or section.refusal or section.name in ("machine", *CHECKS)


@pytest.mark.slow
def test_the_stand_in_runs_from_end_to_end(tmp_path):
    """Sections with a meaning on the CPU pass; the others say why they do not run, and so does the exit code."""
    names = ["battery-native", "backends", "streams", "large", "memcheck"]
    command = [sys.executable, "-m", "tests.gpu", str(tmp_path), "--device", "stand-in", "--only", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert {s["name"]: (s["result"], s["detail"]) for s in record["sections"]} == {
        "machine": ("passed", ""),
        "battery-native": ("not run", "needs a CUDA device"),
        "backends": ("passed", ""),
        "streams": ("skipped", "a CPU has no streams"),
        "large": ("passed", ""),
        "memcheck": ("not run", "needs a CUDA device"),
    }
    assert record["machine"]["torch"] and "streams" in done.stdout.splitlines()[-3]
