"""The benchmark runner on one tiny shape: the record it writes, and that it refuses to report untested kernels."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import report, run
from benchmarks.contestants import backends, disagreement

from .specs.bottleneck import SPEC, bench

TINY = ["bottleneck", "--compile", "none", "--seconds", "0.01", "--device", "cpu", "--threads", str(torch.get_num_threads())]


@pytest.fixture(autouse=True)
def one_shape(monkeypatch):
    monkeypatch.setattr(run, "SPECS", {"bottleneck": replace(SPEC, bench=(bench(4, 16, 2),))})


def test_the_record_is_complete(tmp_path, capsys):
    out = tmp_path / "new" / "out.json"
    assert run.main([*TINY, "--no-check", "--out", str(out), "--dtype", "float32", "bfloat16"]) == 0
    assert "the tests of bottleneck were not run" in capsys.readouterr().out
    sections = json.loads(out.read_text())
    assert list(sections) == ["bottleneck float32 wall", "bottleneck bfloat16 wall"]
    kernels = set(backends(SPEC, bench(4, 16, 2).make(torch.float32, "cpu"), torch.device("cpu")))
    for section in sections.values():
        assert section["checked"] is False and section["complete"] and section["notes"] == []
        assert section["software"]["torch"] == torch.__version__ and section["threads"] == torch.get_num_threads()
        assert [row["direction"] for row in section["rows"]] == ["forward", "forward+backward"]
        for row in section["rows"]:
            assert {"eager", *kernels} <= set(row["times"])
            assert all(0 < t["low"] <= t["us"] <= t["high"] for t in row["times"].values()) and row["floor_us"] > 0
        output = 4 * 16 * (4 if section["dtype"] == "float32" else 2)
        assert all(peak >= output for peak in section["rows"][0]["peak_bytes"].values())


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


def test_an_op_without_tests_is_red():
    assert not run.battery("no-such-op")


def test_unknown_op_is_named(capsys):
    with pytest.raises(SystemExit):
        run.main(["lora"])
    assert "op must be one of bottleneck, got lora" in capsys.readouterr().err


def test_a_wrong_contestant_is_seen():
    y = torch.randn(8, 8)
    assert disagreement({"y": y.clone()}, {"y": y}) is None
    assert "output differs" in disagreement({"y": 1.01 * y}, {"y": y})
    assert "output differs" in disagreement({"y": y * float("nan")}, {"y": y})


def test_summary():
    times = [{"eager": 4.0, "compiled": 1.0, "native": 2.0}, {"eager": 8.0, "compiled": 4.0, "native": 1.0}]
    rows = [
        {"case": name, "floor_us": 1.0, "times": {who: {"us": us} for who, us in row.items()}} for name, row in zip("01", times)
    ]
    assert report.summarize(rows) == {
        "native": {
            "geometric_mean_over": {"eager": 4.0, "compiled": 1.414}, "geometric_mean_of_floor": 0.707, "rows": 2,
            "below": {"0": 0.5},
        }
    }  # fmt: skip
