"""lora_merge: one rounding, any strides, blocks of rows."""

import itertools

import pytest
import torch

from fastadapt import lora_merge

from .accuracy import assert_within_reference_error
from .battery import DEVICE
from .layouts import LAYOUTS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def drawn(dtype, n, k, r, parameters=None):
    randn = lambda *s, gain=1.0: (gain * torch.randn(*s, device=DEVICE)).to(parameters or dtype)  # noqa: E731
    weight = (torch.randn(n, k, device=DEVICE) * k**-0.5).to(dtype)
    return weight, {
        "lora_a": randn(r, k, gain=k**-0.5), "lora_b": randn(n, r, gain=r**-0.5), "magnitude": 1 + randn(n, gain=0.2),
        "diagonal": randn(r), "scale": randn(1, gain=0.5)[0],
    }  # fmt: skip


def formula(weight, lora_a, lora_b, scale=1.0, magnitude=None, diagonal=None):
    total = weight + scale * (lora_b if diagonal is None else lora_b * diagonal) @ lora_a
    return total if magnitude is None else magnitude[:, None] * total / total.norm(dim=1, keepdim=True)


def exact(weight, arguments):
    return formula(weight.double(), **{name: t.double() for name, t in arguments.items()})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("names", [(), ("scale", "diagonal"), ("magnitude",), ("scale", "diagonal", "magnitude")])
@pytest.mark.parametrize("n, k, r", [(33, 40, 5), (50, 1, 1), (0, 8, 2), (401, 1500, 16)])  # the last one in three blocks
def test_merge(n, k, r, names, dtype):
    weight, arguments = drawn(dtype, n, k, r)
    arguments = {name: t for name, t in arguments.items() if name in ("lora_a", "lora_b", *names)}
    merged, oracle = lora_merge(weight, **arguments), exact(weight, arguments)
    assert_within_reference_error(merged, formula(weight, **arguments), oracle, "merged")
    if dtype != torch.float32 and n:  # rounded once: all that differs are ties that float32 has moved
        assert (merged == oracle.to(dtype)).float().mean() > 0.999


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout):
    weight, arguments = drawn(torch.float32, 33, 40, 5)
    strided = LAYOUTS[layout](weight)
    before = strided.clone()
    merged = lora_merge(strided, **{name: LAYOUTS[layout](t) if t.dim() == 2 else t for name, t in arguments.items()})
    arguments = {name: LAYOUTS[layout](t) if t.dim() == 2 else t for name, t in arguments.items()}
    torch.testing.assert_close(merged, exact(strided, arguments).float())
    assert torch.equal(strided, before) and (layout != "transposed" or merged.stride() == strided.stride())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_parameters_and_autocast(dtype):
    weight, arguments = drawn(dtype, 33, 40, 5, parameters=torch.float32)
    merged = lora_merge(weight, **arguments)
    assert (merged == exact(weight, arguments).to(dtype)).float().mean() > 0.999
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(lora_merge(weight, **arguments), merged)


@pytest.mark.skipif(DEVICE != "cpu", reason="counts what the CPU allocates")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_copy_in_float32(dtype):
    weight, arguments = drawn(dtype, 2048, 2048, 8)
    with torch.profiler.profile(profile_memory=True) as profile:
        merged = lora_merge(weight, **arguments)
    changes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert merged.nbytes <= max(itertools.accumulate(changes)) <= merged.nbytes + 4 * 2**20


def test_bad_arguments():
    weight, good = drawn(torch.float32, 9, 6, 3)
    for change, error, message in (
        ({"weight": weight.long()}, TypeError, "weight must be float16.* got torch.int64"),
        ({"weight": weight[0]}, ValueError, r"weight must be \(n, k\), got \(6,\)"),
        ({"lora_a": good["lora_a"][:, 1:]}, ValueError, r"lora_a must be \(r, k\) = \(3, 6\), got \(3, 5\)"),
        ({"lora_b": good["lora_b"].T}, ValueError, r"lora_b must be \(n, r\) = \(9, 3\), got \(3, 9\)"),
        ({"lora_b": good["lora_b"].double()}, TypeError, "lora_b must be torch.float32 like weight, got torch.float64"),
        ({"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
        ({"magnitude": good["diagonal"]}, ValueError, r"magnitude must be \(n,\) = \(9,\), got \(3,\)"),
        ({"diagonal": good["magnitude"]}, ValueError, r"diagonal must be \(r,\) = \(3,\), got \(9,\)"),
        ({"magnitude": good["magnitude"].to("meta")}, ValueError, "magnitude must be on .* like weight, got meta"),
    ):
        with pytest.raises(error, match=message):
            lora_merge(**{"weight": weight, **good, **change})
