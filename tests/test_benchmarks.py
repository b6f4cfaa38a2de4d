"""The benchmark runner on one tiny shape: the record it writes, and that it refuses to report untested kernels."""

import json
import re
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from benchmarks import drop, fusion, report, run, tasks
from benchmarks.agreement import Judge, disagreement
from benchmarks.contestants import Contestant, backends, differentiated, enter, quiet
from benchmarks.memory import saved_extra
from benchmarks.peers import lora_by_hand
from benchmarks.timing import GraphTimer

from .specs import SPECS, bottleneck, compacter, kron_linear, lora_linear, prefix_attention

CPU = torch.device("cpu")
OPTIONS = ["--compile", "none", "--seconds", "0.01", "--device", "cpu", "--threads", str(torch.get_num_threads())]
TINY = ["bottleneck", *OPTIONS]
PLAIN, RANDOM = bottleneck.bench(4, 16, 2), lora_linear.bench(64, 64, 64, 8, 0.1)


@pytest.fixture(autouse=True)
def one_shape(monkeypatch):
    specs = {"bottleneck": replace(bottleneck.SPEC, bench=(PLAIN,)), "lora_linear": replace(lora_linear.SPEC, bench=(RANDOM,))}
    monkeypatch.setattr(run, "SPECS", specs)


def test_the_record_is_complete(tmp_path, capsys):
    out = tmp_path / "new" / "out.json"
    assert run.main([*TINY, "--no-check", "--out", str(out), "--dtype", "float32", "bfloat16"]) == 0
    assert "the tests of bottleneck were not run" in capsys.readouterr().out
    sections = json.loads(out.read_text())
    assert list(sections) == ["bottleneck float32 wall", "bottleneck bfloat16 wall"]
    kernels = set(backends(bottleneck.SPEC, PLAIN.make(torch.float32, "cpu"), CPU))
    for section in sections.values():
        assert section["checked"] is False and section["complete"] and section["notes"] == []
        assert section["software"]["torch"] == torch.__version__ and section["threads"] == torch.get_num_threads()
        assert [row["direction"] for row in section["rows"]] == ["forward", "forward+backward"]
        for row in section["rows"]:
            assert {"eager", *kernels} <= set(row["times"])
            assert all(0 < t["low"] <= t["us"] <= t["high"] for t in row["times"].values()) and row["floor_us"] > 0
        output = 4 * 16 * (4 if section["dtype"] == "float32" else 2)
        assert all(peak >= output for peak in section["rows"][0]["peak_bytes"].values())


def test_what_is_measured_survives_a_kernel_that_fails(tmp_path, capsys, monkeypatch):
    measure = run.Bench.measure

    def fails_in_backward(bench, case, direction):
        if direction != "forward":
            raise RuntimeError("an illegal memory access")
        measure(bench, case, direction)

    monkeypatch.setattr(run.Bench, "measure", fails_in_backward)
    out = tmp_path / "out.json"
    assert run.main([*TINY, "--no-check", "--out", str(out), "--dtype", "float32", "bfloat16"]) == 1
    assert "bottleneck: RuntimeError('an illegal memory access') after 1 of 2 rows" in capsys.readouterr().err
    (section,) = json.loads(out.read_text()).values()
    assert not section["complete"] and [row["direction"] for row in section["rows"]] == ["forward"]


def test_a_random_call_with_frozen_arguments(tmp_path, capsys):
    """The library's layer agrees in expectation, the frozen layer alone is timed, and what autograd saves is counted."""
    pytest.importorskip("peft")
    out = tmp_path / "out.json"
    assert run.main(["lora_linear", *OPTIONS, "--no-check", "--out", str(out), "--by", "p"]) == 0
    printed = capsys.readouterr().out
    (section,) = json.loads(out.read_text()).values()
    assert "% over frozen layer" in printed and printed.count("p0.1 alone:") == len(section["summary"])
    forward, step = section["rows"]
    assert section["notes"] == [] and all({"eager", "peft"} < row["times"].keys() for row in (forward, step))
    assert list(forward["parts"]) == list(step["parts"]) == ["frozen layer"]
    # The mask, the input after dropout, and what is between the adapter's two layers; x itself is held anyhow.
    assert step["saved_bytes"]["eager"] == 4 * (2 * 64 * 64 + 64 * 8)
    assert step["saved_bytes"]["native"] <= 4 * 64 * 8 + 8


# A tiny case of an op, and the library among its peers.
PEERS = {
    "compacter": (compacter.bench(6, 64, reduction=8), "adapters"),
    "kron_linear": (kron_linear.bench(6, (2, 4), (16, 8), 3), "peft"),
}


