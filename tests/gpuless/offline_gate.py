"""The compilation gate: every launch of the calls in an op's spec, compiled for one chip, and the faults of its machine code.

The first call of a dtype and rank goes through all tiles of the tables it meets; the other calls are compiled as launched.
"""

import collections
import contextlib
import math
import re
from types import SimpleNamespace
from typing import NamedTuple

import torch
import triton
from triton.compiler.compiler import make_backend

from .configurations import tables, taken
from .offline import CHIPS, Launch, captured, compiled, target
from .offline_machine import Machine, inspect

COMPILER = f"triton {triton.__version__}"
# With a few values fewer in registers one more program may fit a multiprocessor; ptxas then stores what a loop doesn't use
# before it and loads it behind it, or loads a value that the loop doesn't change in each round. That much is worth it; a tile
# that doesn't fit its registers spills hundreds of bytes and dozens of instructions.
STACK, RELOADS = 16, 1
# Of these chips Triton makes the same PTX as of those, and ptxas alone runs for each.
TWINS = {89: 86}


class Build(NamedTuple):
    """A compiled launch. ``products``: its tl.dot needs tensor cores; ``wide``: some tile has 16 bytes for each thread."""

    name: str
    launch: Launch
    machine: Machine
    products: bool
    wide: bool


@contextlib.contextmanager
def float32_products(precision):
    """Inside, PyTorch's setting for products of float32 on CUDA is ``precision``."""
    setting = torch.backends.cuda.matmul
    before, setting.fp32_precision = setting.fp32_precision, precision
    try:
        yield
    finally:
        setting.fp32_precision = before


def launches(spec, call, chip, place=None):
    """What a forward and a backward launch on ``chip`` when every gradient is wanted, and the entries of the tables used."""
    arguments = call.case.make(call.dtype, "meta")
    args = spec.leaf_args(arguments)
    wanted = [isinstance(arguments.get(name), torch.Tensor) for name in spec.bwd_outputs]
    with target(chip), float32_products(call.precision), taken(place) as entries, captured() as found:
        spec.fwd.launcher(*args)
        spec.bwd.launcher(*spec.bwd_leaf_args(spec.output(arguments), args, wanted))
    return found, entries


def places(spec, call, chip, known: set):
    """The places that a call goes through, given the ``known`` (table, key) pairs, to which its own are added."""
    keys = {entry[:2] for entry in launches(spec, call, chip)[1]}
    new = keys - known
    known |= keys
    return range(max(len(tables()[name][key]) for name, key in new)) if new else (None,)


def compiled_for(launch, chip):
    """The launch compiled for ``chip``, as far as the gate reads it."""
    twin = TWINS.get(chip, chip)
    with target(twin):
        kernel = compiled(launch)
    if twin == chip:
        return kernel
    gpu, ptx = CHIPS[chip].target, kernel.asm["ptx"].replace(f".target sm_{twin}", f".target sm_{chip}")
    cubin = make_backend(gpu).make_cubin(ptx, {}, kernel.metadata, chip)
    return SimpleNamespace(
        hash=kernel.hash, asm={**kernel.asm, "ptx": ptx, "cubin": cubin}, metadata=kernel.metadata._replace(target=gpu)
    )


def builds(spec, chip, calls, everything=True):
    """The distinct Builds of ``calls``, and the entries of the tables that they cover."""
    found, covered, known = [], set(), set()
    for call in calls:
        hashes = set()
        for place in places(spec, call, chip, known) if everything else (None,):
            launched, entries = launches(spec, call, chip, place)
            covered |= entries
            for launch in launched:
                kernel = compiled_for(launch, chip)
                if kernel.hash not in hashes:
                    hashes.add(kernel.hash)
                    found.append((call, launch, kernel))
    return described(found), covered


def described(found):
    """The Builds of all ``(call, launch, kernel)`` of one chip."""
    twins, built = collections.Counter(), []
    for (call, launch, kernel), machine in zip(found, inspect([kernel for *_, kernel in found])):
        name = f"{call.name}: {launch.name}"
        twins[name] += 1  # the same tiles with other arguments
        built.append(_build(f"{name} #{twins[name]}" if twins[name] > 1 else name, call, launch, kernel, machine))
    return built


def _build(name, call, launch, kernel, machine):
    code, threads = kernel.asm["ttir"], kernel.metadata.num_warps * kernel.metadata.target.warp_size
    operands = re.findall(r"tt\.dot .*?(tf32)?(?:x3)? : tensor<[\dx]*x(\w+)> \*", code)
    tiles = re.findall(r"tt\.load .*: tensor<((?:\d+x){2,})!tt\.ptr<[a-z]+(\d+)", code)
    sizes = [math.prod(map(int, shape.rstrip("x").split("x"))) * int(bits) // 8 for shape, bits in tiles]
    return Build(
        name, launch, machine,
        any(tf32 or dtype != "f32" for tf32, dtype in operands),
        call.aligned and any(size >= 16 * threads for size in sizes),
    )  # fmt: skip


def faults(build: Build, chip: str) -> list[str]:
    """What no kernel may do on any chip."""
    machine, limit = build.machine, CHIPS[chip].shared * 1024
    x, *others = build.launch.grid
    found = {
        f"{machine.shared} bytes of shared memory, the chip has {limit}": machine.shared > limit,
        f"{machine.stack} bytes of stack": machine.stack > STACK,
        f"{machine.local} instructions in loops go to local memory": machine.local > RELOADS,
        "its products use no tensor cores": build.products and not machine.products,
        "no 16-byte loads": build.wide and not machine.wide,
        "no fence.proxy.async between writes to shared memory and tensor cores": machine.unfenced,
        f"grid {build.launch.grid} exceeds what CUDA launches": x >= 2**31 or any(n >= 2**16 for n in others),
    }
    return [f"{chip} {build.name}: {fault}" for fault, present in found.items() if present]


def row(machine: Machine) -> dict:
    """What the budgets record of a kernel; ``narrow``: percent of the loaded bytes that don't come in pieces of 16, in tens."""
    narrow = round(10 - machine.wide / 10) * 10
    return {"registers": machine.registers, "shared": machine.shared, "narrow": narrow, "products": machine.products}
