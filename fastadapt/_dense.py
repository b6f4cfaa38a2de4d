"""Frozen weights that are kept in another form: one protocol for their dense tensor."""

import torch
from torch import Tensor


def is_packed(weight) -> bool:
    """Whether ``weight`` brings a ``dequantize()`` of its own, as torchao's tensors do, or is a 4-bit one of bitsandbytes."""
    if type(weight) is Tensor or type(weight) is torch.nn.Parameter:
        return False
    own = getattr(type(weight), "dequantize", Tensor.dequantize) is not Tensor.dequantize
    return own or getattr(weight, "quant_state", None) is not None


def reads_other_inputs(weight) -> bool:
    """Whether a layer of torchao with this packed weight scales or quantises its input before the product."""
    names = ("act_pre_scale", "act_quant_kwargs", "activation_quantization")
    return is_packed(weight) and any(getattr(weight, name, None) is not None for name in names)


def dense(weight, dtype: torch.dtype | None = None):
    """The tensor that a packed weight stands for, in ``dtype`` if given; any other weight as it is."""
    if not is_packed(weight):
        return weight
    if reads_other_inputs(weight):
        raise ValueError(f"weight must leave the input as it is, got a {type(weight).__name__} that scales or quantises it")
    with torch.no_grad():
        if getattr(weight, "quant_state", None) is not None:
            from bitsandbytes.functional import dequantize_4bit

            if getattr(weight.quant_state, "packing_format_for_cpu", False):  # dequantize_4bit would misread it
                raise ValueError("weight must be packed as bitsandbytes does at first, got one packed anew for a CPU")
            return dequantize_4bit(weight.data, weight.quant_state).to(dtype)
        return weight.dequantize().to(dtype)
