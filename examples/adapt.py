"""The encoder with a classification head, and the fine-tuning methods that the demo compares."""

import copy
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fastadapt

from . import plain


class Method(NamedTuple):
    title: str
    lr: float
    attach: Callable[..., None] | None = None  # (BERT layer, adapter modules, rank, and what all layers share by name)
    rank: str = "rank"  # the option that sets it
    random: bool = False  # two runs draw different masks
    shared: Callable[[], dict] = dict  # makes what all layers of a model share
    around: Callable[..., nn.Module] | None = None  # (encoder, adapter modules, length) -> what runs it
    trains: Callable[[nn.Module], object] | None = None  # chooses among the encoder's own parameters, of which a run has a copy

    alone: bool = False  # there is one run: no kernel takes part


# The encoder's own activation. It is smooth: where ReLU's kink lies between two roundings, two runs soon drift apart.
ACTIVATION = "gelu"


def _after(layer: nn.Module, modules, r: int, **options) -> nn.Sequential:
    return nn.Sequential(layer, modules.BottleneckAdapter(layer.out_features, r, activation=ACTIVATION, **options))


def _after_ffn(layer: nn.Module, modules, r: int, **options) -> None:
    layer.output.dense = _after(layer.output.dense, modules, r, **options)


def _after_both(layer: nn.Module, modules, r: int) -> None:
    layer.attention.output.dense = _after(layer.attention.output.dense, modules, r)
    _after_ffn(layer, modules, r)


def _skip(layer: nn.Module, modules, r: int) -> None:
    _after_ffn(layer, modules, r, skip="channel")


def _beside_ffn(layer: nn.Module, modules, r: int) -> None:
    """BERT splits its FFN over two submodules; joined in the first, they have one input and one output."""
    ffn = nn.Sequential(layer.intermediate, layer.output.dense)
    d = layer.output.dense.out_features
    adapter = modules.BottleneckAdapter(d, r, activation=ACTIVATION, scale=4.0, residual=False)
    layer.intermediate, layer.output.dense = modules.ParallelAdapter(ffn, adapter), nn.Identity()


# Terms in the sums of Kronecker products; the rank that is set must be a multiple of it.
TERMS = 4


def _rule() -> dict[str, nn.Parameter]:
    """The left factors of all Kronecker products of a model."""
    return {"shared_rule": nn.Parameter(torch.randn(TERMS, TERMS, TERMS) / TERMS)}


def _phm_after_ffn(layer: nn.Module, modules, r: int, **shared) -> None:
    linear = layer.output.dense
    layer.output.dense = nn.Sequential(linear, modules.CompacterAdapter(linear.out_features, r, n=TERMS, **shared))


def _phm_after_both(layer: nn.Module, modules, r: int, **shared) -> None:
    _phm_after_ffn(layer.attention, modules, r, **shared)  # its linear layer is found under the same names
    _phm_after_ffn(layer, modules, r, **shared)


QUERIES_AND_VALUES = ("attention.self.query", "attention.self.value")


def _lora(layer: nn.Module, modules, r: int, on=QUERIES_AND_VALUES, **options) -> None:
    """``on`` names the linear layers; None takes them all."""
    for name in on or [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]:
        parent, _, last = name.rpartition(".")
        owner = layer.get_submodule(parent)
        setattr(owner, last, modules.LoRALinear(getattr(owner, last), r, **options).train())


def _method_of_lora(title: str, lr: float, random: bool = False, **options) -> Method:
    return Method(title, lr, partial(_lora, **options), "lora_rank", random)


HIDDEN = 64  # of the MLP that prefixes come from


class PrefixedAttention(nn.Module):
    """BERT's self-attention with a prefix in front of its keys and values; sentences are padded on the right."""

    def __init__(self, of_bert: nn.Module):
        super().__init__()
        self.query, self.key, self.value, self.h = of_bert.query, of_bert.key, of_bert.value, of_bert.num_attention_heads
        self.prefix = self.lengths = self.backend = None

    def forward(self, hidden: Tensor, *args, **kwargs) -> tuple[Tensor, None]:
        heads = (linear(hidden).unflatten(-1, (self.h, -1)).transpose(1, 2) for linear in (self.query, self.key, self.value))
        options = {"key_lengths": self.lengths, "backend": self.backend}
        y = fastadapt.prefix_attention(*heads, self.prefix.key, self.prefix.value, **options)
        return y.transpose(1, 2).flatten(2), None


class Prefixed(nn.Module):
    """An encoder with a prefix for each layer: one module puts them out, once for all layers and sentences."""

    def __init__(self, encoder: nn.Module, prefixes: nn.Module):
        super().__init__()
        self.encoder, self.prefixes = encoder, prefixes
        for layer in encoder.encoder.layer:
            layer.attention.self = PrefixedAttention(layer.attention.self)

    def forward(self, input_ids: Tensor, attention_mask: Tensor):
        lengths = attention_mask.sum(1)
        for layer, prefix in zip(self.encoder.encoder.layer, self.prefixes()):
            layer.attention.self.prefix, layer.attention.self.lengths = prefix, lengths
        positions = torch.arange(self.prefixes.p, self.prefixes.p + input_ids.shape[1], device=input_ids.device)
        seen = torch.ones_like(attention_mask)  # all that the encoder knows of; the layers know the lengths
        return self.encoder(input_ids=input_ids, attention_mask=seen, position_ids=positions[None])


