"""What the battery can't say of adapter_fusion."""

import pytest
import torch
import torch.nn.functional as F

from fastadapt.ops.adapter_fusion import _bwd, _fwd, adapter_fusion

from . import numerics
from .accuracy import assert_within_reference_error
from .battery import BACKENDS, DEVICE, on_cpu, run
from .peak import extra_bytes
from .specs.adapter_fusion import SPEC, case, make

KERNELS = [b for b in BACKENDS if (b, DEVICE) in _fwd.available]
kernels = pytest.mark.parametrize("backend", KERNELS)
backends = pytest.mark.parametrize("backend", [*KERNELS, "reference"])


def call(**options):
    return make(torch.float32, DEVICE, **{"shape": (19, 40), "g": 5, **options})


def attention(query, keys, values, scale):
    """PyTorch's attention of each row over its adapters."""
    keys, values = (t.movedim(0, -2) for t in (keys, values))
    return F.scaled_dot_product_attention(query[..., None, :], keys, values, scale=scale)[..., 0, :]


@backends
def test_equals_pytorchs_attention_over_the_adapters(backend):
    arguments, grad_y = call(scale=0.7), torch.randn(19, 40, device=DEVICE)
    actual, expected = (run(fn, arguments, grad_y, **options) for fn, options in (
        (adapter_fusion, {"backend": backend}), (attention, {}),
    ))  # fmt: skip
    exact = run(attention, {n: t.double() if torch.is_tensor(t) else t for n, t in arguments.items()}, grad_y)
    for name in actual:
        assert_within_reference_error(actual[name], expected[name], exact[name], name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@backends
def test_weights_are_the_softmax(backend, dtype):
    arguments = make(dtype, DEVICE, shape=(3, 7, 40), g=5, scale=0.7)
    y, weights = adapter_fusion(**arguments, return_weights=True, backend=backend)
    plain, exact = (
        (0.7 * torch.einsum("...d,g...d->...g", *(arguments[name].to(wide) for name in ("query", "keys")))).softmax(-1)
        for wide in (torch.float32, torch.float64)
    )  # fmt: skip
    assert weights.dtype == torch.float32 and weights.shape == (3, 7, 5) and weights.is_contiguous()
    if backend != "reference" or dtype == torch.float32:  # which computes in the dtype of query
        assert_within_reference_error(weights, plain, exact, "weights")
    assert torch.equal(y, adapter_fusion(**arguments, backend=backend))


@kernels
def test_weights_have_no_gradient(backend):
    arguments = call()
    arguments["query"].requires_grad_()
    y, weights = adapter_fusion(**arguments, return_weights=True, backend=backend)
    assert y.requires_grad and not weights.requires_grad


@pytest.mark.parametrize("shared", [False, True])
@kernels
def test_what_is_kept_for_backward_is_the_arguments_and_the_weights(backend, shared):
    arguments = call(shared=shared, scale="0-d")
    arguments["query"].requires_grad_()
    given = {t.untyped_storage().data_ptr() for t in arguments.values()}
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        _, weights = adapter_fusion(**arguments, return_weights=True, backend=backend)
    assert {pointer: size for pointer, size in kept.items() if pointer not in given} == {weights.data_ptr(): weights.nbytes}


@kernels
def test_keys_that_are_the_values_get_the_sum_of_both_gradients(backend):
    apart = call(shared=True)
    apart["values"] = apart["keys"].clone()
    together, grad_y = apart | {"values": apart["keys"]}, torch.randn(19, 40, device=DEVICE)
    expected, actual = (run(adapter_fusion, a, grad_y, backend=backend) for a in (apart, together))
    assert torch.equal(actual["y"], expected["y"]) and torch.equal(actual["query"], expected["query"])
    torch.testing.assert_close(actual["keys"], expected["keys"] + expected["values"])


@kernels
def test_a_query_that_all_rows_share_gets_the_sum_of_their_gradients(backend):
    arguments, grad_y = call(shared=True), torch.randn(19, 40, device=DEVICE)
    query = torch.randn(40, device=DEVICE, requires_grad=True)
    whole = query.detach().expand(19, 40).clone().requires_grad_()
    y = [adapter_fusion(**arguments | {"query": q}, backend=backend) for q in (query.expand(19, 40), whole)]
    grads = [torch.autograd.grad(out, q, grad_y)[0] for out, q in zip(y, (query, whole))]
    assert torch.equal(*y) and torch.equal(grads[0], grads[1].sum(0))


@kernels
def test_no_row_reaches_another(backend):
    """Not even with NaN or infinity in what one adapter gives for it, which is NaN for that row alone."""
    good = call()
    bad = good | {"keys": good["keys"].clone(), "values": good["values"].clone()}
    bad["keys"][1, 4], bad["values"][2, 7] = float("inf"), float("nan")
    expected, actual = (run(adapter_fusion, a, backend=backend) for a in (good, bad))
    others, hit = (torch.tensor(rows, device=DEVICE) for rows in ([i for i in range(19) if i not in (4, 7)], [4, 7]))
    for name, dim in (("y", 0), ("query", 0), ("keys", 1), ("values", 1)):
        assert torch.equal(actual[name].index_select(dim, others), expected[name].index_select(dim, others)), name
    assert not actual["y"][hit].isfinite().any() and not actual["query"][hit].isfinite().any()


@backends
@pytest.mark.parametrize("score, expected", [
    ([0.0, -torch.inf, 0.0], [0.5, 0.0, 0.5]), ([-torch.inf] * 3, [torch.nan] * 3),
    ([0.0, torch.inf, 0.0], [torch.nan] * 3), ([0.0, torch.nan, 0.0], [torch.nan] * 3), ([0.0, -200.0, 90.0], [0.0, 0.0, 1.0]),
])  # fmt: skip
def test_scores_that_no_softmax_can_tell_apart(backend, score, expected):
    query = torch.ones(1, 1, device=DEVICE)
    keys = torch.tensor(score, device=DEVICE).view(3, 1, 1)
    values = torch.eye(3, device=DEVICE).view(3, 1, 3)[..., :1]
    _, weights = adapter_fusion(query, keys, values, return_weights=True, backend=backend)
    torch.testing.assert_close(weights[0], torch.tensor(expected, device=DEVICE), equal_nan=True, rtol=0, atol=1e-38)


def gradient_by_differences(query, keys, values, scale):
    """Of a query, for a ``grad_y`` of ones, where no difference is of what was rounded before."""
    weights = (scale * torch.einsum("...d,g...d->...g", query, keys)).softmax(-1)
    of_weights = values.sum(-1).movedim(0, -1)
    differences = of_weights[..., :, None] - of_weights[..., None, :]
    of_scores = weights * (weights[..., None, :] * differences).sum(-1)
    return scale * torch.einsum("...g,g...d->...d", of_scores, keys)


def rows_that_one_adapter_wins(backend):
    """Where a weight is almost 1, its gradient is the small difference of large numbers."""
    arguments = call(shape=(100, 40), g=3, gain=0.1)
    arguments["query"][:, 0], arguments["keys"][0, :, 0], arguments["keys"][1:, :, 0] = 1.0, 14.0, 0.0
    plain = gradient_by_differences(**arguments)
    exact = gradient_by_differences(**{n: t.double() if torch.is_tensor(t) else t for n, t in arguments.items()})
    assert_within_reference_error(run(adapter_fusion, arguments, backend=backend)["query"], plain, exact, "grad of query")


@kernels
def test_rows_that_one_adapter_wins_have_right_gradients(backend):
    rows_that_one_adapter_wins(backend)


@on_cpu
@pytest.mark.parametrize("name", ["everything", "many-rows", "many-shared-adapters"])
def test_bits_do_not_depend_on_the_number_of_threads(name):
    numerics.threads_change_no_bit(SPEC, SPEC.case(name), torch.float32)


@on_cpu
def test_bits_of_long_sums_do_not_depend_on_the_number_of_threads():
    """In float64, since the scale's gradient is summed in it."""
    numerics.threads_change_no_bit(SPEC, case("long", shape=(3000, 48), g=3, scale="0-d"), torch.float64)


@kernels
@pytest.mark.parametrize("name", ["learned-scale", "wide-and-shared"])  # everything is in the battery
def test_frozen_arguments_change_no_bit(backend, name):
    numerics.frozen_arguments_change_no_bit(SPEC, backend, SPEC.case(name), torch.float32, every=True)


@kernels
def test_frozen_arguments_take_no_memory(backend):
    arguments = call(scale="0-d")
    args = SPEC.leaf_args(arguments)
    for mask in ([False] * 4, [True, False, False, False], [False, False, True, False]):
        outputs = getattr(_bwd, backend)(*SPEC.bwd_leaf_args(torch.ones_like(arguments["query"]), args, mask))
        assert [t.numel() for t in outputs] == [t.numel() * wanted for t, wanted in zip(args, mask)]


@pytest.mark.skipif(DEVICE != "cpu", reason="GPUs have their own dtype of autocast")
@pytest.mark.parametrize("shared", [False, True])
@kernels
def test_autocast_casts_query_keys_and_values(backend, shared):
    arguments = call(shared=shared, scale="0-d")
    narrow = {name: t if name == "scale" else t.bfloat16() for name, t in arguments.items()}
    narrow["values"] = narrow["keys"] if shared else narrow["values"]
    expected = run(adapter_fusion, narrow, torch.ones(19, 40), backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run(adapter_fusion, arguments, torch.ones(19, 40), backend=backend)
    assert actual["y"].dtype == torch.bfloat16 and actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name].to(actual[name].dtype)) for name in actual)


