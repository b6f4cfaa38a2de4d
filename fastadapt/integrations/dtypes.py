"""Which dtypes of a layer of another library the kernels take."""

import torch
from torch import Tensor

from .._dense import is_packed, reads_other_inputs
from ..ops.lora_linear import autocasts

NARROW = (torch.float16, torch.bfloat16)


def served(dtype: torch.dtype, own: torch.dtype) -> bool:
    """Whether an adapter of the dtype ``own`` can be in a product of ``dtype``."""
    return own is dtype or (own is torch.float32 and dtype in NARROW)


def match(x: Tensor, weight: Tensor, own: torch.dtype) -> bool:
    """Whether ``x`` can go through a linear layer of ``weight`` with an adapter of the dtype ``own``."""
    if reads_other_inputs(weight):
        return False
    if autocasts(x):
        known = torch.float32, torch.get_autocast_dtype(x.device.type)
        return x.dtype in known and own in known and (weight.dtype in known or is_packed(weight))
    return served(x.dtype, own) and (weight.dtype is x.dtype or is_packed(weight))


def mismatch(weight, own: torch.dtype) -> tuple[str | None, str | None]:
    """Why a layer of ``weight`` with an adapter of the dtype ``own`` never runs on kernels, and why it does only at times."""
    if not isinstance(weight, Tensor) or is_packed(weight) or not weight.is_floating_point() or served(weight.dtype, own):
        return None, None
    words = f"{own} in a layer of {weight.dtype}"
    return (None, f"{words}, outside autocast") if weight.dtype is torch.float32 and own in NARROW else (words, None)
