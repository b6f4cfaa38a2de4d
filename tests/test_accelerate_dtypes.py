"""What the report says of adapters of ``peft`` in layers of another dtype is so."""

import copy

import pytest
import torch

import fastadapt

from .battery import DEVICE
from .modules import spied

peft = pytest.importorskip("peft", reason="the library peft is not installed (pip install fastadapt[peers])")

from fastadapt.integrations import peft_lora, peft_lycoris  # noqa: E402

from . import test_accelerate, test_accelerate_lycoris  # noqa: E402
from .test_accelerate import N, inputs, target  # noqa: E402

WHOLE, HALF, BRAIN, DOUBLE = torch.float32, torch.float16, torch.bfloat16, torch.float64


@pytest.mark.parametrize(
    "dtype, own, state",
    [
        (WHOLE, BRAIN, "in part"), (WHOLE, HALF, "in part"), (BRAIN, HALF, "left"), (HALF, BRAIN, "left"),
        (WHOLE, DOUBLE, "left"), (BRAIN, WHOLE, "accelerated"), (HALF, HALF, "accelerated"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_the_report_tells(monkeypatch, kind, dtype, own, state):
    build = test_accelerate.build("linear", {}) if kind == "lora" else test_accelerate_lycoris.build(kind, {})
    library = build.to(dtype)
    for p in library.parameters():
        if p.requires_grad:
            p.data = p.data.to(own)
    fast = copy.deepcopy(library)
    fast.more = test_accelerate.build("linear", {})
    row = fastadapt.accelerate(fast).rows[0]
    words = f"adapter 'adapter0': {own} in a layer of {dtype}{', outside autocast' if state == 'in part' else ''}"
    assert row == ("base_model.model.target", state, "" if state == "accelerated" else words)
    calls = spied(monkeypatch, peft_lora, "lora_linear"), spied(monkeypatch, peft_lycoris, "kron_linear", "lora_linear")
    seen, x = [], inputs("linear", dtype, draws=1)[0]
    for cast in (None, HALF, BRAIN):
        results = []
        for model in (fast, library):
            with torch.autocast(DEVICE, cast or BRAIN, enabled=cast is not None), torch.no_grad():
                results.append(target(model)(x))
        if any(calls):
            seen.append(cast)
            eps = torch.finfo(cast or dtype).eps
            torch.testing.assert_close(*results, rtol=4 * eps, atol=4 * eps * results[1].abs().max().item())
        else:
            assert torch.equal(*results) and results[0].shape[-1] == N
        for each in calls:
            each.clear()
    if state == "accelerated":
        assert None in seen
    else:
        assert seen == [own] * (state == "in part")
