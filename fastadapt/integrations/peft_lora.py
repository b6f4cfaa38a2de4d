"""What a LoRA layer of the library ``peft`` computes, on the kernels here.

Every function looks at the state of the layer anew, as the library does, so that nothing has to be told of a change. What has
no kernel (``operands`` and ``frozen_layer`` say why in words, ``fits`` looks at dtypes) is None, for the library to compute.
"""

import torch
import torch.nn.functional as F
from accelerate.hooks import AlignDevicesHook
from peft.tuners.lora import dora as peft_dora
from peft.tuners.lora import variants
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from .._dense import is_packed, reads_other_inputs
from ..nn.lora import is_falcons
from ..ops.dropout import LARGEST
from ..ops.lora_linear import lora_linear, row_norms, without_autocast
from .dtypes import match

# Layers whose product is x @ weight.T, or x @ weight where that is True.
TRANSPOSED = {nn.Linear: False, NonDynamicallyQuantizableLinear: False, Conv1D: True}


def _hooked(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its class says, or than moving inputs to the device of its weights."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    if "forward" not in module.__dict__:
        return False
    hook = module.__dict__.get("_hf_hook")  # those of device_map
    return type(hook) is not AlignDevicesHook or hook.offload or hook.io_same_device


def frozen_layer(layer) -> tuple[Tensor, Tensor | None] | str:
    """Weight ``(n, k)`` and bias of the base layer, or why they don't say what it computes."""
    base = layer._modules["base_layer"]
    transposed = False if is_falcons(base) else TRANSPOSED.get(type(base))
    if transposed is None:
        what = "another adapter's" if isinstance(base, BaseTunerLayer) else f"a {type(base).__name__}"
        return f"its base layer is {what}"
    weight = base._parameters.get("weight")
    if weight is None or _hooked(base):
        return "its base layer has hooks, or its weight elsewhere"
    if reads_other_inputs(weight):
        return "its base layer scales or quantises its input"
    return weight.T if transposed else weight, base._parameters.get("bias")


def operands(layer, name: str) -> tuple | str:
    """What the kernels take of the adapter ``name``, or why they can't.

    ``(lora_a, lora_b, lora_bias, scale, dropout_p, magnitude)``; ``magnitude`` is the library's module for DoRA, or None.
    """
    modules = layer._modules
    down, up = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
    dropout, variant, magnitude = modules["lora_dropout"]._modules[name], layer.lora_variant.get(name), None
    if type(variant) is variants.DoraLinearVariant:
        magnitude = modules["lora_magnitude_vector"]._modules[name]
        if type(magnitude) is not peft_dora.DoraLinearLayer or _hooked(magnitude) or layer.ephemeral_gpu_offload:
            return "DoRA with hooks or on another device"
    elif variant is not None and type(variant) is not variants.MiCALinearVariant:  # which differs in what is trained
        return type(variant).__name__
    for module in (down, up):
        if type(module) is not nn.Linear or _hooked(module):
            return f"{type(module).__name__} in it, or hooks"
    a, b, bias = down._parameters.get("weight"), up._parameters.get("weight"), up._parameters.get("bias")
    if a is None or b is None or b.dtype is not a.dtype or (magnitude is not None and bias is not None):
        return "weights elsewhere or of two dtypes, or DoRA with a bias"
    p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
    if type(dropout) not in (nn.Dropout, nn.Identity) or p > LARGEST:
        return f"dropout {dropout}"
    return a, b, bias, layer.scaling[name], p, magnitude


def fits(x: Tensor, weight: Tensor, a: Tensor, scale) -> bool:
    """Whether dtypes and devices are those of the kernels; the library casts ``x`` to the adapter's dtype."""
    if weight.device != x.device or isinstance(scale, Tensor) and (scale.device != x.device or x.dtype is torch.float64):
        return False
    return match(x, weight, a.dtype)


def several(parts: list[tuple]) -> tuple[tuple, Tensor | None]:
    """Adapters without dropout as one, whose rank is the sum of theirs; ``diagonal`` holds scales that differ."""
    a, b = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts], 1)
    scales, biases = [part[3] for part in parts], [(part[2], part[3]) for part in parts if part[2] is not None]
    if not any(isinstance(scale, Tensor) or scale != scales[0] for scale in scales):
        bias = sum(bias for bias, _ in biases) if biases else None
        return (a, b, bias, scales[0], 0.0, None), None
    ranks = torch.promote_types(a.dtype, torch.float32)
    diagonal = [
        scale.to(ranks).expand(len(part[0])) if isinstance(scale, Tensor) else a.new_full((len(part[0]),), scale, dtype=ranks)
        for part, scale in zip(parts, scales)
    ]
    bias = sum(scale * bias for bias, scale in biases) if biases else None
    return (a, b, bias, 1.0, 0.0, None), torch.cat(diagonal)


