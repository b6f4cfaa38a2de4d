"""Any method into a transformer that exists, by its name."""

from collections.abc import Callable
from functools import partial

from torch import nn

from .bank import AdapterBank
from .bitfit import train_biases
from .bottleneck import BottleneckAdapter
from .compacter import CompacterAdapter
from .fusion import AdapterFusion
from .hyper import HyperAdapter
from .kron import KronALinear
from .lora import LoRAEmbedding, LoRALinear
from .lora_attention import LoRAMultiheadAttention
from .lora_bank import LoRABank
from .places import check_free, factory, leave_nested_tensors, put_after, put_around, put_beside
from .prefix import PrefixAttention
from .prefix_multihead import PrefixMultiheadAttention
from .prompt import PromptEmbedding
from .structure import Layer, Targets, described, element, layers, resolve, walk, width

_OF_PREFIXES = ("p", "hidden", "width", "gate", "dropout", "shift_positions")  # among the options of "mam"
_MULTIHEAD = (nn.MultiheadAttention, LoRAMultiheadAttention, PrefixMultiheadAttention)  # the last two have an adapter
REDUCTION = 16  # width of the model over that of a bottleneck, where no r is given
LENGTH = 16  # of a prefix or prompt, where no p is given


# Where a method goes if the user doesn't say it.


def _clear_layers(model: nn.Module) -> list[Layer]:
    found = layers(model)
    if unclear := [layer.name for layer in found if layer.feed_forward is None]:
        raise ValueError(
            f"targets must be given for {type(model).__name__}, in whose {unclear[0]!r} no feed-forward block is clear; it has "
            f"{described(model)}"
        )
    return found


def _feed_forward(model: nn.Module) -> list[str]:
    return [layer.feed_forward.leave for layer in _clear_layers(model)]


def _both(model: nn.Module) -> list[str]:
    found = _clear_layers(model)
    return [name for layer in found for name in (*(a.output for a in layer.attentions), layer.feed_forward.leave)]


def _projections(model: nn.Module) -> list[str]:
    return [name for layer in layers(model) for a in layer.attentions for name in a.projections]


def _linear_projections(model: nn.Module) -> list[str]:
    """The same, but where these are no modules of their own the linear layers of the feed-forward blocks."""
    names = _projections(model)
    if any(isinstance(model.get_submodule(name), nn.MultiheadAttention) for name in names):
        names = [name for layer in _clear_layers(model) for name in dict.fromkeys(layer.feed_forward)]
    return names


def _found(model: nn.Module, targets: Targets | None, default: Callable[[nn.Module], list[str]]) -> dict[str, nn.Module]:
    if targets is not None:
        return resolve(model, targets)
    modules = {model.get_submodule(name): name for name in reversed(default(model))}  # a shared module by its first name
    if not modules:
        raise ValueError(
            f"targets must be given for {type(model).__name__}, in which no layer with attention and a feed-forward block was "
            f"found but {described(model)}"
        )
    return {name: module for module, name in reversed(modules.items())}


def _places(found: dict[str, nn.Module]) -> list[tuple[int, dict]]:
    """Width, device and dtype of an adapter for each."""
    for name, module in found.items():
        if width(module) is None:
            raise ValueError(f"targets must be modules that show their width, got {name!r}, a {type(module).__name__}")
    return [(width(module), factory(module)) for module in found.values()]


# Adapters for places, given as pairs of a width and options for the device and the dtype. An option that must be given is None
# here: the class that needs it says so.


