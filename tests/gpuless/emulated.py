"""The CUDA kernels of bottleneck on the CPU: builds bottleneck_emulated.cpp and offers its plans as leaf ops."""

import ctypes
import subprocess
from pathlib import Path

import torch

HERE = Path(__file__).parent
CUDA = HERE.parents[1] / "csrc/cuda"
KINDS = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Array(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("kind", ctypes.c_int), ("dims", ctypes.c_int),
        ("size", ctypes.POINTER(ctypes.c_int64)), ("stride", ctypes.POINTER(ctypes.c_int64)),
    ]  # fmt: skip

    @classmethod
    def of(cls, tensor):
        if tensor is None:
            return cls()
        numbers = ctypes.c_int64 * max(tensor.dim(), 1)
        sizes, strides = numbers(*tensor.shape), numbers(*tensor.stride())
        return cls(tensor.data_ptr(), KINDS.index(tensor.dtype), tensor.dim(), sizes, strides)


class Arguments(ctypes.Structure):
    """``Arguments`` of csrc/cuda/bottleneck_plan.cuh; ``other`` is the residual or ``grad_y``."""

    _fields_ = [
        *((name, Array) for name in (
            "x", "other", "down_weight", "up_weight", "down_bias", "up_bias", "scale", "norm_weight", "norm_bias",
            "skip_weight", "hidden_skip_weight", "adapter_ids",
        )),
        ("scale_value", ctypes.c_float), ("norm_eps", ctypes.c_float), ("activation", ctypes.c_int), ("add_x", ctypes.c_int),
    ]  # fmt: skip


class Emulated:
    """Implementations of the leaves of bottleneck.

    ``multiprocessors`` and ``shared_limit`` describe the device that the kernels are planned for: few multiprocessors mean
    large tiles and few splits. ``schedule`` numbers the order in which the emulator runs blocks, warps and lanes.
    """

    def __init__(self, library: Path, multiprocessors=1, shared_limit=99 * 1024, schedule=0):
        self.library = ctypes.CDLL(str(library))
        self.device = ctypes.c_int(multiprocessors), ctypes.c_int(shared_limit), ctypes.c_uint64(schedule)

    @staticmethod
    def build(library: Path, headers: Path = CUDA, *flags: str) -> Path:
        # With -march=native the compiler contracts a * b + c to one rounding, as nvcc does.
        command = ["g++", "-std=c++17", "-O1", "-march=native", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Werror"]
        subprocess.run(
            [*command, *flags, "-I", HERE, "-I", headers, HERE / "bottleneck_emulated.cpp", "-o", library], check=True
        )
        return library

    def _call(
        self, direction, out, other, x, down_weight, up_weight, down_bias, up_bias, add_x, scale, scale_value, activation,
        norm_weight, norm_bias, norm_eps, skip_weight, hidden_skip_weight, adapter_ids,
    ):  # fmt: skip
        tensors = (
            x, other, down_weight, up_weight, down_bias, up_bias, scale, norm_weight, norm_bias, skip_weight,
            hidden_skip_weight, adapter_ids,
        )  # fmt: skip
        arguments = Arguments(*map(Array.of, tensors), scale_value, norm_eps, activation, add_x)
        function = getattr(self.library, f"emulated_bottleneck_{direction}")
        function.restype = ctypes.c_char_p
        if error := function(ctypes.byref(arguments), out, *self.device):
            raise RuntimeError(error.decode())

    def bottleneck_fwd(self, x, down_weight, up_weight, down_bias, up_bias, residual, *rest):
        y = torch.full(x.shape, float("nan"), dtype=x.dtype)
        out = ctypes.c_void_p(y.data_ptr())
        self._call("fwd", out, residual, x, down_weight, up_weight, down_bias, up_bias, *rest)
        return y

    def bottleneck_bwd(self, grad_y, x, *rest):
        *parameters, mask = rest
        down_weight, up_weight, down_bias, up_bias, _, scale, _, _, norm_weight, norm_bias, _, skip, hidden_skip, _ = parameters
        inputs = (x, down_weight, up_weight, down_bias, up_bias, scale, norm_weight, norm_bias, skip, hidden_skip)
        grads = tuple(
            torch.full(t.shape, float("nan"), dtype=t.dtype) if wanted else x.new_empty(0) for t, wanted in zip(inputs, mask)
        )
        outputs = (Array * len(grads))(*(Array.of(grad if grad.numel() else None) for grad in grads))
        self._call("bwd", outputs, grad_y, x, *parameters)
        return grads
