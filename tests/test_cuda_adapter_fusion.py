"""What the battery can't say of the CUDA kernels of adapter_fusion: keys that stay in shared memory, and the most adapters."""

import functools
import shutil

import pytest
import torch

from fastadapt.ops.adapter_fusion import _MAX_CUDA

from .battery import check, run
from .gpuless import emulated, stable
from .specs.adapter_fusion import SPEC, make

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
module = functools.cache(emulated.module)


@pytest.fixture
def emulate(monkeypatch):
    def install(**settings):
        stable.install(monkeypatch, SPEC, module("adapter_fusion").with_settings(**settings))

    return install


@pytest.mark.parametrize("shape", ((9, 72), (3, 1544)), ids=("narrow", "wide"))
def test_bits_are_those_without_room_in_shared_memory(emulate, shape):
    arguments = make(torch.bfloat16, "cpu", shape=shape, g=6, shared=True, scale="0-d")
    grad_y = torch.randn(shape).bfloat16()
    results = []
    for limit in (99 * 1024, 1024):
        emulate(shared_limit=limit)
        results.append(run(SPEC.op, arguments, grad_y, backend="native"))
    kept, read_again = results
    assert all(torch.equal(kept[name], read_again[name]) for name in kept)


def test_most_adapters(emulate):
    emulate()
    check(SPEC, "native", lambda: make(torch.float32, "cpu", shape=(2, 8), g=_MAX_CUDA, scale=0.1), unit="matrix")


def test_more_adapters_are_left_to_others():
    def refusal(g):
        return SPEC.fwd.unsupported("native", (torch.empty(2, 8, device="meta"), torch.empty(g, 2, 8, device="meta")))

    assert refusal(_MAX_CUDA) is None
    assert refusal(_MAX_CUDA + 1) == f"supports up to {_MAX_CUDA} adapters, got {_MAX_CUDA + 1}"
