"""The arguments of rows: what a call with them is equal to, what they are read for, and that they are no part of a plan."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import OPS
from given import SIZES, WINDOW, make_call, taking

import attnreg
from attnreg import Window, local_attention, ops
from attnreg.op import ROWS
from attnreg.rows import rows_of

PACKED = {"cu_seqlens_q": torch.tensor([0, 2, 2, 6], dtype=torch.int32)}


def packed(length=6, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(length)
    return [torch.randn((1, 2, length, 8), generator=generator).to(dtype).to(device) for _ in range(3)]


@pytest.mark.parametrize(
    ("op", "example", "backend", "device", "dtype"),
    [run for run in taking(torch.float32) if run.values[1] in ("packed", "packed, other keys")],
)
def test_a_pack_is_its_sequences_one_by_one(op, example, backend, device, dtype):
    call = make_call(op, example, dtype, device)
    of_queries = call.given["cu_seqlens_q"].tolist()
    of_keys = call.given.get("cu_seqlens_k", call.given["cu_seqlens_q"]).tolist()
    output, gradients = call.with_gradients(backend)
    upstream = next(iter(call.upstream.values()))
    covered = {name: torch.zeros_like(each, dtype=torch.bool) for name, each in call.tensors.items()}
    for rows, keys in zip(itertools.pairwise(of_queries), itertools.pairwise(of_keys)):
        places = {"Q": slice(*rows), "K": slice(*keys)}
        cuts = {name: places[dims[2]] for name, dims in ROWS[op].tensors.items()}
        alone = [call.tensors[name][:, :, cut].detach().requires_grad_() for name, cut in cuts.items()]
        found = getattr(attnreg, op)(*alone, WINDOW, backend=backend)
        torch.testing.assert_close(output[:, :, places["Q"]], found.detach(), rtol=1e-5, atol=1e-5)
        wanted = torch.autograd.grad(found, alone, upstream[:, :, places["Q"]])
        for (name, cut), gradient in zip(cuts.items(), wanted):
            torch.testing.assert_close(gradients[name][:, :, cut], gradient, rtol=1e-4, atol=1e-5, msg=name)
            covered[name][:, :, cut] = True
    for name, inside in covered.items():
        assert not gradients[name][~inside].any(), name
    outside = output[:, :, of_queries[-1] :]
    assert (outside == ROWS[op].results[next(iter(ROWS[op].results))].fill).all()


@pytest.mark.parametrize(("op", "example", "backend", "device", "dtype"), [
    run for run in taking(torch.float32) if run.values[1] == "all of rows"
])  # fmt: skip
def test_starts_and_lengths_are_the_call_on_the_keys_between_them(op, example, backend, device, dtype):
    """Each sequence, with the keys that it may see and the rows where they stand among these."""
    call = make_call(op, example, dtype, device)
    output, _ = call.with_gradients(backend)
    for n in range(SIZES["N"]):
        low, high = int(call.given["key_starts"][n]), int(call.given["key_lengths"][n])
        position = int(call.given["query_starts"][n]) - low
        # Rows before and behind, that the ends are aligned where the first one is to stand.
        front, back = max(-position, 0), high - low - position - SIZES["Q"]
        tensors = []
        for name, dims in ROWS[op].tensors.items():
            tensor = call.tensors[name][n : n + 1].detach()
            if dims[2] == "K":
                tensor = tensor[:, :, low:high]
                tensor = torch.nn.functional.pad(tensor, (0, 0, 0, max(-back, 0)))
            else:
                tensor = torch.nn.functional.pad(tensor, (0, 0, 0, max(back, 0)))
            tensors.append(tensor)
        keys = tensors[-1].shape[2]
        lengths = torch.tensor([high - low], device=device)
        found = getattr(attnreg, op)(*tensors, WINDOW, key_lengths=lengths, backend=backend)
        assert keys - tensors[0].shape[2] == position or front
        torch.testing.assert_close(output[n : n + 1], found[:, :, : SIZES["Q"]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("start", [2**31, 2**40, 2**63 - 1, -(2**31), -(2**63), 9, -7])
@pytest.mark.parametrize("window", [Window(3, 2), Window(2**61, 2**61), Window(2**62 - 1, 2**62 - 1)], ids=str)
def test_rows_may_stand_anywhere(start, window):
    """Far away a row sees nothing, unless its window reaches back."""
    query, key, value = (each.requires_grad_() for each in packed())
    starts = torch.tensor([start])
    output = local_attention(query, key, value, window, query_starts=starts, backend="torch")
    seen = [
        any(max(p - window.left, 0) <= j < min(p + window.right + 1, 6) for j in range(6))
        for p in range(start, start + 6)
    ]
    assert (output != 0).any(-1)[0, 0].tolist() == seen
    gradients = torch.autograd.grad(output.sum(), (query, key, value))
    assert all(gradient.isfinite().all() for gradient in gradients)
    if all(seen) and window.left > 6:
        torch.testing.assert_close(output, local_attention(query, key, value, Window(9, 9)))


def test_rows_of_says_what_each_row_sees():
    window = Window(2, 1)
    offsets = {"cu_seqlens_q": torch.tensor([0, 2, 2, 5]), "cu_seqlens_k": torch.tensor([0, 3, 4, 6])}
    first, last = (each.expand(1, 7)[0] for each in rows_of(7, 8, torch.device("cpu"), **offsets).seen(7, window))
    seen = [list(range(*pair)) for pair in zip(first.tolist(), last.tolist())]
    # Two rows at keys 1 and 2 of 0 to 2, three at 3 to 5 of 4 and 5; the others are of no sequence.
    assert seen == [[0, 1, 2], [0, 1, 2], [4], [4, 5], [4, 5], [], []]


def test_offsets_beyond_a_tensor_are_cut_where_nobody_reads_them():
    """As on a GPU."""
    for of_queries in ([0, 3, 99], [-5, 3, 6]):
        rows = rows_of(6, 6, torch.device("cpu"), cu_seqlens_q=torch.tensor(of_queries))
        right = rows_of(6, 6, torch.device("cpu"), cu_seqlens_q=torch.tensor([0, 3, 6]))
        for found, wanted in zip(rows.seen(6, Window(9, 9)), right.seen(6, Window(9, 9))):
            assert torch.equal(found, wanted)


# Their numbers are no part of a plan


IN_PLACE = {
    "cu_seqlens_q": ([0, 2, 6], [0, 5, 6]),
    "key_lengths": ([6], [2]),
    "key_starts": ([0], [4]),
    "query_starts": ([0], [3]),
}


@pytest.mark.parametrize("way", ["eager", "compiled"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", IN_PLACE)
def test_numbers_that_change_in_place_are_those_that_count(name, op, way):
    tensors = [*packed(), torch.randn(1, 2, 6, WINDOW.size)]
    tensors = tensors[-2:][::-1] if op == "local_weighted_average" else tensors[: len(ROWS[op].tensors)]

    def run(numbers):
        return getattr(attnreg, op)(*tensors, WINDOW, **{name: numbers}, backend="torch")

    torch._dynamo.reset()
    called = torch.compile(run, backend="aot_eager", fullgraph=True) if way == "compiled" else run
    first, second = (torch.tensor(numbers) for numbers in IN_PLACE[name])
    expected = [run(first.clone()), run(second.clone())]
    assert not torch.equal(*expected)
    numbers = first.clone()
    assert torch.equal(called(numbers), expected[0])
    numbers.copy_(second)
    assert torch.equal(called(numbers), expected[1])


@pytest.fixture
def plans(monkeypatch):
    """The problems for which a plan was made."""
    made = []
    remember = ops.remember
    monkeypatch.setattr(
        ops, "remember", lambda call, problem, *rest: made.append(problem) or remember(call, problem, *rest)
    )
    return made


@pytest.mark.parametrize("grad", [False, True])
def test_other_offsets_need_no_other_plan(plans, grad):
    query, key, value = (each.requires_grad_(grad) for each in packed())
    attnreg.reset()
    for offsets in ([0, 6], [0, 2], [0, 2, 6], [0, 0, 6], [0, 1, 2, 3, 4, 5, 6], [0]):
        local_attention(query, key, value, WINDOW, cu_seqlens_q=torch.tensor(offsets))
    assert len(plans) == 1
    given = plans[0].gives("cu_seqlens_q")
    assert (given.shape, given.dtype) == ((), torch.int64)
    # A tensor of another dtype, or another length of the pack, is another problem.
    local_attention(query, key, value, WINDOW, cu_seqlens_q=torch.tensor([0, 6], dtype=torch.int32))
    local_attention(*packed(7), WINDOW, cu_seqlens_q=torch.tensor([0, 6]))
    assert len(plans) == 3


def test_other_lengths_and_starts_need_no_other_plan(plans):
    tensors = packed()
    attnreg.reset()
    for number in (0, 3, 5):
        numbers = torch.tensor([number])
        local_attention(*tensors, WINDOW, key_lengths=numbers, key_starts=numbers // 2, query_starts=numbers)
    assert len(plans) == 1


@pytest.mark.parametrize("op", OPS)
def test_offsets_of_keys_that_are_those_of_queries_are_not_given(op):
    call = make_call(op, "packed")
    offsets = call.given["cu_seqlens_q"]
    both = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
    problem = attnreg.explain(*call.tensors.values(), WINDOW, **both, op=op).problem
    assert problem.gives("cu_seqlens_k") is None
    assert problem == attnreg.explain(*call.tensors.values(), WINDOW, **call.given, op=op).problem
    (found,) = call.results("torch", cu_seqlens_k=offsets)[:1]
    (expected,) = call.results("torch")[:1]
    (equal,) = call.results("torch", cu_seqlens_k=offsets.clone())[:1]
    assert torch.equal(found, expected)
    torch.testing.assert_close(equal, expected)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (PACKED, "; cu_seqlens_q; forward only"),
        ({**PACKED, "cu_seqlens_k": torch.tensor([0, 1, 2, 3])}, "; cu_seqlens_q; cu_seqlens_k; forward only"),
        ({"key_starts": torch.tensor([1]), "query_starts": torch.tensor([0])}, "; key_starts; query_starts; forward only"),
        ({"sinks": torch.zeros(2), "softcap": 9}, "; softcap; sinks (2,) float32; forward only"),
    ],
)  # fmt: skip
def test_explain_says_what_is_given_and_reads_no_number(given, told):
    state = torch.get_rng_state()
    text = str(attnreg.explain(*packed(), WINDOW, **given))
    assert told in text.splitlines()[0]
    for name in given:
        assert f"{name} is given; it takes" in text or all(
            name in status.backend.taken["local_attention"]
            for status in attnreg.backends()
            if status.backend is not None and "local_attention" in status.backend.taken
        )
    assert torch.equal(torch.get_rng_state(), state)


def test_explain_of_all_results_tells_of_the_gradient_that_may_come_in():
    query = torch.randn(1, 2, 6, 8, requires_grad=True)
    for op in ("local_attention_with_lse", attnreg.local_attention_with_lse):
        decision = attnreg.explain(query, query, query, WINDOW, op=op)
        assert "; grad_log_sum_exp; with gradients" in str(decision)
    assert attnreg.explain(query, query, query, WINDOW).problem.gives("grad_log_sum_exp") is None
