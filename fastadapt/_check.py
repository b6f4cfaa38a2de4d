"""Argument checks: each error names the argument, what was expected and what came."""

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def tensor(name: str, value) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def activation_dtype(name: str, value: Tensor) -> None:
    """``value`` must be a floating tensor of a supported dtype."""
    tensor(name, value)
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {value.dtype}")


def parameter(name: str, value: Tensor | None, x: Tensor, shape: tuple, meaning: str, like: str = "x") -> None:
    """``value``, if given, must have ``shape``, the device of ``x`` and its dtype or float32; errors call ``x`` by ``like``."""
    if value is None:
        return
    tensor(name, value)
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} must be {meaning} = {tuple(shape)}, got {tuple(value.shape)}")
    if value.dtype != x.dtype and not (value.dtype == torch.float32 and x.dtype in (torch.float16, torch.bfloat16)):
        float32 = " or torch.float32" if x.dtype in (torch.float16, torch.bfloat16) else ""
        raise TypeError(f"{name} must be {x.dtype} like {like}{float32}, got {value.dtype}")
    same_device(name, value, x, like)


def same_device(name: str, value: Tensor, x: Tensor, like: str = "x") -> None:
    if value.device != x.device:
        raise ValueError(f"{name} must be on {x.device} like {like}, got {value.device}")


def residual(value: Tensor | None, x: Tensor, shape: tuple, like: str = "x") -> None:
    """``value``, if given, must have ``shape``, and the dtype and device of ``x``; errors say that it is that of ``like``."""
    if value is None:
        return
    tensor("residual", value)
    if tuple(value.shape) != tuple(shape) or value.dtype != x.dtype:
        raise ValueError(f"residual must be {tuple(shape)} {x.dtype} like {like}, got {tuple(value.shape)} {value.dtype}")
    same_device("residual", value, x)


def adapter_ids(ids: Tensor, x: Tensor, g: int, values: bool = False, on_cpu: bool = True) -> None:
    """One id a sequence or one a token, each an adapter of the bank or -1; ``values`` says to read them on a GPU, ``on_cpu``
    on a CPU, where a kernel may do it itself."""
    tensor("adapter_ids", ids)
    if ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"adapter_ids must be an integer tensor, got {ids.dtype}")
    sequences, tokens = tuple(x.shape[:-1][:1]), tuple(x.shape[:-1])
    if tuple(ids.shape) != sequences and tuple(ids.shape) != tokens:  # `in` fails under torch.compile with dynamic sizes
        raise ValueError(
            f"adapter_ids must be {sequences} (one a sequence) or {tokens} (one a token) to match x, got {tuple(ids.shape)}"
        )
    same_device("adapter_ids", ids, x)
    looked_at = values or (on_cpu and ids.device.type == "cpu" and not torch.compiler.is_compiling())
    if looked_at and ids.device.type != "meta" and ids.numel():
        low, high = int(ids.min()), int(ids.max())
        if low < -1 or high >= g:
            raise ValueError(f"adapter_ids must lie in [-1, {g - 1}] for a bank of {g}, got {low if low < -1 else high}")
