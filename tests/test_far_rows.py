"""What a launch can have many of: rows that lie more than 2**31 elements apart, in memory of which only they are touched, and
blocks, of which only the first and last ones run."""

import mmap
import tempfile

import pytest
import torch

from fastadapt._leaf import INTERPRET

from .battery import check, run
from .gpuless import emulated, stable
from .specs import SPECS

pytestmark = pytest.mark.skipif(INTERPRET, reason="launches on meta tensors show it of Triton's kernels")
STRIDE = 2**31 + 8
DTYPE = torch.bfloat16


class Far(torch.autograd.Function):
    """A copy whose rows, or what else the first dim counts, are ``STRIDE`` elements apart."""

    @staticmethod
    def forward(ctx, t):
        size = (STRIDE * (len(t) - 1) + t[0].numel()) * t.element_size()
        with tempfile.TemporaryFile() as file:
            file.truncate(size)  # a hole
            memory = mmap.mmap(file.fileno(), size)
        return torch.frombuffer(memory, dtype=t.dtype).as_strided(t.shape, (STRIDE, *t[0].contiguous().stride())).copy_(t)

    @staticmethod
    def backward(ctx, grad):
        return grad


@pytest.fixture(scope="module")
def room():
    try:
        Far.apply(torch.zeros(5, 1, dtype=DTYPE))
    except OSError as error:
        pytest.skip(f"no address space: {error}")


def far_rows(name, spec):
    rows = (*spec.activations, "grad_y")
    for case in spec.cases[:1]:  # the smallest
        check(spec, "native", lambda: case.make(DTYPE, "cpu"), layout=lambda n, t: Far.apply(t) if n in rows else t, **name)  # noqa: B023


@pytest.mark.parametrize("op", [op for op, spec in SPECS.items() if ("native", "cpu") in spec.fwd.available])
def test_native(op, room):
    far_rows({}, SPECS[op])


@pytest.mark.parametrize("op", emulated.ops())
def test_emulated_cuda(op, room, monkeypatch):
    stable.install(monkeypatch, SPECS[op], emulated.module(op))
    far_rows({"unit": "matrix"}, SPECS[op])


MANY = [pytest.param(op, *many, id=f"{op}-{many[0].name}") for op in emulated.ops() for many in SPECS[op].many]


@pytest.mark.parametrize("op, case, names", MANY)
def test_emulated_cuda_launches_the_last_blocks(op, case, names, monkeypatch):
    stable.install(monkeypatch, SPECS[op], emulated.module(op).with_settings(most_blocks=64))
    arguments = case.make(DTYPE, "cpu")
    for name in names:  # alone, so that its last entry is in the last blocks of every launch
        for result, t in run(SPECS[op].op, arguments, wanted={name}, backend="native").items():
            last = t.movedim(SPECS[op].numerics.along.get(result, 0), 0)[-1]
            assert last.isfinite().all(), f"nothing has written the end of {result}"
