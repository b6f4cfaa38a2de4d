"""The checks of a GPU run find planted errors. They run on the CPU as the stand-in for a device."""

from dataclasses import replace

import pytest
import torch

from .battery import TELLING
from .gpu import small
from .gpu import test_device as checks
from .specs import SPECS

if checks.DEVICE != "cpu":
    pytest.skip("the planted errors are calls on the CPU", allow_module_level=True)

SPEC = SPECS["bottleneck"]
CASE, X = SPEC.case(TELLING[0]), SPEC.activations[0]


def planted(change):
    """The op, its output or its call changed by ``change(call, arguments)``."""
    return replace(SPEC, op=lambda backend, **arguments: change(lambda a: SPEC.op(**a, backend="native"), arguments))


def rarely(call, arguments, state=[0]):  # noqa: B006
    state[0] += 1
    return call(arguments) + (1e-3 if state[0] % 7 == 0 else 0)


def waits(call, arguments):
    return call(arguments) + arguments[X].mean().item()


def remembers(call, arguments):
    """What the host read at the first call stays in a graph."""
    return call(arguments) + torch.from_numpy(arguments[X].detach().numpy().copy())


def copies(call, arguments):
    return call({**arguments, X: arguments[X].clone(memory_format=torch.contiguous_format)})


def last_row(call, arguments):
    y = call(arguments)
    return y + torch.nn.functional.one_hot(torch.tensor(len(y) - 1), len(y))[:, None].to(y.dtype)


def forgets_rows(call, arguments):
    """The rows of the last quarter give no gradient to the parameters."""
    m = 3 * len(arguments[X]) // 4
    frozen = {n: t.detach() if isinstance(t, torch.Tensor) and n not in SPEC.activations else t for n, t in arguments.items()}
    first, last = (checks.part(SPEC, a, rows) for a, rows in ((arguments, slice(0, m)), (frozen, slice(m, None))))
    return torch.cat([call(first), call(last)])


@pytest.mark.parametrize(
    "check, change, message",
    [
        (checks.test_repeats, rarely, "run 5: .*y"),
        (checks.test_graphs, waits, "waits for the device"),
        (checks.test_graphs, remembers, "y"),
        (checks.test_synchronisations, waits, "waits for the device"),
    ],
)
def test_planted_in_a_call(check, change, message):
    check(SPEC, "native", CASE, torch.float32)
    with pytest.raises((AssertionError, RuntimeError), match=message):
        check(planted(change), "native", CASE, torch.float32)


@pytest.mark.parametrize("change, message", [(last_row, "y, rows from"), (forgets_rows, "grad of down_weight")])
def test_planted_in_a_large_call(change, message):
    with pytest.raises(AssertionError, match=message):
        checks.test_large(planted(change), "native")


def test_planted_copy():
    for view in checks.VIEWS:
        arguments = planted(copies), "native", checks.bench(SPEC), torch.float32, view
        with pytest.raises(AssertionError, match=r"<= \(0 \+ \(2 \*\* 21\)\)"):
            checks.test_memory(*arguments, record_property=lambda *_: None)


def test_planted_missing_backend():
    with pytest.raises(AssertionError):
        checks.test_backends(replace(SPEC, fwd=type("Leaf", (), {"name": "fwd", "available": set()})))


def test_the_calls_for_the_sanitizers(monkeypatch, capsys):
    assert small.main("cpu", ["native"]) == 0
    calls = 2 * sum(case.name in TELLING for spec in SPECS.values() for case in spec.cases)
    assert capsys.readouterr().out.count("done") == calls
    monkeypatch.setattr(small, "run", lambda *_, **__: {"y": torch.tensor(float("inf"))})
    assert small.main("cpu", ["native"]) == 1
    assert "error: not finite: ['y']" in capsys.readouterr().out
    assert small.main("cpu", []) == 1
