"""What the other tests, tuning and the benchmarks take for the truth, against loops over (row, key); and the error budget."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from attnreg import Problem, Window
from attnreg.measuring.sizes import result_shape
from attnreg.op import ROWS
from attnreg.problem import Given
from attnreg.testing import oracle
from attnreg.testing.budget import budget
from attnreg.testing.checking import check, expectations
from attnreg.testing.inputs import Calls, random_inputs

CPU, DOUBLE = torch.device("cpu"), torch.float64
SIZES = {"batch": 2, "heads": 4, "kv_heads": 2, "query_length": 7, "key_length": 9, "head_dim": 3, "value_dim": 5}
BIAS, LENGTHS, SCALE = (
    ("bias", Given((1, 4, 1, 6), DOUBLE)),
    ("key_lengths", Given((2,), torch.int64)),
    ("scale", Given()),
)


def problem(op, **changes):
    letters = "".join(ROWS[op].tensors.values())
    unused = {name: 0 for name, letter in (("head_dim", "E"), ("value_dim", "D")) if letter not in letters}
    return Problem(**{"op": op, "device": CPU, "dtype": DOUBLE, "window": Window(3, 2), **SIZES, **unused, **changes})


def by_loops(call, inputs):
    """The op's results, with gradients by autograd, from single numbers: nothing is made of what is hidden."""
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in inputs.leaves.items()}
    group, width = call.heads // call.kv_heads, call.window.size
    lengths = inputs.arguments.get("key_lengths")
    scale = inputs.arguments.get("scale", call.head_dim**-0.5 if call.op == "local_attention" else 1.0)
    bias = leaves.get("bias")
    if bias is not None:
        bias = bias.expand(call.batch, call.heads, call.query_length, width)
    rows, sums = [], []
    for n in range(call.batch):
        last = call.key_length if lengths is None else int(lengths[n])
        for h in range(call.heads):
            for i in range(call.query_length):
                first = i + call.key_length - call.query_length - call.window.left
                slots = [c for c in range(width) if 0 <= first + c < last]
                if bias is not None:
                    slots = [c for c in slots if bias[n, h, i, c] != -math.inf]
                keys = [first + c for c in slots]
                if "query" in leaves:
                    scores = [scale * leaves["query"][n, h, i] @ leaves["key"][n, h // group, j] for j in keys]
                    if bias is not None:
                        scores = [score + bias[n, h, i, c] for score, c in zip(scores, slots)]
                if call.op == "local_dot_product":
                    row = [torch.tensor(-math.inf, dtype=DOUBLE)] * width
                    for c, score in zip(slots, scores):
                        row[c] = score
                    rows.append(torch.stack(row))
                    continue
                if call.op == "local_attention":
                    exponentials = [score.exp() for score in scores]
                    sums.append(sum(exponentials).log() if keys else torch.tensor(-math.inf, dtype=DOUBLE))
                    weights = [each / sum(exponentials) for each in exponentials]
                else:
                    weights = [leaves["weights"][n, h, i, c] for c in slots]
                row = torch.zeros(call.value_dim, dtype=DOUBLE)
                for weight, j in zip(weights, keys):
                    row = row + weight * leaves["value"][n, h // group, j]
                rows.append(row)
    output = torch.stack(rows).view(result_shape(call))
    upstream = inputs.upstream.where(output.isfinite(), 0)
    gradients = torch.autograd.grad(output, list(leaves.values()), upstream)
    results = {next(iter(ROWS[call.op].results)): output.detach()}
    if sums:
        results["log_sum_exp"] = torch.stack(sums).view(call.batch, call.heads, call.query_length).detach()
    return results, dict(zip(leaves, gradients))


def make(call, seed=0):
    return random_inputs(call, torch.Generator().manual_seed(seed))


def truth(call, inputs):
    op = ROWS[call.op]
    upstream = {next(iter(op.results)): inputs.upstream}
    return oracle.truth(op, inputs.tensors, call.window, inputs.arguments, upstream)


def assert_same(found, results, gradients):
    assert found.results.keys() == results.keys()
    for name, result in results.items():
        torch.testing.assert_close(found.results[name], result, msg=name)
    assert found.gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found.gradients[name], gradient, msg=f"gradient of {name}")


@pytest.mark.parametrize("op", ROWS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"given": (LENGTHS,)},
        {"query_length": 9, "key_length": 4},
        {"query_length": 1, "heads": 2},
        {"window": Window(40, 30)},
        {"window": Window(0, 0), "dtype": DOUBLE},
        {"given": (BIAS, LENGTHS, SCALE)},
        {"given": (("bias", Given((2, 1, 7, 6), DOUBLE)),)},
        {"given": (("bias", Given((1, 1, 1, 1), DOUBLE)), SCALE), "query_length": 3},
    ],
    ids=str,
)
def test_the_oracle_says_what_the_loops_say(op, changes):
    taken = {argument.name for argument in ROWS[op].arguments}
    given = tuple(each for each in changes.get("given", ()) if each[0] in taken)
    call = problem(op, **{**changes, "given": given})
    inputs = make(call)
    if "bias" in inputs.arguments and inputs.arguments["bias"].numel() > 1:
        inputs.arguments["bias"][torch.rand(inputs.arguments["bias"].shape) < 0.4] = -math.inf
    assert_same(truth(call, inputs), *by_loops(call, inputs))


