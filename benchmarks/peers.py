"""What the kernels are measured against: the code that users write, and the modules of other libraries."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from fastadapt.ops.bottleneck import ACTIVATIONS

# A peer takes the arguments of the op and returns a call without arguments that computes the op's output, with the tensors
# it differentiates by the names of the op's arguments; or None where the other library has no such call.
Peer = Callable[[dict], tuple[Callable[[], Tensor], dict[str, Tensor]] | None]


def bottleneck_by_hand(x, down_weight, up_weight, *, down_bias, up_bias, residual, scale, activation):
    hidden = ACTIVATIONS[activation](F.linear(x, down_weight, down_bias))
    return residual + scale * F.linear(hidden, up_weight, up_bias)


def hold(module: nn.Module, name: str, tensor: Tensor | None) -> nn.Parameter | None:
    """Make ``tensor`` the parameter ``name`` of a module, without a copy."""
    parameter = None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)
    setattr(module, name, parameter)
    return parameter


def bottleneck_of_adapters(arguments: dict) -> tuple | None:
    """The module of the library ``adapters``, holding the same tensors."""
    a = arguments
    plain = {"x", "down_weight", "up_weight", "down_bias", "up_bias", "residual", "scale", "activation"}
    if set(a) != plain or a["residual"] is None or a["activation"] != "relu" or not isinstance(a["scale"], float):
        return None
    try:
        from adapters import SeqBnConfig
        from adapters.methods.modeling import Adapter
    except ImportError:
        return None

    r, d = a["down_weight"].shape
    module = Adapter("peer", d, r, SeqBnConfig(scaling=a["scale"]))
    linears = {"down": module.adapter_down[0], "up": module.adapter_up}
    names = {f"{side}_{kind}": (linear, kind) for side, linear in linears.items() for kind in ("weight", "bias")}
    inputs = {"x": a["x"], **{name: hold(*place, a[name]) for name, place in names.items()}}
    if a["residual"] is not a["x"]:
        inputs["residual"] = a["residual"]
    return lambda: module(a["x"], a["residual"])[0], inputs


def lora_by_hand(x, weight, bias, lora_a, lora_b, *, scale, dropout_p=0.0, magnitude=None, adapter_ids=None):
    if adapter_ids is not None:  # one a sequence
        a, b = lora_a[adapter_ids], lora_b[adapter_ids]
        return F.linear(x, weight, bias) + scale * (x @ a.transpose(1, 2)) @ b.transpose(1, 2)
    branch = scale * F.linear(F.linear(F.dropout(x, dropout_p), lora_a), lora_b)
    if magnitude is None:
        return F.linear(x, weight, bias) + branch
    norm = (weight + scale * lora_b @ lora_a).norm(dim=1).detach()
    return magnitude / norm * (F.linear(x, weight) + branch) + bias


def layer_of_peft(arguments: dict) -> tuple | None:
    """The layer of the library ``peft`` in training, holding the same tensors."""
    a = arguments
    known = {"x", "weight", "bias", "lora_a", "lora_b", "scale", "dropout_p", "magnitude"}
    if not set(a) <= known or not isinstance(a["scale"], float):
        return None
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        return None

    (r, k), n, dora = a["lora_a"].shape, a["weight"].shape[0], "magnitude" in a
    model = nn.ModuleDict({"target": nn.Linear(k, n)})
    config = LoraConfig(
        r=r, lora_alpha=a["scale"] * r, lora_dropout=a.get("dropout_p", 0.0), use_dora=dora, target_modules=["target"]
    )
    layer = get_peft_model(model, config).base_model.model["target"].train()
    for name in ("weight", "bias"):
        hold(layer.base_layer, name, a[name])
    places = {"lora_a": layer.lora_A, "lora_b": layer.lora_B, **({"magnitude": layer.lora_magnitude_vector} if dora else {})}
    inputs = {"x": a["x"], **{name: hold(place["default"], "weight", a[name]) for name, place in places.items()}}
    return lambda: layer(a["x"]), inputs


def bank_of_peft(arguments: dict) -> tuple | None:
    """The layer of the library ``peft`` with an adapter for each of the bank, and ``adapter_names`` for the sequences."""
    a = arguments
    if set(a) != {"x", "weight", "bias", "lora_a", "lora_b", "scale", "adapter_ids"} or not isinstance(a["scale"], float):
        return None
    try:
        from peft import LoraConfig
        from peft.tuners.lora import Linear
    except ImportError:
        return None

    (g, r, k), n = a["lora_a"].shape, a["weight"].shape[0]
    names = [str(i) for i in range(g)]
    config = LoraConfig(r=r, lora_alpha=a["scale"] * r)
    layer = Linear(nn.Linear(k, n), names[0], config=config, r=r, lora_alpha=config.lora_alpha)
    for name in names[1:]:
        layer.update_layer(name, r, config.lora_alpha, config=config)
    for name in ("weight", "bias"):
        hold(layer.base_layer, name, a[name])
    for adapter in (*layer.lora_A.values(), *layer.lora_B.values()):
        del adapter.weight
    chosen = [names[i] for i in a["adapter_ids"].tolist()]

    def call():
        for bank, adapters in ((a["lora_a"], layer.lora_A), (a["lora_b"], layer.lora_B)):
            for name, weight in zip(names, bank.unbind()):
                adapters[name].weight = weight
        return layer(a["x"], adapter_names=chosen)

    return call, {name: a[name] for name in ("x", "lora_a", "lora_b")}


def loop_over_adapters(arguments: dict) -> tuple | None:
    """The rows of each adapter of a bank by themselves."""
    a = arguments
    if "adapter_ids" not in a:
        return None

    def call():
        y = F.linear(a["x"], a["weight"], a["bias"])
        for i, (lora_a, lora_b) in enumerate(zip(a["lora_a"].unbind(), a["lora_b"].unbind())):
            rows = (a["adapter_ids"] == i).nonzero()[:, 0]
            y = y.index_add(0, rows, a["scale"] * F.linear(F.linear(a["x"][rows], lora_a), lora_b))
        return y

    return call, {name: a[name] for name in ("x", "lora_a", "lora_b")}


def frozen_layer(arguments: dict) -> tuple:
    x, weight, bias = (arguments[name] for name in ("x", "weight", "bias"))
    return lambda: F.linear(x, weight, bias), {"x": x}


def kron_by_hand(x, a, s, t, *, scale, bias=None, residual=None):
    z = torch.einsum("...ap,tpq->...atq", x.unflatten(-1, (a.shape[1], -1)), s)
    y = torch.einsum("...btq,tqp->...bp", torch.einsum("...atq,tab->...btq", z, a), t).flatten(-2)
    y = scale * y
    y = y if bias is None else y + bias
    return y if residual is None else residual + y


def compacter_by_hand(
    x, down_a, down_s, down_t, up_a, up_s, up_t, *, down_bias, up_bias, residual, scale, activation
):  # fmt: skip
    hidden = ACTIVATIONS[activation](kron_by_hand(x, down_a, down_s, down_t, scale=1.0) + down_bias)
    return residual + scale * (kron_by_hand(hidden, up_a, up_s, up_t, scale=1.0) + up_bias)


def compacter_of_adapters(arguments: dict) -> tuple | None:
    """The module of the library ``adapters`` with PHM layers, holding the same tensors.

    Its rules are each layer's own here, as they are in the arguments; sharing one would save no arithmetic.
    """
    a = arguments
    if "adapter_ids" in a or a["residual"] is None or a["activation"] != "gelu" or not isinstance(a["scale"], float):
        return None
    try:
        from adapters import CompacterConfig
        from adapters.methods.modeling import Adapter
    except ImportError:
        return None

    (n, chunk, q), r = a["down_s"].shape, a["down_a"].shape[-1] * a["down_t"].shape[-1]
    config = CompacterConfig(phm_dim=n, phm_rank=q, shared_phm_rule=False, scaling=a["scale"])
    module = Adapter("peer", n * chunk, r, config)
    layers = {"down": module.adapter_down[0], "up": module.adapter_up}
    kinds = {"a": "phm_rule", "s": "W_left", "t": "W_right", "bias": "b"}
    inputs = {"x": a["x"]}
    for side, layer in layers.items():
        inputs |= {f"{side}_{kind}": hold(layer, theirs, a[f"{side}_{kind}"]) for kind, theirs in kinds.items()}
    if a["residual"] is not a["x"]:
        inputs["residual"] = a["residual"]
    return lambda: module(a["x"], a["residual"])[0], inputs


def lokr_of_peft(arguments: dict) -> tuple | None:
    """What the LoKr layer of the library ``peft`` adds to its frozen layer, without that layer's own product, as in the op."""
    a = arguments
    if set(a) != {"x", "a", "s", "t", "scale"} or len(a["a"]) != 1 or not isinstance(a["scale"], float):
        return None
    try:
        from peft import LoKrConfig
        from peft.tuners.lokr import Linear
    except ImportError:
        return None

    (_, a_in, a_out), (_, b_in, q), b_out = a["a"].shape, a["s"].shape, a["t"].shape[2]
    frozen = nn.Linear(a_in * b_in, a_out * b_out, device="meta")  # its shape is asked for, and nothing else
    layer = Linear(frozen, "peer", config=LoKrConfig(r=q), r=q, alpha=a["scale"] * q)
    for place in ("lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b"):
        delattr(layer, place)
        setattr(layer, place, {})  # holds views of the arguments, which are no parameters

    def call():
        layer.lokr_w1["peer"] = a["a"][0].T.contiguous()  # a few numbers
        layer.lokr_w2_a["peer"], layer.lokr_w2_b["peer"] = a["t"][0].T, a["s"][0].T
        return layer._get_delta_activations("peer", a["x"])

    return call, {name: a[name] for name in ("x", "a", "s", "t")}


