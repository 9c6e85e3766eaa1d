"""Every built-in backend goes through the kit that anybody's goes through: ``attnreg.testing``.

Triton's interpreter takes a second for what a GPU does in no time: there, what other tests hold for it is left to them. It runs
one program after the other, so that nothing in it can differ from one run to the next.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import CASES, OPS, make_inputs
from composed import composed
from reference import brute_force_visible, call
from running import runs

from attnreg import composition
from attnreg.op import DOT_PRODUCT
from attnreg.testing import conformance_tests
from attnreg.testing.cases import SMALL_LENGTHS, small_windows
from attnreg.testing.conformance import chosen_properties
from attnreg.testing.oracle import truth as true_of
from attnreg.testing.subject import find

CASES_OF = {case.name: case for case in CASES}
NUMBERS = ("gradients", "windows")
HELD_ELSEWHERE = ("values", "hidden", "magnitudes", "memory_order", "autocast")
HELD_BY_A_GPU = ("repeatable",)
QUICKLY = [
    each.name for each in chosen_properties(None) if each.name not in (*NUMBERS, *HELD_ELSEWHERE, *HELD_BY_A_GPU)
]

test_torch = conformance_tests("torch")
test_torch_block = conformance_tests("torch_block")
test_attnreg_cpu = conformance_tests("attnreg_cpu")
if torch.cuda.is_available():
    test_triton = pytest.mark.gpu(conformance_tests("triton", device="cuda"))
else:
    test_triton = conformance_tests("triton", properties=NUMBERS)
    _triton = find("triton")[0]
    _in_float32 = replace(_triton, capability=replace(_triton.capability, dtypes={torch.float32}))
    test_triton_quickly = conformance_tests(_in_float32, properties=QUICKLY, quick=True)
test_torch_block_on_gpu = pytest.mark.gpu(conformance_tests("torch_block", device="cuda"))
test_cublas_block = pytest.mark.gpu(conformance_tests("cublas_block", device="cuda"))
test_flash = pytest.mark.gpu(conformance_tests("flash", device="cuda"))
test_flash4 = pytest.mark.gpu(conformance_tests("flash4", device="cuda"))
test_flex = pytest.mark.gpu(conformance_tests("flex", device="cuda"))

COMPOSED = (
    *("gradients", "unequal_lengths", "value_dim", "grouped_heads", "key_lengths", "bias", "uninitialised"),
    *("query_starts", "packed", "softcap", "sinks", "lse_gradients", "dropout", "dropped_weights"),
)


def of_products(name):
    """That backend without its own attention, with all that it takes."""
    return composed(name, capability=find(name)[0].capability)


test_composed_of_torch = conformance_tests(of_products("torch"), properties=COMPOSED)
test_composed_of_torch_block = conformance_tests(of_products("torch_block"), properties=COMPOSED)
_in_parts = conformance_tests(of_products("torch_block"), properties=COMPOSED)


@pytest.fixture
def _small_bands(monkeypatch):
    """One key head of one sequence at a time."""
    monkeypatch.setattr(composition, "LARGEST_BAND", 1)


test_composed_in_parts = pytest.mark.usefixtures("_small_bands")(_in_parts)


@pytest.mark.parametrize("case", small_windows(SMALL_LENGTHS), ids=str)
def test_the_oracle_itself_sees_the_keys_that_loops_find(case):
    """The truth that all of this rests on, against plain Python loops over (row, slot, key)."""
    case = case.of("local_dot_product", torch.float64, torch.device("cpu"))
    problem, inputs = case.problem, case.draw()
    scores = true_of(DOT_PRODUCT, inputs.tensors, problem.window).results["scores"]
    expected = torch.full_like(scores, -torch.inf)
    for row, slot, key in brute_force_visible(
        problem.query_length, problem.key_length, problem.window.left, problem.window.right
    ):
        expected[0, 0, row, slot] = inputs.tensors["query"][0, 0, row] @ inputs.tensors["key"][0, 0, key]
    assert torch.allclose(scores, expected)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("backend", "device", "dtype"), runs(torch.float32))
def test_every_forward_has_its_backward(op, backend, device, dtype):
    from attnreg.registry import registry

    call(op, make_inputs(op, CASES_OF["causal"], dtype, device), CASES_OF["causal"].window, backend=backend)
    assert {op, f"{op}_backward"} <= registry.functions(backend).keys()
