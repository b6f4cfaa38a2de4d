"""The sharper checks of numbers (numerics.py) of the CUDA kernels on the CPU."""

import functools
import shutil

import pytest
import torch

from . import numerics
from .test_cuda_emulated import DEVICES, emulate, over, telling

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
__all__ = ["emulate"]
BF16, FP32 = torch.bfloat16, torch.float32


def checks(check, cases, *dtypes, device="small-tiles"):
    @over(cases, *dtypes)
    def test(emulate, op, case, dtype):
        check(emulate(op, **DEVICES[device]), "native", case, dtype)

    return test


rounds = functools.partial(numerics.rounds_where_documented, unit="matrix", elements=4000)
frozen = functools.partial(numerics.frozen_arguments_change_no_bit, every=False)

test_rounds_where_the_docstring_says = checks(rounds, telling, BF16, torch.float16)
test_every_case_rounds_where_the_docstring_says = pytest.mark.slow(checks(rounds, numerics.wide, BF16))
test_integers_are_exact = checks(numerics.exact_on_integers, lambda spec: spec.numerics.exact, FP32, BF16)
test_a_row_alone_has_the_bits_that_it_has_in_a_batch = checks(numerics.rows_alone, telling, BF16, device="large-tiles")
test_nan_and_inf_spread_as_in_pytorch = checks(numerics.bad_values_spread_as_in_pytorch, telling, FP32)
test_inputs_are_left_alone = checks(numerics.leaves_its_inputs_alone, telling, BF16)
test_frozen_arguments_change_no_bit = checks(frozen, telling, BF16)
test_expanded_gradients_change_no_bit = checks(numerics.expanded_gradients_change_no_bit, telling, BF16)
