"""What the Triton launchers do around their kernels, seen without a device."""

import pytest
import torch
import triton
from triton.runtime.jit import KernelInterface

from fastadapt._leaf import INTERPRET

from .gpuless import offline
from .specs import SPECS

pytestmark = pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1 runs the kernels")


@pytest.fixture
def launches(monkeypatch):
    """Launches are noted, not made; a launch, or a question about the GPU, outside of a guard of the device of x fails."""
    guards, noted = [], []

    class Guard:
        def __init__(self, of):
            self.of = getattr(of, "device", of)

        def __enter__(self):
            guards.append(self.of)

        def __exit__(self, *_):
            guards.pop()

    class Driver(offline.OfflineDriver):
        def get_current_target(self):
            assert guards, "the launcher asks for the GPU before it has chosen the device of x"
            return super().get_current_target()

    def launch(kernel, grid):
        assert guards, f"{kernel.fn.__name__} is launched on whatever device is current"
        return lambda *args, **kwargs: noted.append((kernel.fn.__name__, grid))

    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(KernelInterface, "__getitem__", launch)
    monkeypatch.setattr(offline, "OfflineDriver", Driver)
    with offline.target(90):
        yield noted


def launch_both(spec, case, dtype):
    arguments = case.make(dtype, "meta")
    args = spec.leaf_args(arguments)
    wanted = [isinstance(arguments.get(name), torch.Tensor) for name in spec.bwd_outputs]
    spec.fwd.launcher(*args)
    spec.bwd.launcher(*spec.bwd_leaf_args(spec.output(arguments), args, wanted))


@pytest.mark.parametrize("name", SPECS)
def test_launches_on_the_device_of_x(name, launches):
    spec = SPECS[name]
    for case in spec.cases:
        for dtype in spec.dtypes:
            launch_both(spec, case, dtype)
    assert {kernel for kernel, _ in launches} and launches


@pytest.mark.parametrize("name", SPECS)
def test_grids_fit(name, launches):
    """At most 2**31 - 1 programs in the first dimension and 65535 in the others, where a GPU refuses more."""
    spec = SPECS[name]
    launch_both(spec, spec.large(2**36), torch.bfloat16)
    assert launches
    for kernel, grid in launches:
        x, *others = grid if isinstance(grid, tuple) else (grid,)
        assert 0 < x < 2**31 and all(0 < n <= 65535 for n in others), (kernel, grid)


@triton.jit
def _kernel():
    pass


def test_planted_launch_outside_the_guard(launches):
    with pytest.raises(AssertionError, match="_kernel is launched on whatever device is current"):
        _kernel[(1,)]()
    with pytest.raises(AssertionError, match="asks for the GPU"):
        triton.runtime.driver.active.get_current_target()