@pytest.mark.parametrize("op", ROWS)
def test_what_nothing_sees_is_nothing_to_the_oracle(op):
    """Keys past the length, rows that see none, hidden weights and incoming gradients: they hold NaN and infinities."""
    call = problem(op, query_length=12, given=(LENGTHS,))
    inputs = make(call)
    inputs.arguments["key_lengths"][:] = torch.tensor([4, 0])
    clean_truth = truth(call, inputs)
    visible = (
        oracle.truth(
            ROWS["local_dot_product"], _of_ones(call), call.window, {"key_lengths": inputs.arguments["key_lengths"]}
        )
        .results["scores"]
        .isfinite()
    )
    for name, tensor in inputs.tensors.items():
        if name in ("key", "value"):
            tensor[0, :, 4:] = math.nan
            tensor[1] = math.inf
        elif name == "weights":
            tensor[~visible] = math.nan
        else:
            tensor[~visible.any(-1)] = math.nan
    inputs.upstream[~visible if op == "local_dot_product" else ~visible.any(-1)] = math.nan
    assert_same(truth(call, inputs), clean_truth.results, clean_truth.gradients)


def _of_ones(call):
    shape = (call.batch, call.heads, call.query_length, 1)
    return {"query": torch.ones(shape), "key": torch.ones(call.batch, call.kv_heads, call.key_length, 1)}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_key_that_the_bias_hides_from_a_row_reaches_others_alone(value):
    call = problem(
        "local_attention", batch=1, heads=1, kv_heads=1, query_length=9, given=(("bias", Given((1, 1, 9, 6), DOUBLE)),)
    )
    inputs = make(call)
    inputs.arguments["bias"][0, 0, 4, 3] = -math.inf  # slot 3 of row 4 is key 4
    inputs.tensors["key"][0, 0, 4] = value
    inputs.tensors["value"][0, 0, 4] = value
    sees = [i for i in range(9) if -3 <= 4 - i <= 2 and i != 4]
    found = truth(call, inputs)
    for result in (found.results["output"], found.gradients["query"]):
        assert [i for i in range(9) if not result[0, 0, i].isfinite().all()] == sees


def test_the_gradient_of_the_log_sum_exp_is_the_softmax():
    call = problem("local_attention")
    inputs, op = make(call), ROWS["local_attention"]
    upstream = {"log_sum_exp": torch.ones(2, 4, 7, dtype=DOUBLE)}
    found = oracle.truth(op, inputs.tensors, call.window, {"bias": torch.zeros(2, 4, 7, 6, dtype=DOUBLE)}, upstream)
    torch.testing.assert_close(found.gradients["bias"].sum(-1), torch.ones(2, 4, 7, dtype=DOUBLE))
    assert not found.gradients["value"].any()


def test_what_the_oracle_does_not_know_it_refuses():
    with pytest.raises(ValueError, match="the oracle does not know softcap"):
        oracle.truth(ROWS["local_attention"], make(problem("local_attention")).tensors, Window(1, 1), {"softcap": 30.0})