def _kept_norms(magnitude: nn.Module, name: str, *args) -> Tensor | None:
    """The norms of DoRA where the library's own cache of them is switched on, else None."""
    if not peft_dora.ENABLE_DORA_CACHING or magnitude.training:
        return None
    key = f"weight-norm-{name}"  # the library's own
    norms = magnitude._cache_get(key, None)
    if norms is None:
        norms = row_norms(*args)
        magnitude._cache_store(key, norms)
    return norms


def _linear(layer, x: Tensor, weight: Tensor, bias: Tensor | None, name: str, part: tuple, diagonal=None) -> Tensor | None:
    """The base layer with one adapter; None where its own class has to compute that."""
    a, b, lora_bias, scale, p, magnitude = part
    options = {"scale": scale, "backend": layer._fastadapt_backend}
    if magnitude is None:
        return lora_linear(x, weight, bias, a, b, dropout_p=p, lora_bias=lora_bias, diagonal=diagonal, **options)
    if p:
        # The library drops the input of the frozen product too, but not of the one it takes away again. The factor that makes
        # up for what is dropped goes into the gain, where it rounds nothing.
        if is_packed(weight):
            return None
        kept, factor = x * (F.dropout(torch.ones_like(x), p) != 0), 1 / (1 - p)
        y = lora_linear(kept, weight, bias, a, b, magnitude=factor * magnitude.weight, **options)
        return y + F.linear(torch.sub(x, kept, alpha=factor), weight)
    if is_packed(weight) or (norms := _kept_norms(magnitude, name, weight, a, b, scale)) is None:
        return lora_linear(x, weight, bias, a, b, magnitude=magnitude.weight, **options)
    y = lora_linear(x, weight, None, a, b, **options)
    y = y * (magnitude.weight / norms).to(y.dtype)
    return y if bias is None else y + bias.to(y.dtype)


def active(layer, x: Tensor) -> Tensor | None:
    """The base layer with the active adapters, the first of them in its own product; None where no kernel can."""
    frozen, current = frozen_layer(layer), layer._active_adapter
    present = layer._modules["lora_A"]._modules
    names = (current,) if type(current) is str else current
    if len(names) > 1:
        names = [name for name in names if name in present]
    if type(frozen) is str or not names or names[0] not in present:
        return None
    part = operands(layer, names[0])
    if type(part) is str or not fits(x, frozen[0], part[0], part[3]):
        return None
    if len(names) > 1:
        return _all_active(layer, x, frozen, names, part)
    return _linear(layer, x, *frozen, names[0], part)


def _all_active(layer, x: Tensor, frozen: tuple, names: list[str], part: tuple) -> Tensor | None:
    """The adapters ``names``, of which ``part`` is the first: as many as can be in one product, the others beside it."""
    parts, diagonal = [part], None
    if not part[4] and part[5] is None:
        for name in names[1:]:
            other = operands(layer, name)
            if type(other) is str or other[4] or other[5] is not None or other[0].dtype is not part[0].dtype:
                break
            if not fits(x, frozen[0], other[0], other[3]):
                break
            parts.append(other)
    others = names[len(parts) :]
    if any(name in layer.lora_variant for name in others):
        return None  # DoRA scales what it finds, which must not have been rounded before
    if len(parts) > 1:
        part, diagonal = several(parts)
    y = _linear(layer, x, *frozen, names[0], part, diagonal)
    return y if y is None else _added(layer, x, y, others)


def _added(layer, x: Tensor, y: Tensor, names: list[str]) -> Tensor:
    """``y`` with further adapters, each as the library adds it: with a dropout of its own."""
    dtype = y.dtype
    for name in names:
        down, up = layer.lora_A[name], layer.lora_B[name]
        x = layer._cast_input_dtype(x, down.weight.dtype)
        y = y + up(down(layer.lora_dropout[name](x))) * layer.scaling[name]
    return y.to(dtype)


class MixedBatch(list):
    """The ``adapter_names`` of one forward or one ``generate``, and what the layers make of them."""

    def __init__(self, names):
        super().__init__(names)
        self.unique = sorted(set(names))
        self._ids, self.banks = {}, {}

    def ids(self, present: tuple[str, ...], device: torch.device) -> Tensor:
        """Of every sequence the place of its adapter in ``present``, or -1."""
        key = present, device
        if key not in self._ids:
            places = {name: i for i, name in enumerate(present)}
            self._ids[key] = torch.tensor([places.get(name, -1) for name in self], device=device)
        return self._ids[key]