def kron_of_fastkron(arguments: dict) -> tuple | None:
    """The product of the library ``pyfastkron`` with the two factors, of which the second is multiplied out first."""
    a = arguments
    if set(a) != {"x", "a", "s", "t", "scale"} or len(a["a"]) != 1 or a["x"].dtype != torch.float32:
        return None
    try:
        from pyfastkron import fastkrontorch
    except ImportError:
        return None

    def call():
        return fastkrontorch.gemkm(a["x"], [a["scale"] * a["a"][0], a["s"][0] @ a["t"][0]])

    return call, {name: a[name] for name in ("x", "a", "s", "t")}


def joined(prefix: Tensor, own: Tensor, heads: int) -> Tensor:
    """What other libraries attend to: a copy of the prefix for each sequence, one of the own keys, and heads repeated."""
    both = torch.cat([prefix.to(own.dtype).expand(len(own), -1, -1, -1), own], 2)
    return both if both.shape[1] == heads else both.repeat_interleave(heads // both.shape[1], 1)


MASKS: dict[tuple, Tensor] = {}  # the layers of a model share one: to make it is no part of what is measured


def lower_right_mask(t: int, p: int, device: torch.device) -> Tensor:
    if (t, p, device) not in MASKS:
        MASKS[t, p, device] = torch.ones(t, p + t, dtype=torch.bool, device=device).tril(p)
    return MASKS[t, p, device]


def attention_by_hand(q, k, v, prefix_k, prefix_v, *, is_causal, scale):
    """As in ``peft`` and ``adapters``: PyTorch's attention over the concatenation, with a mask for what is_causal can't say."""
    keys, values = joined(prefix_k, k, q.shape[1]), joined(prefix_v, v, q.shape[1])
    mask = lower_right_mask(q.shape[2], prefix_k.shape[1], q.device) if is_causal else None
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale)


