"""What a call does on a device beyond its numbers. Every check runs over all ops and backends; on a machine without a GPU those
that have a meaning on the CPU run there, and the others say why they don't."""

import pytest
import torch

from benchmarks.memory import peak_extra

from ..accuracy import excess
from ..battery import BACKENDS, DEVICE, TELLING, floats, over, run, substitute
from ..specs import SPECS
from .device import Cuda, StandIn, moved

MACHINE = Cuda() if DEVICE == "cuda" else StandIn()


def same(actual, expected):
    """The names of what isn't bit-equal."""
    return [name for name in expected if not torch.equal(actual[name], expected[name])]


def bench(spec):
    """The largest call to measure that suits the machine."""
    cases = [c for c in getattr(spec, f"bench_{DEVICE}", spec.bench) if DEVICE == "cuda" or c.bytes(4) <= 2**24]
    return max(cases, key=lambda c: (c.bytes(4), c.flops))


def largest(*dtypes):
    """Parametrize a test over ops and backends with the largest call to measure."""
    return pytest.mark.parametrize(
        "spec, backend, case, dtype",
        [
            pytest.param(spec, backend, bench(spec), dtype, id=f"{name}-{backend}-{str(dtype)[6:]}")
            for name, spec in SPECS.items()
            for backend in BACKENDS
            if (backend, DEVICE) in spec.fwd.available
            for dtype in dtypes
        ],
    )


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_backends(spec):
    """Both backends are there: without this a build that lost the kernels would pass every other check."""
    wanted = BACKENDS if DEVICE == "cuda" else ("native",)
    assert {leaf.name: sorted(leaf.available) for leaf in (spec.fwd, spec.bwd)} == {
        leaf.name: sorted({*leaf.available, *((backend, DEVICE) for backend in wanted)}) for leaf in (spec.fwd, spec.bwd)
    }


@largest(torch.float32, torch.bfloat16)
def test_repeats_of_a_large_call(spec, backend, case, dtype):
    test_repeats(spec, backend, case, dtype)


@over(*TELLING)
def test_repeats(spec, backend, case, dtype):
    """A race shows as a change from run to run."""
    arguments = case.make(dtype, DEVICE)
    grad_y = torch.randn_like(spec.output(arguments))
    first = run(spec.op, arguments, grad_y, backend=backend)
    for i in range(MACHINE.repeats):
        assert not (wrong := same(run(spec.op, arguments, grad_y, backend=backend), first)), f"run {i}: {wrong}"


@over(*TELLING, dtypes=(torch.float32, torch.bfloat16))
def test_graphs(spec, backend, case, dtype):
    """A captured step, replayed after its inputs have changed in place, does what a call would do."""
    arguments, fresh = case.make(dtype, DEVICE), case.make(dtype, DEVICE)
    grad_y = torch.randn_like(spec.output(arguments))
    step = lambda: run(spec.op, arguments, grad_y.clone(), backend=backend)  # noqa: E731  a gradient may be grad_y itself
    before = step()
    outputs, replay = MACHINE.capture(step)
    replay()
    assert not (wrong := same(outputs, before)), wrong
    with torch.no_grad():
        for name, tensor in floats(arguments).items():
            tensor.copy_(fresh[name])
        for tensor in arguments.values():
            if isinstance(tensor, torch.Tensor) and not tensor.is_floating_point():
                tensor.copy_(tensor.roll(1, 0))
        for tensor in outputs.values():
            tensor.fill_(float("nan"))
    expected = step()
    assert same(expected, before)
    replay()
    assert not (wrong := same(outputs, expected)), wrong


@over(*TELLING, dtypes=(torch.float32, torch.bfloat16))
def test_streams(spec, backend, case, dtype):
    """On a side stream whose inputs become right only after a while: a launch on another stream reads NaN."""
    if DEVICE == "cpu":
        pytest.skip("a CPU has no streams")
    arguments = case.make(dtype, DEVICE)
    expected = run(spec.op, arguments, backend=backend)
    late = {name: torch.full_like(t, float("nan")) for name, t in floats(arguments).items()}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # cycles
        for name, tensor in floats(arguments).items():
            late[name].copy_(tensor)
        actual = run(spec.op, substitute(arguments, late), backend=backend)
    stream.synchronize()
    assert not (wrong := same(actual, expected)), wrong


@over(*TELLING, dtypes=(torch.float32, torch.bfloat16))
def test_devices(spec, backend, case, dtype):
    """Tensors on a device that isn't the current one."""
    if DEVICE == "cpu" or torch.cuda.device_count() < 2:
        pytest.skip("there is one device")
    if torch.cuda.get_device_name(0) != torch.cuda.get_device_name(1):
        pytest.skip("the devices differ")
    arguments = case.make(dtype, "cuda:0")
    expected, actual = (run(spec.op, a, backend=backend) for a in (arguments, moved(arguments, "cuda:1")))
    assert torch.cuda.current_device() == 0 and all(t.device == torch.device("cuda:1") for t in actual.values())
    assert not (wrong := same({n: t.to("cuda:0") for n, t in actual.items()}, expected)), wrong