def _prefixes(encoder: nn.Module, modules, p: int, **options) -> nn.Module:
    if modules is plain:
        return plain.prefix_tuning(encoder, p, options.get("hidden"))
    h, layers = encoder.config.num_attention_heads, encoder.config.num_hidden_layers
    return Prefixed(encoder, modules.PrefixEncoder(h, p, encoder.config.hidden_size // h, layers, **options))


class Prompted(nn.Module):
    """An encoder whose embedded sentences have a learned prompt in front."""

    def __init__(self, encoder: nn.Module, prompt: nn.Module, inputs: Callable[..., dict[str, Tensor]]):
        super().__init__()
        self.encoder, self.prompt, self.inputs = encoder, prompt, inputs

    def forward(self, input_ids: Tensor, attention_mask: Tensor):
        embedded = self.prompt(self.encoder.get_input_embeddings()(input_ids))
        return self.encoder(inputs_embeds=embedded, **self.inputs(self.prompt.p, attention_mask=attention_mask))


def _prompt(encoder: nn.Module, modules, p: int) -> nn.Module:
    if modules is plain:
        return plain.prompt_tuning(encoder, p)
    return Prompted(encoder, modules.PromptEmbedding.from_vocabulary(encoder.get_input_embeddings(), p), modules.prompt_inputs)


def _p_tuning(encoder: nn.Module, modules, p: int) -> nn.Module:
    if modules is plain:
        return plain.p_tuning(encoder, p)
    return Prompted(encoder, modules.PromptEncoder(p, encoder.config.hidden_size), modules.prompt_inputs)


def _mam(encoder: nn.Module, modules, p: int) -> nn.Module:
    """Prefixes, and beside each FFN a bottleneck three times as wide as they are long."""
    for layer in encoder.encoder.layer:
        _beside_ffn(layer, modules, 3 * p)
    return _prefixes(encoder, modules, p, hidden=HIDDEN)


def _ladder(encoder: nn.Module, modules, r: int) -> nn.Module:
    return fastadapt.nn.LadderSideNetwork(encoder, encoder.config.hidden_size)


METHODS = {
    "full": Method("full fine-tuning", 1e-4, trains=lambda encoder: encoder.requires_grad_(True), alone=True),
    "head": Method("head only", 2e-2, alone=True),
    "bitfit": Method(
        "BitFit: the encoder's own biases (Ben Zaken et al. 2022)", 3e-3, trains=fastadapt.nn.train_biases, alone=True
    ),
    "standard": Method("standard: a bottleneck after the FFN (Pfeiffer et al. 2021)", 2e-3, _after_ffn),
    "houlsby": Method("a bottleneck after attention and after the FFN (Houlsby et al. 2019)", 1e-3, _after_both),
    "skip": Method("standard with a learned skip connection, skip_weight * x", 2e-3, _skip),
    "parallel": Method("a bottleneck beside the FFN, scale 4 (He et al. 2022)", 5e-4, _beside_ffn),
    "compacter": Method(
        "as houlsby, of Kronecker products (Karimi Mahabadi et al. 2021)", 6e-3, _phm_after_both, shared=_rule
    ),
    "compact++": Method("Compacter++: the same after the FFN alone", 1e-2, _phm_after_ffn, shared=_rule),
    "lora": _method_of_lora("LoRA on queries and values (Hu et al. 2021)", 3e-3),
    "lora-drop": _method_of_lora("LoRA on queries and values, dropout 0.1", 3e-3, random=True, dropout=0.1),
    "dora": _method_of_lora("DoRA on queries and values (Liu et al. 2024)", 3e-3, dora=True),
    "lora-all": _method_of_lora("LoRA on all linear layers", 1e-3, on=None),
    "prefix": Method(
        "prefix tuning: keys and values of every layer from an MLP (Li and Liang 2021)", 5e-3, None, "prefix_length",
        around=partial(_prefixes, hidden=HIDDEN),
    ),
    "ptuning-2": Method(
        "P-tuning v2: the same as parameters (Liu et al. 2022)", 3e-2, None, "prefix_length",
        around=partial(_prefixes, init_std=0.3),
    ),
    "mam": Method("mix and match: prefixes and parallel (He et al. 2022)", 1e-3, None, "prefix_length", around=_mam),
    "prompt": Method("prompt tuning: a prompt of vectors (Lester et al. 2021)", 1e-1, None, "prefix_length", around=_prompt),
    "ptuning": Method("P-tuning: a prompt from an MLP (Liu et al. 2021)", 5e-3, None, "prefix_length", around=_p_tuning),
    "ladder": Method("a side network an eighth as wide (LST, Sung et al. 2022)", 3e-3, around=_ladder, alone=True),
}  # fmt: skip


# What runs without --all: one method or two of each kind.
USUAL = ["head", "bitfit", "standard", "parallel", "compact++", "lora", "prefix", "mam", "ladder"]
OF_KRONECKER_PRODUCTS = [name for name, method in METHODS.items() if method.shared is _rule]
# The methods that peft has and accelerate makes faster.
OF_PEFT = [name for name, method in METHODS.items() if method.rank == "lora_rank"] + ["prefix", "ptuning-2"]


def mean_over_sentence(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    hidden = hidden[:, hidden.shape[1] - attention_mask.shape[1] :]  # a prompt's own are left out
    weight = attention_mask[..., None].to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1)


class Classifier(nn.Module):
    """``head(mean over the sentence of encoder(tokens))``."""

    def __init__(self, encoder: nn.Module, labels: int = 2):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, labels)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.head(mean_over_sentence(hidden, attention_mask))


def load(folder: Path):
    """The pretrained encoder and its tokenizer, from files alone."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
    from transformers import AutoTokenizer, BertModel, logging

    logging.set_verbosity_error()  # the checkpoint's pooler is left out on purpose
    encoder = BertModel.from_pretrained(folder, add_pooling_layer=False, local_files_only=True)
    return encoder, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def build(encoder: nn.Module, method: str, modules=plain, *, r: int = 48, seed: int = 0) -> Classifier:
    """A classifier on a copy of ``encoder`` with the adapters of ``method``; what stays frozen is shared, not copied.

    The encoder's dropout is off, so that two runs on the same batches differ by rounding alone, or by the masks of LoRA's.
    """
    trains = METHODS[method].trains
    shared = {} if trains else {id(p): p for p in encoder.requires_grad_(False).parameters()}
    encoder = copy.deepcopy(encoder, shared)
    if trains:
        trains(encoder)
    torch.manual_seed(seed)
    model = Classifier(encoder).eval()
    if attach := METHODS[method].attach:
        shared = METHODS[method].shared()
        for layer in encoder.encoder.layer:
            attach(layer, modules, r, **shared)
    if around := METHODS[method].around:
        model.encoder = around(encoder, modules, r)
    return model


def pair(encoder: nn.Module, method: str, modules, *, r: int = 48, seed: int = 0) -> dict[str, Classifier]:
    """The classifier with ``modules`` and with those of ``plain`` of the same weights; one where there is no adapter."""
    ours = build(encoder, method, modules, r=r, seed=seed)
    if METHODS[method].alone:
        return {"plain": ours}
    theirs = build(encoder, method, plain, r=r, seed=seed)
    if METHODS[method].around:
        plain.load_prompt(theirs.encoder, ours.encoder)
    else:
        theirs.load_state_dict(plain.translated(ours.state_dict()))
    return {"fastadapt": ours, "plain": theirs}


def lora_of_peft(encoder: nn.Module, r: int, **options) -> nn.Module:
    """The model of ``peft`` with one of the LoRA methods in ``encoder``."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    on, dora, dropout = options.get("on", QUERIES_AND_VALUES), options.get("dora", False), options.get("dropout", 0.0)
    targets = "all-linear" if on is None else list(on)
    config = LoraConfig(r=r, lora_alpha=16, lora_dropout=dropout, use_dora=dora, target_modules=targets)
    model = get_peft_model(encoder, config)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.train()  # for its dropout
    return model


def pair_of_peft(encoder: nn.Module, method: str, accelerate: Callable, *, r: int, seed: int = 0) -> dict[str, Classifier]:
    """The classifier on a model of ``peft``, and a copy of it after ``accelerate``."""
    theirs, around = build(encoder, "head", seed=seed), METHODS[method].around
    if around is None:
        theirs.encoder = lora_of_peft(theirs.encoder, r, **METHODS[method].attach.keywords)
    else:
        theirs.encoder = around(theirs.encoder, plain, r)
    ours = copy.deepcopy(theirs, {id(p): p for p in theirs.parameters() if not p.requires_grad})
    accelerate(ours)
    return {"fastadapt": ours, "plain": theirs}


def set_backend(model: nn.Module, backend: str | None) -> None:
    """Have every adapter of ours in ``model`` run on ``backend``."""
    for module in model.modules():
        if isinstance(module, PrefixedAttention) or (hasattr(module, "backend") and _ours(module)):
            module.backend = backend


def _ours(module: nn.Module) -> bool:
    return type(module).__module__.startswith("fastadapt.nn.")


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def count(model: nn.Module) -> tuple[int, int]:
    """The number of trainable parameters, and of all."""
    return sum(p.numel() for p in trainable(model)), sum(p.numel() for p in model.parameters())
