"""Every tile that a launcher can choose, alone and at a real size: a choice by size or by measurement can hide a wrong one."""

import pytest

from ..battery import BACKENDS, DEVICE, check
from ..gpuless import offline_gate
from ..gpuless.configurations import taken
from ..specs import SPECS


def configurations():
    """Calls of each op, and the places of the tables of tiles that each goes through; together they reach every entry.

    Only the small ones where a CPU stands in.
    """
    found = []
    for name, spec in SPECS.items():
        known = set()
        for call in spec.compiled:
            places = offline_gate.places(spec, call, 90, known)
            if DEVICE == "cpu" and call.case.make(call.dtype, "meta")[spec.activations[0]].numel() > 2**14:
                continue
            for backend in BACKENDS if call.precision == "ieee" else ["triton"]:
                if (backend, DEVICE) in spec.fwd.available:
                    for place in places if backend == "triton" else (None,):
                        id_ = f"{name}-{backend}-{call.name}-{place}".replace(" ", "-")
                        found.append(pytest.param(spec, backend, call, place, id=id_))
    return found


@pytest.mark.parametrize("spec, backend, call, place", configurations())
def test_configurations(spec, backend, call, place):
    with taken(place), offline_gate.float32_products(call.precision):
        check(spec, backend, lambda: call.case.make(call.dtype, DEVICE))
