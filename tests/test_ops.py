"""The battery that every op passes; an op joins it with a file in specs/."""

import pytest
import torch
import torch._dynamo.testing
from torch.autograd import forward_ad

from fastadapt._leaf import INTERPRET

from .battery import BACKENDS, DEVICE, FEW, TELLING, check, floats, over, run, substitute
from .layouts import LAYOUTS, sliced
from .specs import SPECS

# What the short run takes in the interpreter: the others have the same tails, or the same outputs, or are one graph with these.
STRIDED, OUTPUTS, GRAPHS = (
    ("everything", "bank-of-sequences"), ("everything", "dora-with-everything", "gated-with-everything"), ("everything",)
) if INTERPRET else (None, None, None)  # fmt: skip


@over(thin=INTERPRET)
def test_matches_reference(spec, backend, case, dtype):
    check(spec, backend, lambda: case.make(dtype, DEVICE))


@pytest.mark.parametrize("layout", LAYOUTS)
@over("everything", "bank-of-sequences", "m33-d65-r17", dtypes=(torch.float32,), quick=STRIDED)
def test_any_strides(spec, backend, case, dtype, layout):
    names = (*spec.activations, "grad_y")
    check(spec, backend, lambda: case.make(dtype, DEVICE), layout=lambda n, t: LAYOUTS[layout](t) if n in names else t)


@over("everything", dtypes=(torch.float32,))
def test_strided_parameters(spec, backend, case, dtype):
    rows = (*spec.activations, "grad_y")
    make = lambda: case.make(dtype, DEVICE)  # noqa: E731
    check(spec, backend, make, layout=lambda n, t: t if n in rows or t.dim() == 0 else sliced(t))


@over("everything", "bank-with-everything", dtypes=(torch.float32,))
def test_only_what_is_wanted_is_returned(spec, backend, case, dtype):
    arguments = case.make(dtype, DEVICE)
    args = spec.leaf_args(arguments)
    grad_y = torch.randn_like(spec.output(arguments))
    for i, name in enumerate(spec.bwd_outputs):
        if arguments.get(name) is None:
            continue
        mask = [name == other for other in spec.bwd_outputs]
        outputs = getattr(spec.bwd, backend)(*spec.bwd_leaf_args(grad_y, args, mask))
        assert [o.shape for o in outputs] == [arguments[name].shape if i == j else (0,) for j in range(len(outputs))]


def assert_deterministic(spec, backend, case, dtype):
    arguments = case.make(dtype, DEVICE)
    first, second = (run(spec.op, arguments, backend=backend) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@over(*((*TELLING, "many-rows", "bank-of-sequences", "large-a") if INTERPRET else ()), dtypes=FEW)
def test_deterministic(spec, backend, case, dtype):
    assert_deterministic(spec, backend, case, dtype)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRET, reason="the tests of the interpreter run every case in several orders")
@over(dtypes=(torch.float32, torch.bfloat16))
def test_every_case_is_deterministic(spec, backend, case, dtype):
    assert_deterministic(spec, backend, case, dtype)


@over(*TELLING, "bank-unused", "empty", dtypes=FEW, thin=True, whole=("everything",), quick=OUTPUTS)
def test_registration(spec, backend, case, dtype):
    arguments = case.make(dtype, DEVICE)
    args = spec.leaf_args(arguments)
    wanted = [arguments.get(name) is not None and isinstance(arguments[name], torch.Tensor) for name in spec.bwd_outputs]
    torch.library.opcheck(getattr(spec.fwd, backend), args)
    grad_y = torch.randn_like(spec.output(arguments))
    for mask in (wanted, [w and i % 2 == 0 for i, w in enumerate(wanted)]):
        torch.library.opcheck(getattr(spec.bwd, backend), spec.bwd_leaf_args(grad_y, args, mask))


