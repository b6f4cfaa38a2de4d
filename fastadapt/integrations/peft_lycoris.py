"""What LoKr and LoHa layers of the library ``peft`` compute, on the kernels here: no matrix as large as the layer's own weight.

As in ``peft_lora`` every function looks at the state of the layer anew. An adapter that has no kernel goes through the
library's own ``_get_delta_activations``, whichever adapters are active beside it.
"""

import torch
from peft.tuners.lokr import Linear as LoKr
from torch import Tensor

from ..ops.kron_linear import kron_linear
from ..ops.lora_linear import autocasts, lora_linear, without_autocast
from . import summary
from .dtypes import NARROW, mismatch
from .peft_lora import fits, frozen_layer, several


def drawing(layer, name: str) -> str | None:
    """What of the adapter ``name`` is random in training, where the library computes the layer with its own draws."""
    found = [option for option in ("rank_dropout", "module_dropout") if getattr(layer, option)[name]]
    return f"{' and '.join(found)} in training" if found else None


def active(layer) -> list[str] | None:
    """The active adapters that the layer has; None where the library has to compute it all."""
    if layer._disable_adapters or layer.merged_adapters:
        return None
    present = layer._available_adapters
    names = [name for name in layer.active_adapters if name in present]
    return None if layer.training and any(drawing(layer, name) for name in names) else names


def _factors(layer, part: str, name: str) -> Tensor | tuple[Tensor, Tensor]:
    """``w1`` or ``w2`` of LoKr as kron_linear takes it: ``(1, in, out)``, or two factors of that."""
    if name in (whole := getattr(layer, f"lokr_{part}")):
        return whole[name].T[None]
    return tuple(getattr(layer, f"lokr_{part}_{side}")[name].T[None] for side in "ba")


def _with_lokr(layer, name: str, x: Tensor, y: Tensor) -> Tensor | None:
    """``y`` and the LoKr adapter ``name`` of ``x``; None where the library casts in a way of its own."""
    if torch.promote_types(x.dtype, y.dtype) is not y.dtype and not autocasts(x):
        return None
    a, b = _factors(layer, "w1", name), _factors(layer, "w2", name)
    if not isinstance(a, Tensor):
        with without_autocast(x):
            a = a[0] @ a[1]
    whole, backend = isinstance(b, Tensor), layer._fastadapt_backend
    dtype = (b if whole else b[0]).dtype
    x = x.to(y.dtype)  # what the base layer has made of it under autocast
    if dtype is not x.dtype:
        if dtype is not torch.float32 or x.dtype not in NARROW:
            return None
        in_kernel = not whole and kron_linear.leaf.choose(backend, x.device.type, (x, a, *b)) != "reference"
        if not in_kernel and not autocasts(x):
            x, y = x.float(), y.float()  # as in the library, since plain PyTorch would round every product to 16 bits
    return kron_linear(x, a, b, residual=y, scale=layer.scaling[name], backend=None if whole else backend)


def lokr(layer, names: list[str], x: Tensor, *args, **kwargs) -> Tensor:
    """The base layer, to whose output each of the LoKr adapters ``names`` is added in its own pass."""
    y = layer.base_layer(x, *args, **kwargs)
    for name in names:
        added = _with_lokr(layer, name, x, y)
        y = y + layer._get_delta_activations(name, x, *args, **kwargs) if added is None else added
    return y.to(x.dtype)


def _refusal(layer, name: str) -> str | None:
    """Why LoHa's adapter ``name`` isn't a LoRA of rank ``r * r`` here: a row costs less by the matrix itself."""
    (n, r), k = layer.hada_w1_a[name].shape, layer.hada_w1_b[name].shape[1]
    return None if r * r * (n + k) < n * k else f"rank {r} squared costs more than the ({n}, {k}) matrix"


def _as_lora(layer, name: str) -> tuple:
    """LoHa's adapter ``name`` as ``peft_lora.operands`` gives a LoRA, in float32 where its own factors have 16 bits.

    ``(A1 B1) * (A2 B2)``, element by element, is ``sum_ij (A1_i * A2_j) (B1_i * B2_j)`` over columns of A and rows of B.
    """
    factors = (getattr(layer, f"hada_{factor}")[name] for factor in ("w1_a", "w1_b", "w2_a", "w2_b"))
    a1, b1, a2, b2 = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in factors)
    lora_a, lora_b = (b1[:, None] * b2).flatten(0, 1), (a1[:, :, None] * a2[:, None]).flatten(1)
    return lora_a, lora_b, None, layer.scaling[name], 0.0, None


def loha(layer, names: list[str], x: Tensor, *args, **kwargs) -> Tensor:
    """The base layer and its LoHa adapters ``names`` in one product, except for those that the library computes."""
    parts, frozen = {}, frozen_layer(layer)
    if type(frozen) is not str and not (args or kwargs):
        served = [name for name in names if fits(x, frozen[0], layer.hada_w1_a[name], layer.scaling[name])]
        parts = {name: _as_lora(layer, name) for name in served if not _refusal(layer, name)}
    if parts:
        part, diagonal = several(list(parts.values()))
        options = {"scale": part[3], "diagonal": diagonal, "backend": layer._fastadapt_backend}
        y = lora_linear(x, *frozen, part[0], part[1], **options)
    else:
        y = layer.base_layer(x, *args, **kwargs)
    for name in names:
        if name not in parts:
            y = y + layer._get_delta_activations(name, x, *args, **kwargs)
    return y.to(x.dtype)


def examined(layer) -> tuple[str, str]:
    """State and reason of a layer, as in a :class:`fastadapt.integrations.Row`."""
    lokr = isinstance(layer, LoKr)
    if not lokr and type(frozen := frozen_layer(layer)) is str:
        return "left", frozen
    weight, reasons = getattr(layer.get_base_layer(), "weight", None), {}
    for name in sorted(layer._available_adapters):
        own = layer.hada_w1_a[name] if not lokr else _factors(layer, "w2", name)
        never, partly = mismatch(weight, own.dtype if isinstance(own, Tensor) else own[0].dtype)
        reasons[name] = never or (None if lokr else _refusal(layer, name)), partly or drawing(layer, name)
    return summary(reasons)
