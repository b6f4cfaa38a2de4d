"""The battery's sharper checks of numbers: see numerics.py and rounding.py."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import fastadapt
from fastadapt._leaf import INTERPRET

from . import numerics
from .battery import BACKENDS, DEVICE, FEW, TELLING, check, over
from .layouts import LAYOUTS, sliced
from .specs import SPECS

NARROW = (torch.bfloat16, torch.float16)


@over(*TELLING, "norm", "channel-scale", "float32-parameters", "bank-of-sequences", dtypes=NARROW, thin=INTERPRET, whole=())
def test_rounds_where_the_docstring_says(spec, backend, case, dtype):
    numerics.rounds_where_documented(spec, backend, case, dtype, elements=2000 if INTERPRET else 8000)


@pytest.mark.slow
@over(cases=numerics.wide, dtypes=NARROW, turns=INTERPRET)
def test_every_case_rounds_where_the_docstring_says(spec, backend, case, dtype):
    numerics.rounds_where_documented(spec, backend, case, dtype, elements=4000 if INTERPRET else 20_000)


@over(cases=lambda spec: spec.numerics.exact)
def test_integers_are_exact(spec, backend, case, dtype):
    numerics.exact_on_integers(spec, backend, case, dtype)


@over(*TELLING, "many-rows", "bank-of-sequences", dtypes=FEW)
def test_a_row_alone_has_the_bits_that_it_has_in_a_batch(spec, backend, case, dtype):
    numerics.rows_alone(spec, backend, case, dtype)


@over(*TELLING, dtypes=FEW)
def test_nan_and_inf_spread_as_in_pytorch(spec, backend, case, dtype):
    numerics.bad_values_spread_as_in_pytorch(spec, backend, case, dtype)


@over(*TELLING, dtypes=FEW)
def test_inputs_are_left_alone(spec, backend, case, dtype):
    numerics.leaves_its_inputs_alone(spec, backend, case, dtype)


@over("everything", "bank-with-everything", dtypes=FEW[-1:])
def test_frozen_arguments_change_no_bit(spec, backend, case, dtype):
    # Triton compiles, or interprets, a kernel for each subset.
    numerics.frozen_arguments_change_no_bit(spec, backend, case, dtype, every=backend == "native")


@over(*TELLING, dtypes=FEW)
def test_expanded_gradients_change_no_bit(spec, backend, case, dtype):
    numerics.expanded_gradients_change_no_bit(spec, backend, case, dtype)


@pytest.fixture
def cpu_target(request):
    best = fastadapt._C.cpu_target()
    try:
        yield fastadapt._C.cpu_target(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    finally:
        fastadapt._C.cpu_target(best)


@pytest.mark.skipif(INTERPRET or DEVICE != "cpu", reason="the instruction sets of the CPU kernels")
@pytest.mark.parametrize("cpu_target", ["portable", "avx2", "avx512", "amx"], indirect=True)
@over(cases=lambda spec: (*spec.numerics.paths, *spec.numerics.exact), dtypes=FEW)
def test_every_instruction_set_and_path(cpu_target, spec, backend, case, dtype):
    """Each alone, on outputs that are full of NaN before the call."""
    if cpu_target == "amx" and dtype != torch.bfloat16:
        pytest.skip("AMX multiplies bfloat16 only")
    assert torch.empty(1000).isnan().all()
    check(spec, backend, lambda: case.make(dtype, DEVICE))
    if case in spec.numerics.exact:
        numerics.exact_on_integers(spec, backend, case, dtype)
    elif dtype != torch.float32:
        numerics.rounds_where_documented(spec, backend, case, dtype)


def fuzz(op, backend, data):
    """One call of random size, options, dtype and strides against the rule of the battery."""
    spec = SPECS[op]
    if (backend, DEVICE) not in spec.fwd.available:
        return
    case, dtype = spec.numerics.fuzz(data.draw, st), data.draw(st.sampled_from(spec.dtypes))
    rows = {n: data.draw(st.sampled_from(["plain", *LAYOUTS]), label=n) for n in (*spec.activations, "grad_y")}
    strided = data.draw(st.booleans(), label="strided parameters")
    hypothesis.note(f"{case.make.keywords} {dtype}")

    def layout(name, t):
        if name not in rows:
            return sliced(t) if strided and t.dim() else t
        return t if rows[name] == "plain" or t.dim() < 2 or not t.numel() else LAYOUTS[rows[name]](t)

    torch.manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    check(spec, backend, lambda: case.make(dtype, DEVICE), layout=layout)


calls = pytest.mark.parametrize("op, backend", [(op, backend) for op in SPECS for backend in BACKENDS])
examples = lambda n: hypothesis.settings(  # noqa: E731
    max_examples=n, derandomize=True, database=None, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
)


@calls
@examples(5 if INTERPRET else 30)
@hypothesis.given(data=st.data())
def test_fuzz(op, backend, data):
    fuzz(op, backend, data)


@pytest.mark.slow
@calls
@examples(100 if INTERPRET else 500)
@hypothesis.given(data=st.data())
def test_long_fuzz(op, backend, data):
    fuzz(op, backend, data)
