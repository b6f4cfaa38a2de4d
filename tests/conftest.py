import hashlib
import os

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it torch refuses deterministic products on CUDA
if os.environ.get("TRITON_INTERPRET") == "1":
    from .gpuless import strict_interpreter

    strict_interpreter.install()


@pytest.fixture(autouse=True)
def seeded_and_poisoned(request):
    """A seed of its own for every test, and NaN in every torch.empty: a hole in an output can't pass."""
    seed = int(hashlib.sha256(request.node.nodeid.encode()).hexdigest(), 16) % 2**31
    torch.manual_seed(seed)
    if os.environ.get("TRITON_INTERPRET") == "1":
        strict_interpreter.reseed(seed)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
