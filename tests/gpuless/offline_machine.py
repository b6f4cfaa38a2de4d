"""What the machine code of a compiled Triton kernel uses, read from the cubin or the AMD assembly itself."""

import itertools
import re
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from triton.backends.nvidia import __file__ as nvidia

TOOLS = Path(nvidia).parent / "bin"
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


def inspect(kernels: list) -> list[Machine]:
    """Read what Triton compiled for one chip; running ptxas again could give other machine code."""
    if "amdgcn" in kernels[0].asm:
        return [_read_amd(kernel) for kernel in kernels]
    return [_read_nvidia(kernel, code) for kernel, code in zip(kernels, disassembled(kernels))]


def _read_nvidia(kernel, code):
    usage = _output("cuobjdump", kernel.asm["cubin"], "--dump-resource-usage")
    ((registers, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    loads = [next((LOAD_BYTES[part] for part in m.split(".") if part in LOAD_BYTES), 4) for m in LOADS.findall(code)]
    return Machine(
        int(registers), kernel.metadata.shared, int(stack), local_in_loops(code), _kind(code), _wide(loads),
        unfenced(kernel.asm["ptx"]),
    )  # fmt: skip


def _output(tool, data, *options):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(data)
        file.flush()
        return subprocess.run([TOOLS / tool, *options, file.name], capture_output=True, text=True, check=True).stdout


def disassembled(kernels) -> list[str]:
    """The instructions of each. nvdisasm starts for half a second and reads one file, so they go there one behind another."""
    codes, arch = [_instructions(kernel.asm["cubin"]) for kernel in kernels], kernels[0].metadata.target.arch
    text = _output("nvdisasm", b"".join(codes), "--binary", f"SM{arch}{'a' * (arch >= 90)}")
    lines = iter([line for line in text.splitlines() if re.match(r"\s*/\*[0-9a-f]{4,}\*/", line)])
    return ["\n".join(itertools.islice(lines, len(code) // 16)) for code in codes]


def _instructions(cubin: bytes) -> bytes:
    """What the one section that can be executed holds; a cubin is an ELF file of 64 bits."""
    (start,), (size, count) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<HH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, start + i * size) for i in range(count)]
    ((offset, length),) = [header[4:] for header in headers if header[2] & 4]
    return cubin[offset : offset + length]


def _read_amd(kernel):
    code = kernel.asm["amdgcn"]

    def field(name):
        (value,) = re.findall(rf"^\s*(?:- )?\.{name}:\s*(\d+)", code, re.MULTILINE)
        return int(value)

    loads = [AMD_LOAD_BYTES[re.match(r"dwordx\d|[a-z]+", m)[0]] for m in AMD_LOADS.findall(code)]
    # Scalar registers spill to the lanes of vector registers, or where those are full to the stack, which is reported.
    spills = field("vgpr_spill_count")
    return Machine(
        field("vgpr_count"), kernel.metadata.shared, field("private_segment_fixed_size"), spills, _kind(code), _wide(loads)
    )


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
