"""Which models of Hugging Face take prefixes, of what size, and what they are given back."""

import re

import pytest
import torch

from .battery import DEVICE
from .prefix_models import SIZES, VOCABULARY, P, T, gpt2, hf

from fastadapt.integrations.transformers import add_prefix, attention_layers, remove_prefix  # isort: skip


@pytest.mark.parametrize("options", [{"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True}], ids=str)
def test_scales_that_only_the_model_knows(options):
    model = gpt2(attn_implementation="eager", **options)[0]
    with pytest.raises(ValueError, match="no scales in its attention that PyTorch's doesn't know, got GPT2LMHeadModel"):
        add_prefix(model, P)
    assert model.config._attn_implementation == "eager" and not hasattr(model, "prefix_encoder")


VISION = {"hidden_size": 48, "num_attention_heads": 3, "num_hidden_layers": 2, "image_size": 8, "patch_size": 4}


def clip():
    config = hf.CLIPConfig(text_config=SIZES, vision_config=VISION, projection_dim=16)
    return hf.CLIPModel(config), {"vision_model": (3, 3, 16), "text_model": (4, 4, 8)}


def llava():
    parts = {"vision_config": hf.CLIPVisionConfig(**VISION), "text_config": hf.LlamaConfig(**SIZES, num_key_value_heads=2)}
    config = hf.LlavaConfig(**parts, image_token_index=VOCABULARY - 1, vision_feature_layer=-1)
    return hf.LlavaForConditionalGeneration(config), {"vision_tower": (3, 3, 16), "language_model": (4, 2, 8)}


def bart():
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 2}
    config = hf.BartConfig(d_model=32, encoder_layers=1, decoder_layers=1, vocab_size=VOCABULARY, **heads)
    return hf.BartForConditionalGeneration(config), {"decoder": (2, 2, 16), "encoder": (4, 4, 8)}


@pytest.mark.parametrize("make", [clip, llava, bart])
@torch.no_grad()
def test_heads_that_differ(make):
    """The prefixes of an encoder have the size of the layers that they are for, which are one part of such a model."""
    model, sizes = make()
    model, found = model.to(DEVICE).eval(), sorted(sizes.values())
    with pytest.raises(ValueError, match=re.escape(f"heads of one number and size, got 2 kinds (h, h_kv, e): {found}")):
        add_prefix(model, P)
    assert not hasattr(model, "prefix_encoder")
    ids = torch.randint(3, VOCABULARY - 3, (2, T), device=DEVICE)
    ids[:, :4] = VOCABULARY - 1
    given = {"input_ids": ids} if make is bart else {"input_ids": ids, "pixel_values": torch.randn(2, 3, 8, 8, device=DEVICE)}
    before = model(**given)[0]
    for part, (_, h_kv, e) in sizes.items():
        (owner,) = (m for name, m in model.named_modules() if name.split(".")[-1] == part)
        encoder = add_prefix(model, P, layers=attention_layers(owner))
        assert {tuple(prefix.key.shape) for prefix in encoder()} == {(h_kv, P, e)}
        encoder.prefix.normal_()
        assert not torch.allclose(model(**given)[0], before)
        remove_prefix(model)
        assert torch.equal(model(**given)[0], before)


@torch.no_grad()
def test_prefixes_of_images_leave_the_tokens_where_they_are():
    model = clip()[0].to(DEVICE).eval()
    ids, pixels = torch.randint(3, VOCABULARY, (2, T), device=DEVICE), torch.randn(2, 3, 8, 8, device=DEVICE)
    given = {"input_ids": ids, "pixel_values": pixels}
    before = model(**given)
    add_prefix(model, P, layers=attention_layers(model.vision_model)).prefix.normal_()
    after = model(**given)
    torch.testing.assert_close(after.text_embeds, before.text_embeds)
    assert not torch.allclose(after.image_embeds, before.image_embeds)
    remove_prefix(model)
    add_prefix(model, P, layers=attention_layers(model.text_model))
    assert not torch.allclose(model(**given).text_embeds, before.text_embeds)


def test_each_part_gets_its_attention_back():
    model, _ = llava()
    parts = {"vision_config": "eager", "text_config": "sdpa"}
    model.set_attn_implementation(parts)
    add_prefix(model, P, layers=attention_layers(model.model.language_model))
    assert {getattr(model.config, name)._attn_implementation for name in parts} == {"fastadapt"}
    remove_prefix(model)
    assert {name: getattr(model.config, name)._attn_implementation for name in parts} == parts
