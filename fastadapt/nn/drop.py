"""AdapterDrop: layers of a model that run without their adapters."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .bank import AdapterBank
from .bottleneck import BottleneckAdapter
from .compacter import CompacterAdapter
from .fusion import AdapterFusion
from .hyper import HyperSite
from .kron import KronALinear
from .lora import LoRAEmbedding, LoRALinear, Merging
from .lora_attention import LoRAMultiheadAttention
from .lora_bank import LoRABank
from .prefix import Prefix, PrefixAttention, PrefixEncoder
from .prefix_multihead import PrefixMultiheadAttention
from .structure import element

# What runs in place of the forward of an adapter that is dropped.


def _passed(adapter: nn.Module, x: Tensor, residual: Tensor | None = None, **options) -> Tensor:
    if residual is None and getattr(adapter, "residual", True):
        return x
    return torch.zeros_like(x) if residual is None else residual


def _passed_by_fusion(
    fusion: AdapterFusion, x: Tensor, residual: Tensor | None = None, hidden: Tensor | None = None, return_weights: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    y = _passed(fusion.adapters, x, residual)
    return (y, x.new_zeros(*x.shape[:-1], fusion.adapters.g)) if return_weights else y


def _passed_by_bank(bank: AdapterBank, x: Tensor, adapter_ids: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    return _passed(bank, x, residual)


def _base(adapter: nn.Module, x: Tensor, adapter_ids: Tensor | None = None) -> Tensor:
    return adapter.base(x)


def _base_attention(attention: nn.Module, *args, **kwargs):
    return attention.base(*args, **kwargs)


def _without_prefix(attention: PrefixAttention, x: Tensor, *args, prefix=None, adapter_ids=None, **kwargs):
    none = x.new_empty(attention.h_kv, 0, attention.e)
    return type(attention).forward(attention, x, *args, prefix=Prefix(none, none), **kwargs)


_INSTEAD: dict[type, Callable] = {
    **dict.fromkeys((BottleneckAdapter, CompacterAdapter, HyperSite), _passed),
    AdapterBank: _passed_by_bank,
    AdapterFusion: _passed_by_fusion,
    **dict.fromkeys((LoRALinear, LoRAEmbedding, LoRABank, KronALinear), _base),
    **dict.fromkeys((LoRAMultiheadAttention, PrefixMultiheadAttention), _base_attention),
    PrefixAttention: _without_prefix,
}


def _instead(module: nn.Module) -> Callable | None:
    return next((forward for kind, forward in _INSTEAD.items() if isinstance(module, kind)), None)


class _Replaced:
    """An adapter with what runs in place of its ``forward``. Its own method: a pickle would look for ``MethodType`` of another
    function in the adapter's class, and compiled code isn't used again for a new object that is called."""

    def __init__(self, adapter: nn.Module, instead: Callable):
        self.adapter, self.instead = adapter, instead

    def forward(self, *args, **kwargs):
        return self.instead(self.adapter, *args, **kwargs)


def _drop(adapter: nn.Module) -> None:
    """As often as it is called; a ``forward`` of the module's own comes before that of its class."""
    if not getattr(adapter, "_drops", 0):
        forward = _instead(adapter)
        if forward is None:
            adapter.fastadapt_dropped = True
        else:
            adapter.forward = _Replaced(adapter, forward).forward
    adapter._drops = getattr(adapter, "_drops", 0) + 1


def _restore(adapter: nn.Module) -> None:
    adapter._drops -= 1
    if not adapter._drops:
        delattr(adapter, "fastadapt_dropped" if _instead(adapter) is None else "forward")
        del adapter._drops


def _adapters(model: nn.Module) -> dict[int, list[nn.Module]]:
    """The adapters of each layer: its number is that in the outermost ``nn.ModuleList``, or ``nn.Sequential``, around them.

    Of a Hugging Face model with prefixes these are also the attention layers, which look whether theirs is dropped.
    """
    modules = dict(model.named_modules())
    encoders = [module for module in modules.values() if isinstance(module, PrefixEncoder)]
    prefixed = {attention for encoder in encoders for attention in getattr(encoder, "attentions", ())}
    found: dict[int, list[nn.Module]] = {}
    for name, module in modules.items():
        layer = element(modules, name) if _instead(module) is not None or module in prefixed else None
        if layer is not None:
            found.setdefault(layer[1], []).append(module)
    return found


