"""Every backend computes the same thing: values and all gradients against float64, for every case of the table."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from cases import CASES, LARGE_CASES, OPS, Case, make_inputs, small_case
from reference import brute_force_visible, call, truth
from running import DTYPES, runs

import attnreg
from attnreg import Window, composition
from attnreg.testing.budget import budget

CASES_OF = {case.name: case for case in [*CASES, *LARGE_CASES]}


@lru_cache(maxsize=64)
def true_and_naive(op: str, name: str, device: str, dtype: torch.dtype):
    """The truth in float64 for inputs rounded to ``dtype``, and what PyTorch makes of it naively in ``dtype``."""
    case = CASES_OF[name]
    inputs = make_inputs(op, case, dtype, device)
    return truth(op, inputs.to(torch.float64), case.window), truth(op, inputs, case.window)


def assert_within_budget(
    what: str, got: torch.Tensor, true: torch.Tensor, naive: torch.Tensor, others: tuple[torch.Tensor, ...] = ()
) -> None:
    """See ``attnreg.testing.budget``; ``others`` are all true gradients of a call where this is one."""
    assert got.shape == true.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(true.shape)}"
    fault = budget(true, naive, got.dtype, others).fault(got, true)
    assert fault is None, f"{what}: {fault}"


def check(op: str, case: Case, backend: str, device: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(op, case, dtype, device)
    output, gradients = call(op, inputs, case.window, backend=backend)
    (true, true_gradients), (naive, naive_gradients) = true_and_naive(op, case.name, device, dtype)
    assert output.dtype == dtype
    assert_within_budget("value", output, true, naive)
    for name, gradient in gradients.items():
        assert gradient.dtype == inputs.tensors[name].dtype
        others = tuple(true_gradients.values())
        assert_within_budget(f"gradient of {name}", gradient, true_gradients[name], naive_gradients[name], others)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("backend", "device", "dtype"), runs())
def test_values_and_gradients_are_within_the_error_budget(op, case, backend, device, dtype):
    check(op, case, backend, device, dtype)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("products", "largest_band"), [("torch", 2**30), ("torch_block", 2**30), ("torch_block", 1)])
def test_attention_composed_of_two_products_is_within_the_error_budget(
    case, dtype, products, largest_band, monkeypatch
):
    """In one piece, and in parts: one key head of one sequence at a time."""
    monkeypatch.setattr(composition, "LARGEST_BAND", largest_band)
    (backend,) = (status.backend for status in attnreg.backends() if status.name == products)
    alone = replace(backend, name="composed", local_attention=None, local_attention_backward=None)
    with attnreg.register(alone):
        check("local_attention", case, "composed", "cpu", dtype)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", LARGE_CASES, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("backend", "device", "dtype"),
    [run for run in runs() if run.values[1] == "cuda" and run.values[0] != "torch"],
)
def test_values_and_gradients_of_large_cases_are_within_the_error_budget(op, case, backend, device, dtype):
    check(op, case, backend, device, dtype)


SMALL_LENGTHS = [(1, 1), (1, 3), (3, 1), (2, 2), (3, 4), (4, 3), (5, 5)]


@pytest.mark.parametrize(("query_length", "key_length"), SMALL_LENGTHS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("backend", "device", "dtype"), runs(torch.float32))
def test_every_small_window_sees_exactly_the_keys_of_the_definition(
    op, query_length, key_length, backend, device, dtype
):
    """Loops over all windows up to one wider than both sequences: an off-by-one has nowhere to hide."""
    for left in range(6):
        for right in range(6 - left):
            case = small_case(query_length, key_length, left, right)
            inputs = make_inputs(op, case, dtype, device)
            output, gradients = call(op, inputs, case.window, backend=backend)
            true, true_gradients = truth(op, inputs.to(torch.float64), case.window)
            assert torch.allclose(output.double(), true, atol=1e-5), f"{case}: value"
            for name, gradient in gradients.items():
                assert torch.allclose(gradient.double(), true_gradients[name], atol=1e-5), f"{case}: gradient of {name}"


@pytest.mark.gpu
@pytest.mark.parametrize(("query_length", "key_length"), [*SMALL_LENGTHS, (65, 64), (63, 130)])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("backend", "device", "dtype"),
    [run for run in runs(torch.bfloat16) if run.values[1] == "cuda" and run.values[0] != "torch"],
)
def test_every_small_window_sees_the_same_keys_in_16_bit(op, query_length, key_length, backend, device, dtype):
    """As above for kernels that serve 16 bit alone: a key too many or too few is far outside this tolerance."""
    for left in range(6):
        for right in range(6 - left):
            case = small_case(query_length, key_length, left, right, head_dim=16, value_dim=8)
            inputs = make_inputs(op, case, dtype, device)
            output, gradients = call(op, inputs, case.window, backend=backend)
            true, true_gradients = truth(op, inputs.to(torch.float64), case.window)
            assert torch.allclose(output.double(), true, atol=0.06, rtol=0.03), f"{case}: value"
            for name, gradient in gradients.items():
                same = torch.allclose(gradient.double(), true_gradients[name], atol=0.06, rtol=0.03)
                assert same, f"{case}: gradient of {name}"


@pytest.mark.parametrize(("query_length", "key_length"), SMALL_LENGTHS)
def test_the_reference_itself_sees_the_keys_that_loops_find(query_length, key_length):
    """The truth the other tests rest on, against plain Python loops over (row, slot, key)."""
    for left in range(6):
        for right in range(6):
            case = small_case(query_length, key_length, left, right)
            inputs = make_inputs("local_dot_product", case, torch.float64)
            scores, _ = truth("local_dot_product", inputs, case.window)
            expected = torch.full_like(scores, -torch.inf)
            for row, slot, key in brute_force_visible(query_length, key_length, left, right):
                expected[0, 0, row, slot] = inputs.tensors["query"][0, 0, row] @ inputs.tensors["key"][0, 0, key]
            assert torch.allclose(scores, expected)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("backend", "device", "dtype"), runs(torch.float32, torch.bfloat16))
def test_the_same_call_gives_the_same_bits(op, backend, device, dtype):
    case = CASES_OF["everything"]
    inputs = make_inputs(op, case, dtype, device)
    first_output, first = call(op, inputs, case.window, backend=backend)
    second_output, second = call(op, inputs, case.window, backend=backend)
    assert torch.equal(first_output, second_output)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("bias", [None, "NHLW"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("backend", "device", "dtype"), runs(torch.float32, torch.bfloat16))
def test_what_lies_in_an_invisible_slot_or_key_is_never_used(op, bias, backend, device, dtype):
    """NaN in invisible weights, in incoming gradients of invisible scores, and in keys past their length, is harmless."""
    case = Case(
        "lengths", query_length=40, key_length=33, window=Window(5, 4), key_lengths=(20, 0), bias=bias, hidden=0.3
    )
    clean = make_inputs(op, case, dtype, device)
    dirty = make_inputs(op, case, dtype, device)
    past_length = torch.arange(case.key_length, device=device) >= clean.key_lengths[:, None]
    for name in {"key", "value"} & dirty.tensors.keys():
        dirty.tensors[name][past_length[:, None].expand(dirty.tensors[name].shape[:3])] = torch.nan
    if op == "local_dot_product":
        scores, _ = truth(op, clean.to(torch.float64), case.window)
        dirty.grad[scores == -torch.inf] = torch.nan
    if op == "local_weighted_average":
        unit = Case(**{**case.__dict__, "name": "unit", "bias": None})
        scores, _ = truth(
            "local_dot_product", make_inputs("local_dot_product", unit, torch.float64, device), case.window
        )
        dirty.tensors["weights"][scores == -torch.inf] = torch.nan
    expected, expected_gradients = call(op, clean, case.window, backend=backend)
    output, gradients = call(op, dirty, case.window, backend=backend)
    assert torch.equal(output, expected)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected_gradients[name]), name


@pytest.mark.parametrize(("backend", "device", "dtype"), runs(torch.float32, torch.float16))
def test_a_row_without_a_visible_key_gives_zeros_and_zero_gradients(backend, device, dtype):
    case = Case("no_key", batch=1, key_lengths=(0,))
    inputs = make_inputs("local_attention", case, dtype, device)
    output, gradients = call("local_attention", inputs, case.window, backend=backend)
    assert torch.equal(output, torch.zeros_like(output))
    for name, gradient in gradients.items():
        assert torch.equal(gradient, torch.zeros_like(gradient)), name
    scores, _ = call(
        "local_dot_product", make_inputs("local_dot_product", case, dtype, device), case.window, backend=backend
    )
    assert (scores == -torch.inf).all()


@pytest.mark.parametrize("wanted", ["query", "key", "value", "bias"])
@pytest.mark.parametrize(("backend", "device", "dtype"), runs(torch.float32))
def test_a_gradient_asked_for_alone_is_the_same_as_among_all(wanted, backend, device, dtype):
    for op in OPS:
        case = CASES_OF["everything"]
        inputs = make_inputs(op, case, dtype, device)
        if wanted not in inputs.tensors:
            continue
        _, gradients = call(op, inputs, case.window, backend=backend)
        leaves = {name: tensor.detach().requires_grad_(name == wanted) for name, tensor in inputs.tensors.items()}
        positional = [leaf for name, leaf in leaves.items() if name != "bias"]
        bias = {"bias": leaves["bias"]} if "bias" in leaves else {}
        output = getattr(attnreg, op)(
            *positional, case.window, **bias, key_lengths=inputs.key_lengths, **inputs.options, backend=backend
        )
        output.backward(inputs.grad)
        assert torch.equal(leaves[wanted].grad, gradients[wanted]), op


@pytest.mark.parametrize(("backend", "device", "dtype"), runs(torch.float32))
def test_an_expanded_incoming_gradient_is_taken(backend, device, dtype):
    """``.sum().backward()`` sends a gradient of ones with stride 0 in every dimension."""
    case = CASES_OF["causal"]
    for op in OPS:
        inputs = make_inputs(op, case, dtype, device)
        inputs.grad = torch.ones((), dtype=dtype, device=device).expand(inputs.grad.shape)
        _, gradients = call(op, inputs, case.window, backend=backend)
        _, true = truth(op, inputs.to(torch.float64), case.window)
        for name, gradient in gradients.items():
            assert torch.allclose(gradient.double(), true[name], atol=1e-5), f"{op}: {name}"


@pytest.mark.parametrize("op", OPS)
def test_the_reference_backend_is_differentiable_twice(op):
    case = Case("twice", batch=1, heads=2, kv_heads=1, query_length=4, key_length=5, head_dim=2, value_dim=3,
                window=Window(2, 1), bias="H1W", key_lengths=(4,))  # fmt: skip
    inputs = make_inputs(op, case, torch.float64)
    names = list(inputs.tensors)
    leaves = tuple(tensor.requires_grad_() for tensor in inputs.tensors.values())

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        given = dict(zip(names, tensors))
        bias = {"bias": given.pop("bias")} if "bias" in given else {}
        output = getattr(attnreg, op)(
            *given.values(), case.window, **bias, key_lengths=inputs.key_lengths, backend="torch"
        )
        return output.where(output != -torch.inf, 0.0)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("backend", "device", "dtype"), runs(torch.float32))
def test_every_forward_has_its_backward(op, backend, device, dtype):
    from attnreg.registry import registry

    call(op, make_inputs(op, CASES_OF["causal"], dtype, device), CASES_OF["causal"].window, backend=backend)
    assert {op, f"{op}_backward"} <= registry.functions(backend).keys()


@pytest.mark.parametrize("name", ["causal", "everything"])
@pytest.mark.parametrize(("backend", "device", "dtype"), runs(torch.float32))
def test_log_sum_exp_agrees_across_backends(name, backend, device, dtype):
    """A compiled graph may run one backend forward and another backward: the log-sum-exp means the same everywhere."""
    from attnreg.registry import registry

    op, case = "local_attention", CASES_OF[name]
    inputs = make_inputs(op, case, dtype, device)
    call(op, inputs, case.window, backend=backend)
    tensors = inputs.tensors
    bias = tensors["bias"][None] if "bias" in tensors else None
    options = {"bias": bias, "key_lengths": inputs.key_lengths, "scale": 0.3}
    arguments = (tensors["query"], tensors["key"], tensors["value"], case.window)
    output, log_sum_exp = registry.functions(backend)[op](*arguments, **options)
    expected, expected_log_sum_exp = registry.functions("torch")[op](*arguments, **options)
    assert log_sum_exp.dtype == torch.float32
    assert torch.allclose(output, expected, atol=1e-5)
    assert torch.allclose(log_sum_exp, expected_log_sum_exp, atol=1e-5)
