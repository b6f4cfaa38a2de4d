"""A pytest plugin: what the emulation and the sanitized programs are made of is compiled once for all edited trees."""

import hashlib
import os
import shutil
from pathlib import Path

from tests.gpuless import stable

from . import ROOT
from .extension import text_of

OBJECTS = Path(os.environ["FASTADAPT_MUTANTS_OBJECTS"])
_compile = stable.Builder.compile


def compile(self, source, *flags):
    options = " ".join(map(str, (source.name, *self.flags, *flags))).replace(str(ROOT), "")
    kept = OBJECTS / f"{source.stem}-{hashlib.sha256((options + text_of(source)).encode()).hexdigest()[:16]}.o"
    if not kept.exists():
        shutil.copy(_compile(self, source, *flags), kept)
    return kept


stable.Builder.compile = compile
