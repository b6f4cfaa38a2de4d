"""Every Triton kernel, as its launcher launches it, compiles for real GPUs, fits them, and keeps its budget."""

import re
import subprocess
import tempfile

import pytest
import torch
import triton
import triton.language as tl

from fastadapt._leaf import INTERPRET
from fastadapt.ops.bottleneck import _bwd

from .gpuless import budgets, cuda_budget, offline, offline_gate
from .gpuless.configurations import entries
from .gpuless.offline_machine import LOADS, TOOLS, disassembled, inspect, local_in_loops, unfenced
from .specs import SPECS
from .specs.bottleneck import EVERYTHING, SPEC, make

pytestmark = pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1 leaves nothing to compile")

QUICK = [(op, chip) for op, spec in SPECS.items() for chip in offline.CHIPS if any(chip in c.quick for c in spec.compiled)]


def check(op, chip, calls, everything):
    found, _ = offline_gate.builds(SPECS[op], chip, calls, everything)
    problems = [fault for build in found for fault in offline_gate.faults(build, chip)]
    budget = budgets.read(f"{op}.triton")
    known = budget["compiler"] in (None, offline_gate.COMPILER)
    if known:
        problems += budgets.exceeded(budget, {b.name: offline_gate.row(b.machine) for b in found}, chip, everything)
    assert not problems, "\n".join(problems)
    if not known:
        pytest.skip(f"registers unchecked: the budgets are of {budget['compiler']}, this is {offline_gate.COMPILER}")


@pytest.mark.short
@pytest.mark.parametrize("op, chip", QUICK)
def test_compiles_and_fits(op, chip):
    check(op, chip, [call for call in SPECS[op].compiled if chip in call.quick], everything=False)


@pytest.mark.slow
@pytest.mark.parametrize("op", SPECS)
def test_a_twin_is_what_triton_compiles(op):
    launch = offline_gate.launches(SPECS[op], SPECS[op].compiled[0], 86)[0][-1]
    for chip in offline_gate.TWINS:
        with offline.target(chip):
            kernel = offline.compiled(launch)
        twin = offline_gate.compiled_for(launch, chip)
        assert twin.asm["ptx"] == kernel.asm["ptx"] and inspect([twin]) == inspect([kernel])


@pytest.mark.slow
@pytest.mark.parametrize("chip", offline.CHIPS)
@pytest.mark.parametrize("op", SPECS)
def test_every_configuration_compiles_and_fits(op, chip):
    check(op, chip, SPECS[op].compiled, everything=True)


def test_the_calls_reach_every_configuration():
    covered = set()
    for spec in SPECS.values():
        assert spec.compiled, "an op needs calls to compile"
        known = set()
        for call in spec.compiled:
            for place in offline_gate.places(spec, call, 90, known):
                covered |= offline_gate.launches(spec, call, 90, place)[1]
    assert covered == entries()


def test_every_budget_is_of_an_op():
    files = {f"{op}.triton.json" for op in SPECS} | {f"{source.stem}.cuda.json" for source in cuda_budget.SOURCES}
    assert {path.name for path in budgets.FOLDER.glob("*.json")} == files


def test_a_frozen_parameter_launches_nothing_for_it():
    arguments = make(torch.bfloat16, "meta", shape=(4096, 1024), r=64, **EVERYTHING)
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
            _bwd.launcher(*SPEC.bwd_leaf_args(grad_y, args, [name == other for other in SPEC.bwd_outputs]))
        assert [launch.kernel.fn.__name__[15:-7] for launch in launches] == kernels


@triton.jit
def product_kernel(
    x_ptr, y_ptr, out_ptr, stride, k, DOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    rows, columns, inner = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, k, BLOCK_K):
        x = tl.load(x_ptr + rows[:, None] * stride + first + inner[None, :])
        y = tl.load(y_ptr + (first + inner)[:, None] * stride + columns[None, :])
        if DOT:
            acc = tl.dot(x, y, acc)
        else:
            acc += tl.sum(x.to(tl.float32), 1)[:, None] * tl.sum(y.to(tl.float32), 0)[None, :]
    tl.store(out_ptr + rows[:, None] * stride + columns[None, :], acc.to(out_ptr.dtype.element_ty))


CALL = SPEC.compiled[0]


def build(chip, x=(128, 128), stride=128, offset=0, dot=True, m=64, n=64, warps=4, stages=2):
    """product_kernel as the gate sees it."""
    view = lambda: torch.empty(x[0] * x[1] + offset, dtype=torch.bfloat16, device="meta")[offset:].view(x)  # noqa: E731
    with offline.target(chip), offline.captured() as launches:
        product_kernel[(1,)](
            view(), view(), view(), stride, 4096, DOT=dot, BLOCK_M=m, BLOCK_N=n, BLOCK_K=64, num_warps=warps, num_stages=stages,
            enable_fp_fusion=True,
        )
    with offline.target(chip):
        kernel = offline.compiled(launches[0])
    return offline_gate.described([(CALL, launches[0], kernel)])[0], kernel


