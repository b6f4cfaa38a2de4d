"""Which models of Hugging Face take prefixes, of what size, and what they are given back."""

import pytest

from .prefix_models import P, gpt2

from fastadapt.integrations.transformers import add_prefix  # isort: skip


@pytest.mark.parametrize("options", [{"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True}], ids=str)
def test_scales_that_only_the_model_knows(options):
    model = gpt2(attn_implementation="eager", **options)[0]
    with pytest.raises(ValueError, match="no scales in its attention that PyTorch's doesn't know, got GPT2LMHeadModel"):
        add_prefix(model, P)
    assert model.config._attn_implementation == "eager" and not hasattr(model, "prefix_encoder")
