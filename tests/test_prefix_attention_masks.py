"""prefix_attention: masks far below all scores, and lengths and ids without values."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fastadapt.ops.prefix_attention import _fwd, prefix_attention

from .battery import BACKENDS, DEVICE, run
from .specs.prefix_attention import make

kernels = pytest.mark.parametrize("backend", [b for b in BACKENDS if (b, DEVICE) in _fwd.available])


@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, -1e20])
@pytest.mark.parametrize("options", [{}, {"p": 0}, {"gate": "drawn"}, {"g": 2, "ids": [-1, -1]}], ids=str)
@kernels
def test_a_query_of_hidden_keys_alone_attends_to_all_of_them(backend, options, lowest):
    """As in plain PyTorch, if it sees no prefix; query 1 is one. In backward its weights are known to be at most 1."""
    arguments = make(torch.float32, DEVICE, **{"b": 2, "h": 2, "t": 5, "e": 16, "p": 3} | options)
    mask = torch.zeros(5, 5, device=DEVICE)
    mask[1] = mask[2, :-1] = lowest
    op = lambda backend: lambda **a: prefix_attention(**a, attn_mask=mask, backend=backend)  # noqa: E731
    grad_y = torch.randn_like(arguments["q"])
    grad_y[:, :, 1] = 0
    actual, expected = (run(op(name), arguments, grad_y) for name in (backend, "reference"))
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])
    grads = run(op(backend), arguments, (grad_y == 0).float())  # ones for the query, zeros for the others
    assert all(t.isfinite().all() for t in grads.values()) and ((grads["v"] >= 0) & (grads["v"] <= 1)).all()


@pytest.mark.parametrize("options", [{"lengths": [5, 3]}, {"g": 2, "ids": [1, -1]}], ids=str)
def test_lengths_and_ids_without_values_are_taken(options):
    """In a vmap, which takes the reference, each sequence has its own; fake tensors have none."""
    arguments = make(torch.float32, DEVICE, **{"b": 2, "h": 2, "t": 5, "e": 16, "p": 3} | options)
    batched = {n: t for n, t in arguments.items() if n in ("q", "k", "v", "key_lengths", "adapter_ids") and t is not None}
    alone = lambda inputs: prefix_attention(**arguments | {n: t[None] for n, t in inputs.items()})[0]  # noqa: E731
    expected = prefix_attention(**arguments, backend="reference")
    torch.testing.assert_close(torch.func.vmap(alone)(batched), expected)
    with FakeTensorMode() as mode:
        fakes = {n: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}
        assert prefix_attention(**fakes, backend="reference").shape == expected.shape