def faults(chip, **options):
    return [fault.partition(": product_kernel ")[2] for fault in offline_gate.faults(build(chip, **options)[0], chip)]


def test_sound_code_has_no_faults():
    for chip in (80, 90, "gfx942"):
        assert faults(chip) == []


def test_finds_planted_faults():
    assert any("in loops go to local memory" in fault for fault in faults(80, m=128, n=64, warps=1))
    assert any("bytes of stack" in fault for fault in faults(80, m=128, n=64, warps=1))
    assert any("in loops go to local memory" in fault for fault in faults("gfx942", m=256, n=128, warps=1))
    assert faults(86, m=128, n=128, stages=5) == [
        "M128 N128 K64: 131072 bytes of shared memory, the chip has 101376"
    ] and not faults(90, m=128, n=128, stages=5)
    assert faults(80, offset=1) == ["M64 N64 K64: no 16-byte loads"]
    sound, kernel = build(90)
    assert sound.machine.products == "HGMMA" and "fence.proxy.async" in kernel.asm["ptx"]
    assert unfenced(kernel.asm["ptx"].replace("fence.proxy.async", "// fence"))
    assert offline_gate.faults(sound._replace(machine=sound.machine._replace(products="")), 90) == [
        f"90 {sound.name}: its products use no tensor cores"
    ]
    assert "grid" in offline_gate.faults(sound._replace(launch=sound.launch._replace(grid=(1, 2**16))), 90)[0]


def test_kernels_disassembled_together_are_read_as_each_alone():
    kernels = [build(90, dot=dot)[1] for dot in (True, False)]
    assert inspect(kernels) == [machine for kernel in kernels for machine in inspect([kernel])]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernels[1].asm["cubin"])
        file.flush()
        alone = subprocess.run([TOOLS / "cuobjdump", "-sass", file.name], capture_output=True, text=True, check=True).stdout
    code = disassembled(kernels)[1]
    assert len(LOADS.findall(code)) == len(LOADS.findall(alone)) > 0
    assert [line.split()[1] for line in code.splitlines()] == re.findall(r"/\*[0-9a-f]{4}\*/\s+(\S+)", alone)


def test_finds_a_branch_back_past_the_fence():
    """The fence stands before the loop, the write behind the product at its end."""
    loop = "st.shared.b32 [%r1], %r2;\nfence.proxy.async;\n$L1:\nwgmma.mma_async x;\n{}\n@%p1 bra $L1;\nret;"
    assert unfenced(loop.format("st.shared.b32 [%r1], %r2;")) and not unfenced(loop.format("ld.shared.b32 %r2, [%r1];"))


def test_a_spill_around_a_loop_is_none_in_it():
    code = "/*0010*/ STL [R1], R2 ;\n/*0020*/ {} ;\n/*0030*/ @P0 BRA 0x20 ;\n/*0040*/ LDL.LU R2, [R1] ;\n/*0050*/ BRA 0x50 ;"
    assert local_in_loops(code.format("LDL R3, [R1]")) == 1 and local_in_loops(code.format("LDS R3, [R1]")) == 0


def test_a_budget_is_kept():
    row, other = (offline_gate.row(build(80, dot=dot)[0].machine) for dot in (True, False))
    budget = lambda **change: {"kernels": {"k": {"80": list((row | change).values())}}}  # noqa: E731
    exceeded = lambda budget, now, complete=True: "\n".join(budgets.exceeded(budget, now, 80, complete))  # noqa: E731
    assert exceeded(budget(), {"k": row}) == ""
    assert exceeded(budget(registers=int(row["registers"] / 1.12)), {"k": row}).startswith("80 k uses registers")
    assert "make budgets" in exceeded(budget(shared=row["shared"] // 2), {"k": row})
    assert "uses products '', its budget is 'HMMA'" in exceeded(budget(), {"k": row | {"products": other["products"]}})
    assert "uses narrow 50, its budget is " in exceeded(budget(), {"k": row | {"narrow": 50}})
    assert "n has no budget" in exceeded(budget(), {"k": row, "n": row})
    assert "k has a budget, but no kernel" in exceeded(budget(), {})
    assert exceeded(budget(), {}, complete=False) == ""


def test_arguments_are_specialised_as_on_a_gpu():
    """A view that begins at an odd element isn't aligned, a stride past 2**31 is 64 bits wide, a 1 is folded in."""
    code = lambda **options: build(80, **options)[1].asm["ttir"].partition("{\n")[2].partition(" attributes")[0]  # noqa: E731
    aligned, odd, far, one = code(), code(offset=1), code(stride=2**31 + 16), code(stride=1)
    assert [text.count("tt.divisibility = 16") for text in (aligned, odd)] == [5, 2]
    assert "%stride: i32" in aligned and "%stride: i64" in far and "%stride" not in one
