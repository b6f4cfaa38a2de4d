"""Prefixes in models that count their positions in ways of their own, and in calls with positional arguments."""

import inspect

import pytest
import torch

from .battery import DEVICE
from .prefix_models import SIZES, VOCABULARY, P, T, gpt2, hf, llama

from fastadapt.integrations.transformers import add_prefix, remove_prefix  # isort: skip

PADDED = 3


def opt():
    return hf.OPTForCausalLM(hf.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32))


def biogpt():
    return hf.BioGptForCausalLM(hf.BioGptConfig(**SIZES))


def large(model):
    """So that positions matter."""
    for p in model.parameters():
        p.data.mul_(3)
    return model.to(DEVICE).eval()


@pytest.fixture
def ids():
    return torch.randint(3, VOCABULARY, (2, T), device=DEVICE)


@pytest.mark.parametrize("make", [opt, biogpt])
@torch.no_grad()
def test_padding_has_no_positions(make, ids):
    """A sequence gets what it gets without its padding, whoever counts, and with a cache."""
    model, seen = large(make()), torch.ones_like(ids)
    add_prefix(model, P)
    seen[0, :PADDED] = 0
    alone = model(ids[:1, PADDED:]).logits[0]
    for positions in ({}, {"position_ids": (seen.cumsum(1) - 1).clamp(min=0)}):
        torch.testing.assert_close(model(ids, seen, **positions).logits[0, PADDED:], alone)
    past = model(ids[:, :-2], seen[:, :-2], use_cache=True).past_key_values
    torch.testing.assert_close(model(ids[:, -2:], seen, past_key_values=past).logits[0], alone[-2:])


@torch.no_grad()
def test_positional_arguments(ids):
    model, seen, positions = large(llama()[0]), torch.ones_like(ids), 2 * torch.arange(T, device=DEVICE)[None]
    add_prefix(model, P)
    expected = model(input_ids=ids, attention_mask=seen, position_ids=positions).logits
    assert not torch.allclose(expected, model(ids).logits)
    assert torch.equal(model(ids, seen, positions).logits, expected)
    model = large(gpt2()[0])
    add_prefix(model, P)
    expected, past = model(ids).logits[:, 3:], model(ids[:, :3], use_cache=True).past_key_values
    torch.testing.assert_close(model(ids[:, 3:], past).logits, expected)


@pytest.mark.parametrize("name", ["Qwen2VL", "Qwen2_5_VL"])
@torch.no_grad()
def test_positions_of_images_stay(name):
    """There are three of each, which the model counts itself."""
    text = {"num_key_value_heads": 2, "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
    if name == "Qwen2_5_VL":
        vision |= {"out_hidden_size": 32, "intermediate_size": 32, "fullatt_block_indexes": [0], "window_size": 16}
    image, start, end = (VOCABULARY - i for i in (1, 2, 3))
    tokens = {"image_token_id": image, "vision_start_token_id": start, "vision_end_token_id": end, "video_token_id": end - 1}
    config = getattr(hf, f"{name}Config")(text_config=SIZES | text, vision_config=vision, **tokens)
    model = large(getattr(hf, f"{name}ForConditionalGeneration")(config))
    ids = torch.tensor([[5, 6, start, *[image] * 4, end, 7, 8, 9]], device=DEVICE)
    inputs = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(16, 96, device=DEVICE),
        "image_grid_thw": torch.tensor([[1, 4, 4]], device=DEVICE),
    }  # fmt: skip
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        inputs["mm_token_type_ids"] = ids.eq(image).int()
    layers, results = [layer.self_attn for layer in model.model.language_model.layers], []
    with pytest.raises(ValueError, match=f"shift_positions must be False for {name}ForConditionalGeneration"):
        add_prefix(model, P, layers=layers, shift_positions=True)
    for shift in (False, None):
        torch.manual_seed(0)
        add_prefix(model, P, layers=layers, shift_positions=shift)
        results.append(model(**inputs).logits)
        remove_prefix(model)
    assert torch.equal(*results) and not torch.allclose(results[0], model(**inputs).logits)
