"""The Triton kernels of every op in the strict interpreter: what the battery, which also runs in it, doesn't call for."""

import pytest
import torch

from fastadapt._leaf import INTERPRET

from .battery import TELLING, check, run
from .gpuless import configurations
from .gpuless import strict_interpreter as strict
from .specs import SPECS

pytestmark = pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")
BF16, FP32 = torch.bfloat16, torch.float32


def over(cases, dtypes, alternating=False, turns=False):
    """Parametrize a test. ``alternating``: the short run takes each case in one dtype or another. ``turns``: every run does."""
    return pytest.mark.parametrize(
        "spec, case, dtype",
        [
            pytest.param(spec, case, dtype, id=f"{name}-{case.name}-{str(dtype)[6:]}", marks=[pytest.mark.slow] * later)
            for name, spec in SPECS.items()
            for i, case in enumerate(cases(spec))
            for j, dtype in enumerate(dtypes)
            for later in [alternating and (i + j) % len(dtypes) > 0]
            if not turns or (i + j) % len(dtypes) == 0
        ],
    )


def launch(spec, arguments, layout=lambda t: t):
    """What the launchers of both leaves return when every gradient is wanted."""
    views = {id(v): layout(v) for n, v in arguments.items() if n in spec.activations and isinstance(v, torch.Tensor)}
    args = spec.leaf_args({n: views.get(id(v), v) for n, v in arguments.items()})
    outputs = spec.fwd.launcher(*args)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [isinstance(arguments.get(name), torch.Tensor) for name in spec.bwd_outputs]
    return *outputs, *spec.bwd.launcher(*spec.bwd_leaf_args(layout(torch.ones_like(outputs[0])), args, wanted))


def tiles_of(spec, case, dtype, place):
    """The entries of the tables of tiles that a call takes, without running a program."""
    with configurations.taken(place) as entries, strict.ghosts(lambda n: ()):
        launch(spec, case.make(dtype, "meta"))
    return entries


DEPTH = max((len(tiles) for table in configurations.tables().values() for tiles in table.values()), default=1)


@pytest.mark.parametrize("name", SPECS)
def test_tiled_calls_reach_every_tile(name):
    """And every table belongs to an op by the name of its file."""
    taken = set()
    for case in SPECS[name].tiled:
        taken |= {e for dtype in (BF16, FP32) for place in range(DEPTH) for e in tiles_of(SPECS[name], case, dtype, place)}
    owner = lambda table: max((op for op in SPECS if table.startswith(op)), key=len, default=None)  # noqa: E731
    assert taken == {entry for entry in configurations.entries() if owner(entry[0]) in (name, None)}


@over(lambda spec: spec.tiled, (BF16, FP32), alternating=True)
def test_every_tile_alone(spec, case, dtype):
    """The rule of the battery for each tile that the case can be made to take, and every element of the outputs written."""
    seen = set()
    for place in range(DEPTH):
        if seen >= (entries := tiles_of(spec, case, dtype, place)):
            continue
        seen |= entries
        with configurations.taken(place):
            check(spec, "triton", lambda: case.make(dtype, "cpu"))
            with strict.recorded() as launches:
                outputs = launch(spec, case.make(dtype, "cpu"))
        assert [strict.unwritten(t, launches) or 0 for t in outputs] == [0] * len(outputs), place


def transposed(t):
    return t.transpose(0, -1).contiguous().transpose(0, -1)


LAYOUTS = {"contiguous": lambda t: t, "transposed": transposed}


@pytest.mark.parametrize(
    "spec, case, layout",
    [
        pytest.param(spec, case, layout, id=f"{name}-{case.name}-{layout}", marks=[pytest.mark.slow] if j else [])
        for name, spec in SPECS.items()
        for i, case in enumerate((spec.large(2**33), *spec.huge))
        for j, layout in enumerate(LAYOUTS)
    ],
)
def test_offsets_of_the_launches_are_64_bit(spec, case, layout):
    """Programs from both ends of every launch, the last of which reach the end of all that is written. So many elements that
    columns overflow too where they are strided."""
    with strict.ghosts() as launches:
        launch(spec, case.make(BF16, "meta"), LAYOUTS[layout])
    assert any(t.numel() > 2**31 for record in launches for t in record.tensors)
    assert strict.unreached(launches) == [], "too few programs"


def order_changes_no_bit(spec, case, dtype, seeds):
    arguments, first = case.make(dtype, "cpu"), None
    for seed in seeds:
        strict.reseed(seed)
        results = run(spec.op, arguments, backend="triton")
        first = first or results
        assert all(torch.equal(t, results[n]) for n, t in first.items()), seed


@over(lambda spec: spec.tiled[:1], (FP32,))
def test_the_order_of_programs_changes_no_bit(spec, case, dtype):
    order_changes_no_bit(spec, case, dtype, range(3))


@pytest.mark.slow
@over(lambda spec: [case for case in spec.cases if case.name in TELLING], (BF16, FP32))
def test_nothing_is_reported_over_twenty_orders(spec, case, dtype):
    order_changes_no_bit(spec, case, dtype, range(10) if dtype == FP32 else range(10, 20))


@pytest.mark.slow
@over(lambda spec: [case for case in spec.cases if case.name not in TELLING], (BF16, FP32), turns=True)
def test_nothing_is_reported_over_three_orders(spec, case, dtype):
    """Races are noted by program and element, and so reported in whatever order the programs run."""
    order_changes_no_bit(spec, case, dtype, range(3))
