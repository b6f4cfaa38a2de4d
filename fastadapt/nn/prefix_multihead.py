"""A prefix for PyTorch's own attention."""

import torch.nn.functional as F
from torch import Tensor, nn

from .._leaf import BACKENDS
from ..ops.prefix_attention import prefix_attention
from .lora import adapter_dtype, check_no_hooks
from .lora_attention import merged_mask
from .prefix import PrefixEncoder


class PrefixMultiheadAttention(nn.Module):
    """An ``nn.MultiheadAttention`` with a learned prefix, run by :func:`fastadapt.prefix_attention`; called like the base.

    It returns no attention weights, which its kernel doesn't form. With ``gate`` a new one computes what ``base`` does. Keys of
    ``state_dict``: those of ``base``, and those of its :class:`PrefixEncoder` under ``encoder``. Sources: as for that.

    Args:
        base: an attention without ``add_bias_kv`` and ``add_zero_attn`` whose keys and values are as wide as its queries. It
            is frozen and kept, not copied; its ``dropout`` acts on the attention weights in training.
        p: length of the prefix.
        backend: as in :func:`fastadapt.prefix_attention`; also an attribute.
        options: ``hidden``, ``width``, ``dropout``, ``gate``, ``init_std`` and ``dtype`` of :class:`PrefixEncoder`.
    """

    # nn.TransformerEncoderLayer asks for it before its fast path, which would run the frozen weights alone.
    _qkv_same_embed_dim = False

    def __init__(self, base: nn.MultiheadAttention, p: int, *, backend: str | None = None, **options):
        if not isinstance(base, nn.MultiheadAttention) or type(base).forward is not nn.MultiheadAttention.forward:
            raise TypeError(f"base must be a torch.nn.MultiheadAttention, got {type(base).__name__}")
        if base.bias_k is not None or base.add_zero_attn or base.in_proj_weight is None:
            raise ValueError("base must have add_bias_kv=False, add_zero_attn=False, and kdim and vdim like embed_dim")
        check_no_hooks(base)
        if backend not in (None, *BACKENDS):
            raise ValueError(f"backend must be one of {(None, *BACKENDS)}, got {backend!r}")
        super().__init__()
        weight = base.out_proj.weight
        options = {"device": weight.device, **options, "dtype": adapter_dtype(weight, options.get("dtype"))}
        self.encoder = PrefixEncoder(base.num_heads, p, base.head_dim, **options)
        self.base = base.requires_grad_(False)
        self.embed_dim, self.num_heads, self.batch_first = base.embed_dim, base.num_heads, base.batch_first
        self.backend = backend
        self.train(base.training)

    @property
    def in_proj_weight(self) -> Tensor:
        return self.base.in_proj_weight

    @property
    def in_proj_bias(self) -> Tensor | None:
        return self.base.in_proj_bias

    @property
    def out_proj(self) -> nn.Module:
        return self.base.out_proj

    def _heads(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Projected queries, keys and values as ``(b, h, t, e)``."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if query is key and key is value:
            projected = F.linear(query, weight, bias).chunk(3, -1)
        else:
            biases = [None] * 3 if bias is None else bias.chunk(3)
            projected = map(F.linear, (query, key, value), weight.chunk(3), biases)
        heads = [y.unflatten(-1, (self.num_heads, -1)) for y in projected]
        return [y.transpose(1, 2) if self.batch_first else y.permute(1, 2, 0, 3) for y in heads]

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None, need_weights: bool = False,
        attn_mask: Tensor | None = None, average_attn_weights: bool = True, is_causal: bool = False,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """Attend to the prefix and to ``key``; arguments are those of ``nn.MultiheadAttention.forward``, batched.

        The masks are of the own keys, and every query sees the prefix. ``is_causal=True`` says that ``attn_mask``, which must
        be given, is causal.
        """
        if need_weights:
            raise ValueError("need_weights must be False for attention with a prefix, got True")
        if query.is_nested or query.dim() != 3 or not query.dim() == key.dim() == value.dim():
            raise ValueError(f"query, key and value must be 3-d and not nested, got {query.dim()}, {key.dim()}, {value.dim()}")
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask must be the causal mask with is_causal=True, got None")
        q, k, v = self._heads(query, key, value)
        # The kernel lets the last query see all keys, nn.MultiheadAttention the first query the first key alone.
        causal = is_causal and key_padding_mask is None and q.shape[-2] == k.shape[-2]
        prefix = self.encoder()[0]
        y = prefix_attention(
            q, k, v, prefix.key, prefix.value, is_causal=causal, gate=prefix.gate, backend=self.backend,
            attn_mask=None if causal else merged_mask(attn_mask, key_padding_mask, q, k),
            dropout_p=self.base.dropout if self.training else 0.0,
        )  # fmt: skip
        y = (y.transpose(1, 2) if self.batch_first else y.permute(2, 0, 1, 3)).flatten(2)
        return F.linear(y, self.out_proj.weight, self.out_proj.bias), None
