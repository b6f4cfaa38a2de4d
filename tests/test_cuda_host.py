"""The host side of the CUDA sources launches on the device of its tensors and on the current stream there."""

import ctypes
import re
import shutil
from pathlib import Path

import pytest
import torch

from .battery import TELLING
from .gpuless import stable
from .gpuless.emulated import CUDA, FLAGS
from .specs import SPECS

OPS = [name for name in SPECS if (CUDA / f"{name}.cu").exists()]
WRAPPED = ("get_device_index", "create_device_guard", "delete_device_guard", "get_current_cuda_stream")


@pytest.fixture(scope="module")
def builder():
    wrap = ",".join(f"--wrap=aoti_torch_{name}" for name in WRAPPED)
    return stable.Builder("-I", stable.HERE / "host_side", *FLAGS, "-O0", f"-Wl,{wrap}")


def launched(builder, op, source):
    """How many kernels forward and backward of the telling cases launch."""
    spec, library = SPECS[op], builder.module(builder.compile(source, "-I", CUDA))
    module, count = stable.Module(library, cuda=1), ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "host_side_launches")
    fwd, bwd = (stable.implementation(module, leaf) for leaf in (spec.fwd, spec.bwd))
    for case in (case for case in spec.cases if case.name in TELLING):
        arguments = case.make(torch.bfloat16, "cpu")
        args = spec.leaf_args(arguments)
        wanted = [isinstance(arguments.get(name), torch.Tensor) for name in spec.bwd_outputs]
        before = count.value
        outputs = fwd(*args)
        y = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
        assert count.value > before, f"forward of {case.name} launches nothing"
        before = count.value
        bwd(*spec.bwd_leaf_args(y, args, wanted))
        assert count.value > before, f"backward of {case.name} launches nothing"
    return count.value


@pytest.mark.parametrize("op", OPS)
def test_launches_on_the_device_and_stream_of_its_tensors(builder, op):
    assert launched(builder, op, CUDA / f"{op}.cu")


PLANTED = {
    "no-guard": (r"torch::stable::accelerator::DeviceGuard \w+\(\w+\);", "", "device 0 is current"),
    "stream-of-device-0": (r"current_stream\(\w+\)", "current_stream(0)", "not on the current stream of device 1 but on 1000"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_finds_planted_errors(builder, name, tmp_path):
    pattern, replacement, message = PLANTED[name]
    text, count = re.subn(pattern, replacement, (CUDA / "call.h").read_text())
    assert count
    (tmp_path / "call.h").write_text(text)
    source = Path(shutil.copy(CUDA / f"{OPS[0]}.cu", tmp_path))
    with pytest.raises(RuntimeError, match=message):
        launched(builder, OPS[0], source)
