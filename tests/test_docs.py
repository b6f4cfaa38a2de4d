"""What the pages name exists: files, modules, make targets, test functions."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
FOLDERS = ("benchmarks", "csrc", "docs", "examples", "fastadapt", "kernels", "tests")
# What a GPU run writes.
RECORDS = set(re.findall(r'"(\w+\.json)"', "".join(p.read_text() for p in (ROOT / "tests/gpu").glob("*.py"))))
PATH = re.compile(rf"(?:{'|'.join(FOLDERS)})/[\w./*-]*[\w*/]|[\w-]+\.(?:py|cpp|cuh?|h|json|md|toml|sh)\b")


def code(page):
    """The pieces of a page between backticks and in blocks of code."""
    blocks = re.split(r"^```.*\n", page, flags=re.M)
    for block in blocks[1::2]:
        yield from block.splitlines()
    yield from re.findall(r"`([^`\n]+)`", "\n".join(blocks[::2]))


def missing(text):
    """What the page's code names and the project lacks. ``<op>`` and the like stand for any name."""
    found = []
    for piece in code(text):
        piece = re.sub(r"<\w+>", "*", piece.partition(" #")[0])
        found += [f"make {name}" for name in re.findall(r"\bmake ([a-z]+)", piece) if name not in TARGETS]
        for module in re.findall(r"-m ((?:benchmarks|tests|examples)[\w.]*)", piece):
            path = ROOT / module.replace(".", "/")
            if not (path.with_suffix(".py").exists() or (path / "__main__.py").exists()):
                found.append(f"python -m {module}")
        for name in set(PATH.findall(piece)) - RECORDS:
            if not list(ROOT.glob(name)) and ("/" in name or not list(ROOT.glob(f"[!.]*/**/{name}"))):
                found.append(name)
        for path, function in re.findall(r"(tests/[\w/]+\.py)::(\w+)", piece):
            if (ROOT / path).exists() and f"def {function}" not in (ROOT / path).read_text():
                found.append(f"{path}::{function}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_what_the_page_names_exists(page):
    assert not (lost := missing(page.read_text())), lost


def test_the_readme_runs():
    """Block by block, as a reader would, but for those in which the model is the reader's own."""
    pytest.importorskip("transformers")
    use, *others = re.split("^## ", (ROOT / "README.md").read_text(), flags=re.M)[1:]
    first, *rest = (re.findall(r"^```python\n(.*?)^```", section, re.M | re.S) for section in (use, *others))
    names = {}
    for block in (first[0], *(block for section in rest for block in section)):
        exec(block, names)
    assert names["y"].shape == (3, 12, 256) and names["tagged"].shape == (4, 12, 256)


def test_planted_names():
    text = "`make nothing`, `tests/no.py`, `tests/spec.py::test_no`, `kernels/<op>.py`, `x.cuh`\n```\npython -m tests.no\n```"
    assert sorted(missing(text)) == ["make nothing", "python -m tests.no", "tests/no.py", "tests/spec.py::test_no", "x.cuh"]
