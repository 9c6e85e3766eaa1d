"""What the other tests, tuning and the benchmarks take for the truth, against loops over (row, key); and the error budget."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

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
from attnreg.testing.philox import kept, philox
from attnreg.testing.placing import placing

CPU, DOUBLE = torch.device("cpu"), torch.float64
SIZES = {"batch": 2, "heads": 4, "kv_heads": 2, "query_length": 7, "key_length": 9, "head_dim": 3, "value_dim": 5}
BIAS, LENGTHS, SCALE = (
    ("bias", Given((1, 4, 1, 6), DOUBLE)),
    ("key_lengths", Given((2,), torch.int64)),
    ("scale", Given()),
)
KEY_STARTS, QUERY_STARTS = (("key_starts", Given((2,), torch.int32)), ("query_starts", Given((2,), torch.int64)))
OFFSETS_Q, OFFSETS_K = (("cu_seqlens_q", Given((), torch.int64)), ("cu_seqlens_k", Given((), torch.int64)))
SOFTCAP, SINKS, LSE = ("softcap", Given()), ("sinks", Given((4,), DOUBLE)), ("grad_log_sum_exp", Given())
DROPOUT = (("dropout_p", Given()), ("seed", Given((1,), torch.int64)))


def problem(op, **changes):
    letters = "".join(ROWS[op].tensors.values())
    unused = {name: 0 for name, letter in (("head_dim", "E"), ("value_dim", "D")) if letter not in letters}
    return Problem(**{"op": op, "device": CPU, "dtype": DOUBLE, "window": Window(3, 2), **SIZES, **unused, **changes})


def stands(call, given, n, i):
    """The position of row i of sequence n, and the bounds of the keys that it may see."""
    if "cu_seqlens_q" in given:
        of_queries = given["cu_seqlens_q"].tolist()
        of_keys = given.get("cu_seqlens_k", given["cu_seqlens_q"]).tolist()
        for s in range(len(of_queries) - 1):
            if of_queries[s] <= i < of_queries[s + 1]:
                return of_keys[s + 1] - of_queries[s + 1] + i, of_keys[s], of_keys[s + 1]
        return 0, 0, 0
    start = call.key_length - call.query_length
    if "query_starts" in given:
        start = given["query_starts"].tolist()[n]
    low = given["key_starts"].tolist()[n] if "key_starts" in given else 0
    high = given["key_lengths"].tolist()[n] if "key_lengths" in given else call.key_length
    return start + i, low, high


def keeps(given, n, h, i, j):
    """Whether a weight stays, by Python's integers."""
    words, seed = [n, h, i, j // 4], int(given["seed"])
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for _ in range(10):
        a, b = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        words = [(b >> 32) ^ words[1] ^ key[0], b & 0xFFFFFFFF, (a >> 32) ^ words[3] ^ key[1], a & 0xFFFFFFFF]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return words[j % 4] >= int(given["dropout_p"] * 2**32)


def by_loops(call, inputs):
    """The op's results, with gradients by autograd, from single numbers: nothing is made of what is hidden."""
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in inputs.leaves.items()}
    given = inputs.arguments
    group, width, left = call.heads // call.kv_heads, call.window.size, call.window.left
    scale = given.get("scale", call.head_dim**-0.5 if call.op == "local_attention" else 1.0)
    bias, sinks, cap, dropped = leaves.get("bias"), leaves.get("sinks"), given.get("softcap"), given.get("dropout_p")
    if bias is not None:
        bias = bias.expand(call.batch, call.heads, call.query_length, width)
    nothing = torch.tensor(-math.inf, dtype=DOUBLE)
    rows, sums = [], []
    for n, h, i in product(range(call.batch), range(call.heads), range(call.query_length)):
        p, low, high = stands(call, given, n, i)
        keys = [j for j in range(call.key_length) if p - left <= j <= p + call.window.right and low <= j < high]
        if bias is not None:
            keys = [j for j in keys if bias[n, h, i, j - p + left] != -math.inf]
        if "query" in leaves:
            scores = [scale * leaves["query"][n, h, i] @ leaves["key"][n, h // group, j] for j in keys]
            if cap is not None:
                scores = [cap * (score / cap).tanh() for score in scores]
            if bias is not None:
                scores = [score + bias[n, h, i, j - p + left] for score, j in zip(scores, keys)]
        if call.op == "local_dot_product":
            row = [nothing] * width
            for j, score in zip(keys, scores):
                row[j - p + left] = score
            rows.append(torch.stack(row))
            continue
        if call.op == "local_attention":
            exponentials = [score.exp() for score in scores]
            total = sum(exponentials) + (0 if sinks is None else sinks[h].exp())
            sums.append(total.log() if keys else nothing)
            weights = [each / total for each in exponentials]
        else:
            weights = [leaves["weights"][n, h, i, j - p + left] for j in keys]
        row = torch.zeros(call.value_dim, dtype=DOUBLE)
        for weight, j in zip(weights, keys):
            if dropped is None or keeps(given, n, h, i, j):
                row = row + weight / (1 - (dropped or 0)) * leaves["value"][n, h // group, j]
        rows.append(row)
    output = torch.stack(rows).view(result_shape(call))
    results = {next(iter(ROWS[call.op].results)): output}
    if sums:
        results["log_sum_exp"] = torch.stack(sums).view(call.batch, call.heads, call.query_length)
    upstream = upstream_of(call, inputs)
    gradients = torch.autograd.grad(
        [results[name] for name in upstream],
        list(leaves.values()),
        [gradient.where(results[name].isfinite(), 0) for name, gradient in upstream.items()],
        allow_unused=True,
        materialize_grads=True,
    )
    return {name: result.detach() for name, result in results.items()}, dict(zip(leaves, gradients))


def upstream_of(call, inputs):
    return {next(iter(ROWS[call.op].results)): inputs.upstream, **inputs.incoming}


def make(call, seed=0):
    return random_inputs(call, torch.Generator().manual_seed(seed))


def truth(call, inputs):
    return oracle.truth(ROWS[call.op], inputs.tensors, call.window, inputs.arguments, upstream_of(call, inputs))


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
        {"given": (KEY_STARTS, LENGTHS)},
        {"given": (QUERY_STARTS,), "query_length": 3},
        {"given": (BIAS, KEY_STARTS, QUERY_STARTS, LENGTHS)},
        {"given": (OFFSETS_Q,), "batch": 1, "query_length": 9},
        {"given": (BIAS, OFFSETS_Q, OFFSETS_K), "batch": 1, "query_length": 11},
        {"given": (SOFTCAP,)},
        {"given": (BIAS, SOFTCAP, SINKS, LSE)},
        {"given": (SINKS, *DROPOUT)},
        {"given": (BIAS, KEY_STARTS, SCALE, SOFTCAP, SINKS, *DROPOUT, LSE)},
        {"given": (OFFSETS_Q, OFFSETS_K, SINKS, *DROPOUT, LSE), "batch": 1, "query_length": 11},
        {"given": (LSE,), "query_length": 12},
    ],
    ids=str,
)
def test_the_oracle_says_what_the_loops_say(op, changes):
    taken = {argument.name for argument in ROWS[op].extras}
    given = tuple(each for each in changes.get("given", ()) if each[0] in taken)
    call = problem(op, **{**changes, "given": given})
    inputs = make(call)
    chosen = {
        "key_starts": [2, 0],
        "key_lengths": [8, 5],
        "cu_seqlens_q": [0, 3, 3, 4, 8, 8],
        "cu_seqlens_k": [0, 2, 6, 6, 9, 9],
    }
    for name in chosen.keys() & inputs.arguments.keys():
        inputs.arguments[name] = torch.tensor(chosen[name])
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
    tensors = make(problem("local_attention")).tensors
    with pytest.raises(ValueError, match="the oracle does not know squash"):
        oracle.truth(ROWS["local_attention"], tensors, Window(1, 1), {"squash": 30.0})
    with pytest.raises(ValueError, match="no seed that says which weights are dropped"):
        oracle.truth(ROWS["local_attention"], tensors, Window(1, 1), {"dropout_p": 0.1})


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0,) * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_the_generator_gives_its_published_answers(counter, key, words):
    found = philox(tuple(map(torch.tensor, counter)), key)
    assert " ".join(f"{int(word):08x}" for word in found) == words


