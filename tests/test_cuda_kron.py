"""What the battery can't say of the CUDA kernels of compacter and kron_linear: ids outside a bank, the largest rank space."""

import shutil

import pytest
import torch

from .battery import check, run
from .gpuless import emulated, stable
from .specs import SPECS
from .specs.compacter import FACTORS
from .specs.compacter import make as make_compacter
from .specs.kron_linear import make as make_kron_linear

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture
def emulate(monkeypatch):
    def install(op, **settings):
        stable.install(monkeypatch, SPECS[op], emulated.module(op).with_settings(**settings))
        return SPECS[op]

    return install


@pytest.mark.parametrize("wanted", (None, {"x"}), ids=("all", "x"))
def test_id_outside_the_bank_gives_nan_and_spoils_no_other_row(emulate, wanted):
    spec = emulate("compacter", multiprocessors=1)
    arguments = make_compacter(torch.bfloat16, "cpu", shape=(6, 24), r=8, g=3, ids=[2, 3, -1, -2, 0, 1])
    result = run(spec.op, arguments, wanted=wanted, backend="native")
    bad = torch.tensor([False, True, False, True, False, False])
    for name in ("y", "x"):
        assert torch.equal(result[name].isnan().all(-1), bad) and torch.equal(result[name].isnan().any(-1), bad)
    assert torch.equal(result["y"][2], arguments["x"][2])
    assert all(result[name].isfinite().all() for name in (*FACTORS, "down_bias", "up_bias") if name in result)


# The last call that fits into the shared memory of the smallest GPUs, and the first that doesn't.
LARGEST = {
    "compacter": (lambda r: make_compacter(torch.float32, "cpu", shape=(3, 32), r=r, n=16, q=11), 1024, 1040),
    "kron_linear": (lambda q: make_kron_linear(torch.float32, "cpu", leading=(3,), a=(20, 12), b=(3, 5), q=q), 384, 385),
}


@pytest.mark.parametrize("op", LARGEST)
def test_largest_rank_space(emulate, op):
    make, most, too_much = LARGEST[op]
    check(emulate(op, multiprocessors=1), "native", lambda: make(most), unit="matrix")


@pytest.mark.parametrize("op", LARGEST)
def test_larger_rank_space_is_left_to_others(op):
    make, *sizes = LARGEST[op]
    on_meta = ({n: t.to("meta") if isinstance(t, torch.Tensor) else t for n, t in make(size).items()} for size in sizes)
    fits, exceeds = (SPECS[op].fwd.unsupported("native", SPECS[op].leaf_args(arguments)) for arguments in on_meta)
    assert fits is None and "too few for" in exceeds


@pytest.mark.parametrize("op", LARGEST)
def test_too_large_a_rank_space_is_refused(emulate, op):
    make, most, _ = LARGEST[op]
    arguments = make(64 * most)
    with pytest.raises(RuntimeError, match="a row needs more shared memory than a block can have"):
        emulate(op).op(**arguments, backend="native")