class Dropped:
    """Layers of a model whose adapters are dropped, until :meth:`restore` or the end of a ``with`` block."""

    def __init__(self, model: nn.Module, adapters: dict[int, list[nn.Module]], random: bool):
        self.layers: tuple[int, ...] = ()
        self._adapters = adapters
        self._hook = model.register_forward_pre_hook(self._draw) if random else None
        if not random:
            self._drop(tuple(adapters))

    def _drop(self, layers: tuple[int, ...]) -> None:
        for change, numbers in ((_drop, set(layers) - set(self.layers)), (_restore, set(self.layers) - set(layers))):
            for adapter in (adapter for number in numbers for adapter in self._adapters[number]):
                change(adapter)
        self.layers = layers

    def _draw(self, model: nn.Module, args: tuple) -> None:
        count = int(torch.randint(len(self._adapters) + 1, ())) if model.training else 0
        self._drop(tuple(self._adapters)[:count])

    def restore(self) -> None:
        """Let all adapters run again that are not dropped by another call too."""
        self._drop(())
        if self._hook is not None:
            self._hook.remove()

    def __enter__(self) -> "Dropped":
        return self

    def __exit__(self, *exception) -> None:
        self.restore()


def drop_adapters(model: nn.Module, layers: int | Iterable[int], *, random: bool = False) -> Dropped:
    """Let layers of a model run without their adapters, which then cost nothing. Source: Rückle et al. 2021 (AdapterDrop).

    A dropped adapter passes on what it would have added to, and the weights that a fusion returns are zeros; LoRA and KronA run
    the frozen layer alone, and attention does without its prefix. What :func:`attach` has put in is dropped as well as what was
    placed by hand, prefixes of Hugging Face models too; a prompt, which is in no layer, is not. All parameters stay in
    ``state_dict``. A copy or a pickle of the model that is made meanwhile stays without those adapters.

    With ``random`` the model is trained to do without the lower layers' adapters, however many: each call of ``model`` in
    training drops those of the first ``n`` of ``layers``, where ``n`` from 0 to all is drawn from torch's default generator on
    the CPU, and each call in evaluation none. What was drawn stays till the next call, so that a backward pass with activation
    checkpointing sees it too. Parameters of dropped adapters get no gradient in that step, which ``DistributedDataParallel``
    has to be told (``find_unused_parameters=True``). Where nothing else is trained, such as a head, ``layers`` must leave one
    with adapters out: without any the loss has no gradient, and ``backward`` raises. Compiled code is compiled once for each
    number.

    Args:
        model: a model with adapters in the elements of an ``nn.ModuleList`` or, if in none, of an ``nn.Sequential``; where
            lists are in lists, the outermost numbers the layers. An encoder's and a decoder's layers have the same numbers.
        layers: the numbers of layers, from 0 on; an integer means as many of the first ones.
        random: see above.

    Returns:
        What undoes it: ``restore()``, or the end of a ``with`` block.

    Raises:
        ValueError: one of ``layers`` has no adapter, or one with a merged weight, which can't be dropped; nothing is dropped.
    """
    found = _adapters(model)
    numbers = sorted(found)
    wanted = list(range(layers)) if isinstance(layers, int) else list(layers)
    if not wanted or any(not isinstance(number, int) or number not in found for number in wanted):
        raise ValueError(f"layers must be numbers of layers with adapters, some of {numbers}, got {layers!r}")
    chosen = {number: found[number] for number in sorted(set(wanted))}
    if any(isinstance(adapter, Merging) and adapter.merged for adapters in chosen.values() for adapter in adapters):
        raise ValueError("layers must have no merged adapters, which are part of the frozen weights: unmerge() them first")
    return Dropped(model, chosen, random)