@pytest.mark.parametrize("op", ROWS)
@pytest.mark.parametrize("lengths", [(700, 700), (700, 900), (900, 650), (3, 900)], ids=str)
@pytest.mark.parametrize("given", [(), (LENGTHS,), (BIAS, SCALE), (("bias", Given((2, 4, -1, 1), DOUBLE)),)], ids=str)
def test_strips_are_parts_of_the_whole(op, lengths, given, monkeypatch):
    queries, keys = lengths
    taken = {argument.name for argument in ROWS[op].arguments}
    given = tuple(
        (name, replace(each, shape=tuple(queries if size == -1 else size for size in each.shape)))
        for name, each in given
        if name in taken
    )
    call = problem(op, query_length=queries, key_length=keys, given=given)
    inputs = make(call)
    monkeypatch.setattr(oracle, "MOST_PAIRS", math.inf)
    (whole,) = oracle.strips(call)
    all_of_it = oracle.truth_of(call, whole, inputs, DOUBLE)
    monkeypatch.setattr(oracle, "MOST_PAIRS", 0)
    strips = list(oracle.strips(call))
    assert len(strips) == 6
    output, gradients = all_of_it.pop("output"), all_of_it
    assert gradients.keys() == inputs.leaves.keys()
    for strip in strips:
        parts = oracle.truth_of(call, strip, inputs, DOUBLE)
        expected = oracle.parts_of(call, strip, inputs, output, gradients)
        # The gradient of a bias that is the same for all sequences is no strip's to tell.
        assert parts.keys() == expected.keys() == {"output", *gradients} - ({"bias"} if BIAS in given else set())
        for name, part in parts.items():
            torch.testing.assert_close(part, expected[name], msg=f"{name} in {strip}")


def test_long_calls_are_judged_by_strips_and_short_ones_as_a_whole():
    assert len(list(oracle.strips(problem("local_attention", query_length=8192, key_length=8192)))) == 6
    (strip,) = oracle.strips(problem("local_attention"))
    assert str(strip) == "queries 0 to 6 of sequence 0 to 1"


# The budget


def test_twice_the_naive_error_and_a_rounding_step_pass_and_no_more():
    true = torch.ones(100, dtype=DOUBLE)
    naive = true + 1e-2
    allowed = budget(true, naive, torch.bfloat16)
    most = 2e-2 + torch.finfo(torch.bfloat16).eps
    assert allowed.fault(true + 0.99 * most, true) is None
    assert allowed.fault(true + 1.01 * most, true) == f"relative error {1.01 * most:.1e} exceeds {most:.1e}"
    one = true.clone()
    one[3] += 4.1 * most  # a tenth of that in the 2-norm
    assert "of one element" in allowed.fault(one, true)


def test_a_naive_computation_that_overflows_is_no_licence():
    true = torch.ones(10, dtype=DOUBLE)
    allowed = budget(true, torch.full((10,), math.nan), torch.float16)
    assert allowed.fault(true * 1.1, true) is not None
    assert allowed.fault(true, true) is None
    assert allowed.fault(torch.full((10,), math.nan), true) is not None


def test_float32_need_not_be_better_than_it_promises():
    true = torch.ones(10, dtype=DOUBLE)
    allowed = budget(true, true, torch.float32)
    assert allowed.fault(true * (1 + 9e-7), true) is None
    assert allowed.fault(true * (1 + 2e-6), true) is not None


def test_infinities_are_where_they_are_and_nothing_else_is_said_of_them():
    true = torch.tensor([1.0, -math.inf], dtype=DOUBLE)
    allowed = budget(true, true, torch.float32)
    assert allowed.fault(true, true) is None
    assert allowed.fault(torch.tensor([-math.inf, 1.0]), true) is not None
    assert allowed.fault(torch.tensor([1.0, -1e38]), true) is not None


def test_a_gradient_that_vanishes_may_keep_a_few_steps_of_the_largest():
    nothing, large = torch.zeros(10, dtype=DOUBLE), torch.ones(10, dtype=DOUBLE)
    allowed = budget(nothing, nothing, torch.float32, [nothing, large])
    step = torch.finfo(torch.float32).eps
    assert allowed.fault(nothing + 7 * step, nothing) is None
    assert allowed.fault(nothing + 20 * step, nothing) is not None
    assert budget(nothing, nothing, torch.float32).fault(nothing + step, nothing) is not None


# Checks


@pytest.mark.parametrize("op", ROWS)
def test_a_gradient_of_the_bias_is_checked_too(op):
    call = problem(op, query_length=9, given=(BIAS,) if op != "local_weighted_average" else ())
    inputs = make(call)
    expected = expectations(call, inputs)
    found = truth(call, inputs)

    def verdict(name, change):
        gradients = {**found.gradients, name: change(found.gradients[name])}
        calls = Calls(lambda: found.results["output"], lambda: lambda: tuple(gradients[each] for each in inputs.leaves))
        return check(call, "backward", calls, inputs, expected)

    for name in inputs.leaves:
        assert verdict(name, lambda gradient: gradient).fault is None
        assert verdict(name, lambda gradient: 1.001 * gradient).fault.startswith(f"{name}: relative error")
        assert "has shape" in verdict(name, lambda gradient: gradient[:1, :1]).fault or call.batch == 1
