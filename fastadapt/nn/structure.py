"""What a transformer is made of: its layers, the attention and the feed-forward block in each, and how a user names them."""

import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from .freeze import _BESIDE_A_BASE, KINDS
from .lora import is_conv1d
from .lora_attention import LoRAMultiheadAttention
from .prefix_multihead import PrefixMultiheadAttention

Targets = str | type | Iterable[str | type]
_ADAPTERS = (*(kind for kinds in KINDS.values() for kind in kinds), PrefixMultiheadAttention)
# They don't call the linear layers in them.
_ATTENTION = (nn.MultiheadAttention, LoRAMultiheadAttention, PrefixMultiheadAttention)
_LISTS = (nn.ModuleList, nn.ModuleDict)
_QUERY_OR_VALUE = re.compile(r"(to_?|w_?)?(q|query|queries|v|value|values)(_?(proj|projection|lin|linear))?", re.IGNORECASE)
_FUSED = re.compile(r"c_attn|in_proj|query_key_value|(w_?)?qkv(_?(proj|projection|lin|linear))?", re.IGNORECASE)
_SHOWN = 24


class Attention(NamedTuple):
    """Names of the linear layers of one attention, or for both that of an ``nn.MultiheadAttention``."""

    projections: tuple[str, ...]  # of queries and values
    output: str


class FeedForward(NamedTuple):
    """Names of the modules that read the input of a feed-forward block and put out its result; of one module or of two."""

    enter: str
    leave: str


class Layer(NamedTuple):
    """A layer of a transformer; an encoder's has one attention, a decoder's often two."""

    name: str
    attentions: tuple[Attention, ...]
    feed_forward: FeedForward | None  # where it isn't clear


