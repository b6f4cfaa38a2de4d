"""What the battery can't say of lora_linear."""

import copy
import math
from functools import partial

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastadapt
from fastadapt._leaf import INTERPRET
from fastadapt.nn import LoRALinear
from fastadapt.ops.dropout import kept, kept_scale, threshold
from fastadapt.ops.lora_linear import _bwd, _fwd, row_norms

from . import numerics
from .accuracy import assert_within_reference_error
from .battery import BACKENDS, DEVICE, check, on_cpu, run
from .layouts import LAYOUTS
from .specs.lora_linear import SPEC, make

KERNELS = [b for b in BACKENDS if (b, DEVICE) in _fwd.available]
kernels = pytest.mark.parametrize("backend", KERNELS)
backends = pytest.mark.parametrize("backend", KERNELS if INTERPRET else [*KERNELS, "reference"])
M, K = 19, 43


def layer(backend, r=6, **options):
    made = LoRALinear(nn.Linear(K, 24), r, backend=backend, **options).to(DEVICE)
    nn.init.normal_(made.lora_B.weight)
    return made


def gradients(module, x, call=None):
    """Output and gradients of the input and of what is trained; the seed of dropout is that of torch."""
    torch.manual_seed(11)
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = (module if call is None else call)(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in module.parameters() if p.requires_grad)]


