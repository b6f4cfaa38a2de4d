"""One file an op: what the battery, the GPU-less tools and the benchmarks know of it. ``SPECS`` finds them by name."""

import importlib
import pkgutil

SPECS = {m.name: importlib.import_module(f"{__name__}.{m.name}").SPEC for m in pkgutil.iter_modules(__path__)}
