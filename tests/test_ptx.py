"""What Triton and nvcc made of the kernels runs in a simulator: right results, no hazard, and planted errors are seen."""

import math
import re
import shutil

import pytest
import torch

from fastadapt._leaf import INTERPRET

from .battery import TELLING, check, run
from .gpuless import nvcc, stable
from .gpuless.emulated import CUDA
from .gpuless.emulated import ops as cuda_ops
from .gpuless.ptx import triton_device
from .gpuless.ptx.cuda_device import CudaDevice
from .gpuless.ptx.machine import Launch
from .gpuless.ptx.memory import Memory
from .gpuless.ptx.parser import Fault, Refused
from .gpuless.ptx.planted import ORDERING, without_each
from .specs import SPECS

pytestmark = [
    pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1 leaves nothing to compile"),
    # nvcc builds the CUDA half, c++filt and nm name its kernels.
    pytest.mark.skipif(not shutil.which("c++filt"), reason="needs binutils"),
]
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
ARCHITECTURES = (80, 90)
QUICK = ((torch.bfloat16, 90), (torch.float32, 80))
# What every op's code for sm_90 is ordered by; one with wgmma, by all of ORDERING.
BASIC = {"bar.sync", "bar.warp.sync", "cp.async.wait_group", "cp.async.commit_group"}
# One multiprocessor: the tallest tiles. Many: the lowest ones, and many splits of the rows.
PLANS = (1, 64)


@pytest.fixture(scope="module")
def cuda_devices():
    return {}


@pytest.fixture
def on_cuda(monkeypatch, cuda_devices):
    def install(op, arch, multiprocessors, run=Launch.run):
        device = cuda_devices.setdefault(op, None) or CudaDevice(op)
        cuda_devices[op] = device
        device.arch, device.run, device.settings = arch, run, {"multiprocessors": multiprocessors}
        stable.install(monkeypatch, SPECS[op], device)

    return install


def name(dtype):
    return str(dtype)[6:]


# What float16 adds to bfloat16, and sm_90 to what nvcc makes for sm_80 (test_cuda_is_one_code_for_all), the telling cases show.
# A tile runs in one dtype on one architecture or with one plan, and in the other dtype on the other one; another case once.


