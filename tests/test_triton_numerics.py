"""Where kernels of the triton backend would overflow or lose digits: large inputs in 16 bits, large scores in fp32."""

from __future__ import annotations

import pytest
import torch
from cases import Case, make_inputs
from reference import call, truth
from running import runs

from attnreg import Window

CASE = Case("large", query_length=70, key_length=70, head_dim=64, value_dim=64, window=Window(40, 30))


def triton_runs(*dtypes: torch.dtype):
    return [run for run in runs(*dtypes) if run.values[0] == "triton"]


def assert_gradients_within_budget(inputs, backend: str, names: tuple[str, ...]) -> None:
    gradients = call("local_attention", inputs, CASE.window, backend=backend)[1]
    true = truth("local_attention", inputs.to(torch.float64), CASE.window)[1]
    # What fp16 overflows in is no measure for it.
    naive_dtype = torch.float32 if inputs.grad.dtype == torch.float16 else inputs.grad.dtype
    naive = truth("local_attention", inputs.to(naive_dtype), CASE.window)[1]
    for name in names:
        size = true[name].norm()
        limit = 2 * (naive[name].double() - true[name]).norm() + 2 * torch.finfo(inputs.grad.dtype).eps * size
        assert (gradients[name].double() - true[name]).norm() <= limit, name


@pytest.mark.parametrize(("backend", "device", "dtype"), triton_runs(torch.float16, torch.bfloat16))
def test_scores_of_1e11_give_no_nan(backend, device, dtype):
    inputs = make_inputs("local_attention", CASE, dtype, device)
    inputs.tensors = {name: 60000 * tensor.sign() for name, tensor in inputs.tensors.items()}
    inputs.options["scale"] = 0.3  # no power of two, so that the log-sum-exp is rounded otherwise than the scores
    output, gradients = call("local_attention", inputs, CASE.window, backend=backend)
    assert output.isfinite().all()
    assert gradients["value"].isfinite().all()
    assert not gradients["query"].isnan().any()
    assert not gradients["key"].isnan().any()


@pytest.mark.parametrize(("backend", "device", "dtype"), triton_runs(torch.float16))
def test_gradients_of_scores_beyond_fp16_are_scaled(backend, device, dtype):
    inputs = make_inputs("local_attention", CASE, dtype, device)
    inputs.tensors["value"] = 60000 * inputs.tensors["value"].sign()
    inputs.grad = 10000 * inputs.grad.sign()
    inputs.options["scale"] = 1e-6
    assert_gradients_within_budget(inputs, backend, ("query", "key", "value"))


@pytest.mark.parametrize(("backend", "device", "dtype"), triton_runs(torch.float32))
@pytest.mark.parametrize("magnitude", [20.0, 1e3, 2e4])
def test_gradients_keep_their_digits_at_large_scores(backend, device, dtype, magnitude):
    inputs = make_inputs("local_attention", CASE, dtype, device)
    inputs.tensors["query"] = inputs.tensors["query"].abs() * magnitude
    inputs.tensors["key"] = inputs.tensors["key"].abs()
    assert_gradients_within_budget(inputs, backend, ("value",))
