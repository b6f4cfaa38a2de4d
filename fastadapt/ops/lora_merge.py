"""lora_merge: a new weight gain * (W + scale * B @ diag @ A)."""

import torch
from torch import Tensor

from .. import _check as check
from .._dense import dense
from .lora_linear import check_adapter, without_autocast


@torch.no_grad()
def lora_merge(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, *, scale: float | Tensor = 1.0, magnitude: Tensor | None = None,
    diagonal: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The weight of the linear layer that :func:`lora_linear` computes: ``gain * (weight + scale * lora_b @ diag @ lora_a)``.

    ``gain`` is 1, or with ``magnitude`` that of DoRA, ``magnitude`` over the norm of each row. The sum is accumulated in
    float32 (float64 for float64) and rounded once, in one pass over blocks of rows that stay in the cache, so that there is no
    float32 copy of the whole weight. There is no ``backend``: each block is one ``torch.addmm``. Autograd doesn't record it.

    In a 16-bit weight an update below half a unit in the last place of its element is lost, so train beside the weight and
    merge at the end.

    Args:
        weight: ``(n, k)``, any strides; float16, bfloat16, float32 or float64, or a quantised weight as in :func:`lora_linear`.
        lora_a, lora_b: ``(r, k)`` and ``(n, r)``. Like every parameter below: dtype of ``weight``, or float32 beside 16 bits.
        scale: a number or a 0-d tensor.
        magnitude: ``(n,)`` of DoRA.
        diagonal: ``(r,)``, between ``lora_a`` and ``lora_b``.

    Returns:
        ``(n, k)`` with the dtype of ``weight``, and its order in memory where it has no gaps.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value.
    """
    weight = dense(weight)
    check.activation_dtype("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight must be (n, k), got {tuple(weight.shape)}")
    check_adapter(weight, "weight", *weight.shape, lora_a, lora_b, scale, magnitude, diagonal)
    wide = torch.promote_types(weight.dtype, torch.float32)
    a, b = lora_a.to(wide), lora_b.to(wide)
    b = scale * (b if diagonal is None else b * diagonal)
    merged = torch.empty_like(weight)
    # 1 MiB of float32 on a CPU, for its second-level cache; on a GPU 64 MiB, since each block is a few launches.
    rows = max(1, (2**18 if weight.is_cpu else 2**24) // max(1, weight.shape[1]))
    with without_autocast(weight):
        for old, new, b_rows, *length in zip(*(t.split(rows) for t in (weight, merged, b, magnitude) if t is not None)):
            block = torch.addmm(old.to(wide), b_rows, a, out=new if wide == new.dtype else None)
            if length:
                block *= (length[0] / torch.linalg.vector_norm(block, dim=1))[:, None]
            if block is not new:
                new.copy_(block)
    return merged