def _tensors_of_attention(arguments: dict) -> dict[str, Tensor]:
    return {name: arguments[name] for name in ("q", "k", "v", "prefix_k", "prefix_v")}


def attention_of_lower_right(arguments: dict) -> tuple:
    """The same with the mask that PyTorch has for a cache in front of the own keys."""
    tensors = _tensors_of_attention(arguments)
    q, k, v, prefix_k, prefix_v = tensors.values()
    mask = causal_lower_right(q.shape[2], prefix_k.shape[1] + k.shape[2])

    def call():
        keys, values = joined(prefix_k, k, q.shape[1]), joined(prefix_v, v, q.shape[1])
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=arguments["scale"])

    return call, tensors


def attention_of_flex(arguments: dict) -> tuple | None:
    """FlexAttention over the concatenation, whose kernels know grouped queries; on a CPU it has no backward pass."""
    tensors = _tensors_of_attention(arguments)
    q, k, v, prefix_k, prefix_v = tensors.values()
    if q.is_cpu and q.requires_grad:
        return None
    p, heads = prefix_k.shape[1], k.shape[1]
    sizes = {"Q_LEN": q.shape[2], "KV_LEN": p + k.shape[2], "device": q.device}
    blocks = create_block_mask(lambda b, h, i, j: j <= i + p, None, None, **sizes)

    def call():
        keys, values = joined(prefix_k, k, heads), joined(prefix_v, v, heads)
        return flex_attention(q, keys, values, block_mask=blocks, scale=arguments["scale"], enable_gqa=heads < q.shape[1])

    return call, tensors


