"""How far a kernel may be from the truth: the rule of every numerical test."""

import torch


def excess(actual, reference, oracle, what, samples=None):
    """A kernel may err at most twice as much as plain PyTorch in the same dtype, both measured against float64.

    The arguments are lists of tensors, one a draw of the inputs; the errors of the draws are pooled. Returns what is too much.

    PyTorch may be exact by luck, and where few numbers count it often is. So the rule takes the larger of its error and of a
    floor: the error of ``samples``, for each draw a list of tensors that unavoidable rounding could have made of the oracle
    (``battery.samples``). Without samples PyTorch's error is enlarged by a share of a unit in the
    last place.
    """
    for a, r in zip(actual, reference):
        assert a.shape == r.shape and a.dtype == r.dtype, what
        assert torch.isfinite(a).all(), f"{what}: not finite"
    eps = torch.finfo(actual[0].dtype).eps
    flat = lambda tensors: torch.cat([t.double().flatten() for t in tensors])  # noqa: E731
    actual, reference, oracle = map(flat, (actual, reference, oracle))
    # l2 sees a systematic error, max sees a wrong element.
    for name, norm, share in (("l2", torch.norm, eps / 32), ("max", lambda t: t.abs().max(), eps / 2)):
        if not oracle.numel():
            continue
        err, ref = norm(actual - oracle).item(), norm(reference - oracle).item()
        if samples is None:
            floor = ref + share * norm(oracle).item()
        else:
            floor = max(norm(flat(draws) - oracle).item() for draws in zip(*samples))
        if not err <= 2 * max(ref, floor):
            yield f"{what}: {name} error {err:.3e}, plain PyTorch {ref:.3e}, floor {floor:.3e}"


def assert_within_reference_error(actual, reference, oracle, what):
    """The rule for one tensor, which may hold many draws."""
    assert not (errors := list(excess([actual], [reference], [oracle], what))), "; ".join(errors)
