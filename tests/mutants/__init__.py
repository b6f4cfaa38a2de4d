"""Planted errors: each is an edit of a kernel's source that a named check must see.

``<op>_<kind>.py`` holds the ``MUTANTS`` of one op for one kind of kernel; :func:`table` finds them by name. An edit replaces a
text that must occur exactly once, so that the tables can't fall behind the kernels unnoticed. ``python -m tests.mutants.run``
plants all of them.
"""

import importlib
import pkgutil
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Kind -> its source, by the name of the op; "op" is what PyTorch and the caller see of the kernels.
KINDS = {"op": "fastadapt/ops/{}.py", "triton": "kernels/{}.py", "cuda": "csrc/cuda/{}.cu", "cpu": "csrc/cpu/{}.cpp"}
# Fast mutants that each kernel needs; every run of the tests plants as many of one kernel of an op.
MINIMUM = 1

# Class of error -> the kinds of kernels in which it must be planted somewhere.
ALL = ("triton", "cuda", "cpu")
BUGS = {
    "load out of bounds": ALL,
    "store out of bounds": ALL,
    "mask off by one": ALL,
    "tail of the product unmasked": ("triton", "cuda"),
    "masked-off lanes undefined": ("triton",),
    "32-bit offset": ALL,
    "stride ignored": ALL,
    "alignment assumed": ("triton", "cuda"),
    "tail skipped": ALL,
    "grid too small": ("triton", "cuda"),
    "empty input": ("triton", "cuda"),
    "NaN swallowed": ALL,
    "zero times infinity": ALL,
    "scale on the residual": ALL,
    "bias after the activation": ALL,
    "missing term": ("op", *ALL),
    "wrong row of a bank": ALL,
    "id -1 not honoured": ALL,
    "gradient mask ignored": ("op", *ALL),
    "uninitialised memory": ALL,
    "input overwritten": ALL,
    "sum in 16 bits": ALL,
    "product in 16 bits": ALL,
    "residual added after rounding": ALL,
    "tf32 product": ALL,
    "cancellation": ALL,
    "race": ALL,
    "order of a sum left to chance": ("triton", "cpu"),
    "row depends on its neighbours": ALL,
    "missing barrier": ("cuda",),
    "missing wait": ("cuda",),
    "divergent barrier": ("cuda",),
    "too much shared memory": ("triton", "cuda"),
    "grid too large": ("triton", "cuda"),
    "wrong device": ("triton", "cuda"),
    "one tile of several": ALL,
    "wrong instruction": ("cuda",),
    "spilled registers": ("triton", "cuda"),
    "shape that only the interpreter takes": ("triton",),
    "slow instructions": ("triton",),
    "wrong promise to the compiler": ("op",),
    "recompilation": ("op",),
    "graph break": ("op",),
    "second differentiation": ("op",),
    "function transform": ("op",),
    "hidden copy": ("op",),
    "silent fallback": ("op",),
    "dtypes mixed up": ("cuda",),
    "autocast": ("op",),
}

# An edit of an op: a second differentiation, which differentiable_once refuses, goes the way of torch's decorator.
ONCE = (
    "    @differentiable_once\n",
    "    @lambda f: torch.autograd.function.once_differentiable(lambda ctx, *grads: f(ctx, ctx.saved_tensors, *grads))\n",
)


@dataclass(frozen=True)
class Rung:
    """A check of the ladder: the tests of ``tests`` (paths for pytest) that ``select`` (an expression for -k) names."""

    tests: str
    select: str
    interpret: bool = False  # TRITON_INTERPRET=1
    plugins: tuple = ()  # of pytest
    edits: tuple = ()  # that make it cheap; with and without the error
    target: str = "portable"  # the instruction set that it takes, as in gpuless.sanitized


@dataclass(frozen=True)
class Mutant:
    """An error: ``edits`` are (file, old text, new text); every rung of ``seen`` must fail with a message that matches."""

    name: str
    bug: str
    seen: dict  # Rung -> regular expression
    edits: tuple
    fast: bool = False

    def missing(self) -> str:
        """Why this processor can't show the error, or an empty string."""
        from ..gpuless.sanitized import missing  # with fastadapt, which extension_plugin imports its way

        return next(filter(None, (missing(rung.target) for rung in self.seen)), "")


def table() -> dict:
    """(op, kind) -> its mutants."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        op, _, kind = module.name.rpartition("_")
        if kind in KINDS:
            found[op, kind] = importlib.import_module(f"{__name__}.{module.name}").MUTANTS
    return found


def edited(text: str, old: str, new: str, where: str) -> str:
    if text.count(old) != 1:
        raise ValueError(f"{where}: the text to replace must occur once, but occurs {text.count(old)} times: {old!r}")
    return text.replace(old, new)


def plant(edits: tuple, tree: Path) -> None:
    """Edit the sources in ``tree``."""
    for file, old, new in edits:
        path = tree / file
        path.write_text(edited(path.read_text(), old, new, file))