def _bank(parts: list[tuple], device: torch.device) -> tuple:
    """The adapters as a bank ``(g, r, k)``, ``(g, n, r)``, their biases and scales; ranks are filled up with zeros."""
    r = max(len(part[0]) for part in parts)
    a = torch.stack([F.pad(part[0], (0, 0, 0, r - len(part[0]))) if len(part[0]) < r else part[0] for part in parts])
    b = torch.stack([F.pad(part[1], (0, r - len(part[0]))) if len(part[0]) < r else part[1] for part in parts])
    biases, scales = [part[2] for part in parts], [part[3] for part in parts]
    bias = None
    if any(t is not None for t in biases):
        bias = torch.stack([b.new_zeros(b.shape[1]) if t is None else t for t in biases])
    if any(isinstance(scale, Tensor) for scale in scales):
        scale = torch.stack([torch.as_tensor(scale, dtype=torch.float32, device=device) for scale in scales])
    elif any(scale != scales[0] for scale in scales):
        scale = torch.tensor(scales, dtype=torch.promote_types(a.dtype, torch.float32), device=device)
    else:
        scale = scales[0]
    return a, b, bias, scale


def _bank_options(layer, x: Tensor, weight: Tensor, batch: MixedBatch, present: tuple[str, ...]) -> dict | None:
    """What lora_linear takes of the adapters ``present``; None where one call can't serve them."""
    if any(layer.use_dora.get(name, False) for name in present):
        return None
    parts = [operands(layer, name) for name in present]
    if any(type(part) is str or part[4] != parts[0][4] or part[0].dtype is not parts[0][0].dtype for part in parts):
        return None  # one rate of dropout and one dtype serve a whole bank
    if not all(fits(x, weight, part[0], part[3]) for part in parts):
        return None
    a, b, lora_bias, scale = _bank(parts, x.device)
    return {
        "lora_a": a, "lora_b": b, "lora_bias": lora_bias, "scale": scale, "dropout_p": parts[0][4],
        "adapter_ids": batch.ids(present, x.device), "backend": layer._fastadapt_backend,
    }  # fmt: skip


def mixed(layer, x: Tensor, names: list[str]) -> Tensor | None:
    """Each sequence with the adapter that ``names`` gives it; None where no kernel can, or the library has an objection."""
    batch, frozen = names if type(names) is MixedBatch else MixedBatch(names), frozen_layer(layer)
    if len(x) != len(batch) or type(frozen) is str:
        return None
    # Kept as long as the library's hooks are: for all steps of a generate, and not beyond, where a weight may change unseen.
    keeps = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    options = batch.banks.get(layer) if keeps else None
    if options is None:
        lora_A = layer._modules["lora_A"]._modules
        present = tuple(name for name in batch.unique if name in lora_A and name != "__base__")
        if len(batch.unique) == 1 and present and not layer.use_dora.get(present[0], False):
            part = operands(layer, present[0])
            served = type(part) is not str and fits(x, frozen[0], part[0], part[3])
            return _linear(layer, x, *frozen, present[0], part) if served else None
        options = _bank_options(layer, x, frozen[0], batch, present) if present else None
        if options is None:
            return None
        if keeps:
            batch.banks[layer] = options
    elif not fits(x, frozen[0], options["lora_a"], 1.0):
        return None
    return lora_linear(x, *frozen, **options)


def embedded(layer, ids: Tensor) -> Tensor | None:
    """The embedding with its active adapters: for each one product, added as it is computed."""
    table_a, table_b, current = layer.lora_embedding_A, layer.lora_embedding_B, layer._active_adapter
    names = [name for name in ((current,) if type(current) is str else current) if name in table_a]
    known = (type(None), variants.MiCAEmbeddingVariant, variants.DoraEmbeddingVariant)
    if not names or layer.input_fns or any(type(layer.lora_variant.get(name)) not in known for name in names):
        return None
    y, own_scale = layer.base_layer(ids), layer._get_embed_scale()
    dtype = y.dtype
    for name in names:
        a, b, scale = table_a[name], table_b[name], layer.scaling[name]
        rows = layer._embed(ids, a.T)
        wide = torch.promote_types(y.dtype, rows.dtype)
        rows, factor = rows.to(wide), scale
        if own_scale is not None or isinstance(scale, Tensor):
            rows, factor = rows * (scale if own_scale is None else scale * own_scale.to(wide)), 1
        with without_autocast(y):
            y = torch.addmm(y.reshape(-1, y.shape[-1]).to(wide), rows.view(-1, rows.shape[-1]), b.to(wide).T, alpha=factor)
        y = y.view(*ids.shape, y.shape[-1])
        if type(layer.lora_variant.get(name)) is variants.DoraEmbeddingVariant:
            magnitude, norms_of = layer.lora_magnitude_vector[name], (layer.weight.T, a, b, scale)
            norms = _kept_norms(magnitude, name, *norms_of)
            y = y * (magnitude.weight / (row_norms(*norms_of) if norms is None else norms))
    return y.to(dtype)