@pytest.mark.parametrize("op", PEERS)
def test_modules_of_libraries_agree(tmp_path, monkeypatch, op):
    """Output and every gradient: those that don't are left out with a note."""
    case, library = PEERS[op]
    pytest.importorskip(library)
    monkeypatch.setattr(run, "SPECS", {op: replace(SPECS[op], bench=(case,))})
    out = tmp_path / "out.json"
    assert run.main([op, *OPTIONS, "--no-check", "--out", str(out), "--dtype", "float32", "bfloat16"]) == 0
    for section in json.loads(out.read_text()).values():
        assert section["notes"] == [] and len(section["rows"]) == 2
        assert all({"eager", library} <= row["times"].keys() for row in section["rows"])


@pytest.mark.parametrize(("p", "peers"), [(4, {"causal_lower_right"}), (0, {"causal_lower_right", "SDPA"})])
def test_attention_over_concatenated_keys_agrees(tmp_path, monkeypatch, p, peers):
    """With grouped queries; FlexAttention enters compiled or not at all."""
    case = prefix_attention.bench(2, 4, 16, 16, p, h_kv=2)
    monkeypatch.setattr(run, "SPECS", {"prefix_attention": replace(SPECS["prefix_attention"], bench=(case,))})
    out = tmp_path / "out.json"
    assert run.main(["prefix_attention", *OPTIONS, "--no-check", "--out", str(out)]) == 0
    (section,) = json.loads(out.read_text()).values()
    assert section["notes"] == [] and all({"eager", *peers} == row["times"].keys() - {"native"} for row in section["rows"])
    entered = enter("prefix_attention", SPECS["prefix_attention"], case.make(torch.float32, "cpu"), CPU, ["default"])
    assert "compiled FlexAttention" in entered and "FlexAttention" not in entered


def test_sections_of_other_runs_are_kept(tmp_path):
    out = tmp_path / "out.json"
    report.write_json(out, {"a": {"op": "µ", "rows": []}, "b": {"rows": [{"case": "1"}]}})
    report.write_json(out, {"b": {"rows": [{"case": "2"}, {"case": "3"}]}})
    assert json.loads(out.read_text()) == {"a": {"op": "µ", "rows": []}, "b": {"rows": [{"case": "2"}, {"case": "3"}]}}


def test_red_tests_are_not_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "battery", lambda op: False)
    assert run.main([*TINY, "--out", str(tmp_path / "out.json")]) == 1
    captured = capsys.readouterr()
    assert "red" in captured.err and "floor" not in captured.out and not (tmp_path / "out.json").exists()


@pytest.mark.slow
def test_an_op_without_tests_is_red():
    assert not run.battery("no-such-op")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["lora"], "op must be one of bottleneck, lora_linear, got lora"), (["--threads", "0"], "must be above 0, got 0"),
        (["--seconds", "0"], "must be above 0, got 0"), (["--device", "meta"], "--device must be cpu, or cuda"),
    ],
)  # fmt: skip
def test_bad_options(options, message, capsys):
    with pytest.raises(SystemExit):
        run.main(options)
    assert message in capsys.readouterr().err


def test_a_selection_of_nothing_says_so(capsys):
    assert run.main(["bottleneck", "--shapes", "m5", "--no-check"]) == 1
    assert "bottleneck has no case with the parts m5; one is m" in capsys.readouterr().err


def test_a_wrong_contestant_is_seen():
    y = torch.randn(8, 8)
    assert disagreement({"y": y.clone()}, {"y": y}) is None
    assert "output differs" in disagreement({"y": 1.01 * y}, {"y": y})
    assert "output differs" in disagreement({"y": y * float("nan")}, {"y": y})


def without_rescaling(x, weight, bias, lora_a, lora_b, *, scale, dropout_p):
    u = F.linear(torch.where(torch.rand_like(x) < dropout_p, 0.0, x), lora_a)
    return F.linear(x, weight, bias) + scale * F.linear(u, lora_b)


@pytest.mark.parametrize(
    ("planted", "edit", "message"),
    [
        (lora_by_hand, {}, None),
        (lora_by_hand, {"dropout_p": 0.0}, "output varies by 0.000"),
        (lora_by_hand, {"dropout_p": 0.25}, "output varies by"),
        (lora_by_hand, {"scale": 0.55}, r"gradient of lora_a is 1\.[01].. of that without randomness in the mean, and"),
        (without_rescaling, {}, r"gradient of lora_[ab] is 0\.[89].. of that without"),
    ],
)  # fmt: skip
def test_a_wrong_random_contestant_is_seen(planted, edit, message):
    arguments = lora_linear.bench(256, 256, 256, 8, 0.1).make(torch.float32, "cpu")
    tensors = differentiated(lora_linear.SPEC, arguments)
    assert set(tensors) == {"x", "lora_a", "lora_b"}
    for tensor in tensors.values():
        tensor.requires_grad_()
    grad_y = torch.randn(256, 256)
    judge = Judge(quiet("lora_linear", lora_linear.SPEC, arguments))
    assert judge.fault(Contestant(lambda: lora_by_hand(**arguments), tensors), grad_y) is None
    fault = judge.fault(Contestant(lambda: planted(**{**arguments, **edit}), tensors), grad_y)
    assert fault is None if message is None else re.match(message, fault), fault