def a_seed_that_tells(p):
    """One whose mask keeps something, and would be another if ``p`` were rounded the other way to a 65536th."""
    steps = p * 65536
    other = math.floor(steps) + math.ceil(steps) - threshold(p)
    for seed in map(torch.tensor, range(1 << 40, 1 << 50, (1 << 33) + 1)):
        mask = kept(seed, M, K, p)
        if mask.any() and (other == threshold(p) or not torch.equal(mask, kept(seed, M, K, other / 65536))):
            return seed.to(DEVICE), mask.to(DEVICE)
    raise AssertionError(f"no seed for {p}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [0.4, 1.5, 2.5, 6553.6, 32768, 65470.464, 65535])
@backends
def test_forward_and_backward_use_the_documented_mask(backend, steps, dtype):
    """With identities for A and B and no frozen weight the mask itself comes out."""
    p = steps / 65536
    seed, mask = a_seed_that_tells(p)
    eye = torch.eye(K, dtype=dtype, device=DEVICE)
    x = torch.randint(1, 4, (M, K), device=DEVICE).to(dtype)
    arguments = {"x": x, "weight": 0 * eye, "bias": None, "lora_a": eye, "lora_b": eye.clone()}
    arguments |= {"dropout_p": p, "dropout_seed": seed}
    result, plain = run(fastadapt.lora_linear, arguments, backend=backend), run(SPEC.reference, arguments)
    dropped = x.double() * mask * kept_scale(p)
    for name, expected in (
        ("y", dropped), ("x", mask.double() * kept_scale(p)), ("lora_b", dropped.sum(0).expand(K, K)),
        ("lora_a", dropped.sum(0).expand(K, K)), ("weight", x.double().sum(0).expand(K, K)),
    ):  # fmt: skip
        assert_within_reference_error(result[name], plain[name], expected, name)


@backends
def test_the_seed_comes_from_torch(backend):
    """One seed fixes a run; steps, and layers in a step, have masks of their own."""
    first, second = (layer(backend, dropout=0.5) for _ in range(2))
    second.load_state_dict(first.state_dict())
    x = torch.randn(M, K, device=DEVICE)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append([f(x) for _ in range(2) for f in (first, second)])
    assert all(torch.equal(a, b) for a, b in zip(*runs))
    outputs = torch.stack(runs[0])
    assert not any(torch.equal(outputs[i], outputs[j]) for i in range(4) for j in range(i))
    seed = torch.tensor(5, device=DEVICE)
    arguments = {"bias": None, "lora_a": first.lora_A.weight, "lora_b": first.lora_B.weight, "backend": backend}
    call = lambda: fastadapt.lora_linear(x, first.base.weight, dropout_p=0.5, dropout_seed=seed, **arguments)  # noqa: E731
    before = torch.get_rng_state()
    assert torch.equal(call(), call()) and torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("reentrant", [False, True])
@backends
def test_activation_checkpointing_replays_the_mask(backend, reentrant):
    module, x = layer(backend, dropout=0.5, dora=True), torch.randn(M, K, device=DEVICE)
    replayed = gradients(module, x, lambda x: checkpoint(module, x, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(gradients(module, x), replayed))


@backends
def test_modules_compile_without_graph_break(backend):
    module, x = layer(backend, dropout=0.3, dora=True, lora_bias=True), torch.randn(M, K, device=DEVICE)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for traced, eager in zip(gradients(module, x, compiled), gradients(module, x)):
        assert torch.equal(traced, eager)


def test_forward_mode_leaves_out_the_norm_of_dora_too():
    """It is a constant to the backward pass."""
    module, x = layer(None, r=2, dora=True).double(), torch.randn(2, K, device=DEVICE, dtype=torch.float64)
    y = lambda b: torch.func.functional_call(module, {"lora_B.weight": b}, x)  # noqa: E731
    forward, backward = (of(y)(module.lora_B.weight.detach()) for of in (torch.func.jacfwd, torch.func.jacrev))
    torch.testing.assert_close(forward, backward)


@backends
def test_autocast_casts_as_a_linear_layer(backend):
    """The frozen layer's operands; the adapter stays float32, and so do the gradients and the norm of DoRA."""
    module, x = layer(backend, dora=True), torch.randn(M, K, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        linear = module.base(x)
        cast = gradients(module, x)
    by_hand = copy.deepcopy(module)
    by_hand.base.bfloat16()
    expected = gradients(by_hand, x, lambda x: by_hand(x.bfloat16()))
    assert cast[0].dtype == linear.dtype == torch.bfloat16 and all(t.dtype == torch.float32 for t in cast[1:])
    assert all(torch.equal(a, b) for a, b in zip(cast, expected))
    args = module.base.weight, module.lora_A.weight, module.lora_B.weight
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(row_norms(*args), (norms := row_norms(*args)))
    plain, exact = ((w + b @ a).norm(dim=1) for w, a, b in (args, [t.double() for t in args]))
    assert_within_reference_error(norms, plain, exact, "norms")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@kernels
def test_small_magnitudes_have_gradients_like_others(backend, dtype):
    """Down to zero, under a bias which y is hardly more than."""
    def draw():
        arguments = SPEC.case("dora").make(dtype, DEVICE)
        sizes = torch.logspace(0, -6, len(arguments["bias"]), device=DEVICE).to(dtype)
        sizes[3] = 0
        return arguments | {"magnitude": arguments["magnitude"] * sizes, "bias": 10 * arguments["bias"].float()}

    check(SPEC, backend, draw)


def test_norms_do_not_cancel():
    """Where the rows of lora_a are alike, and where the update takes most of the weight away."""
    weight, lora_a, lora_b = (torch.randn(*shape, device=DEVICE) for shape in ((64, 48), (8, 48), (64, 8)))
    alike = lora_a[:1] + 0.03 * lora_a
    for args in ((weight, alike, lora_b), (weight, alike, 100 * (lora_b - lora_b.mean(1, keepdim=True))),
                 (0.03 * weight - lora_b @ lora_a, lora_a, lora_b)):  # fmt: skip
        plain, exact = ((w + b @ a).norm(dim=1) for w, a, b in (args, [t.double() for t in args]))
        assert_within_reference_error(row_norms(*args) / exact, plain / exact, exact / exact, "norms")


@on_cpu
@pytest.mark.parametrize("n, k, r", [(19, 1, 1), (23, 130, 3), (50, 64, 17), (97, 200, 150), (49, 1100, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_norms_of_the_kernel(dtype, n, k, r):
    """Of rows that lie apart, beside those of PyTorch."""
    wide = torch.promote_types(dtype, torch.float32)
    weight, diagonal = torch.randn(n, k + 5).to(dtype)[:, 2:-3], torch.randn(r).to(wide)
    lora_a, lora_b = torch.randn(k, r).to(wide).T, torch.randn(r, n).to(wide).T
    args = weight, lora_a, lora_b, 0.7, diagonal
    exact = (weight.double() + 0.7 * lora_b.double() * diagonal @ lora_a.double()).norm(dim=1)
    native, plain = (row_norms(*args, backend).double() for backend in ("native", "reference"))
    assert torch.equal(row_norms(*args), row_norms(*args, "native")) and row_norms(*args).dtype == wide
    assert_within_reference_error(native / exact, plain / exact, exact / exact, "norms")
    if k > 1:
        assert torch.equal(row_norms(weight.T.contiguous().T, *args[1:]), row_norms(*args, "reference"))
        with pytest.raises(RuntimeError, match="supports rows without gaps"):
            row_norms(weight.T.contiguous().T, *args[1:], "native")


@pytest.mark.parametrize("k, n", [(0, 4), (5, 0), (0, 0)])
@on_cpu
def test_a_layer_without_inputs_or_outputs(k, n):
    arguments = {"x": torch.randn(M, k), "weight": torch.randn(n, k), "bias": torch.randn(n)}
    arguments |= {"lora_a": torch.randn(2, k), "lora_b": torch.randn(n, 2)}
    native, reference = (run(SPEC.op, arguments, backend=backend) for backend in ("native", "reference"))
    assert all(torch.equal(native[name], reference[name]) for name in reference)


def test_explain_draws_nothing():
    arguments = SPEC.case("small").make(torch.float32, DEVICE)
    before = torch.get_rng_state()
    fastadapt.explain(fastadapt.lora_linear, **arguments, dropout_p=0.5)
    assert torch.equal(before, torch.get_rng_state())


class Quantised(nn.Parameter):
    """The least that a quantised weight offers: here eight bits an element and a scale a row."""

    def __new__(cls, weight):
        scale = weight.abs().amax(1, keepdim=True) / 127
        codes = torch.Tensor._make_subclass(cls, (weight / scale).round().to(torch.int8), False)
        codes.scale, codes.calls = scale, 0
        return codes

    def dequantize(self):
        self.calls += 1
        return self.data * self.scale


@kernels
def test_a_quantised_weight_is_dense_for_one_call_at_a_time(backend):
    """Once in forward and once in backward, with nothing dense kept between them; the bits are those of the dense weight."""
    module, x = layer(backend, dropout=0.3, dora=True), torch.randn(M, K, device=DEVICE)
    module.base.weight = Quantised(module.base.weight.detach())
    kept_shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept_shapes.append(t.shape) or t, lambda t: t):
        quantised = gradients(module, x)
    assert module.base.weight.calls == 2 and (M, K) in kept_shapes and (24, K) not in kept_shapes
    module.base.weight = nn.Parameter(module.base.weight.dequantize(), requires_grad=False)
    assert all(torch.equal(a, b) for a, b in zip(quantised, gradients(module, x)))


def bank_call(ids, g=3, **options):
    """A bank with ids of its rows, small enough for its rows to stay unsorted."""
    return make(torch.float32, DEVICE, shape=(len(ids), 33), n=24, r=5, g=g, ids=ids, scale="each", **options)


@backends
def test_the_gradient_of_a_banks_bias_is_no_chain_of_float32_sums(backend):
    make_long = partial(make, torch.float32, DEVICE, shape=(2048, 3), n=5, r=1, g=2, ids=[0] * 2048, lora_bias=True)
    check(SPEC, backend, make_long, {"lora_bias"}, lambda name, t: LAYOUTS["expanded"](t) if name == "grad_y" else t)


@pytest.mark.parametrize("g", [3, 60])  # rows as they come, or sorted
@backends
def test_an_adapter_reaches_no_row_but_its_own(backend, g):
    """Not even with NaN or infinity for parameters, nor do rows of other adapters reach its gradients."""
    ids = torch.tensor([0, 1, -1, 2, 0, 1, 1, -1])
    good = bank_call(ids, g, diagonal=True, lora_bias=True)
    bad = {**good}
    for name, value in (("lora_a", math.inf), ("lora_b", math.nan), ("scale", math.nan), ("diagonal", math.inf)):
        bad[name] = good[name].clone()
        bad[name][1] = value
    bad["lora_bias"] = good["lora_bias"].index_fill(0, torch.tensor([1], device=DEVICE), math.nan)
    expected, actual = (run(fastadapt.lora_linear, a, backend=backend) for a in (good, bad))
    rows = (ids != 1).to(DEVICE)
    assert torch.equal(actual["y"][rows], expected["y"][rows]) and actual["y"][~rows].isnan().all()
    assert torch.equal(actual["x"][rows], expected["x"][rows]) and actual["x"][~rows].isnan().all()
    for name in ("lora_a", "lora_b", "scale", "diagonal", "lora_bias"):
        assert torch.equal(actual[name][[0, 2]], expected[name][[0, 2]]), name
    plain = torch.nn.functional.linear(good["x"], good["weight"], good["bias"])
    torch.testing.assert_close(actual["y"][[2, 7]], plain[[2, 7]])


@pytest.mark.skipif(("triton", DEVICE) not in _fwd.available, reason="needs a GPU or TRITON_INTERPRET=1")
@pytest.mark.parametrize("g", [3, 60])
def test_ids_outside_the_bank_give_nan_rows_on_the_device(g):
    """Reading ids on a GPU would stall its stream, so the kernels mark such rows and read nothing outside the bank."""
    ids = torch.tensor([0, 1, -1, 2, 0, 1, 1, -1])
    good = bank_call(ids, g, dropout=0.5)
    bad = {**good, "adapter_ids": good["adapter_ids"].clone()}
    bad["adapter_ids"][1], bad["adapter_ids"][2], bad["adapter_ids"][6] = g, -2, 2**40
    wrong = (bad["adapter_ids"] != good["adapter_ids"]).cpu()
    grad_y = torch.randn(8, 24, device=DEVICE)
    (y, u, _), (bad_y, bad_u, _) = (_fwd.triton(*SPEC.leaf_args(a)) for a in (good, bad))
    assert bad_y[wrong].isnan().all() and torch.equal(bad_y[~wrong], y[~wrong])
    assert not bad_u[wrong].any() and torch.equal(bad_u[~wrong], u[~wrong])
    args, mask = SPEC.leaf_args(bad)[:-1], [True, False, False, True, True, True, False]
    grad_x, _, _, *grads, _ = _bwd.triton(grad_y, args[0], bad_u, None, *args[1:], mask)
    left = {**bad, "x": bad["x"][~wrong], "adapter_ids": bad["adapter_ids"][~wrong], "dropout_p": 0.0}
    assert grad_x[wrong].isnan().all() and all(t.isfinite().all() for t in (grad_x[~wrong], *grads))
    kept_rows = run(SPEC.reference, {**left, "dropout_seed": None}, grad_y[~wrong])
    undropped = {**bad, "dropout_p": 0.0}
    args = SPEC.leaf_args(undropped)
    grads = _bwd.triton(grad_y, args[0], _fwd.triton(*args)[1], None, *args[1:-1], mask)
    torch.testing.assert_close(grads[3], kept_rows["lora_a"])
    torch.testing.assert_close(grads[4], kept_rows["lora_b"])


@backends
def test_other_ids_cost_no_recompilation(backend):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fastadapt.lora_linear, fullgraph=True, backend=counter)
    for ids in ([0, 1, 2, -1], [-1, -1, -1, -1], [2, 2, 2, 0]):
        arguments = bank_call(torch.tensor(ids), lora_bias=True)
        assert torch.equal(compiled(**arguments, backend=backend), fastadapt.lora_linear(**arguments, backend=backend))
    assert counter.frame_count == 1


@kernels
def test_leaf_of_nothing_wanted(backend):
    arguments = SPEC.case("small").make(torch.float32, DEVICE)
    args = SPEC.leaf_args(arguments)
    outputs = getattr(_bwd, backend)(*SPEC.bwd_leaf_args(torch.ones_like(SPEC.output(arguments)), args, [False] * 7))
    assert [tuple(t.shape) for t in outputs] == [(0,)] * 7


@on_cpu
@pytest.mark.parametrize("case", [c for c in SPEC.numerics.paths if c.name != "long-ranks"], ids=lambda c: c.name)
def test_bits_do_not_depend_on_the_number_of_threads(case):
    """But for what the library of PyTorch's own products has a part in."""
    numerics.threads_change_no_bit(SPEC, case, torch.float32, but=("y", "x", "weight", "magnitude"))


def kept_bytes(modules, x):
    """What autograd keeps of a call of each module beside parameters: bytes of the input, and of all else."""
    kept_tensors = {}

    def pack(t):
        kept_tensors[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = [module(x) for module in modules]
    for parameter in (p for module in modules for p in module.parameters()):
        kept_tensors.pop(parameter.untyped_storage().data_ptr(), None)
    assert all(y.requires_grad for y in outputs)
    return kept_tensors.pop(x.untyped_storage().data_ptr(), 0), sum(kept_tensors.values())


@on_cpu
def test_what_is_kept_for_backward_with_dropout():
    """The input, r numbers a row and the seed; peft keeps a mask and a masked copy for each layer."""
    peft = pytest.importorskip("peft", reason="the library peft is not installed (pip install fastadapt[peers])")
    config = peft.LoraConfig(r=16, lora_dropout=0.1, target_modules=["q", "v"])
    model = nn.Module()
    model.q, model.v = nn.Linear(768, 768), nn.Linear(768, 768)
    ours = [LoRALinear(copy.deepcopy(base), 16, dropout=0.1, backend="native") for base in (model.q, model.v)]
    wrapped = peft.get_peft_model(model, config).base_model.model
    x = torch.randn(2048, 768, requires_grad=True)
    for count, share in ((1, 0.51), (2, 0.26)):
        theirs = sum(kept_bytes([wrapped.q, wrapped.v][:count], x))
        of_input, beyond = kept_bytes(ours[:count], x)
        assert of_input == x.nbytes and beyond == count * (2048 * 16 * 4 + 8)
        assert of_input + beyond <= share * theirs
