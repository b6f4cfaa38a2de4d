"""Accelerated prefixes in calls of two threads on one model that overlap in the worst way, against calls one by one."""

import threading

import pytest
import torch

import fastadapt

from .prefix_models import P, batch, bert, llama

peft = pytest.importorskip("peft", reason="the library peft is not installed (pip install fastadapt[peers])")
adapters = pytest.importorskip("adapters", reason="the library adapters is not installed (pip install fastadapt[peers])")


def of_peft(config, **options):
    model = peft.get_peft_model(llama()[0], config(task_type="CAUSAL_LM", **options))
    for name, p in model.named_parameters():
        if "gate" in name:
            p.data.fill_(1.0)
    return model


def of_adapters(make):
    model = make(attn_implementation="eager")[0]
    adapters.init(model)
    model.add_adapter("prefix", config=adapters.PrefixTuningConfig(flat=True, prefix_length=P), set_active=True)
    return model


CASES = {
    "prefix": lambda: of_peft(peft.PrefixTuningConfig, num_virtual_tokens=P),
    "adaption-prompt": lambda: of_peft(peft.AdaptionPromptConfig, adapter_len=P, adapter_layers=2),
    "adaption-prompt-of-one": lambda: of_peft(peft.AdaptionPromptConfig, adapter_len=P, adapter_layers=1),
    "adapters-bert": lambda: of_adapters(bert),
    "adapters-llama": lambda: of_adapters(llama),
}


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
@torch.no_grad()
def test_calls_may_overlap(make, at):
    """The first call waits in the layer ``at`` for the second, which waits in layer 0, if it gets there, until it is over."""
    torch.manual_seed(0)
    model = make().eval()
    for name, p in model.named_parameters():
        if "prefix" in name or "prompt" in name:
            p.normal_()
    fastadapt.accelerate(model)
    both = [{k: v for k, v in batch(model, side).items() if k != "labels"} for side in (None, "right")]
    expected = [model(**inputs).logits for inputs in both]
    projections = [m for name, m in model.named_modules() if name.endswith((".q_proj", ".query"))]
    first, arrived, over, results = threading.current_thread(), threading.Event(), threading.Event(), []
    second = threading.Thread(target=lambda: results.append(torch.no_grad()(model)(**both[1]).logits))

    def hook(projection, args):
        if threading.current_thread() is not first and projection is projections[0]:
            arrived.set()
            over.wait(10)
        elif threading.current_thread() is first and projection is projections[at]:
            second.start()
            arrived.wait(0.3)

    for projection in {projections[0], projections[at]}:
        projection.register_forward_pre_hook(hook)
    results.append(model(**both[0]).logits)
    over.set()
    second.join()
    assert len(results) == 2
    for actual, wanted in zip(results, expected):
        torch.testing.assert_close(actual, wanted)
    assert not any("fastadapt_prefix" in vars(module) for module in model.modules())
    assert model.config._attn_implementation == ("eager" if make in list(CASES.values())[3:] else "sdpa")
