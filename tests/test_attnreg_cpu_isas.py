"""The kernels of every instruction set that the processor has pass the kit; by default that of the best one alone does."""

from __future__ import annotations

import pytest
from attnreg_cpu import build

from attnreg.testing import conformance_tests

PROPERTIES = ("values", "gradients", "windows", "layouts", "bias", "packed", "dropout", "hidden")


@pytest.fixture(params=["amx", "avx512", "avx2", "baseline"])
def _isa(request, library_for_cpus):
    if request.param not in build.isas():
        pytest.skip(f"this processor has no {request.param}")
    build.choose_isa(request.param)


test_attnreg_cpu = pytest.mark.usefixtures("_isa")(conformance_tests("attnreg_cpu", properties=PROPERTIES, quick=True))
