"""Bottleneck adapters of the library ``adapters`` as :class:`fastadapt.nn.BottleneckAdapter`."""

import torch
from torch import Tensor, nn

from ..nn import BottleneckAdapter


def _activation(function) -> str:
    """Our name of an activation module of ``transformers``."""
    name = type(function).__name__
    names = {
        "ReLU": "relu",
        "NewGELUActivation": "gelu_tanh",
        "SiLU": "silu",
        "SiLUActivation": "silu",
        "Tanh": "tanh",
        "LinearActivation": "identity",
        "Identity": "identity",
        "GELUActivation": "gelu",
        "GELUTanh": "gelu_tanh",
        "PytorchGELUTanh": "gelu_tanh",
    }
    if name not in names:
        raise ValueError(f"module must have an activation among {tuple(names)}, got {name}")
    return names[name]


def _refuse_unsupported(module) -> None:
    """Raise for what a BottleneckAdapter can't compute."""
    from adapters.methods.modeling import Adapter

    if not isinstance(module, Adapter):
        raise TypeError(f"module must be an adapters.methods.modeling.Adapter, got {type(module).__name__}")
    if not isinstance(module.adapter_up, nn.Linear):
        raise ValueError(f"module must have linear projections, got {type(module.adapter_up).__name__} (phm_layer=True)")
    for option, value in (("ln_after", module.add_layer_norm_after), ("use_gating", module.use_gating)):
        if value:
            raise ValueError(f"module must have {option}=False, got {value}")
    depth = module.DropPath.p if hasattr(module, "DropPath") else 0.0
    for option, p in (("dropout", module.dropout.p), ("stochastic_depth", depth)):
        if p and module.training:
            raise ValueError(f"module must have {option}=0.0 in training mode, got {p}")


@torch.no_grad()
def _copy(module, adapter: BottleneckAdapter, back: bool = False) -> None:
    """Copy values and ``requires_grad`` from ``module`` to ``adapter``, or back."""
    norm = module.adapter_norm_before if module.add_layer_norm_before else None
    down = module.adapter_down[1 if norm is not None else 0]
    pairs = [(down, adapter.down), (module.adapter_up, adapter.up)] + ([] if norm is None else [(norm, adapter.norm)])
    pairs = [(getattr(t, name), getattr(o, name)) for t, o in pairs for name in ("weight", "bias")]
    if isinstance(module.scaling, Tensor):
        pairs.append((module.scaling, adapter.scale))
    for theirs, ours in pairs:
        source, target = (ours, theirs) if back else (theirs, ours)
        if source.shape != target.shape:
            raise ValueError(f"adapter must match the shapes of module, got {tuple(ours.shape)} for {tuple(theirs.shape)}")
        target.copy_(source)
        target.requires_grad_(source.requires_grad)


def from_adapters(module) -> BottleneckAdapter:
    """Build a :class:`fastadapt.nn.BottleneckAdapter` with the weights of a bottleneck adapter of ``adapters``.

    ``module(x, residual_input)[0]`` equals ``from_adapters(module)(x, residual_input)``. Where the library's own wiring passes
    ``x`` itself as ``residual_input`` (DoubleSeqBnConfig, AdapterPlusConfig), the new adapter has ``residual=True`` and needs
    no second argument. Otherwise it has ``residual=False``: SeqBnConfig feeds it the normalised sum and adds the sublayer's
    output, ParBnConfig feeds it the sublayer's input and adds the sublayer's output; pass that as ``residual``.

    Args:
        module: an ``adapters.methods.modeling.Adapter`` or ``ParallelAdapter``, as found in a model under
            ``...adapters[name]``. Gating, a LayerNorm after the adapter and PHM layers are not supported; dropout and
            stochastic depth only in evaluation mode, where they do nothing.

    Returns:
        A new module on the same device and in the same dtype; values and ``requires_grad`` are copied.
    """
    _refuse_unsupported(module)
    from adapters.methods.modeling import ParallelAdapter

    up, scale = module.adapter_up, module.scaling
    if isinstance(scale, Tensor):
        scale = "learned" if scale.numel() == 1 else "channel"
    own_residual = not module.original_ln_before or not module.residual_before_ln
    adapter = BottleneckAdapter(
        up.out_features, up.in_features, activation=_activation(module.non_linearity.f),
        norm="pre" if module.add_layer_norm_before else None, scale=scale,
        residual=own_residual and not isinstance(module, ParallelAdapter),
        norm_eps=module.adapter_norm_before.eps if module.add_layer_norm_before else 1e-5,
        device=up.weight.device, dtype=up.weight.dtype,
    )  # fmt: skip
    _copy(module, adapter)
    return adapter.train(module.training)


def to_adapters(adapter: BottleneckAdapter, module) -> None:
    """Copy the weights of ``adapter`` back into ``module``, whose options must be those it was built from.

    Saving the model with the library's own ``save_adapter`` then writes a checkpoint that it can load anywhere.
    """
    _refuse_unsupported(module)
    expected = from_adapters(module).options()
    for name, value in adapter.options().items():
        if name != "residual" and value != expected[name]:
            raise ValueError(f"adapter must have {name}={expected[name]!r} like module, got {value!r}")
    _copy(module, adapter, back=True)
