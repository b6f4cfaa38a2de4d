"""The CUDA kernels of bottleneck on the CPU: builds tests/gpuless/bottleneck_emulated.cpp and calls it on CPU tensors."""

import ctypes
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
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
        dims = tensor.dim()
        numbers = ctypes.c_int64 * max(dims, 1)
        return cls(tensor.data_ptr(), KINDS.index(tensor.dtype), dims, numbers(*tensor.shape), numbers(*tensor.stride()))


class Arguments(ctypes.Structure):
    TENSORS = (
        "x", "other", "down_weight", "up_weight", "down_bias", "up_bias", "scale", "norm_weight", "norm_bias", "skip_weight",
        "hidden_skip_weight", "adapter_ids",
    )  # fmt: skip
    _fields_ = [(name, Array) for name in TENSORS] + [
        ("scale_value", ctypes.c_float), ("norm_eps", ctypes.c_float), ("activation", ctypes.c_int), ("add_x", ctypes.c_int),
    ]  # fmt: skip


class Outputs(ctypes.Structure):
    TENSORS = (
        "x", "down_weight", "up_weight", "down_bias", "up_bias", "scale", "norm_weight", "norm_bias", "skip_weight",
        "hidden_skip_weight",
    )  # fmt: skip
    _fields_ = [(name, Array) for name in TENSORS]


class Emulated:
    """``multiprocessors`` and ``shared_limit`` describe the device whose plan runs; few multiprocessors mean large tiles."""

    def __init__(self, folder: Path, *flags: str):
        library = folder / "bottleneck_emulated.so"
        command = ["g++", "-std=c++17", "-O2", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Werror", *flags]
        command += ["-I", ROOT / "tests/gpuless", "-I", ROOT / "csrc/cuda", ROOT / "tests/gpuless/bottleneck_emulated.cpp"]
        subprocess.run([*command, "-o", library], check=True)
        self.library = ctypes.CDLL(str(library))

    def _call(self, function, *args, multiprocessors, shared_limit, schedule):
        function = getattr(self.library, function)
        function.restype = ctypes.c_char_p
        device = ctypes.c_int(multiprocessors), ctypes.c_int(shared_limit), ctypes.c_uint64(schedule)
        if error := function(*args, *device):
            raise RuntimeError(error.decode())

    @staticmethod
    def _arguments(tensors, scale, activation, add_x, norm_eps):
        tensors = dict(tensors, scale=scale if isinstance(scale, torch.Tensor) else None)
        value = 1.0 if isinstance(scale, torch.Tensor) else scale
        return Arguments(*(Array.of(tensors.get(name)) for name in Arguments.TENSORS), value, norm_eps, activation, add_x)

    def forward(self, x, *, residual=None, scale=1.0, activation=0, norm_eps=1e-5, device, **tensors):
        add_x = residual is x
        tensors = dict(tensors, x=x, other=None if add_x else residual)
        y = torch.full(x.shape, float("nan"), dtype=x.dtype)
        arguments = self._arguments(tensors, scale, activation, add_x, norm_eps)
        self._call("emulated_bottleneck_fwd", ctypes.byref(arguments), ctypes.c_void_p(y.data_ptr()), **device)
        return y

    def backward(self, grad_y, x, wanted, *, add_x=True, scale=1.0, activation=0, norm_eps=1e-5, device, **tensors):
        """The gradients named in ``wanted``, by name; the others aren't touched."""
        arguments = self._arguments(dict(tensors, x=x, other=grad_y), scale, activation, add_x, norm_eps)
        inputs = dict(tensors, x=x, scale=scale)
        grads = {name: torch.full(inputs[name].shape, float("nan"), dtype=inputs[name].dtype) for name in wanted}
        outputs = Outputs(*(Array.of(grads.get(name)) for name in Outputs.TENSORS))
        self._call("emulated_bottleneck_bwd", ctypes.byref(arguments), ctypes.byref(outputs), **device)
        return grads