@pytest.mark.parametrize("dynamic", [False, True])
@over(*TELLING, dtypes=(torch.float32,), quick=GRAPHS)
def test_compiles_without_graph_break(spec, backend, case, dtype, dynamic):
    arguments = case.make(dtype, DEVICE)
    torch._dynamo.reset()
    compiled = torch.compile(spec.op, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    eager, traced = (run(fn, arguments, backend=backend) for fn in (spec.op, compiled))
    for name in eager:
        assert torch.equal(traced[name], eager[name]), name


@over("everything", "dora-with-everything", dtypes=(torch.float32,))
def test_one_tensor_wherever_it_fits_compiles(spec, backend, case, dtype):
    arguments, first = case.make(dtype, DEVICE), {}
    tensors = {n: first.setdefault(t.shape, t) for n, t in floats(arguments).items()}
    assert len(first) < len(tensors)
    torch._dynamo.reset()
    compiled = torch.compile(spec.op, fullgraph=True, backend="aot_eager", dynamic=True)
    eager, traced = (run(fn, {**arguments, **tensors}, backend=backend) for fn in (spec.op, compiled))
    for name in eager:
        torch.testing.assert_close(traced[name], eager[name])


@over("m33-d65-r17", dtypes=(torch.float32,))
def test_scale_value_costs_no_recompilation(spec, backend, case, dtype):
    arguments = case.make(dtype, DEVICE)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(spec.op, fullgraph=True, backend=counter)
    for scale in (0.5, 0.25, 2.0, 3.0):
        arguments["scale"] = scale
        assert torch.equal(compiled(**arguments, backend=backend), spec.op(**arguments, backend=backend))
    assert counter.frame_count <= 2  # once for the first value, once with the value as an input


@over("everything", dtypes=(torch.float32,))
def test_exports(spec, backend, case, dtype):
    arguments, name = case.make(dtype, DEVICE), spec.activations[0]
    module = torch.nn.Module()
    module.forward = lambda x: spec.op(**{**arguments, name: x}, backend=backend)
    program = torch.export.export(module, (arguments[name],))
    assert torch.equal(program.module()(arguments[name]), spec.op(**arguments, backend=backend))


@over("everything", "bank-of-sequences", "dropout", dtypes=(torch.float32,))
def test_exports_for_every_batch(spec, backend, case, dtype):
    arguments = case.make(dtype, DEVICE)
    names = [n for n in (*spec.activations, *spec.numerics.rows) if arguments.get(n) is not None]
    dims = {n: spec.numerics.along.get(n, 0) for n in names}
    few = {n: arguments[n].narrow(dim, 0, 2).contiguous() for n, dim in dims.items()}
    for name in (backend, "reference"):
        module = torch.nn.Module()
        module.forward = lambda inputs: spec.op(**{**arguments, **inputs}, backend=name)  # noqa: B023
        dynamic = ({n: {dim: torch.export.Dim.DYNAMIC} for n, dim in dims.items()},)
        program = torch.export.export(module, ({n: arguments[n] for n in names},), dynamic_shapes=dynamic)
        assert torch.equal(program.module()(few), spec.op(**{**arguments, **few}, backend=name))


@over("everything", "bank-with-everything", "norm", dtypes=(torch.float64,))
def test_gradcheck(spec, backend, case, dtype):
    arguments = case.make(dtype, DEVICE)
    if spec.fwd.refusal(backend, DEVICE, spec.leaf_args(arguments)):
        with pytest.raises(RuntimeError, match="does not support float64"):
            spec.op(**arguments, backend=backend)
        return
    tensors = {n: t.clone().requires_grad_() for n, t in floats(arguments).items()}
    call = lambda *values: spec.op(**substitute(arguments, dict(zip(tensors, values))), backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(call, tuple(tensors.values()), fast_mode=True)


@over(dtypes=(torch.float64,))
def test_float64_equals_the_reference(spec, backend, case, dtype):
    arguments = case.make(dtype, DEVICE)
    if spec.fwd.refusal(backend, DEVICE, spec.leaf_args(arguments)):
        with pytest.raises(RuntimeError, match="does not support float64"):
            spec.op(**arguments, backend=backend)
        return
    reference, actual = run(spec.reference, arguments), run(spec.op, arguments, backend=backend)
    for name in reference:
        torch.testing.assert_close(actual[name], reference[name])


@over("everything", dtypes=(torch.float32,))
def test_without_recording(spec, backend, case, dtype):
    arguments = case.make(dtype, DEVICE)
    recorded = substitute(arguments, {n: t.clone().requires_grad_() for n, t in floats(arguments).items()})
    expected = spec.op(**recorded, backend=backend)
    with torch.no_grad():
        assert torch.equal(spec.op(**recorded, backend=backend), expected)
    with torch.inference_mode():
        assert torch.equal(spec.op(**arguments, backend=backend), expected)


@over("everything", dtypes=(torch.float32,))
def test_double_backward_is_refused(spec, backend, case, dtype):
    """Whichever tensor it is for: one that the op was given, or the gradient of its output."""
    arguments = case.make(dtype, DEVICE)
    leaves = {n: t.clone().requires_grad_() for n, t in floats(arguments).items()}
    y = spec.op(**substitute(arguments, leaves), backend=backend)
    grad_y = torch.ones_like(y, requires_grad=True)
    (grad,) = torch.autograd.grad(y, leaves[spec.activations[0]], grad_y, create_graph=True)
    for inputs in (None, grad_y, *(leaves[name] for name in spec.bwd_outputs if name in leaves)):
        with pytest.raises(RuntimeError, match="can't be differentiated"):
            grad.sum().backward(inputs=inputs, retain_graph=True)


@over("everything", dtypes=(torch.float32,))
def test_a_graph_of_the_backward_pass_costs_no_second_look_at_what_was_saved(spec, backend, case, dtype):
    """Hooks on saved tensors may bring them back once only, as those of checkpointing do."""
    arguments, looks = case.make(dtype, DEVICE), []
    x = arguments[spec.activations[0]].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: looks.append(id(t)) or t):
        y = spec.op(**arguments, backend=backend).sum()
    plain, graphed = ([torch.autograd.grad(y, x, create_graph=graph, retain_graph=True), len(looks)] for graph in (False, True))
    assert torch.equal(plain[0][0], graphed[0][0]) and graphed[1] == 2 * plain[1] > 0


@over("everything", dtypes=(torch.float32,))
def test_function_transforms(spec, backend, case, dtype):
    """Transforms take the reference when no backend is asked for; a kernel that is asked for refuses by name."""
    arguments, first = case.make(dtype, DEVICE), spec.activations[0]
    xs = torch.stack([arguments[first], 2 * arguments[first]])
    call = lambda x, **options: spec.op(**{**arguments, first: x}, **options)  # noqa: E731
    expected = torch.stack([call(x, backend="reference") for x in xs])
    torch.testing.assert_close(torch.func.vmap(call)(xs), expected)
    grads = torch.func.grad(lambda x: call(x).sum())(xs[0])
    torch.testing.assert_close(grads, run(call, {"x": xs[0]}, backend="reference")["x"])
    with pytest.raises(RuntimeError, match=f"{backend}.*torch.func"):
        torch.func.vmap(lambda x: call(x, backend=backend))(xs)


@over("everything", dtypes=(torch.float32,))
def test_forward_mode_derivatives(spec, backend, case, dtype):
    """They take the reference like transforms; a kernel would drop the tangent."""
    arguments, first = case.make(dtype, DEVICE), spec.activations[0]
    x, tangent = arguments[first], torch.randn_like(arguments[first])
    call = lambda x, **options: spec.op(**{**arguments, first: x}, **options)  # noqa: E731
    _, expected = torch.func.jvp(lambda x: call(x, backend="reference"), (x,), (tangent,))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        torch.testing.assert_close(forward_ad.unpack_dual(call(dual)).tangent, expected)
        with pytest.raises(RuntimeError, match=f"{backend}.*forward-mode"):
            call(dual, backend=backend)


@over("everything", dtypes=(torch.float32,))
def test_activation_checkpointing(spec, backend, case, dtype):
    arguments = case.make(dtype, DEVICE)

    def checkpointed(**inputs):
        positional = floats(inputs)
        call = lambda *values: spec.op(**substitute(inputs, dict(zip(positional, values))))  # noqa: E731
        return torch.utils.checkpoint.checkpoint(call, *positional.values(), use_reentrant=False)

    plain, replayed = run(spec.op, {**arguments, "backend": backend}), run(checkpointed, {**arguments, "backend": backend})
    assert all(torch.equal(plain[name], replayed[name]) for name in plain)


@over("float32-parameters", "small", dtypes=(torch.float32, torch.bfloat16, torch.float16))
def test_autocast_casts_what_the_spec_names_alone(spec, backend, case, dtype):
    """And, in an op that casts, what else has 16 bits; a number of float32 stays one."""
    arguments = case.make(dtype, DEVICE)
    names = {*spec.autocast, *(n for n, t in floats(arguments).items() if t.dtype == torch.float16 and spec.autocast)}
    plain = run(lambda **a: spec.op(**a | {n: a[n].bfloat16() for n in names}, backend=backend), arguments)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        cast = run(spec.op, arguments, backend=backend)
    assert all(plain[name].dtype == cast[name].dtype and torch.equal(plain[name], cast[name]) for name in plain)


def bad_calls():
    for name, spec in SPECS.items():
        for backend in (None, "reference", *BACKENDS):
            if backend in (None, "reference") or (backend, DEVICE) in spec.fwd.available:
                for bad in spec.bad:
                    if DEVICE == "cpu" or not bad.cpu_only:
                        yield pytest.param(spec, backend, bad, id=f"{name}-{backend}-{bad.name}")


@pytest.mark.parametrize("spec, backend, bad", list(bad_calls()))
def test_bad_arguments(spec, backend, bad):
    arguments = bad.change({"backend": backend, **spec.cases[0].make(torch.float32, DEVICE)})
    with pytest.raises(bad.error, match=bad.message):
        spec.op(**arguments)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_missing_backend_is_refused(spec):
    x = spec.cases[0].make(torch.float32, "meta")
    for backend in ("native", "triton"):
        with pytest.raises(RuntimeError, match=f"{spec.fwd.name} has no '{backend}' implementation for meta"):
            spec.op(**x, backend=backend)


@over("everything", "bank-of-sequences", "dropout", dtypes=(torch.float32,))
def test_freed_memory_is_refused(spec, backend, case, dtype):
    """Sharded training frees the memory of tensors that live on."""
    for i, tensor in enumerate(spec.leaf_args(case.make(dtype, DEVICE))):
        if backend == "native" and isinstance(tensor, torch.Tensor):
            args = [t.clone() if isinstance(t, torch.Tensor) else t for t in spec.leaf_args(case.make(dtype, DEVICE))]
            args[i].untyped_storage().resize_(0)
            with pytest.raises(RuntimeError, match=rf"\w+ has {tensor.numel()} elements, but its memory has been freed"):
                spec.fwd.native(*args)


@over("small", dtypes=(torch.float32,))
def test_explain_names_what_runs(spec, backend, case, dtype):
    args = spec.leaf_args(case.make(dtype, DEVICE))
    assert f"{backend} (asked for)" in spec.fwd.explain(backend, DEVICE, args)
    assert "native > reference" in spec.fwd.explain(None, DEVICE, args)


@over("m33-d65-r17", "everything", dtypes=(torch.float32, torch.bfloat16))
def test_forward_allocates_the_output_only(spec, backend, case, dtype):
    """A strided input is read in place: nothing of its size is allocated beside the output."""
    if backend != "native" or DEVICE != "cpu" or spec.activations[0] != "x":
        return
    arguments = {name: value for name, value in case.make(dtype, DEVICE).items() if name != "residual"}
    arguments["x"] = torch.randn(4, 4096, 2 * arguments["x"].shape[-1]).to(dtype)[..., ::2].transpose(0, 1)
    with torch.profiler.profile(profile_memory=True) as profile:
        y = spec.op(**arguments, backend=backend)
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
    x = arguments["x"]
    copied = x.numel() * x.itemsize if spec.copies_scattered_rows else 0
    assert y.nbytes <= allocated <= y.nbytes + copied + 2**21