def _bottlenecks(make, places, r: int | None = None, **options):
    return [make(d, max(1, d // REDUCTION) if r is None else r, **{**made, **options}) for d, made in places]


def _compacters(places, r: int | None = None, **options):
    adapters = []
    for d, made in places:  # all with the rule of the first
        adapters += CompacterAdapter.compacter_plus_plus(1, d, r, **{**made, **options})
        options.setdefault("shared_rule", adapters[0].down.factors[0])
    return adapters


def _banks(places, *, g: int | None = None, **options):
    return _bottlenecks(lambda d, r, **others: AdapterBank(g, d, r, **others), places, **options)


def _fusions(places, *, g: int | None = None, r: int | None = None, **options):
    own = {name: options.pop(name) for name in ("query", "value", "temperature") if name in options}
    banks = _banks(places, g=g, r=r, **options)
    return [AdapterFusion(d, bank, **{**made, **own}) for (d, made), bank in zip(places, banks)]


def _prompts(p: int, places, **options):
    return [PromptEmbedding(p, d, **{**made, **options}) for d, made in places]


def _after(default, make, model: nn.Module, targets: Targets | None, **options) -> list[str]:
    found = _found(model, targets, default)
    check_free(found, around=False)
    adapters = make(_places(found), **options)
    leave_nested_tensors(model, found.values())
    return put_after(found, adapters)


def _beside(model: nn.Module, targets: Targets | None, before: Callable[[], list[str]] = list, **options) -> list[str]:
    """``before`` runs when nothing can be refused any more."""
    found = _found(model, targets, _feed_forward)
    check_free(found, around=False)
    enters = {} if targets is not None else {layer.feed_forward.leave: layer.feed_forward.enter for layer in layers(model)}
    adapters = _bottlenecks(BottleneckAdapter.parallel, _places(found), **options)
    names = before()
    leave_nested_tensors(model, found.values())
    return names + put_beside({name: model.get_submodule(enters.get(name, name)) for name in found}, found, adapters)


def _hyper(
    model: nn.Module, targets: Targets | None, *, tasks: int | list[str] | None = None, r: int | None = None, **options
) -> list[str]:
    found, modules = _found(model, targets, _both), dict(model.named_modules())
    check_free(found, around=False)
    if "hyper" in model._modules:
        raise ValueError("model must have no module 'hyper' yet, from which all generated adapters come")
    layer_of = {name: (element(modules, name) or (name, 0))[0] for name in found}
    in_layer = {layer: [name for name in found if layer_of[name] == layer] for layer in layer_of.values()}
    (d, made), *others = _places(found)
    if any(other != d for other, _ in others):
        raise ValueError(f"targets must have one width for generated adapters, got {sorted({d, *(o for o, _ in others)})}")
    positions = max(map(len, in_layer.values()))
    r = max(1, d // REDUCTION) if r is None else r
    model.hyper = HyperAdapter(tasks, len(in_layer), d, r, **{"positions": positions, **made, **options})
    numbers = {layer: i for i, layer in enumerate(in_layer)}
    sites = [model.hyper.site(numbers[layer_of[name]], in_layer[layer_of[name]].index(name)) for name in found]
    leave_nested_tensors(model, found.values())
    return ["hyper", *put_after(found, sites)]


def _lora(base: nn.Module, r: int = 8, **options) -> nn.Module:
    if isinstance(base, nn.MultiheadAttention):
        return LoRAMultiheadAttention(base, r, **options)
    return LoRAEmbedding(base, r, **options) if isinstance(base, nn.Embedding) else LoRALinear(base, r, **options)


def _lora_bank(
    base: nn.Module, r: int = 8, *, g: int | None = None, alpha: float = 16, rslora: bool = False, **options
) -> LoRABank:
    bank = LoRABank(base, g, r, **options)
    for slot in range(g):
        bank.replace(slot, LoRALinear(base, r, alpha=alpha, rslora=rslora, lora_bias=bank.lora_bias is not None))
    return bank


def _around(default, make, model: nn.Module, targets: Targets | None, **options) -> list[str]:
    found = _found(model, targets, default)
    check_free(found, around=True)
    frozen = [(p, p.requires_grad) for module in found.values() for p in module.parameters()]
    try:
        adapters = [make(module, **options) for module in found.values()]
    except (TypeError, ValueError):  # the model is as it was, whichever of the modules was refused
        for parameter, requires_grad in frozen:
            parameter.requires_grad_(requires_grad)
        raise
    leave_nested_tensors(model, found.values())
    return put_around(model, found, adapters)


def _prefix(model: nn.Module, targets: Targets | None, p: int = LENGTH, **options) -> list[str]:
    found = resolve(model, PrefixAttention if targets is None else targets) if _has(model, PrefixAttention) else {}
    if found:
        for name, module in found.items():
            if not isinstance(module, PrefixAttention) or "default" in module.names:
                raise ValueError(f"targets must be PrefixAttention without the prefix 'default', got {name!r}")
        for module in found.values():
            module.add("default", p, **options)
            module.activate("default")
        return [f"{name}.prefixes.default" for name in found]
    if not hasattr(model, "set_attn_implementation"):
        kinds = [kind for kind in _MULTIHEAD if _has(model, kind)]
        if not kinds:
            raise ValueError(
                "model must be one of Hugging Face, or have PrefixAttention or nn.MultiheadAttention, for prefixes, "
                f"got {type(model).__name__}"
            )
        make = partial(PrefixMultiheadAttention, p=p)
        return _around(_projections, make, model, kinds if targets is None else targets, **options)
    # What knows that library lies above this package, and needs it.
    from ..integrations.transformers import add_prefix

    add_prefix(model, p, layers=None if targets is None else list(resolve(model, targets).values()), **options)
    return ["prefix_encoder"]


def _mam(model: nn.Module, targets: Targets | None, backend: str | None = None, **options) -> list[str]:
    own = {name: options.pop(name) for name in _OF_PREFIXES if name in options}
    if not _has(model, PrefixAttention):
        own["backend"] = backend
    return _beside(model, targets, partial(_prefix, model, None, **own), backend=backend, **options)


def _prompt(model: nn.Module, targets: Targets | None, p: int = LENGTH, **options) -> list[str]:
    if targets is None:
        if not hasattr(model, "get_input_embeddings"):
            found = f"{type(model).__name__} has {described(model)}"
            raise ValueError(f"targets must name the embedding for a prompt in a model not of Hugging Face; {found}")
        from ..integrations.prompts import add_prompt

        add_prompt(model, p, **options)
        return ["prompt"]
    return _after(_feed_forward, partial(_prompts, p), model, targets, **options)


def _biases(model: nn.Module, targets: Targets | None) -> list[str]:
    return list(train_biases(model, targets=targets))


def _has(model: nn.Module, kind: type) -> bool:
    return any(isinstance(module, kind) for _, module in walk(model))


_METHODS: dict[str, Callable[..., list[str]]] = {
    "bottleneck": partial(_after, _feed_forward, partial(_bottlenecks, BottleneckAdapter)),
    "houlsby": partial(_after, _both, partial(_bottlenecks, BottleneckAdapter.houlsby)),
    "pfeiffer": partial(_after, _feed_forward, partial(_bottlenecks, BottleneckAdapter.pfeiffer)),
    "adapter_plus": partial(_after, _feed_forward, partial(_bottlenecks, BottleneckAdapter.adapter_plus)),
    "parallel": _beside,
    "bank": partial(_after, _feed_forward, _banks),
    "fusion": partial(_after, _feed_forward, _fusions),
    "compacter": partial(_after, _both, _compacters),
    "compacter_plus_plus": partial(_after, _feed_forward, _compacters),
    "hyper": _hyper,
    "lora": partial(_around, _projections, _lora),
    "dora": partial(_around, _linear_projections, partial(LoRALinear, dora=True)),
    "lora_bank": partial(_around, _linear_projections, _lora_bank),
    "kron": partial(_around, _linear_projections, KronALinear),
    "prefix": _prefix,
    "mam": _mam,
    "prompt": _prompt,
    "bitfit": _biases,
}  # fmt: skip
METHODS = tuple(_METHODS)


def attach(model: nn.Module, method: str, *, targets: Targets | None = None, **options) -> list[str]:
    """Put adapters of a method into a transformer, of Hugging Face or in plain PyTorch, which is called as ever afterwards.

    ================================  ===========================================================  =========================
    method                            goes, where no targets are given                             options
    ================================  ===========================================================  =========================
    ``bottleneck``, ``pfeiffer``,     after the feed-forward block's last linear layer             ``r`` and others of
    ``adapter_plus``                                                                               :class:`BottleneckAdapter`
    ``houlsby``                       after that and after the output projection of attention      the same
    ``parallel``                      beside the feed-forward block                                the same
    ``bank``                          as ``bottleneck``, for ids see :func:`route`                 ``g``, :class:`AdapterBank`
    ``fusion``                        as ``bottleneck``, with a frozen bank to be loaded           ``g``, ``query``, ``value``,
                                                                                                   ``temperature``, of the bank
    ``compacter``                     as ``houlsby``, all with one rule                            :class:`CompacterAdapter`
    ``compacter_plus_plus``           as ``bottleneck``, all with one rule                         the same
    ``hyper``                         as ``houlsby``, from one network for all tasks               ``tasks``,
                                                                                                   :class:`HyperAdapter`
    ``lora``                          around the projections of queries and values                 :class:`LoRALinear`
    ``dora``, ``kron``                the same; the linear layers of the feed-forward block        :class:`LoRALinear`,
                                      where attention is ``nn.MultiheadAttention``                 :class:`KronALinear`
    ``lora_bank``                     the same; ``g`` new adapters in each                         ``g``, :class:`LoRABank`
    ``prefix``                        all attention layers of a Hugging Face model, every          ``p``; ``add_prefix`` or
                                      :class:`PrefixAttention`, or around every                    :class:`PrefixEncoder`
                                      ``nn.MultiheadAttention``
    ``mam``                           ``prefix`` and ``parallel``                                  those of both
    ``prompt``                        before the embedded tokens of a Hugging Face model           ``p``; ``add_prompt``
    ``bitfit``                        nowhere: trains the biases, see :func:`train_biases`         none
    ================================  ===========================================================  =========================

    ``r`` is a sixteenth of the width if it isn't given, 8 for LoRA and as in the paper for Compacter; ``p`` is 16. An adapter
    after a module is its submodule ``attached``, and an attached model's own parameters keep their names, but for those of a
    layer in LoRA or KronA, or of an ``nn.MultiheadAttention`` with a prefix, which are under ``base``. Weights of 16 bits get
    adapters in float32.

    Methods compose: each call adds to what is there, on other modules than those that have an adapter. LoRA goes first where
    another adapter is to follow on the same linear layer, or beside the block that starts with it: LoRA and KronA refuse a
    layer with hooks, which would not run any more. PyTorch's encoder layers leave their fused path of evaluation, and their
    nested tensors, for good. Attach before a model that ``torch.compile`` was given runs: its code would not see what comes
    after or beside a module later. Nothing is frozen but what LoRA and KronA contain, and with ``bitfit`` all but the biases:
    see :func:`freeze_except`, whose kinds these methods make.

    Args:
        model: a transformer.
        method: see above.
        targets: modules after, beside or around which the adapters go: names as in ``named_modules``, whole or the last parts
            (``"query"``, ``"output.dense"``), patterns of ``fnmatch`` for whole names, or types of modules; one or more. For
            ``prefix`` attention layers, for ``mam`` sublayers, for ``prompt`` the embedding of a model that takes what is
            longer by ``p``. None for the places above, which :func:`layers` in ``fastadapt/nn/structure.py`` finds.
        options: of the method.

    Returns:
        The names of the modules that were put in; with ``bitfit`` of the biases.

    Raises:
        ValueError: there is no such method, a target means no module, a place has an adapter already, or without targets the
            places weren't found or aren't clear; ``model`` is as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if method not in _METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    return _METHODS[method](model, targets, **options)
