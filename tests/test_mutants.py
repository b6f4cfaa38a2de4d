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
# Of every op one kind of kernel, the kinds in turn.
QUICK = [
    pytest.param(mutant, id=f"{op}-{kind}-{mutant.name}")
    for (op, kind), mutants in TABLE.items()
    for mutant in [mutant for mutant in mutants if mutant.fast][:MINIMUM]
    if (list(SPECS).index(op) + list(KINDS).index(kind)) % len(KINDS) == 0
]


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
        for rung in mutant.seen:
            tests = "".join((ROOT / file).read_text() for file in rung.tests.split())
            assert all(name in tests for name in re.findall(r"test_\w+", rung.select)), f"{mutant.name}: {rung.select}"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    workshop = Workshop(tmp_path_factory.mktemp("mutants"), mutants=[mutant for p in QUICK for mutant in p.values])
    yield workshop
    workshop.close()


@pytest.mark.short  # `make mutants` plants all
@pytest.mark.parametrize("mutant", QUICK)
def test_a_planted_error_is_seen(workshop, mutant):
    assert (reason := workshop.survives(mutant)) is None, reason


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A project of one line, a test that holds and one that doesn't."""
    root = tmp_path_factory.mktemp("toy")
    for folder in FOLDERS:
        (root / folder).mkdir()
    for file in FILES:
        (root / file).touch()
    (root / "kernels/one.py").write_text("one = 1  # the number\n")
    tests = "from kernels.one import one\n\ndef test_right():\n    assert one == 1\n\ndef test_wrong():\n    assert one == 3\n"
    (root / "tests/test_one.py").write_text(tests)
    mutants = [Mutant("toy", "toy", {Rung("tests/test_one.py", name): ""}, ()) for name in ("right", "wrong")]
    workshop = Workshop(tmp_path_factory.mktemp("mutants of the toy"), root, mutants)
    yield workshop
    workshop.close()


@pytest.mark.parametrize(
    "old, new, select, error, verdict",
    [
        ("one = 1", "one = 2", "right", "assert 2 == 1", None),
        ("number", "figure", "right", "assert", "passes with the error"),
        ("number", "figure", "wrong", "assert", "fails without the error: .*assert 1 == 3"),
        ("one = 1", "one = (", "right", "assert", "fails, but not with 'assert': .*SyntaxError"),
        ("one = 1", "one = 2", "nothing", "assert", "fails without the error: .*deselected"),
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