def triton_calls():
    for op, spec in SPECS.items():
        telling = [case for case in spec.cases if case.name in TELLING]
        for i, case in enumerate((*spec.cases, *spec.tiled)):
            for j, dtype in enumerate(spec.dtypes):
                for k, arch in enumerate(ARCHITECTURES):
                    turn = dtype != torch.float16 and (i + j + k) % 2 == 0 and (case in spec.tiled or i // 2 % 2 == k)
                    if not (turn or case in telling):
                        continue
                    # The short run takes each telling case once: in float32 on sm_80 or in bfloat16 on sm_90.
                    quick = case in telling and (dtype, arch) == QUICK[telling.index(case) % 2]
                    marks = () if quick else pytest.mark.slow
                    yield pytest.param(op, arch, case, dtype, marks=marks, id=f"{op}-{case.name}-{name(dtype)}-sm_{arch}")


def cuda_calls():
    for op in cuda_ops():
        spec = SPECS[op]
        for i, case in enumerate((*spec.cases, *spec.tiled)):
            for j, dtype in enumerate(spec.dtypes):
                for k, plan in enumerate(PLANS):
                    for arch in ARCHITECTURES:
                        once = arch == 80 and i % len(spec.dtypes) == j and i // 2 % len(PLANS) == k
                        once &= case not in spec.tiled[1:]
                        turn = arch == 80 and dtype != torch.float16 and case in spec.tiled and (i + j + k) % 2
                        if not (once or turn or case.name in TELLING):
                            continue
                        # The short run takes the telling cases and every second other one.
                        marks = () if once and (case.name in TELLING or i % 2 == 0) else pytest.mark.slow
                        what = f"{op}-{case.name}-{name(dtype)}-{plan}-sm_{arch}"
                        yield pytest.param(op, arch, plan, case, dtype, marks=marks, id=what)


@pytest.mark.parametrize("op, arch, case, dtype", list(triton_calls()))
def test_triton_matches_reference(monkeypatch, op, arch, case, dtype):
    triton_device.install(monkeypatch, SPECS[op], arch)
    check(SPECS[op], "triton", lambda: case.make(dtype, "cpu"))


@needs_nvcc
@pytest.mark.parametrize("op, arch, plan, case, dtype", list(cuda_calls()))
def test_cuda_matches_reference(on_cuda, op, arch, plan, case, dtype):
    on_cuda(op, arch, plan)
    check(SPECS[op], "native", lambda: case.make(dtype, "cpu"))


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("op", cuda_ops())
def test_cuda_is_one_code_for_all(op):
    """nvcc's PTX for sm_80 and sm_90 differs in how a bfloat16 becomes a float32, and nowhere else."""
    to_float = r"\{ (mov\.b32 (%f\d+), \{0,(%rs\d+)\}|cvt\.f32\.bf16 (%f\d+), (%rs\d+));\}"
    codes = [nvcc.ptx(CUDA / f"{op}.cu", arch).partition(".entry")[2] for arch in ARCHITECTURES]
    first, *others = [re.sub(to_float, r"\2\4 = \3\5", code).splitlines() for code in codes]
    assert first and all(first == other for other in others)


class Planted:
    """Leaves out every ordering instruction of the kernels that run, one at a time; ``once``: of each kernel's first launch,
    and at most three of a name."""

    def __init__(self, once):
        self.once, self.kernels, self.outcomes = once, set(), {}

    def run(self, launch):
        if self.once and launch.name in self.kernels:
            return
        self.kernels.add(launch.name)
        code = launch.name, hash(launch.ptx)
        shown = {key[-1] for key, seen in self.outcomes.items() if key[:2] == code and any(o.report for o in seen)}
        for outcome in without_each(launch, shown, 3 if self.once else math.inf):
            self.outcomes.setdefault((*code, outcome.number), []).append(outcome)

    def instructions(self):
        return {o.instruction for outcomes in self.outcomes.values() for o in outcomes}

    def reported(self):
        return {o.instruction for outcomes in self.outcomes.values() for o in outcomes if o.report}

    def missed(self):
        """Instructions that no launch showed to be needed, nor to order nothing. The short run needn't reach them all."""
        return [
            f"{kernel}: instruction {number}, {outcomes[0].instruction}"
            for (kernel, _, number), outcomes in self.outcomes.items()
            if not any(o.report or o.idle and (o.reached or self.once) for o in outcomes)
        ]


both_runs = pytest.mark.parametrize(
    "once", [pytest.param(True, marks=pytest.mark.short, id="short"), pytest.param(False, marks=pytest.mark.slow, id="full")]
)


@both_runs
@pytest.mark.parametrize("op", SPECS)
def test_triton_needs_every_barrier_wait_and_fence(monkeypatch, op, once):
    """Left out of the PTX, each is reported, but for those that order nothing, which ``without_each`` shows by a rule."""
    planted = Planted(once)
    for case in SPECS[op].planted[: 1 if once else None]:
        for arch in ARCHITECTURES[1 if once else 0 :]:
            triton_device.install(monkeypatch, SPECS[op], arch, planted.run)
            run(SPECS[op].op, case.make(torch.bfloat16, "cpu"), backend="triton")
    assert not planted.missed()
    used = set(ORDERING) if any(name.startswith("wgmma") for name in planted.instructions()) else BASIC
    assert planted.reported() == used - {"bar.warp.sync"}


@needs_nvcc
@both_runs
@pytest.mark.parametrize("op", cuda_ops())
def test_cuda_needs_every_barrier_wait_and_fence(on_cuda, op, once):
    planted = Planted(once)
    on_cuda(op, 80, PLANS[-1], planted.run)
    for case in [SPECS[op].case("everything")] if once else SPECS[op].planted:
        run(SPECS[op].op, case.make(torch.bfloat16, "cpu"), backend="native")
    assert not planted.missed()
    code = nvcc.ptx(CUDA / f"{op}.cu", 80)
    present = {name for name in ("bar.sync", "cp.async.wait_group", "cp.async.commit_group") if name in code}
    assert planted.reported() == planted.instructions() >= present >= {"bar.sync"}


PLANTED_IN_TRITON = {  # text of the PTX of a forward kernel, its replacement, and what is said
    "stores-without-mask": (r"@%p\d+ (st\.global)", r"\1", Fault, "access out of bounds: .* of y_ptr"),
    "loads-without-mask": (r"@%p\d+ (ld\.global\.b32)", r"\1", Fault, "access out of bounds"),
    "unknown-instruction": (r"\n\tadd\.s32", "\n\tdp4a.s32.s32", Refused, "unknown instruction: dp4a"),
    "unknown-modifier": (r"fma\.rn\.f32", "fma.rz.f32", Refused, "fma.rz.f32"),
    "unknown-operand": (r"%ctaid\.x", "%clusterid.x", Refused, "%clusterid.x"),
}


@pytest.mark.parametrize("error", PLANTED_IN_TRITON)
def test_planted_error_in_triton(monkeypatch, error):
    text, replacement, kind, message = PLANTED_IN_TRITON[error]

    def broken(launch):
        assert re.search(text, launch.ptx)
        launch._replace(ptx=re.sub(text, replacement, launch.ptx)).run()

    triton_device.install(monkeypatch, SPECS["bottleneck"], 80, broken)
    arguments = SPECS["bottleneck"].case("m33-d65-r17").make(torch.float32, "cpu")
    with pytest.raises(kind, match=message):
        run(SPECS["bottleneck"].op, arguments, backend="triton")


def execute(body, grid=1, threads=64, size=1024, offset=0):
    """``body`` on a buffer of zeros: %rd1 holds its address, %r1 the thread, %r2 the block. Returns it as int32."""
    ptx = f"""
    .extern .shared .align 16 .b8 dynamic[];
    .visible .entry kernel(.param .u64 buffer)
    {{
        .reg .pred %p<4>; .reg .b32 %r<9>; .reg .b64 %rd<9>;
        ld.param.u64 %rd1, [buffer];
        mov.u32 %r1, %tid.x;
        mov.u32 %r2, %ctaid.x;
        shl.b32 %r3, %r1, 2;
        cvt.u64.u32 %rd2, %r3;
        add.s64 %rd3, %rd1, %rd2;
        mov.b32 %r4, dynamic;
        add.s32 %r5, %r4, %r3;
        {body}
        ret;
    }}"""
    memory = Memory(1 << 22)
    start = memory.add(size, "buffer")
    memory.data[start : start + size] = 0
    address = (memory.origin + start + offset).to_bytes(8, "little")
    Launch(ptx, "kernel", memory, (grid, 1, 1), threads, 512, [address]).run()
    return memory.data[start : start + size].view("int32")


COPY = "cp.async.ca.shared.global [%r5], [%rd3], 4, 4;"
NEIGHBOUR = "xor.b32 %r6, %r5, {bit}; st.shared.b32 [%r5], %r1; {between} ld.shared.b32 %r7, [%r6]; st.global.b32 [%rd3], %r7;"


def test_runs_what_it_should():
    assert execute("st.global.b32 [%rd3], %r1;")[:65].tolist() == [*range(64), 0]
    across = execute(NEIGHBOUR.format(bit=128, between="bar.sync 0;"))
    assert across[:64].tolist() == [*range(32, 64), *range(32)]
    within = execute(NEIGHBOUR.format(bit=4, between="bar.warp.sync -1;"))
    assert within[:4].tolist() == [1, 0, 3, 2]
    loop = "mov.b32 %r6, 0; AGAIN: add.s32 %r6, %r6, 1; setp.lt.u32 %p1, %r6, %r1; @%p1 bra AGAIN; st.global.b32 [%rd3], %r6;"
    assert execute(loop)[:64].tolist() == [1, *range(1, 64)]
    divided = "mul.hi.s64 %rd5, %rd4, 7378697629483820647; shr.s64 %rd5, %rd5, 3; cvt.u32.u64 %r6, %rd5;"
    twentieth = f"cvt.u64.u32 %rd4, %r1; {divided} st.global.b32 [%rd3], %r6;"
    assert execute(twentieth)[:64].tolist() == [i // 20 for i in range(64)]
    reduced = "add.s32 %r6, %r1, -40; redux.sync.{}.s32 %r7, %r6, -1; st.global.b32 [%rd3], %r7;"
    for name, expected in (("min", [-40, -8]), ("max", [-9, 23]), ("add", [-784, 240])):
        assert execute(reduced.format(name))[:64:32].tolist() == expected == execute(reduced.format(name))[31:64:32].tolist()
    clamped = "add.s32 %r6, %r1, -40; {}.relu.s32 %r7, %r6, 3; st.global.b32 [%rd3], %r7;"
    assert execute(clamped.format("min"))[:64].tolist() == [min(max(i - 40, 0), 3) for i in range(64)]
    assert execute(clamped.format("max"))[:64].tolist() == [max(i - 40, 3) for i in range(64)]
    words = "shl.b32 %r6, %r1, 16; or.b32 %r6, %r6, 32704; mov.b32 %r7, 2654144;"  # NaN in the lower halves, 40 in an upper one
    chosen = "selp.b32 %r6, 1, 0, %p1; selp.b32 %r7, 2, 0, %p2; or.b32 %r6, %r6, %r7; st.global.b32 [%rd3], %r6;"
    for kind in ("f16x2", "bf16x2"):
        compared = [execute(f"{words} setp.{name}.{kind} %p1|%p2, %r6, %r7; {chosen}")[:64].tolist() for name in ("neu", "lt")]
        assert compared == [[1 + 2 * (i != 40) for i in range(64)], [2 * (i < 40) for i in range(64)]]
    copied = f"{COPY} cp.async.commit_group; cp.async.wait_group 0; ld.shared.b32 %r6, [%r5]; st.global.b32 [%rd3], %r6;"
    assert not execute(copied).any()


HAZARDS = {
    "load-out-of-bounds": ("ld.global.b32 %r6, [%rd3+1000];", {}, "out of bounds: 4 bytes at byte 1024 of 1024 of buffer"),
    "store-before-the-buffer": ("st.global.b32 [%rd3+-4], %r1;", {}, "out of bounds: 4 bytes at byte -4"),
    "shared-out-of-bounds": ("st.shared.b32 [%r5+508], %r1;", {}, "out of bounds: 4 bytes at byte 512 of 512 of shared"),
    "misaligned": ("ld.global.b32 %r6, [%rd3];", {"offset": 2}, "misaligned access of 4 bytes"),
    "no-barrier": (NEIGHBOUR.format(bit=128, between=""), {}, "race between warps: store and load"),
    "warp-barrier-only": (NEIGHBOUR.format(bit=128, between="bar.warp.sync -1;"), {}, "race between warps"),
    "no-warp-barrier": (NEIGHBOUR.format(bit=4, between=""), {}, "race between lanes of one warp: store and load"),
    "two-warps-store": ("and.b32 %r6, %r3, 124; add.s32 %r6, %r6, %r4; st.shared.b32 [%r6], %r1;", {}, "store and store"),
    "two-blocks-store": ("st.global.b32 [%rd3], %r2;", {"grid": 2}, "race .*: store and store at .* of buffer"),
    "two-blocks-load-and-store": (
        "ld.global.b32 %r6, [%rd1]; setp.eq.u32 %p1, %r2, 1; @%p1 st.global.b32 [%rd1], %r2;", {"grid": 2},
        "race .*: store and load at .* of buffer"),
    "barrier-for-some": ("setp.lt.u32 %p1, %r1, 32; @%p1 bra ON; bar.sync 0; ON:", {}, "others of their block never reach"),
    "barrier-within-a-warp": ("setp.lt.u32 %p1, %r1, 7; @%p1 bra ON; bar.sync 0; ON:", {}, "only 25 lanes of a warp arrive"),
    "no-wait": (COPY + "cp.async.commit_group; ld.shared.b32 %r6, [%r5];", {}, "that an unfinished cp.async writes"),
    "ends-with-copies": (COPY, {}, "ends with copies in flight"),
}  # fmt: skip


@pytest.mark.parametrize("hazard", HAZARDS)
def test_hazard_is_reported(hazard):
    body, options, message = HAZARDS[hazard]
    with pytest.raises(Fault, match=message):
        execute(body, **options)
