"""AdapterFusion of the library ``adapters`` on ``adapter_fusion``: its parameters, its state, its outputs."""

import torch
from adapters.methods import modeling
from torch import Tensor, nn

from ..nn.fusion import folded_query, projected
from ..ops.adapter_fusion import adapter_fusion
from ..ops.lora_linear import autocasts
from . import Row


class BertFusion(modeling.BertFusion):
    """``adapters.methods.modeling.BertFusion`` on kernels."""

    _fastadapt_backend = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, residual: Tensor, output_attentions: bool = False):
        drops, autocast = self.dropout.p and self.dropout.training, autocasts(query)
        same = torch.float64 not in (query.dtype, key.dtype) if autocast else query.dtype is key.dtype
        if key is not value or not same or _hooked(self) or (drops and self.config["residual_before"]):
            return super().forward(query, key, value, residual, output_attentions)
        dtype = torch.get_autocast_dtype(query.device.type) if autocast else query.dtype
        query, value = query.to(dtype), value.to(dtype)
        scale = 1 / self.T
        self.T = max(self.T - self.reduction, 1.0)
        projections = [self._modules.get(name) for name in ("query", "key", "value")]
        folded, branches = folded_query(query, *projections[:2]), value.movedim(2, 0)
        if drops:
            z, weights = _with_dropout(folded, branches, _common(query, *projections[:2]), scale, self.dropout)
        else:
            backend = self._fastadapt_backend
            z, weights = adapter_fusion(folded, branches, branches, scale=scale, return_weights=True, backend=backend)
        if self.config["residual_before"]:  # to add it to all values adds it to their mean, and as much to every score
            z, residual = z + residual, None
        y = projected(z, projections[2], residual).to(dtype)  # in which the library adds a wider residual too
        return (y, weights.detach().cpu().numpy()) if output_attentions else y


def _common(x: Tensor, query: nn.Linear | None, key: nn.Linear | None) -> Tensor | float:
    """What a bias of ``key`` adds to every score of a row: it cancels in a softmax, unless some scores are dropped before."""
    if key is None:
        return 0.0
    common = x @ (key.bias if query is None else query.weight.T @ key.bias)
    return (common if query is None else common + query.bias @ key.bias)[..., None]


def _with_dropout(query: Tensor, branches: Tensor, common: Tensor | float, scale: float, dropout: nn.Module):
    """The library drops scores, not weights: in PyTorch's own functions, so that the same ones are dropped."""
    weights = (scale * dropout(torch.einsum("...d,g...d->...g", query, branches) + common)).softmax(-1)
    return torch.einsum("...g,g...d->...d", weights.to(branches.dtype), branches), weights


def _hooked(layer: nn.Module) -> bool:
    """Whether calling one of its projections does more than its class says."""
    linears = [layer._modules[name] for name in ("query", "key", "value") if name in layer._modules]
    return any(type(m) is not nn.Linear or m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in linears)


def _examined(layer: nn.Module) -> tuple[str, str]:
    """State and reason of a fusion layer of the library."""
    if type(layer) not in (modeling.BertFusion, BertFusion):
        return "left", f"no kernel for {type(layer).__name__}"
    if "forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks or _hooked(layer):
        return "left", "its forward has been replaced, or has hooks"
    if layer.dropout.p and layer.config["residual_before"]:
        return "in part", f"dropout={layer.dropout.p} in training with residual_before"
    return "accelerated", ""


def accelerate(model: nn.Module, backend: str | None) -> list[Row]:
    """Swap the classes of the fusion layers that the kernel serves."""
    rows = []
    for path, layer in model.named_modules():
        if isinstance(layer, modeling.BertFusion):
            rows.append(Row(path, *_examined(layer)))
            if rows[-1].state != "left":
                layer.__class__, layer._fastadapt_backend = BertFusion, backend
    return rows


def restore(model: nn.Module) -> None:
    """Give every fusion layer its class back."""
    for module in model.modules():
        if type(module) is BertFusion:
            module.__class__ = modeling.BertFusion
            module.__dict__.pop("_fastadapt_backend", None)
