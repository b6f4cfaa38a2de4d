"""Adapters of the library ``adapters`` as modules of fastadapt, and back."""

import torch
from adapters.methods.modeling import Adapter, ParallelAdapter, PHMLayer
from torch import Tensor, nn

from ..nn import BottleneckAdapter, CompacterAdapter, PHMLinear
from ..nn.kron import Rule

# Our names of activation modules of ``transformers``.
ACTIVATIONS = {
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


def _activation(function) -> str:
    name = type(function).__name__
    if name not in ACTIVATIONS:
        raise ValueError(f"module must have an activation among {tuple(ACTIVATIONS)}, got {name}")
    return ACTIVATIONS[name]


def _refuse_unsupported(module) -> None:
    """Raise for what our modules can't compute."""
    if not isinstance(module, Adapter):
        raise TypeError(f"module must be an adapters.methods.modeling.Adapter, got {type(module).__name__}")
    up = module.adapter_up
    if not isinstance(up, nn.Linear | PHMLayer):
        raise ValueError(f"module must have linear projections or PHM layers, got {type(up).__name__}")
    options = [("ln_after", module.add_layer_norm_after), ("use_gating", module.use_gating)]
    if isinstance(up, PHMLayer):
        options.append(("shared_W_phm", up.shared_W_phm))
    for option, value in options:
        if value:
            raise ValueError(f"module must have {option}=False, got {value}")
    if isinstance(up, PHMLayer) and isinstance(module.scaling, Tensor) and module.scaling.numel() > 1:
        raise ValueError("module must have a scaling of one number with phm_layer=True, got 'channel'")
    depth = module.DropPath.p if hasattr(module, "DropPath") else 0.0
    for option, p in (("dropout", module.dropout.p), ("stochastic_depth", depth)):
        if p and module.training:
            raise ValueError(f"module must have {option}=0.0 in training mode, got {p}")


def _of_phm(theirs: PHMLayer, ours: PHMLinear, rule: Rule | None) -> list[tuple]:
    """Pairs of parameters; those of a shared rule are in ``rule``."""
    pairs = [(theirs.W_left, ours.s), (theirs.W_right, ours.t)] if theirs.factorized_phm_W else [(theirs.W, ours.b)]
    if theirs.shared_phm_rule:
        own = (None, None) if rule is None else rule if theirs.factorized_phm_rule else (rule,)
    elif theirs.factorized_phm_rule:
        own = theirs.phm_rule_left, theirs.phm_rule_right
    else:
        own = (theirs.phm_rule,)
    parts = (ours.rule_left, ours.rule_right) if ours.rule is None else (ours.rule,)
    return [*pairs, *zip(own, parts), (theirs.b, ours.bias)]


@torch.no_grad()
def _copy(module, adapter, rule: Rule | None = None, back: bool = False) -> None:
    """Copy values and ``requires_grad`` from ``module`` to ``adapter``, or back, where also the shared ``rule`` is theirs."""
    norm = module.adapter_norm_before if module.add_layer_norm_before else None
    projections = [(module.adapter_down[0 if norm is None else 1], adapter.down), (module.adapter_up, adapter.up)]
    pairs = [] if norm is None else [(norm.weight, adapter.norm.weight), (norm.bias, adapter.norm.bias)]
    for theirs, ours in projections:
        if isinstance(theirs, PHMLayer):
            pairs += _of_phm(theirs, ours, rule if back else None)
        else:
            pairs += [(theirs.weight, ours.weight), (theirs.bias, ours.bias)]
    if isinstance(module.scaling, Tensor):
        pairs.append((module.scaling, adapter.scale))
    for theirs, ours in pairs:
        if theirs is None or ours is None:  # a bias that neither has, or a rule that stays where it is
            continue
        source, target = (ours, theirs) if back else (theirs, ours)
        if source.shape != target.shape:
            raise ValueError(f"adapter must match the shapes of module, got {tuple(ours.shape)} for {tuple(theirs.shape)}")
        target.copy_(source)
        target.requires_grad_(source.requires_grad)


def shared_rule(model, name: str) -> Rule:
    """The rule that all PHM layers of the adapter ``name`` share in a live model: its own parameter, or a pair of them."""
    parameters = model.base_model.shared_parameters[name]
    return parameters["phm_rule"] if "phm_rule" in parameters else (parameters["phm_rule_left"], parameters["phm_rule_right"])


def from_adapters(module, shared_rule: Rule | None = None) -> BottleneckAdapter | CompacterAdapter:
    """Build a :class:`fastadapt.nn.BottleneckAdapter` with the weights of a bottleneck adapter of ``adapters``, or for one of
    PHM layers a :class:`fastadapt.nn.CompacterAdapter`.

    ``module(x, residual_input)[0]`` equals ``from_adapters(module)(x, residual_input)``, and of a ``ParallelAdapter``, which
    leaves the sum to the library, ``from_adapters(module)(x)``. Where the library's own wiring passes ``x`` itself as
    ``residual_input`` (DoubleSeqBnConfig, CompacterConfig, AdapterPlusConfig), the new adapter has ``residual=True`` and needs
    no second argument. Otherwise it has ``residual=False``: SeqBnConfig and CompacterPlusPlusConfig feed it the normalised sum
    and add the sublayer's output, ParBnConfig feeds it the sublayer's input and adds the sublayer's output; pass that as
    ``residual``.

    Args:
        module: an ``adapters.methods.modeling.Adapter`` or ``ParallelAdapter``, as found in a model under
            ``...adapters[name]``. Gating, a LayerNorm after the adapter and, of PHM layers, weights that are shared
            (``shared_W_phm``) and a scaling per channel are not supported; dropout and stochastic depth only in evaluation
            mode, where they do nothing.
        shared_rule: for a module with ``shared_phm_rule`` the parameter, or pair, that the new adapter shares with others. The
            function ``shared_rule(model, name)`` finds the library's own, ``copy.deepcopy`` of it is one for the new adapters.

    Returns:
        A new module on the same device and in the same dtype; values and ``requires_grad`` are copied.
    """
    _refuse_unsupported(module)
    up, scale = module.adapter_up, module.scaling
    if isinstance(scale, Tensor):
        scale = "learned" if scale.numel() == 1 else "channel"
    own_residual = not module.original_ln_before or not module.residual_before_ln
    phm = isinstance(up, PHMLayer)
    weight = next(up.parameters()) if phm else up.weight
    options = {
        "activation": _activation(module.non_linearity.f),
        "norm": "pre" if module.add_layer_norm_before else None, "scale": scale,
        "residual": own_residual and not isinstance(module, ParallelAdapter),
        "norm_eps": module.adapter_norm_before.eps if module.add_layer_norm_before else 1e-5,
        "device": weight.device, "dtype": weight.dtype,
    }  # fmt: skip
    if phm:
        if up.shared_phm_rule != (shared_rule is not None):
            wanted, got = ("a Parameter or a pair", "None") if up.shared_phm_rule else ("None", type(shared_rule).__name__)
            raise ValueError(f"shared_rule must be {wanted} for a module with shared_phm_rule={up.shared_phm_rule}, got {got}")
        adapter = CompacterAdapter(
            up.out_features, up.in_features, n=up.phm_dim, rank=up.phm_rank if up.factorized_phm_W else None,
            bias=up.b is not None, shared_rule=shared_rule, factorized_rule=up.factorized_phm_rule, **options,
        )  # fmt: skip
    else:
        adapter = BottleneckAdapter(up.out_features, up.in_features, **options)
    _copy(module, adapter)
    return adapter.train(module.training)


def to_adapters(adapter: BottleneckAdapter | CompacterAdapter, module, shared_rule: Rule | None = None) -> None:
    """Copy the weights of ``adapter`` back into ``module``, whose options must be those it was built from.

    Saving the model with the library's own ``save_adapter``, or that of this module, then writes a checkpoint that the library
    can load anywhere. ``shared_rule`` is the library's own, which is written to; None leaves it as it is.
    """
    _refuse_unsupported(module)
    theirs = shared_rule
    if isinstance(module.adapter_up, PHMLayer) and module.adapter_up.shared_phm_rule:
        theirs = (adapter.up.rule_left, adapter.up.rule_right) if adapter.up.rule is None else adapter.up.rule
    expected = from_adapters(module, theirs).options()
    for name, value in adapter.options().items():
        if name != "residual" and value != expected[name]:
            raise ValueError(f"adapter must have {name}={expected[name]!r} like module, got {value!r}")
    _copy(module, adapter, shared_rule, back=True)