@pytest.mark.slow
def test_several_tasks(monkeypatch, capsys):
    for name, value in {"LAYERS": 2, "D": 24, "B": 4, "T": 8, "RANKS": (4,)}.items():
        monkeypatch.setattr(tasks, name, value)
    tasks.main(["--seconds", "0", "--threads", str(torch.get_num_threads())])
    assert len(re.findall(r"\d x$", capsys.readouterr().out, re.MULTILINE)) == 3


@pytest.mark.slow
def test_fused_adapters(monkeypatch, capsys):
    pytest.importorskip("adapters", reason="the library adapters is not installed (pip install fastadapt[peers])")
    for name, value in {"WIDTHS": (32,), "ADAPTERS": (2, 3), "B": 2, "T": 20}.items():
        monkeypatch.setattr(fusion, name, value)
    fusion.main(["--seconds", "0", "--threads", str(torch.get_num_threads())])
    assert len(re.findall(r"\d x +\d\.\d\d x$", capsys.readouterr().out, re.MULTILINE)) == 2


@pytest.mark.slow
def test_dropped_adapters(monkeypatch, capsys):
    for name, value in {"LAYERS": 2, "D": 24}.items():
        monkeypatch.setattr(tasks, name, value)
    drop.main(["--seconds", "0", "--threads", str(torch.get_num_threads())])
    assert len(re.findall(r"-?\d %$|-?\d%$", capsys.readouterr().out, re.MULTILINE)) == len(drop.METHODS)


def test_a_call_that_waits_for_the_device_is_refused_before_a_capture(monkeypatch):
    cuda, modes = mock.MagicMock(), ["default"]
    cuda.set_sync_debug_mode = modes.append
    monkeypatch.setattr(torch, "cuda", cuda)
    timer = object.__new__(GraphTimer)

    def waits():
        if modes[-1] == "error":  # as torch does
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError, match="synchronizing"):
        timer.prepare(waits)
    assert modes[-1] == "default" and not cuda.graph.called
    timer.prepare(lambda: None)()
    assert modes[-1] == "default" and cuda.graph.called and cuda.CUDAGraph().replay.called


def test_saved_memory_counts_each_once_and_not_what_is_held():
    x, weight = torch.randn(8, 16), torch.randn(16, 32, requires_grad=True)

    def call():
        hidden = (x @ weight).exp()  # saves its output
        return hidden * hidden.view(32, 8).T.contiguous()  # saves both factors, one of them a copy

    assert saved_extra(call, [x, weight]) == 2 * 8 * 32 * 4


def test_backward_is_what_a_step_takes_beyond_forward():
    def row(case, direction, floor, **times):
        times = {who: {"us": us} for who, us in times.items()}
        return {"case": case, "direction": direction, "floor_us": floor, "times": times, "parts": {}}

    rows = [row("a", "forward", 1.0, eager=3.0, native=2.0, flex=2.0), row("a", "forward+backward", 3.0, eager=9.0, native=4.5)]
    noisy = [row("b", "forward", 1.0, eager=3.0, native=2.0), row("b", "forward+backward", 3.0, eager=9.0, native=1.5)]
    found = report.by_direction([*rows, *noisy])
    assert found == {
        "forward": [rows[0], noisy[0]], "forward+backward": [rows[1], noisy[1]],
        "backward": [row("a", "backward", 2.0, eager=6.0, native=2.5)],
    }  # fmt: skip
    assert report.by_direction(rows[:1]) == {"forward": rows[:1]}


def test_summary():
    times = [{"eager": 4.0, "compiled": 1.0, "native": 2.0}, {"eager": 8.0, "compiled": 4.0, "native": 1.0}]
    rows = [
        {
            "case": f"m{number}-r8", "floor_us": 1.0, "times": {who: {"us": us} for who, us in row.items()},
            "parts": {"layer": {"us": 0.8}}, "peak_bytes": {"eager": 300, "compiled": 200, "native": 100},
        } for number, row in enumerate(times)
    ]  # fmt: skip
    assert report.summarize(rows) == {
        "native": {
            "geometric_mean_over": {"eager": 4.0, "compiled": 1.414}, "lowest_over": {"eager": 2.0, "compiled": 0.5},
            "over_fastest": {"geometric_mean": 1.414, "lowest": 0.5},
            "share_of_memory": {"eager": 0.333, "compiled": 0.5},
            "over_parts": {"layer": {"geometric_mean": 0.768, "highest": 1.5, "case": "m0-r8"}},
            "geometric_mean_of_floor": 0.707, "rows": 2, "below": {"m0-r8": 0.5},
        }
    }  # fmt: skip
    assert report.groups(rows, "m") == {"m0": rows[:1], "m1": rows[1:]} and list(report.groups(rows, "p")) == ["others"]