def attention_without_prefix(arguments: dict) -> tuple | None:
    """PyTorch's causal attention itself, where the prefix is empty."""
    q, k, v, prefix_k, _ = _tensors_of_attention(arguments).values()
    if prefix_k.shape[1]:
        return None
    options = {"is_causal": True, "scale": arguments["scale"], "enable_gqa": k.shape[1] < q.shape[1]}
    return lambda: F.scaled_dot_product_attention(q, k, v, **options), {"q": q, "k": k, "v": v}


def fusion_of_adapters(arguments: dict) -> tuple | None:
    """What ``BertFusion`` of the library ``adapters`` computes between its projections and its residual, with the adapters side
    by side for each token as it stacks them."""
    a = arguments
    if a["values"] is not a["keys"] or not isinstance(a["scale"], float):
        return None
    keys = a["keys"].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(a["keys"].requires_grad)

    def call():
        stacked = keys.transpose(0, 1)
        scores = torch.squeeze(torch.matmul(a["query"].unsqueeze(-2), stacked.transpose(-2, -1)), dim=-2)
        weights = F.softmax(scores * a["scale"], dim=-1)
        return torch.squeeze(torch.matmul(weights.unsqueeze(-2), stacked), dim=-2)

    return call, {"query": a["query"], "keys": keys}


# How users write an op in plain PyTorch, for the benchmark's arguments; an op that isn't here uses its reference.
BY_HAND: dict[str, Callable] = {
    "bottleneck": bottleneck_by_hand, "lora_linear": lora_by_hand, "compacter": compacter_by_hand, "kron_linear": kron_by_hand,
    "prefix_attention": attention_by_hand,
}  # fmt: skip
PEERS: dict[str, dict[str, Peer]] = {
    "adapter_fusion": {"adapters": fusion_of_adapters},
    "bottleneck": {"adapters": bottleneck_of_adapters},
    "lora_linear": {"peft": layer_of_peft, "peft adapter_names": bank_of_peft, "loop over adapters": loop_over_adapters},
    "compacter": {"adapters": compacter_of_adapters},
    "kron_linear": {"peft": lokr_of_peft, "pyfastkron": kron_of_fastkron},
    "prefix_attention": {
        "causal_lower_right": attention_of_lower_right, "FlexAttention": attention_of_flex, "SDPA": attention_without_prefix,
    },
}  # fmt: skip
ONLY_COMPILED = ("FlexAttention",)  # peers that aren't meant to run otherwise
# What is left of an op without its adapter: like a peer, with another output. The time over it is what the adapter costs.
PARTS: dict[str, dict[str, Peer]] = {"lora_linear": {"frozen layer": frozen_layer}}