def test_which_weights_stay_hangs_on_their_places_in_the_whole_call_alone():
    places = [range(2, 4), range(1, 4), range(70000, 70005), range(65533, 65546)]
    found = kept(-(2**40) + 7, 0.3, *places)
    given = {"seed": -(2**40) + 7, "dropout_p": 0.3}
    wanted = [keeps(given, *place) for place in product(*places)]
    assert found.flatten().tolist() == wanted
    assert 0 < sum(wanted) < len(wanted)


def test_what_is_dropped_is_as_random_as_the_law_says():
    """Mean and variance of the share that is dropped, in rows, keys and heads; and no weight knows of its neighbour."""
    shape = (2, 4, 200, 203)
    for dropout_p in (0.1, 0.5, 0.9):
        dropped = ~kept(2**50 + 3, dropout_p, *map(range, shape))
        law = dropout_p * (1 - dropout_p)
        assert abs(dropped.double().mean() - dropout_p) < 4 * math.sqrt(law / dropped.numel())
        for of in (dropped.flatten(0, 2), dropped.movedim(-1, 0).flatten(1)):
            shares = of.double().mean(1)
            expected = law / of.shape[1]
            # The variance of n normal numbers is off by sqrt(2 / n) of itself.
            assert abs(shares.var() / expected - 1) < 5 * math.sqrt(2 / len(shares))
        centred = dropped.double() - dropout_p
        for dim, size in enumerate(shape):
            pairs = centred.narrow(dim, 0, size - 1) * centred.narrow(dim, 1, size - 1)
            assert abs(pairs.mean() / law) < 5 / math.sqrt(pairs.numel())