def allocated(fn):
    with torch.profiler.profile(profile_memory=True) as profile:
        fn()
    return sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())


@on_cpu
def test_arguments_of_any_strides_are_read_in_place():
    query = torch.randn(64).expand(8, 128, 64)
    keys = torch.randn(8, 64, 128, 4).permute(3, 0, 2, 1)  # d is not contiguous
    y = torch.empty_like(query, memory_format=torch.contiguous_format)
    got = allocated(lambda: adapter_fusion(query, keys, keys, backend="native"))
    assert y.nbytes + 1024 * 4 * 4 <= got <= y.nbytes + 1024 * 4 * 4 + 4096


MEMORY = """
def prepare(m, d, g, wanted):
    query, keys = torch.ones(m, d, requires_grad=wanted), torch.ones(g, m, d)
    def call(query):
        y, weights = fastadapt.ops.adapter_fusion(query, *[keys[:, :len(query)]] * 2, return_weights=True, backend="native")
        grads = torch.autograd.grad(y, query, y) if wanted else ()
        return type("Results", (), {"nbytes": sum(t.nbytes for t in (y, weights, *grads))})
    return query, call
"""


@on_cpu
@pytest.mark.parametrize("wanted", [pytest.param(False, marks=pytest.mark.slow), True])
def test_peak_memory_is_that_of_the_output_and_the_weights(wanted):
    assert extra_bytes(MEMORY, f"64, 64, 2, {wanted}", f"8192, 512, 8, {wanted}") <= 2**20
