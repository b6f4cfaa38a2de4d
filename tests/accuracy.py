"""How far a kernel may be from the truth: the rule of every numerical test."""

import torch


def excess(actual, reference, oracle, what):
    """A kernel may err at most twice as much as plain PyTorch in the same dtype, both measured against float64.

    The arguments are lists of tensors, one a draw of the inputs; the errors of the draws are pooled. Returns what is too much.
    """
    for a, r in zip(actual, reference):
        assert a.shape == r.shape and a.dtype == r.dtype, what
        assert torch.isfinite(a).all(), f"{what}: not finite"
    eps = torch.finfo(actual[0].dtype).eps
    actual, reference, oracle = (torch.cat([t.double().flatten() for t in ts]) for ts in (actual, reference, oracle))
    # l2 sees a systematic error, max sees a wrong element; the slack only covers a reference that happens to be exact.
    for name, norm, slack in (("l2", torch.norm, eps / 16), ("max", lambda t: t.abs().max(), eps)):
        if oracle.numel():
            err, ref, scale = (norm(t).item() for t in (actual - oracle, reference - oracle, oracle))
            if not err <= 2 * ref + slack * scale:
                yield f"{what}: {name} error {err:.3e}, plain PyTorch {ref:.3e}"


def assert_within_reference_error(actual, reference, oracle, what):
    """The rule for one tensor, which may hold many draws."""
    assert not (errors := list(excess([actual], [reference], [oracle], what))), "; ".join(errors)
