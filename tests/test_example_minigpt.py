"""The small GPT of the examples on made-up sentences: what is trained, what it puts out, and the whole run."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("tqdm")
from examples import fetch, minigpt  # noqa: E402
from fastadapt.nn import load_adapters  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
D, H, LAYERS, CONTEXT, R = 32, 2, 2, 24, 8


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    for domain, word in zip(fetch.DOMAINS, ("film", "lol", "phone", "city")):
        lines = [f"{i}\t{i % 3 - 1}\tA {word} &amp; {'more ' * (i % 4)}of it, number {i}.\n" for i in range(120)]
        (tmp_path / f"{domain}.tsv").write_text("".join(lines), encoding="utf-8")
    monkeypatch.setattr(fetch, "sentences", lambda: tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return minigpt.MiniGPT(D, H, LAYERS, CONTEXT)


def test_text_is_all_sentences(corpus):
    train, test = minigpt.read(corpus, ("tweets",))
    lines = [bytes(part.tolist()).decode().splitlines() for part in (train, test)]
    assert sum(map(len, lines)) == 120 and len(lines[1]) >= 5 and not set(lines[0]) & set(lines[1])
    assert "A lol & more of it, number 1." in {*lines[0], *lines[1]}
    both, _ = minigpt.read(corpus, ("nyt", "movie"))
    assert b"city" in bytes(both.tolist()) and b"film" in bytes(both.tolist())
    ids, following = minigpt.windows(train, torch.tensor([0, 5]), 4)
    assert torch.equal(ids[1], train[5:9]) and torch.equal(following[1], train[6:10])


def test_no_byte_sees_those_after_it(model):
    ids = torch.randint(minigpt.BYTES, (2, CONTEXT))
    changed = ids.clone()
    changed[:, 10:] = 7
    torch.testing.assert_close(model(ids)[:, :10], model(changed)[:, :10])
    assert not torch.equal(model(ids)[:, 10:], model(changed)[:, 10:])


PER_LAYER = {
    "bottleneck": 2 * D * R + R + D,
    "houlsby": 2 * (2 * D * R + R + 3 * D),
    "parallel": 2 * D * R + R + D,
    "lora": 2 * 2 * D * R,
    "dora": 2 * (2 * D * R + D),
    "prefix": 2 * R * D,
    "mam": 2 * D * R + R + D + 2 * R * D,
    "compacter": 2 * (2 * (D + R) + R + D),
}


@pytest.mark.parametrize("method", minigpt.METHODS)
def test_methods_start_where_the_model_is_and_train_what_they_say(model, method):
    changed = minigpt.adapted(model, method, R)
    trained = {name: p for name, p in changed.named_parameters() if p.requires_grad}
    count = sum(p.numel() for p in trained.values())
    if method in PER_LAYER:
        assert count == LAYERS * PER_LAYER[method] + (64 if method == "compacter" else 0)
    elif method == "prompt":
        assert count == R * D
    elif method == "bitfit":
        assert all(p.dim() == 1 for p in trained.values()) and len(trained) == LAYERS * (4 + 2 + 2) + 1 + 1
    elif method == "full":
        assert count == sum(p.numel() for p in model.parameters())
    ids = torch.randint(minigpt.BYTES, (2, CONTEXT))
    if method not in ("houlsby", "prefix", "mam", "prompt"):
        torch.testing.assert_close(changed(ids), model(ids))
    frozen = {name: p.clone() for name, p in changed.named_parameters() if not p.requires_grad}
    text = torch.randint(minigpt.BYTES, (200,))
    before = {name: p.clone() for name, p in trained.items()}
    seconds = minigpt.train(changed, text, 1e-2, 4, 0, iter([0.0, 0.3, 0.6]))
    assert len(seconds) == 3 and all(torch.equal(p, changed.get_parameter(name)) for name, p in frozen.items())
    assert not [name for name, p in trained.items() if torch.equal(p, before[name])]


def test_training_learns_a_text_and_goes_on_with_it():
    torch.manual_seed(0)
    model, line = minigpt.MiniGPT(D, H, 1, CONTEXT), b"All is well that ends well.\n"
    text = torch.tensor(list(line * 20))
    start = minigpt.evaluate(model, text, 8)
    minigpt.train(model, text, 1e-2, 8, 0, (i / 80 for i in range(80)))
    assert minigpt.evaluate(model, text, 8) < 0.3 < 5 < start
    assert model.generate("All is", 100, seed=1) == line.decode().strip()


def test_the_whole_run(corpus, capsys):
    options = ["--quick", "--rank", "4", "--device", "cpu", "--threads", str(torch.get_num_threads())]
    assert minigpt.main([*options, "--domain", "amazon", "--save", str(corpus / "out")]) == 0
    file = next((corpus / "out").iterdir())
    assert minigpt.main([*options, "--save", str(file)]) == 1  # before it learns anything
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    rows = {line[0]: line for line in lines if len(line) == 6 and line[3] == "%"}
    assert list(rows) == ["none", *minigpt.METHODS] and "loss on amazon" in printed
    assert all(0 < float(row[4]) < 7 for row in rows.values()) and rows["none"][5] == "-"
    samples = [line for line in printed.split("('none') and after:\n")[1].splitlines() if line.split()[0] in rows]
    assert [line.split()[1] for line in samples] == ["I"] * len(rows)
    files = {path.stem for path in (corpus / "out").iterdir()}
    assert files == set(minigpt.METHODS) - {"full", "bitfit"}
    fresh = minigpt.adapted(minigpt.MiniGPT(D, H, LAYERS, 32), "lora", 4)
    assert len(load_adapters(fresh, corpus / "out" / "lora.safetensors")) == LAYERS * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "ia3"], "'ia3'"), (["--domain", "nyt"], "'nyt'"), (["--steps", "0"], "must be at least 1, got 0"),
        (["--rank", "6"], "--rank must be a multiple of 4, got 6"), (["--opening", ""], "--opening must have at least one"),
    ],
)  # fmt: skip
def test_bad_options(options, message, capsys):
    with pytest.raises(SystemExit):
        minigpt.main(options)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_runs_as_a_script():
    command = [sys.executable, str(ROOT / "examples" / "minigpt.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and all(name in done.stdout for name in minigpt.METHODS), done.stderr


def test_offline_says_what_is_missing(monkeypatch, capsys):
    def fail():
        raise fetch.FetchError("The demo needs the sentiment corpus")

    monkeypatch.setattr(fetch, "sentences", fail)
    assert minigpt.main(["--quick"]) == 1 and "sentiment corpus" in capsys.readouterr().err


def test_an_opening_may_be_longer_than_the_context(model):
    opening = "x" * 2 * CONTEXT
    assert model.generate(opening, 3, seed=0).startswith(opening)
