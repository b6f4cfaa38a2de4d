"""The checks see planted errors: every kernel has some, every class of error is among them, and the quick ones run here."""

import re
import shutil

import pytest

from fastadapt._leaf import INTERPRET

from .mutants import BUGS, KINDS, MINIMUM, ROOT, Mutant, Rung, edited, table
from .mutants.run import FILES, FOLDERS, Workshop
from .specs import SPECS

pytestmark = [
    pytest.mark.skipif(INTERPRET, reason="rungs choose the interpreter themselves"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]
TABLE = table()
KERNELS = [(op, kind) for op in SPECS for kind, path in KINDS.items() if (ROOT / path.format(op)).exists()]
QUICK = [pytest.param(m, id=f"{op}-{kind}-{m.name}") for (op, kind), ms in TABLE.items() for m in ms if m.fast]


@pytest.mark.parametrize("op, kind", KERNELS)
def test_every_kernel_has_its_minimum(op, kind):
    assert sum(mutant.fast for mutant in TABLE.get((op, kind), ())) >= MINIMUM, f"tests/mutants/{op}_{kind}.py"


def test_every_class_of_error_is_planted():
    planted = {(mutant.bug, kind) for (_, kind), mutants in TABLE.items() for mutant in mutants}
    assert planted == {(bug, kind) for bug, kinds in BUGS.items() for kind in kinds}


@pytest.mark.parametrize("op, kind", TABLE)
def test_edits_fit_the_sources(op, kind):
    names = [mutant.name for mutant in TABLE[op, kind]]
    assert len(set(names)) == len(names)
    for mutant in TABLE[op, kind]:
        texts = {file: (ROOT / file).read_text() for file, _, _ in mutant.edits}
        for file, old, new in mutant.edits:
            texts[file] = edited(texts[file], old, new, f"{mutant.name}, {file}")
            assert old != new, mutant.name


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("mutants"))


@pytest.mark.parametrize("mutant", QUICK)
def test_a_planted_error_is_seen(workshop, mutant):
    assert (reason := workshop.survives(mutant)) is None, reason


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A project of one line and its test."""
    root = tmp_path_factory.mktemp("toy")
    for folder in FOLDERS:
        (root / folder).mkdir()
    for file in FILES:
        (root / file).touch()
    (root / "kernels/one.py").write_text("one = 1  # the number\n")
    (root / "tests/test_one.py").write_text("from kernels.one import one\n\ndef test_one():\n    assert one == 1\n")
    return Workshop(tmp_path_factory.mktemp("mutants of the toy"), root)


@pytest.mark.parametrize(
    "old, new, select, error, verdict",
    [
        ("one = 1", "one = 2", "test_one", "assert 2 == 1", None),
        ("number", "figure", "test_one", "assert", "passes with the error"),
        ("one = 1", "one = (", "test_one", "assert", "fails, but not with 'assert': .*SyntaxError"),
        ("one = 1", "one = 2", "test_two", "assert", "fails without the error: .*1 deselected"),
    ],
)
def test_only_the_right_failure_counts(toy, old, new, select, error, verdict):
    mutant = Mutant("toy", "toy", {Rung("tests/test_one.py", select): error}, (("kernels/one.py", old, new),))
    reason = toy.survives(mutant)
    assert reason is None if verdict is None else re.search(verdict, reason, re.DOTALL)


def test_an_edit_must_fit():
    for text in ("two", "one one"):
        with pytest.raises(ValueError, match="the text to replace must occur once"):
            edited(text, "one", "three", "a file")
