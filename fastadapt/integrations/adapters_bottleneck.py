"""What a bottleneck adapter of the library ``adapters`` computes, on the kernels here.

Every function looks at the state of the adapter anew, as the library does, so that nothing has to be told of a change. What has
no kernel is None, for the library to compute; ``refused`` and ``random`` say why in words.
"""

import torch
from adapters import Stack
from adapters.context import AdapterSetup, ForwardContext
from adapters.methods.modeling import Activation_Function_Class, ParallelAdapter, PHMLayer
from torch import Tensor, nn

from ..ops.bottleneck import bottleneck
from ..ops.compacter import compacter, kron_sum, product
from ..ops.lora_linear import autocasts, without_autocast
from . import hooked
from .adapters_modules import ACTIVATIONS
from .dtypes import served


def refused(layer) -> str | None:
    """Why no kernel can compute an adapter with these parts, or None."""
    modules = layer._modules
    sequence, up = modules["adapter_down"], modules["adapter_up"]
    *norm, down, activation = sequence._modules.values()
    if layer.use_gating:
        return "use_gating"
    if layer.add_layer_norm_after:
        return "ln_after"
    if type(activation.f).__name__ not in ACTIVATIONS:
        return f"the activation {getattr(activation.f, '__name__', type(activation.f).__name__)}"
    kinds = [type(part) for part in (*norm, down, activation, up)]
    if kinds != [nn.LayerNorm] * len(norm) + [type(down), Activation_Function_Class, type(down)]:
        return f"{', '.join(kind.__name__ for kind in kinds)} in it"
    if type(down) is not nn.Linear and type(down) is not PHMLayer:
        return f"{type(down).__name__} in it"
    if any(map(hooked, (sequence, *norm, down, activation, activation.f, up, modules["dropout"]))):
        return "hooks in it"
    return None


def random(layer) -> str | None:
    """What of an adapter draws at random in training, or None."""
    words = [f"dropout={layer.dropout.p}"] if layer.dropout.p else []
    depth = layer._modules.get("DropPath")  # which the library's parallel adapters have, and pass by
    if depth is not None and depth.p and not isinstance(layer, ParallelAdapter):
        words.append(f"stochastic_depth={depth.p}")
    return " and ".join(words) or None


def draws(layer) -> bool:
    """Whether it does so now."""
    dropout, depth = layer._modules["dropout"], layer._modules.get("DropPath")
    return bool(
        (dropout.p and dropout.training)
        or (depth is not None and depth.p and depth.training and not isinstance(layer, ParallelAdapter))
    )


def alone(config) -> bool:
    """Whether the active adapters are a chain of single ones: nothing then reads more of them than their output."""
    context = AdapterSetup.get_context()
    setup = config.active_setup if context is None else context.adapter_setup
    return type(setup) is Stack and all(type(child) is str for child in setup)


def _factors(layer: PHMLayer) -> tuple:
    """``(a, b)`` as the ops take them, pairs where they are factorised: the layer's own, or what the model shares."""

    def own_or_shared(shared: bool, factorized: bool, own: str, name: str):
        names = [f"{name if shared else own}{end}" for end in (("_left", "_right") if factorized else ("",))]
        if shared:
            parameters = ForwardContext.get_context().shared_parameters[layer.name]
            found = [parameters[name] for name in names]
        else:
            found = [getattr(layer, name) for name in names]
        return tuple(found) if factorized else found[0]

    a = own_or_shared(layer.shared_phm_rule, layer.factorized_phm_rule, "phm_rule", "phm_rule")
    return a, own_or_shared(layer.shared_W_phm, layer.factorized_phm_W, "W", f"W_{layer.position}")


def _projections(down, up) -> tuple:
    """The op for the two layers, its weights and biases, and the dtype of these."""
    if type(down) is nn.Linear:
        return bottleneck, (down.weight, up.weight), (down.bias, up.bias), down.weight.dtype
    factors = _factors(down), _factors(up)
    if down.factorized_phm_W:
        return compacter, [(a, *b) for a, b in factors], (down.b, up.b), factors[0][1][0].dtype
    with without_autocast(factors[0][1]):
        matrices = [kron_sum(product("a", a), b).T for a, b in factors]
    return bottleneck, matrices, (down.b, up.b), matrices[0].dtype


def adapted(layer, x: Tensor, residual: Tensor | None, one_pass: bool) -> tuple[Tensor, Tensor | None] | None:
    """``residual + up`` and ``up``; None where dtypes are not those of the kernels.

    With ``one_pass``, and where the kernel can add ``residual`` in its own pass, ``up`` is never made, and None.
    """
    *norm, down, activation = layer._modules["adapter_down"]._modules.values()
    op, weights, (down_bias, up_bias), own_dtype = _projections(down, layer._modules["adapter_up"])
    dtype = torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype
    if not served(dtype, own_dtype):
        return None
    options, hidden = {}, x
    if norm and op is compacter:
        hidden = norm[0](x)
    elif norm:
        options = {"norm_weight": norm[0].weight, "norm_bias": norm[0].bias, "norm_eps": norm[0].eps}
    scale, factor = layer.scaling, None
    if isinstance(scale, Tensor):
        if scale.dtype is not dtype or (op is compacter and scale.numel() > 1):  # another dtype is that of the output, if wider
            scale, factor = 1.0, scale
        elif scale.numel() == 1:
            scale = scale.view(())
    added = residual if one_pass and factor is None and residual is not None and residual.dtype is dtype else None
    y = op(
        hidden.to(dtype), *weights, down_bias=down_bias, up_bias=up_bias, residual=added, scale=scale,
        activation=ACTIVATIONS[type(activation.f).__name__], backend=layer._fastadapt_backend, **options,
    )  # fmt: skip
    if added is not None:
        return y, None
    y = y if factor is None else y * factor
    return (y if residual is None else y + residual), y
