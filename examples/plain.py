"""What ``fastadapt.nn`` is compared with: bottlenecks and Compacter as plain PyTorch modules, op by op, and the LoRA layers,
prefixes and prompts of ``peft``.

The plain modules' attributes have the names of ``fastadapt.nn``, so that a ``state_dict`` of one loads into the other.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


class BottleneckAdapter(nn.Module):
    """``residual + scale * up(act(down(x)))``; ``skip`` adds ``skip_weight * x`` or bends the activation by a linear path."""

    def __init__(
        self, d: int, r: int, *, activation: str = "relu", residual: bool = True, scale: float = 1.0, skip: str | None = None
    ):  # fmt: skip
        super().__init__()
        self.down, self.up = nn.Linear(d, r), nn.Linear(r, d)
        self.activation, self.residual, self.scale = ACTIVATIONS[activation], residual, scale
        self.register_parameter("skip_weight", nn.Parameter(torch.zeros(d)) if skip == "channel" else None)
        self.register_parameter("hidden_skip_weight", nn.Parameter(torch.zeros(r)) if skip == "hidden" else None)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        z = self.down(x)
        hidden = self.activation(z)
        if self.hidden_skip_weight is not None:
            hidden = hidden + self.hidden_skip_weight * z
        y = self.up(hidden)
        if self.scale != 1.0:
            y = self.scale * y
        if self.skip_weight is not None:
            y = y + self.skip_weight * x
        if residual is None and self.residual:
            residual = x
        return y if residual is None else residual + y


class PHMLinear(nn.Module):
    """``x @ sum_i kron(rule[i], s[i] @ t[i]) + bias``; as in the library ``adapters`` the matrix is formed in every call."""

    def __init__(self, in_features: int, out_features: int, rule: nn.Parameter):
        super().__init__()
        n = len(rule)
        self.rule, self.bias = rule, nn.Parameter(torch.zeros(out_features))
        self.s = nn.Parameter(torch.randn(n, in_features // n, 1) * (in_features // n) ** -0.5)
        self.t = nn.Parameter(torch.randn(n, 1, out_features // n))

    def forward(self, x: Tensor) -> Tensor:
        products = self.rule[:, :, None, :, None] * (self.s @ self.t)[:, None, :, None, :]
        return x @ products.sum(0).reshape(x.shape[-1], -1) + self.bias


class CompacterAdapter(nn.Module):
    """``x + up(gelu(down(x)))``, two layers of Kronecker products with one rule, which other adapters have too."""

    def __init__(self, d: int, r: int, *, n: int, shared_rule: nn.Parameter):
        super().__init__()
        self.down, self.up = PHMLinear(d, r, shared_rule), PHMLinear(r, d, shared_rule)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(F.gelu(self.down(x)))


class ParallelAdapter(nn.Module):
    """``layer(x) + adapter(x)``."""

    def __init__(self, layer: nn.Module, adapter: BottleneckAdapter):
        super().__init__()
        self.layer, self.adapter = layer, adapter

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter(x, residual=self.layer(x))


def LoRALinear(base: nn.Linear, r: int, *, alpha: float = 16, dropout: float = 0.0, dora: bool = False) -> nn.Module:
    """The layer of the library ``peft`` around ``base``."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, use_dora=dora, target_modules=["layer"])
    return get_peft_model(nn.ModuleDict({"layer": base}), config).base_model.model["layer"]


def prefix_tuning(encoder: nn.Module, p: int, hidden: int | None) -> nn.Module:
    """The model of ``peft`` around ``encoder``: prefixes are a cache in front of each layer's keys, copied for the batch."""
    from peft import PrefixTuningConfig, get_peft_model

    config = PrefixTuningConfig(
        task_type="FEATURE_EXTRACTION", num_virtual_tokens=p, prefix_projection=hidden is not None, encoder_hidden_size=hidden
    )
    trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    model = get_peft_model(encoder, config).eval()
    for parameter in trained:  # of other adapters, which peft takes for a part of the frozen model
        parameter.requires_grad_(True)
    return model


def prompt_tuning(encoder: nn.Module, p: int) -> nn.Module:
    """The model of ``peft`` around ``encoder``."""
    from peft import PromptTuningConfig, get_peft_model

    return get_peft_model(encoder, PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=p)).eval()


def p_tuning(encoder: nn.Module, p: int) -> nn.Module:
    """The model of ``peft`` around ``encoder``: it runs the MLP of a prompt for every sentence."""
    from peft import PromptEncoderConfig, get_peft_model

    options = {"num_virtual_tokens": p, "encoder_hidden_size": encoder.config.hidden_size}
    return get_peft_model(encoder, PromptEncoderConfig(task_type="FEATURE_EXTRACTION", **options)).eval()


def load_prompt(theirs: nn.Module, ours: nn.Module) -> None:
    """Give the model of ``peft`` the prefixes or the prompt of an encoder of the demo, and its bottlenecks if it has some."""
    bottlenecks = [[m for m in model.modules() if type(m).__name__ == "BottleneckAdapter"] for model in (ours, theirs)]
    for source, target in zip(*bottlenecks, strict=True):
        target.load_state_dict(source.state_dict())
    if prefixes := getattr(ours, "prefixes", None):
        state = prefixes.state_dict()
        names = {"hidden.": "transform.0.", "output.": "transform.2."}
        if "prefix" in state:  # (layers, 2, h, p, e)
            state = {"embedding.weight": state["prefix"].permute(3, 0, 1, 2, 4).flatten(1)}
        for name, of_peft in names.items():
            state = {key.replace(name, of_peft): value for key, value in state.items()}
    else:
        state = {name.replace("mlp.", "mlp_head."): value for name, value in ours.prompt.state_dict().items()}
        if "weight" in state:  # no network makes it
            state = {"embedding.weight": state["weight"]}
    theirs.prompt_encoder["default"].load_state_dict(state)


NAMES_OF_PEFT = {
    ".base.": ".base_layer.", ".lora_A.": ".lora_A.default.", ".lora_B.": ".lora_B.default.",
    ".magnitude": ".lora_magnitude_vector.default.weight",
}  # fmt: skip


def translated(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A ``state_dict`` of a model with ``fastadapt.nn`` under the names of one with these modules."""
    for ours, theirs in NAMES_OF_PEFT.items():
        state = {name.replace(ours, theirs): value for name, value in state.items()}
    return state
