"""What a model is made of, where its structure shows that, and an error where it doesn't."""

import pytest
import torch
from torch import nn

from fastadapt.nn import attach
from fastadapt.nn.structure import layers

D = 16


def feed_forward():
    return nn.Sequential(nn.Linear(D, 24), nn.ReLU(), nn.Linear(24, D))


class Lists(nn.Module):
    """All attentions in one list, all feed-forward blocks in another, as in XLM."""

    def __init__(self, count=2):
        super().__init__()
        self.attentions = nn.ModuleList(nn.MultiheadAttention(D, 2) for _ in range(count))
        self.blocks = nn.ModuleList(feed_forward() for _ in range(count))


class Layer(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2)
        for name, module in parts.items():
            self.add_module(name, module)


class Stacked(nn.Module):
    """Experts in one parameter beside one that all tokens share."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, D, D))
        self.shared = feed_forward()


def experts():
    return nn.ModuleDict({str(i): feed_forward() for i in range(2)})


UNCLEAR = {
    "lists": (Lists(), ""),
    "stacked-experts": (Layer(mixture=Stacked()), ""),
    "experts-beside-attention": (Layer(router=nn.Linear(D, 2), experts=experts()), ""),
    "partly": (nn.Sequential(Layer(block=feed_forward()), Layer(mixture=Stacked())), "1"),
}


@pytest.mark.parametrize("model, name", UNCLEAR.values(), ids=UNCLEAR)
def test_what_is_not_clear_is_refused(model, name):
    kind, before = type(model).__name__, list(model.state_dict())
    for method in ("bottleneck", "houlsby", "parallel"):
        with pytest.raises(ValueError, match=f"targets must be given for {kind}, in whose '{name}' no feed-forward block is"):
            attach(model, method)
    assert list(model.state_dict()) == before
    attentions = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    assert attach(model, "lora") == attentions


def test_attention_without_a_layer_is_refused():
    model = nn.Sequential(Layer(block=feed_forward()), Layer())
    for method in ("houlsby", "lora"):
        with pytest.raises(ValueError, match="for Sequential, whose '1.attention' is in no layer with a feed-forward block"):
            attach(model, method)


def test_what_is_clear():
    mixture = nn.ModuleDict({"router": nn.Linear(D, 2), "experts": experts(), "shared": feed_forward()})
    (mixed,), (one,) = layers(Layer(mixture=mixture)), layers(Lists(1))
    assert mixed.feed_forward == ("mixture", "mixture") and mixed.attentions[0].output == "attention"
    assert one.feed_forward == ("blocks.0.0", "blocks.0.2") and one.attentions[0].output == "attentions.0"