def transposed(x, dim):
    """Rows in another order; those of a matrix, ``dim`` its rows, become those of four."""
    x = x.unflatten(dim, (4, -1)) if x.dim() == dim + 2 else x
    return x.transpose(dim, dim + 1).contiguous().transpose(dim, dim + 1)


VIEWS = {
    "contiguous": lambda x, dim: x,
    "every-second-column": lambda x, dim: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    "transposed": transposed,
}


@pytest.mark.parametrize("view", VIEWS)
@largest(torch.float32, torch.bfloat16)
def test_memory(spec, backend, case, dtype, view, record_property):
    """Forward takes its output and at most 2 MiB, whatever the strides of its input."""
    arguments = case.make(dtype, DEVICE)
    given = {n: arguments[n] for n in spec.activations if arguments.get(n) is not None}
    views = {id(t): VIEWS[view](t, spec.numerics.along.get(n, 0)) for n, t in given.items()}
    arguments = {n: views.get(id(t), t) for n, t in arguments.items()}
    x = arguments[spec.activations[0]]
    y = spec.output(arguments)
    extra = peak_extra(lambda: spec.op(**arguments, backend=backend), torch.device(DEVICE)) - y.numel() * y.element_size()
    record_property("bytes beside the output", extra)
    copied = x.numel() * x.element_size() if DEVICE == "cpu" and view != "contiguous" and spec.copies_scattered_rows else 0
    assert 0 <= extra <= copied + 2**21


@over(*TELLING, "norm", "bank-of-sequences", dtypes=(torch.float32, torch.bfloat16))
def test_synchronisations(spec, backend, case, dtype):
    """A call never waits for the device."""
    arguments = case.make(dtype, DEVICE)
    run(spec.op, arguments, backend=backend)
    with MACHINE.never_waiting():
        run(spec.op, arguments, backend=backend)


def cut(spec, name, t, rows):
    """Some rows of the output, an activation, or the gradient of one."""
    return t[(slice(None),) * spec.numerics.along.get(name, 0) + (rows,)]


def part(spec, arguments, rows):
    """The same call on some rows: of the activations, and of what has a value a row; what was one tensor stays one."""
    m = len(arguments[spec.activations[0]])
    by_row = lambda t: isinstance(t, torch.Tensor) and len(t.shape) and len(t) == m and not t.is_floating_point()  # noqa: E731
    names = [n for n, t in arguments.items() if t is not None and (n in spec.activations or by_row(t))]
    parts = {id(arguments[n]): cut(spec, n, arguments[n], rows) for n in names}
    return {n: parts.get(id(t), t) for n, t in arguments.items()}


@pytest.mark.parametrize(
    "spec, backend",
    [
        pytest.param(spec, backend, id=f"{name}-{backend}")
        for name, spec in SPECS.items()
        for backend in BACKENDS
        if (backend, DEVICE) in spec.fwd.available
    ],
)
def test_large(spec, backend, dtype=torch.bfloat16):
    """Offsets beyond 32 bits: rows at the start, around the border and at the end, and the sums over all rows."""
    case = spec.large(MACHINE.large)
    shape = case.make(dtype, "meta")[spec.activations[0]].shape
    m, d = shape[0], shape[1:].numel()
    need = 8 * m * d * dtype.itemsize
    if MACHINE.free_bytes() < need:
        pytest.skip(f"needs {need / 2**30:.0f} GiB, {MACHINE.free_bytes() / 2**30:.0f} are free")
    arguments = case.make(dtype, DEVICE)
    assert m * d > MACHINE.large
    grad_y = torch.randn_like(spec.output(arguments))
    tensors = {n: t.requires_grad_() for n, t in floats(arguments).items()}
    y = spec.op(**arguments, backend=backend)
    actual = {"y": y.detach(), **dict(zip(tensors, torch.autograd.grad(y, list(tensors.values()), grad_y)))}
    by_row = {"y", *spec.activations} & actual.keys()
    few, step, errors, sums = max(2, 2**18 // d), max(1, 2**26 // d), [], {}
    windows = [slice(start, start + few) for start in (0, MACHINE.large // d - few // 2, m - few)]
    for rows in (*windows, *(slice(start, min(start + step, m)) for start in range(0, m, step))):
        some = part(spec, arguments, rows)
        doubles = substitute(some, {n: t.double() for n, t in floats(some).items()})
        reference, oracle = (run(spec.reference, a, grad_y[rows]) for a in (some, doubles))
        if rows in windows:
            here = {n: cut(spec, n, actual[n], rows) for n in by_row}
            results = ([x[n] for n in sorted(by_row)] for x in (here, reference, oracle))
            for name, *three in zip(sorted(by_row), *results):
                errors += excess(*([t] for t in three), f"{name}, rows from {rows.start}")
            continue
        for name in actual.keys() - by_row:
            pair = sums.setdefault(name, [0.0, 0.0])
            pair[0], pair[1] = pair[0] + reference[name].float(), pair[1] + oracle[name]
    for name, (reference, oracle) in sums.items():
        errors += excess([actual[name]], [reference.to(actual[name].dtype)], [oracle], f"grad of {name}")
    assert not errors, "; ".join(errors)
