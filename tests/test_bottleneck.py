"""What the battery can't say of bottleneck."""

import pytest
import torch

import fastadapt
from fastadapt.ops.bottleneck import _bwd, _fwd

from . import numerics
from .battery import BACKENDS, DEVICE, check, floats, on_cpu, run, substitute
from .peak import extra_bytes
from .specs.bottleneck import SPEC, make

backends = pytest.mark.parametrize("backend", [b for b in BACKENDS if (b, DEVICE) in _fwd.available])


@backends
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8])
def test_ids_of_any_integer_dtype(backend, dtype):
    arguments = SPEC.case("bank-with-everything").make(torch.float32, DEVICE)
    expected = run(SPEC.op, arguments, backend=backend)
    arguments["adapter_ids"] = arguments["adapter_ids"].to(dtype)
    actual = run(SPEC.op, arguments, backend=backend)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@backends
def test_rows_without_adapter_ignore_its_parameters(backend):
    arguments = SPEC.case("bank-unused").make(torch.float32, DEVICE)
    for name in ("down_weight", "up_bias"):
        arguments[name] = torch.full_like(arguments[name], float("nan"))
    result = run(SPEC.op, arguments, backend=backend)
    assert torch.equal(result["y"], arguments["residual"]) and not result["down_weight"].any() and not result["x"].any()


@pytest.mark.parametrize("m", [6, 150])
@backends
def test_one_scale_expanded_to_all_channels_has_a_gradient_for_each(backend, m):
    layout = lambda name, t: t[:1].expand(t.shape) if name == "scale" else t  # noqa: E731
    check(SPEC, backend, lambda: make(torch.float32, DEVICE, shape=(m, 24), r=8, scale="channel"), layout=layout)


@pytest.mark.parametrize("m, lead", [(300, ()), (40, (2,))])
@on_cpu
def test_without_hidden_units_the_bias_is_left(m, lead):
    arguments = {"x": torch.randn(m, 5), "down_weight": torch.randn(*lead, 0, 5), "up_weight": torch.randn(*lead, 5, 0)}
    arguments |= {"down_bias": torch.randn(*lead, 0), "up_bias": torch.randn(*lead, 5)}
    arguments |= {"adapter_ids": torch.arange(m) % 3 - 1} if lead else {}
    native, reference = (run(SPEC.op, arguments, backend=backend) for backend in ("native", "reference"))
    for name in reference:
        torch.testing.assert_close(native[name], reference[name])


@pytest.mark.skipif(("triton", DEVICE) not in _fwd.available, reason="needs a GPU or TRITON_INTERPRET=1")
def test_ids_outside_the_bank_give_nan_rows_on_the_device():
    """Reading ids on a GPU would stall its stream, so the kernels mark such rows and read nothing outside the bank."""
    arguments = SPEC.case("bank-with-everything").make(torch.float32, DEVICE)
    good = _fwd.triton(*SPEC.leaf_args(arguments))
    arguments["adapter_ids"] = arguments["adapter_ids"].clone()
    arguments["adapter_ids"][3], arguments["adapter_ids"][5] = 3, -2
    bad = _fwd.triton(*SPEC.leaf_args(arguments))
    wrong = torch.zeros(len(bad), dtype=torch.bool, device=DEVICE)
    wrong[[3, 5]] = True
    assert bad[wrong].isnan().all() and torch.equal(bad[~wrong], good[~wrong])


@on_cpu
@pytest.mark.parametrize("name", ["many-rows", "m65-d129-r48", "everything", "bank-with-everything", "r130"])
def test_bits_do_not_depend_on_the_number_of_threads(name):
    case = next(case for case in (*SPEC.cases, *SPEC.tiled) if case.name == name)
    numerics.threads_change_no_bit(SPEC, case, torch.float32)


@on_cpu
@pytest.mark.parametrize("target", ["portable", "avx2", "avx512", "amx"])
@pytest.mark.parametrize("name", ["m65-d129-r48", "everything", "bank-with-everything", "float32-parameters"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_instruction_set(target, name, dtype):
    best = fastadapt._C.cpu_target()
    try:
        fastadapt._C.cpu_target(target)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        check(SPEC, "native", lambda: SPEC.case(name).make(dtype, "cpu"))
    finally:
        fastadapt._C.cpu_target(best)


@on_cpu
@pytest.mark.parametrize(
    "shape", ["(2048, 4096), 64", *(pytest.param(s, marks=pytest.mark.slow) for s in ("(2048, 768), 64", "(512, 1024), 8"))]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_of_forward_is_the_output(shape, dtype):
    setup = f"""
def prepare(shape, r):
    d = shape[-1]
    x, down, up = (torch.ones(s, dtype=torch.{dtype}) for s in (shape, (r, d), (d, r)))
    return x, lambda x: fastadapt.bottleneck(x, down, up, residual=x, backend="native")
"""
    assert extra_bytes(setup, "(64, 64), 8", shape) <= 2 * 2**20


def test_explain_gives_reasons(monkeypatch):
    text = fastadapt.explain(fastadapt.bottleneck, torch.ones(2, 4, device="meta"), torch.ones(1, 4), torch.ones(4, 1))
    assert text == "bottleneck_fwd on meta: reference (first of reference)"
    monkeypatch.setattr(_fwd, "available", {("native", "cuda"), ("triton", "cuda")})
    args = fastadapt.bottleneck.arguments(
        torch.ones(2, 4), torch.ones(300, 4), torch.ones(4, 300), None, None, None, 1.0, "relu", *[None] * 6
    )
    assert _fwd.explain(None, "cuda", args).split("\n") == [
        "bottleneck_fwd on cuda: native (first of triton > native > reference)",
        "  not triton: bottleneck_fwd: backend 'triton' supports r up to 256, got 300",
    ]
    with pytest.raises(RuntimeError, match="'triton' supports r up to 256, got 300"):
        _fwd.choose("triton", "cuda", args)


@backends
def test_training_reduces_the_loss_as_the_reference_does(backend):
    """Twenty steps of SGD on every argument: an error in a gradient would add up."""
    start = SPEC.case("everything").make(torch.float32, DEVICE)
    target = torch.randn_like(start["x"])
    losses = {}
    for name in (backend, "reference"):
        leaves = {n: t.clone().requires_grad_(n not in ("x", "residual")) for n, t in floats(start).items()}
        optimizer = torch.optim.SGD([t for t in leaves.values() if t.requires_grad], lr=0.05)
        losses[name] = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = (fastadapt.bottleneck(**substitute(start, leaves), backend=name) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    assert losses[backend][-1] < 0.9 * losses[backend][0]
    assert losses[backend] == pytest.approx(losses["reference"], rel=1e-4)


@backends
def test_leaf_of_nothing_wanted(backend):
    arguments = SPEC.case("small").make(torch.float32, DEVICE)
    args = SPEC.leaf_args(arguments)
    outputs = getattr(_bwd, backend)(*SPEC.bwd_leaf_args(torch.ones_like(arguments["x"]), args, [False] * 10))
    assert [tuple(t.shape) for t in outputs] == [(0,)] * 10
