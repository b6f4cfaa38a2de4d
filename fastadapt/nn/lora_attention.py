"""LoRA on the projections of a frozen multi-head attention."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.lora_linear import lora_linear
from .lora import check_no_hooks, check_options, pair

PROJECTIONS = ("q", "k", "v", "out")


class LoRAMultiheadAttention(nn.Module):
    """A frozen ``nn.MultiheadAttention`` with LoRA on some of its projections, called as that is.

    Each projection among ``targets`` becomes ``x @ W.T + bias + scale * dropout(x) @ A.T @ B.T`` with ``A``, ``B`` its own and
    ``scale = alpha / r``. Projections next to each other that read the same tensor, as q, k and v do in self-attention, are one
    call of :func:`fastadapt.lora_linear` with one pass over that tensor and one dropout mask. Attention runs through
    ``F.scaled_dot_product_attention`` unless the weights are asked for. A new layer computes what ``base`` does. Source: Hu et
    al. 2021, where q and v are adapted.

    ``state_dict`` has the keys of ``base`` and, for each target, ``lora_A.<target>.weight`` ``(r, k)`` and
    ``lora_B.<target>.weight`` ``(n, r)``. The module stands in for ``base`` in ``nn.TransformerEncoderLayer`` and the like,
    which then don't take their fast path; build ``nn.TransformerEncoder`` with ``enable_nested_tensor=False``.

    Args:
        base: ``nn.MultiheadAttention`` without ``add_bias_kv`` and ``add_zero_attn``. It is frozen and kept, not copied; its
            ``dropout`` acts on the attention weights in training.
        r, alpha, dropout, rslora, backend, dtype: as in :class:`LoRALinear`.
        targets: the adapted projections, of ``"q"``, ``"k"``, ``"v"``, ``"out"``.
    """

    # nn.TransformerEncoderLayer asks for it before its fast path, which would run the frozen weights alone.
    _qkv_same_embed_dim = False

    def __init__(
        self, base: nn.MultiheadAttention, r: int = 8, *, targets: tuple[str, ...] = ("q", "v"), alpha: float = 16,
        dropout: float = 0.0, rslora: bool = False, backend: str | None = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        check_options(r, alpha, dropout, backend, rslora=rslora)
        if not isinstance(base, nn.MultiheadAttention) or type(base).forward is not nn.MultiheadAttention.forward:
            raise TypeError(f"base must be a torch.nn.MultiheadAttention, got {type(base).__name__}")
        if base.bias_k is not None or base.add_zero_attn:
            raise ValueError("base must have add_bias_kv=False and add_zero_attn=False, got True")
        check_no_hooks(base)
        if isinstance(targets, str) or not targets or not set(targets) <= set(PROJECTIONS):
            raise ValueError(f"targets must be some of {PROJECTIONS}, got {targets!r}")
        super().__init__()
        self.base = base.requires_grad_(False)
        self.r, self.alpha, self.rslora, self.backend = r, alpha, rslora, backend
        self.scale = alpha / (math.sqrt(r) if rslora else r)
        self.dropout = float(dropout)
        self.embed_dim, self.num_heads, self.batch_first = base.embed_dim, base.num_heads, base.batch_first
        self.targets = tuple(name for name in PROJECTIONS if name in targets)
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        for name in self.targets:
            k = {"k": base.kdim, "v": base.vdim}.get(name, base.embed_dim)
            self.lora_A[name], self.lora_B[name] = pair(k, base.embed_dim, r, base.out_proj.weight, dtype=dtype)
        self.reset_parameters()
        self.train(base.training)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew, as what ``base`` alone computes."""
        for name in self.targets:
            self.lora_A[name].reset_parameters()
            self.lora_B[name].weight.zero_()

    @property
    def in_proj_weight(self) -> Tensor | None:
        return self.base.in_proj_weight

    @property
    def in_proj_bias(self) -> Tensor | None:
        return self.base.in_proj_bias

    @property
    def out_proj(self) -> nn.Module:
        return self.base.out_proj

    def _frozen(self, names: str) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of projections next to each other: some of "qkv"."""
        base, e = self.base, self.embed_dim
        start = "qkv".index(names) * e
        rows = slice(start, start + len(names) * e)
        weight = getattr(base, f"{names}_proj_weight") if base.in_proj_weight is None else base.in_proj_weight[rows]
        return weight, None if base.in_proj_bias is None else base.in_proj_bias[rows]

    def _project(self, x: Tensor, weight: Tensor, bias: Tensor | None, names: tuple[str, ...]) -> Tensor:
        """The projections ``names`` of ``x``, whose frozen weights are the rows of ``weight``, side by side."""
        adapted = [name for name in names if name in self.targets]
        if not adapted:
            return F.linear(x, weight, bias)
        a, b = ([pairs[name].weight for name in adapted] for pairs in (self.lora_A, self.lora_B))
        if len(names) > 1:
            # Every projection reads its own columns of x @ A.T; what isn't adapted has no row in B but zeros.
            rank, e = self.r * len(adapted), self.embed_dim
            places = {name: self.r * i for i, name in enumerate(adapted)}
            padded = {n: F.pad(t, (places[n], rank - places[n] - self.r)) for n, t in zip(adapted, b)}
            zeros = b[0].new_zeros(e, rank)
            a, b = [torch.cat(a)], [torch.cat([padded.get(name, zeros) for name in names])]
        dropout_p = self.dropout if self.training else 0.0
        return lora_linear(x, weight, bias, a[0], b[0], scale=self.scale, dropout_p=dropout_p, backend=self.backend)

    def _heads(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Projected queries, keys and values as ``(b, h, t, e)``."""
        groups = []
        for name, x in zip("qkv", (query, key, value)):
            if groups and groups[-1][1] is x and self.base.in_proj_weight is not None:
                groups[-1][0] += name
            else:
                groups.append([name, x])
        heads = []
        for names, x in groups:
            y = self._project(x, *self._frozen(names), tuple(names))
            if x.dim() == 2:
                y = y.unsqueeze(0 if self.batch_first else 1)
            y = y.unflatten(-1, (len(names), self.num_heads, -1))
            heads.extend((y.permute(2, 0, 3, 1, 4) if self.batch_first else y.permute(2, 1, 3, 0, 4)).unbind())
        return heads

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None, need_weights: bool = True,
        attn_mask: Tensor | None = None, average_attn_weights: bool = True, is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Attend; arguments and results are those of ``nn.MultiheadAttention.forward``.

        ``need_weights=False`` is the fast way. ``is_causal=True`` says that ``attn_mask``, which must be given, is causal.
        """
        if query.is_nested:
            raise ValueError("query must not be nested; build nn.TransformerEncoder with enable_nested_tensor=False")
        if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
            raise ValueError(f"query, key and value must be all 2-d or all 3-d, got {query.dim()}, {key.dim()}, {value.dim()}")
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask must be the causal mask with is_causal=True, got None")
        q, k, v = self._heads(query, key, value)
        dropout_p = self.base.dropout if self.training else 0.0
        weights = None
        if is_causal and key_padding_mask is None and not need_weights:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)
        else:
            mask = merged_mask(attn_mask, key_padding_mask, q, k)
            if need_weights:
                scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
                weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, -1), dropout_p)
                y = weights @ v
            else:
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)
        y = (y.transpose(1, 2) if self.batch_first else y.permute(2, 0, 1, 3)).flatten(2)
        y = self._project(y, self.out_proj.weight, self.out_proj.bias, ("out",))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if query.dim() == 2:
            y = y.squeeze(0 if self.batch_first else 1)
            weights = None if weights is None else weights.squeeze(0)
        return y, weights

    def extra_repr(self) -> str:
        return f"r={self.r}, targets={self.targets}, alpha={self.alpha}, dropout={self.dropout}, rslora={self.rslora}"


def merged_mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """What is added to the scores ``(b, h, t, s)``: True in a mask of bools, or minus infinity, means not to attend."""
    (b, h, t, _), s = q.shape, k.shape[-2]
    places = {
        "attn_mask": (attn_mask, {(t, s): (t, s), (b * h, t, s): (b, h, t, s)}),
        "key_padding_mask": (key_padding_mask, {(b, s): (b, 1, 1, s), **({(s,): (1, 1, 1, s)} if b == 1 else {})}),
    }
    total = None
    for name, (mask, shapes) in places.items():
        if mask is None:
            continue
        if tuple(mask.shape) not in shapes:
            raise ValueError(f"{name} must be {' or '.join(map(str, shapes))}, got {tuple(mask.shape)}")
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(f"{name} must be bool or floating, got {mask.dtype}")
        added = mask.reshape(shapes[tuple(mask.shape)])
        if mask.dtype == torch.bool:
            added = torch.zeros_like(added, dtype=q.dtype).masked_fill(added, -math.inf)
        added = added.to(q.dtype)
        total = added if total is None else total + added
    return total