def walk(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Like ``named_modules``, but nothing of what is inside an adapter, or inside attention that calls no module."""
    yield name, module
    if not isinstance(module, (*_ADAPTERS, *_ATTENTION)):
        for last, child in module.named_children():
            yield from walk(child, f"{name}.{last}" if name else last)


def is_adapter(module: nn.Module) -> bool:
    return isinstance(module, _ADAPTERS)


def _bare(module: nn.Module) -> nn.Module:
    return module.base if isinstance(module, (*_BESIDE_A_BASE, PrefixMultiheadAttention)) else module


def _is_linear(module: nn.Module) -> bool:
    bare = _bare(module)
    return isinstance(bare, nn.Linear | nn.MultiheadAttention) or is_conv1d(bare)


def _is_stacked(module: nn.Module) -> bool:
    """Whether it keeps experts, or the like, in one parameter."""
    own = module.parameters(recurse=False)
    return not isinstance(module, (nn.modules.conv._ConvNd, *_ADAPTERS)) and any(p.dim() == 3 for p in own)


def width(module: nn.Module) -> int | None:
    """The width of what a module puts out: by its type, or if it contains linear layers by these. None if neither says it.

    A sublayer, such as an expert or a whole attention, leads back to what its first linear layer reads.
    """
    bare = _bare(module)
    if isinstance(bare, nn.LayerNorm | nn.RMSNorm):
        return bare.normalized_shape[-1]
    if isinstance(bare, nn.Embedding):
        return bare.embedding_dim
    inside = [_sizes(m) for _, m in walk(module) if _is_linear(m)]
    if not inside:
        return None
    first = inside[0][0]
    return first if any(n == first for _, n in inside) else inside[-1][1]


def _sizes(module: nn.Module) -> tuple[int, int]:
    """In and out features."""
    bare = _bare(module)
    if isinstance(bare, nn.MultiheadAttention):
        return bare.embed_dim, bare.embed_dim
    return (bare.nx, bare.nf) if is_conv1d(bare) else (bare.in_features, bare.out_features)


def _is_attention(last: str, module: nn.Module) -> bool:
    """By its class or its own name, as BERT's ``attention``, GPT-2's ``attn`` and T5's ``EncDecAttention`` show it."""
    if isinstance(module, _ATTENTION) or type(module).__name__.endswith("Attention"):
        return True
    return last.lower().rstrip("_0123456789").endswith(("attention", "attn"))


def _above(name: str) -> list[str]:
    """The names of the modules that contain the one of this name, the innermost first; "" is the model."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) - 1, -1, -1)]


def _attention(names: list[str], modules: dict[str, nn.Module]) -> Attention:
    """Of the linear layers of an attention: the output is the last one, if possible of those that lead back to the width that
    the first reads, but for those that by their usual names are of queries, values or both; these, queries and values first,
    are the projections, or all but the output where the names aren't used."""
    named = [[n for n in names if pattern.fullmatch(n.rpartition(".")[2])] for pattern in (_QUERY_OR_VALUE, _FUSED)]
    free = [name for name in names if not any(name in found for found in named)] or names
    back = [name for name in free if _sizes(modules[name])[1] == _sizes(modules[names[0]])[0]]
    output = (back or free)[-1]
    others = [name for name in names if name != output] or names
    return Attention(tuple(named[0] or named[1] or others), output)


def _in_lists(names: list[str], layer: str, modules: dict[str, nn.Module]) -> bool:
    """Whether a layer keeps several of these in one list of its own, as XLM does, so that it is all layers of a model."""
    lists = [name.rpartition(".")[0] for name in names]
    return any(lists.count(name) > 1 and name != layer and isinstance(modules[name], _LISTS) for name in lists)


def _feed_forward(names: list[str], layer: str, modules: dict[str, nn.Module], d: int | None) -> FeedForward | None:
    """Of the linear layers of a layer that aren't attention's: the last that leads back to the width ``d`` is the output. None
    where that isn't clear."""
    leaves = [name for name in names if width(modules[name]) == d]
    if not leaves or not all(_is_linear(modules[name]) for name in names):
        return None
    whole = next(above for above in [names[-1], *_above(names[-1])] if all(above in (n, *_above(n)) for n in names))
    inside = {above for name in names for above in _above(name) if whole in _above(above) and above != whole}
    if any(isinstance(modules[above], _LISTS) for above in inside):  # of experts
        return None if whole in (layer, *_above(layer)) else FeedForward(whole, whole)
    return FeedForward(names[0], leaves[-1])


def layers(model: nn.Module) -> list[Layer]:
    """The layers of a transformer: the innermost modules with attention and with a feed-forward block, in order.

    Attention is what its class or its name calls so, its output projection the last linear layer in it; the other linear
    layers are the feed-forward block, as a whole if it has a list of experts. That holds for BERT, RoBERTa, GPT-2, Llama,
    Mistral, T5, BART, DistilBERT, ViT and the like, for ``nn.TransformerEncoderLayer`` and ``nn.TransformerDecoderLayer``, and
    for most that are written by hand.

    Raises:
        ValueError: some attention of the model is in no such layer.
    """
    modules = dict(walk(model))
    roots: dict[str, list[str]] = {}  # of attention, with the linear layers in each
    others = []
    for name in [name for name, module in modules.items() if _is_linear(module) or _is_stacked(module)]:
        within = [above for above in reversed([name, *_above(name)]) if _is_attention(above.rpartition(".")[2], modules[above])]
        if not within:
            others.append(name)
        elif _is_linear(modules[name]):
            roots.setdefault(within[0], []).append(name)
    both = {a for root in roots for a in _above(root)} & {a for name in others for a in _above(name)}
    inner = [name for name in both if not any(name in _above(other) for other in both if other)]
    found = []
    for layer in [name for name in modules if name in inner]:
        within = [root for root in roots if layer in _above(root)]
        attentions = [_attention(roots[root], modules) for root in within]
        rest = [name for name in others if layer in _above(name)]
        block = _feed_forward(rest, layer, modules, width(modules[attentions[0].output]))
        found.append(Layer(layer, tuple(attentions), None if _in_lists(within, layer, modules) else block))
    if left := [root for root in roots if found and not any(layer.name in _above(root) for layer in found)]:
        raise ValueError(
            f"targets must be given for {type(model).__name__}, whose {left[0]!r} is in no layer with a feed-forward block; it "
            f"has {described(model)}"
        )
    return found


def element(modules: dict[str, nn.Module], name: str) -> tuple[str, int] | None:
    """Name and number of the element of the outermost ``nn.ModuleList``, or if in none ``nn.Sequential``, around a module.

    ``modules`` are all of the model, by name.
    """
    parts = name.split(".")
    for kind in (nn.ModuleList, nn.Sequential):
        for i, part in enumerate(parts):
            parent = modules[".".join(parts[:i])]
            if isinstance(parent, KINDS["composed"]):  # a list in it is one of adapters
                break
            if isinstance(parent, kind):
                return ".".join(parts[: i + 1]), list(parent._modules).index(part)
    return None


def described(model: nn.Module) -> str:
    """The modules that can be targets, in words; names that differ in a number are one."""
    places = [
        (re.sub(r"(?<![^.])\d+(?![^.])", "*", name), type(module).__name__)
        for name, module in walk(model)
        if name and (_is_linear(module) or is_adapter(module) or isinstance(module, nn.Embedding | nn.LayerNorm))
    ]
    words = [f"{name} ({kind})" for name, kind in dict.fromkeys(places)]
    more = [f"and {len(words) - _SHOWN} more"] if len(words) > _SHOWN else []
    return ", ".join(words[:_SHOWN] + more) or "no linear layer"


def _matches(target: str | type, name: str, module: nn.Module) -> bool:
    if isinstance(target, type):
        return isinstance(module, target)
    return name == target or name.endswith(f".{target}") or fnmatchcase(name, target)


def resolve(model: nn.Module, targets: Targets) -> dict[str, nn.Module]:
    """The modules of ``model`` that ``targets`` mean, by their names and in their order, each module once.

    Args:
        model: a module.
        targets: one or more of: a name as in ``named_modules``, whole or its last parts (``"query"``, ``"output.dense"``); a
            pattern of ``fnmatch`` for the whole name (``"encoder.layer.[0-3].*dense"``); a type of modules.

    Raises:
        ValueError: one of ``targets`` means no module of ``model``.
    """
    targets = (targets,) if isinstance(targets, str | type) else tuple(targets)
    for target in targets:
        if not isinstance(target, str | type):
            raise TypeError(f"targets must be names or types of modules, got {type(target).__name__}")
    found = {name: module for name, module in walk(model) if name}
    for target in targets:
        if not any(_matches(target, name, module) for name, module in found.items()):
            shown = target.__name__ if isinstance(target, type) else repr(target)
            raise ValueError(f"targets must be modules of {type(model).__name__}, which has no {shown} but {described(model)}")
    if not targets:
        raise ValueError(f"targets must be given, got none; {type(model).__name__} has {described(model)}")
    chosen = {name: m for name, m in found.items() if any(_matches(target, name, m) for target in targets)}
    names = {id(module): name for name, module in reversed(chosen.items())}
    return {name: module for name, module in chosen.items() if names[id(module)] == name}