@pytest.mark.parametrize("window", [Window(2, 1), Window(2**62 - 1, 2**62 - 1), Window(0, 2**40)], ids=str)
def test_a_query_may_start_anywhere_in_64_bits(window):
    starts = torch.tensor([-(2**63), -(2**40), -3, 0, 2, 5, 9, 2**31, 2**40, 2**63 - 1])
    place = placing(4, 6, window, {"query_starts": starts}, CPU)
    for n, start in enumerate(starts.tolist()):
        for i in range(4):
            p = start + i
            seen = [j for j in range(6) if p - window.left <= j <= p + window.right]
            assert place.visible[n, 0, i].nonzero().flatten().tolist() == seen


def test_what_is_out_of_range_is_clamped():
    lengths, starts = torch.tensor([-5, 2**40, 3]), torch.tensor([1, -7, 99])
    place = placing(6, 6, Window(9, 9), {"key_lengths": lengths, "key_starts": starts}, CPU)
    assert place.visible.sum(-1)[:, 0].tolist() == [[0] * 6, [6] * 6, [0] * 6]


OF_STRIPS = [
    *product(
        [(700, 700), (700, 900), (900, 650), (3, 900)],
        [(), (LENGTHS,), (BIAS, SCALE), (("bias", Given((2, 4, -1, 1), DOUBLE)),)],
    ),
    ((700, 900), (QUERY_STARTS, KEY_STARTS, SOFTCAP, SINKS, *DROPOUT, LSE)),
    ((900, 650), (OFFSETS_Q, OFFSETS_K, *DROPOUT)),
]


@pytest.mark.parametrize("op", ROWS)
@pytest.mark.parametrize(("lengths", "given"), OF_STRIPS, ids=str)
def test_strips_are_parts_of_the_whole(op, lengths, given, monkeypatch):
    queries, keys = lengths
    taken = {argument.name for argument in ROWS[op].extras}
    given = tuple(
        (name, replace(each, shape=tuple(queries if size == -1 else size for size in each.shape)))
        for name, each in given
        if name in taken
    )
    packed = OFFSETS_Q in given
    call = problem(op, batch=1 if packed else 2, query_length=queries, key_length=keys, given=given)
    inputs = make(call)
    monkeypatch.setattr(oracle, "MOST_PAIRS", math.inf)
    (whole,) = oracle.strips(call, inputs)
    all_of_it, _ = oracle.truth_of(call, whole, inputs, DOUBLE)
    monkeypatch.setattr(oracle, "MOST_PAIRS", 0)
    strips = list(oracle.strips(call, inputs))
    assert len(strips) == 6
    output, gradients = all_of_it.pop("output"), all_of_it
    assert gradients.keys() == inputs.leaves.keys()
    for strip in strips:
        parts, _ = oracle.truth_of(call, strip, inputs, DOUBLE)
        expected = oracle.parts_of(call, strip, inputs, output, gradients)
        # The gradient of a bias that is the same for all sequences is no strip's to tell, nor that of sinks.
        untold = {name for name, each in (("bias", BIAS), ("sinks", SINKS)) if each in given}
        assert parts.keys() == expected.keys() == {"output", *gradients} - untold
        for name, part in parts.items():
            torch.testing.assert_close(part, expected[name], msg=f"{name} in {strip}")


def test_long_calls_are_judged_by_strips_and_short_ones_as_a_whole():
    long = problem("local_attention", query_length=8192, key_length=8192)
    assert len(list(oracle.strips(long, make(long)))) == 6
    short = problem("local_attention")
    (strip,) = oracle.strips(short, make(short))
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


def test_a_sum_over_rows_may_be_off_by_a_few_steps_of_its_terms_however_far_these_cancel():
    true, terms = torch.full((4,), 1e-3, dtype=DOUBLE), torch.ones(4, dtype=DOUBLE)
    step = torch.finfo(torch.float32).eps
    allowed = budget(true, true, torch.float32, terms=terms)
    assert allowed.fault(true + 7 * step, true) is None
    assert allowed.fault(true + 40 * step, true) is not None
    assert budget(true, true, torch.float32).fault(true + 7 * step, true) is not None


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
