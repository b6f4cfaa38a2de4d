"""Every Triton kernel, as its launcher launches it, compiles for real GPUs and fits their registers and shared memory."""

import pytest
import torch

from fastadapt._leaf import INTERPRET
from fastadapt.ops.bottleneck import _launch_bwd, _launch_fwd

from .gpuless import offline
from .specs.bottleneck import EVERYTHING, SPEC, make

pytestmark = pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1 leaves nothing to compile")

# ptxas puts a few arguments of a kernel on the stack when that lets more programs run; tiles that don't fit take hundreds
# of bytes.
STACK = 32
BF16, FP32 = torch.bfloat16, torch.float32
BANK = {"g": 5, "ids": [0] * 4096, "activation": "gelu_tanh"}
CALLS = {
    "bfloat16": (90, BF16, (4096, 1024), 64, {}),
    "everything": (90, BF16, (4096, 768), 64, {**EVERYTHING, "parameters": FP32}),
    "rank-256": (90, BF16, (4096, 1024), 256, EVERYTHING),
    "bank": (90, BF16, (4096, 768), 16, BANK),
    "float32": (90, FP32, (4096, 768), 64, EVERYTHING),
    "sm80-everything": (80, BF16, (16384, 768), 64, EVERYTHING),
    "sm80-odd": (80, torch.float16, (17, 769), 7, {"activation": "tanh"}),
    "sm80-float32": (80, FP32, (4096, 768), 16, {}),
    "sm100": (100, BF16, (16384, 1024), 64, {}),
    "sm120-rank-256": (120, BF16, (4096, 4096), 256, {}),
}


def launches_of(arch, dtype, shape, r, options):
    """What a forward and a backward call launch when every gradient is wanted."""
    arguments = make(dtype, "meta", shape=shape, r=r, **options)
    args = SPEC.leaf_args(arguments)
    wanted = [isinstance(arguments.get(name), torch.Tensor) for name in SPEC.bwd_outputs]
    with offline.target(arch), offline.captured() as launches:
        _launch_fwd(*args)
        _launch_bwd(*SPEC.bwd_leaf_args(torch.empty_like(arguments["x"]), args, wanted))
    return launches


@pytest.mark.parametrize("call", CALLS)
def test_compiles_and_fits(call):
    arch, dtype, shape, *_ = CALLS[call]
    launches = launches_of(*CALLS[call])
    assert {launch.name for launch in launches} >= {
        "bottleneck_fwd_kernel", "bottleneck_bwd_rows_kernel", "bottleneck_bwd_columns_kernel", "bottleneck_bwd_reduce_kernel"
    }  # fmt: skip
    for launch in launches:
        with offline.target(arch):
            machine = offline.inspect(offline.compiled(launch))
        what = f"{launch.name} {launch.kwargs}: {machine}"
        assert len(launch.grid) == 1 and launch.grid[0] < 2**31, what
        assert machine.stack <= STACK and not machine.unfenced, what
        assert machine.shared <= offline.SHARED[arch] * 1024, what
        # Sums of grad_z alone, norms and the ordered sum multiply no matrices.
        products = "fwd" in launch.name or "rows" in launch.name
        assert machine.tensor_cores if products and dtype != FP32 else dtype != FP32 or not machine.tensor_cores, what
        if products and shape[-1] % 16 == 0:
            assert machine.wide_loads, what


def test_a_frozen_parameter_launches_nothing_for_it():
    arguments = make(BF16, "meta", shape=(4096, 1024), r=64, **EVERYTHING)
    args, grad_y = SPEC.leaf_args(arguments), torch.empty_like(arguments["x"])
    expected = {  # rows walk d for the hidden tiles, columns for the products and sums of a weight
        "x": ["norm_dots", "rows"],
        "up_weight": ["rows", "columns", "reduce"],
        "down_bias": ["rows", "columns", "reduce"],
        "up_bias": ["columns", "reduce"],
        "skip_weight": ["columns", "reduce"],
    }
    for name, kernels in expected.items():
        with offline.target(90), offline.captured() as launches:
            _launch_bwd(*SPEC.bwd_leaf_args(grad_y, args, [name == other for other in SPEC.bwd_outputs]))
        assert [launch.name.removeprefix("bottleneck_bwd_").removesuffix("_kernel") for launch in launches] == kernels
