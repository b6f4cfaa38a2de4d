"""What the machine code of a compiled Triton kernel uses, read from the cubin or the AMD assembly itself."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from triton.backends.nvidia import __file__ as nvidia

CUOBJDUMP = Path(nvidia).parent / "bin" / "cuobjdump"
# What machine code calls the tensor cores: mma.sync, wgmma, tcgen05, AMD's.
PRODUCTS = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA|v_mfma)")
LOADS = re.compile(r"\bLDG(?:STS)?((?:\.\w+)*)")
AMD_LOADS = re.compile(r"\b(?:global|buffer|flat)_load_(\w+)")
LOAD_BYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
AMD_LOAD_BYTES = {
    "dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "sshort": 2, "short": 2, "ubyte": 1, "sbyte": 1,
}  # fmt: skip


class Machine(NamedTuple):
    """What one kernel uses.

    Registers of a thread; bytes of shared memory of a program; bytes of stack of a thread; instructions in loops that go to
    local memory; the kind of tensor-core instruction, "" for none; how many percent of the bytes that its global loads fetch
    come in pieces of 16, each instruction counted once; whether tensor cores may read, through the async proxy, shared memory
    that threads wrote with no fence between.
    """

    registers: int
    shared: int
    stack: int
    local: int
    products: str
    wide: int
    unfenced: bool = False


def inspect(kernel) -> Machine:
    """Read what Triton compiled; running ptxas again could give other machine code."""
    read = _read_amd if "amdgcn" in kernel.asm else _read_nvidia
    return read(kernel, kernel.metadata.shared)


def _read_nvidia(kernel, shared):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", "-sass", file.name]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ((registers, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", code)
    loads = [next((LOAD_BYTES[part] for part in m.split(".") if part in LOAD_BYTES), 4) for m in LOADS.findall(code)]
    return Machine(
        int(registers), shared, int(stack), local_in_loops(code), _kind(code), _wide(loads), unfenced(kernel.asm["ptx"])
    )


def _read_amd(kernel, shared):
    code = kernel.asm["amdgcn"]

    def field(name):
        (value,) = re.findall(rf"^\s*(?:- )?\.{name}:\s*(\d+)", code, re.MULTILINE)
        return int(value)

    loads = [AMD_LOAD_BYTES[re.match(r"dwordx\d|[a-z]+", m)[0]] for m in AMD_LOADS.findall(code)]
    # Scalar registers spill to the lanes of vector registers, or where those are full to the stack, which is reported.
    spills = field("vgpr_spill_count")
    return Machine(field("vgpr_count"), shared, field("private_segment_fixed_size"), spills, _kind(code), _wide(loads))


def local_in_loops(sass: str) -> int:
    """How many loads and stores of local memory lie between a branch back and where it leads."""
    code = [(int(address, 16), text) for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)]
    jumps = [(int(to, 16), at) for at, text in code for to in re.findall(r"\bBRA\b.*?(0x[0-9a-f]+)", text)]
    local = [at for at, text in code if re.search(r"\b(STL|LDL)\b", text)]
    return sum(any(to <= at < end for to, end in jumps) for at in local)


def _kind(code):
    return max(PRODUCTS.findall(code), default="")


def _wide(loads):
    return round(100 * 16 * loads.count(16) / sum(loads)) if loads else 0


WRITES = re.compile(r"\b(st\.shared|stmatrix|cp\.async\.wait_)")  # an asynchronous copy has written once it is waited for
BRANCH = re.compile(r"(@\S+\s+)?bra(?:\.uni)?\s+(\$\w+)")


def unfenced(ptx: str) -> bool:
    """Whether a path leads from a write to shared memory to wgmma or tcgen05.mma without fence.proxy.async."""
    at_label, before = {}, None
    while at_label != before:  # a branch back may reach a label with more than the pass before knew
        before, written = dict(at_label), False
        for line in map(str.strip, ptx.splitlines()):
            if label := re.match(r"(\$\w+):", line):
                written = at_label[label[1]] = written or at_label.get(label[1], False)
            elif branch := BRANCH.match(line):
                at_label[branch[2]] = written or at_label.get(branch[2], False)
                written = written and branch[1] is not None
            elif line.startswith("fence.proxy.async"):
                written = False
            elif WRITES.search(line):
                written = True
            elif written and ("wgmma.mma_async" in line or "tcgen05.mma" in line):
                return True
    return False
