"""Nothing that is hidden reaches anything: rows that see no key, keys that no row sees, slots that are no row's."""

from __future__ import annotations

import pytest
import torch
from cases import OPS, Case, make_inputs
from composed import composed
from reference import call
from running import runs

import attnreg
from attnreg import Window
from attnreg.op import ROWS

# Rows before all keys, keys before all windows, lengths, a bias that hides slots, whole rows, whole keys, or everything.
CASES = [
    Case("one_row_before_the_keys", batch=1, heads=1, kv_heads=1, query_length=3, key_length=2, window=Window(0, 0)),
    Case("rows_before_the_keys", query_length=75, key_length=40, window=Window(6, 2)),
    Case("keys_before_the_windows", query_length=7, key_length=90, window=Window(5, 0), heads=4),
    Case("key_lengths", query_length=40, key_length=33, window=Window(5, 4), key_lengths=(20, 0)),
    Case("bias_hides_slots", bias="NHLW", hidden=0.5, heads=4, query_length=40, key_length=40, window=Window(4, 2)),
    Case("bias_hides_columns", bias="H1W", hidden=0.5, query_length=70, key_length=70, window=Window(9, 3)),
    Case("bias_hides_rows", bias="N1L1", hidden=0.5, query_length=40, key_length=40),
    Case("bias_hides_all", bias="1", hidden=1.0, query_length=20, key_length=20),
    Case("everything", bias="NHLW", hidden=0.6, key_lengths=(30, 7), heads=4, query_length=50, key_length=40,
         window=Window(7, 3)),
]  # fmt: skip
# Rows that stand elsewhere, keys before a start, packs with rows and keys of no sequence, and what else a softmax may have.
PLACED = [
    Case("key_starts", query_length=40, key_length=33, window=Window(5, 4), further={"key_starts": (7, 33)}),
    Case("query_starts", query_length=40, key_length=70, window=Window(5, 4), further={"query_starts": (3, -35)}),
    Case("all_of_rows", query_length=40, key_length=70, window=Window(9, 2), key_lengths=(60, 9), heads=4,
         further={"key_starts": (5, 2), "query_starts": (0, 20), "sinks": ()}),
    Case("packed", batch=1, query_length=70, key_length=70, window=Window(6, 2),
         further={"cu_seqlens_q": (0, 20, 20, 21, 61), "sinks": (), "softcap": 2.0}),
    Case("packed_other_keys", batch=1, query_length=70, key_length=50, window=Window(6, 2), heads=4,
         further={"cu_seqlens_q": (0, 30, 31, 70), "cu_seqlens_k": (0, 10, 10, 40)}),
    Case("packed_bias", batch=1, query_length=40, key_length=40, window=Window(4, 1), bias="NHLW", hidden=0.5,
         further={"cu_seqlens_q": (0, 11, 40), "softcap": 1.0}),
    Case("dropout", query_length=40, key_length=33, window=Window(5, 4), key_lengths=(20, 0), bias="NHLW", hidden=0.4,
         further={"dropout_p": 0.3}),
]  # fmt: skip
BAD = [torch.nan, torch.inf, -torch.inf]


def standing(case: Case, inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(N, 1, Lq, 1): at which key each row stands, and the bounds of the keys that it may see, by the table of the contract."""
    given = {name: each.tolist() for name, each in inputs.options.items() if name.startswith(("cu_", "key_", "query_"))}
    found = torch.zeros(3, case.batch, case.query_length, dtype=torch.int64)
    of_queries = given.get("cu_seqlens_q")
    for n in range(case.batch):
        for i in range(case.query_length):
            start, low, high = case.key_length - case.query_length, 0, case.key_length
            if of_queries is not None:
                of_keys = given.get("cu_seqlens_k", of_queries)
                sequences = zip(of_queries, of_queries[1:], of_keys, of_keys[1:])
                own = [(keys - end, begin_keys, keys) for begin, end, begin_keys, keys in sequences if begin <= i < end]
                start, low, high = own[0] if own else (0, 0, 0)
            else:
                start = given["query_starts"][n] if "query_starts" in given else start
                low = given["key_starts"][n] if "key_starts" in given else low
                high = int(inputs.key_lengths[n]) if inputs.key_lengths is not None else high
            found[:, n, i] = torch.tensor([start + i, low, high])
    return tuple(found[:, :, None, :, None])


def visibility(op: str, case: Case, inputs) -> torch.Tensor:
    """(N, H, Lq, Lk): which keys a row sees, by the sentence of the contract."""
    position, low, high = standing(case, inputs)
    key = torch.arange(case.key_length)
    slot = key - position + case.window.left
    shape = (case.batch, case.heads, case.query_length, case.key_length)
    visible = ((slot >= 0) & (slot < case.window.size) & (key >= low) & (key < high)).expand(shape)
    if "bias" in inputs.tensors:
        band = (case.batch, case.heads, case.query_length, case.window.size)
        bias = inputs.tensors["bias"].detach().float().cpu().expand(band)
        at = slot.clamp(0, case.window.size - 1).expand(shape)
        visible = visible & (bias.gather(-1, at) != -torch.inf)
    return visible


def band_of(visible: torch.Tensor, case: Case, inputs) -> torch.Tensor:
    position, _, _ = standing(case, inputs)
    key = position - case.window.left + torch.arange(case.window.size)
    there = (key >= 0) & (key < case.key_length)
    at = key.clamp(0, case.key_length - 1).expand(*visible.shape[:3], -1)
    return visible.gather(-1, at) & there


def poison(op: str, case: Case, inputs, bad: float) -> None:
    """Put ``bad`` wherever nothing may look."""
    visible = visibility(op, case, inputs)
    device = inputs.grad.device
    unseeing = ~visible.any(-1)
    group = case.heads // case.kv_heads
    unseen = ~visible.any(2).view(case.batch, case.kv_heads, group, -1).any(2)
    for name in ROWS[op].tensors:
        if name == "query":
            inputs.tensors[name][unseeing.to(device)] = bad
        elif name == "weights":
            inputs.tensors[name][~band_of(visible, case, inputs).to(device)] = bad
        else:
            inputs.tensors[name][unseen.to(device)] = bad
    if op == "local_dot_product":
        inputs.grad[~band_of(visible, case, inputs).to(device)] = bad
    else:
        inputs.grad[unseeing.to(device)] = bad


@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("backend", "device", "dtype"), runs(torch.float32, torch.bfloat16))
def test_what_is_hidden_reaches_nothing(op, case, bad, backend, device, dtype):
    """But for a rounding step, where a backend computes anew what a product over hidden slots has spoilt."""
    assert_nothing_reaches(op, case, bad, backend, device, dtype)


@pytest.mark.parametrize("bad", BAD[:2], ids=str)
@pytest.mark.parametrize("case", PLACED, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("backend", "device", "dtype"), runs(torch.float32))
def test_so_it_is_wherever_rows_stand(op, case, bad, backend, device, dtype):
    skip_unless_taken(backend, op, case)
    assert_nothing_reaches(op, case, bad, backend, device, dtype)


@pytest.mark.parametrize("case", PLACED, ids=str)
@pytest.mark.parametrize("of", ["torch", "torch_block"])
def test_so_it_is_of_composed_attention_wherever_rows_stand(case, of):
    (whole,) = (status.backend for status in attnreg.backends() if status.name == of)
    with attnreg.register(composed(of, capability=whole.capability)):
        skip_unless_taken("composed", "local_attention", case)
        assert_nothing_reaches("local_attention", case, torch.nan, "composed", "cpu", torch.float32)


def skip_unless_taken(backend, op, case):
    taken = next(status.backend.taken for status in attnreg.backends() if status.name == backend)
    given = set(case.further) & ROWS[op].optional
    if not given <= taken.get(op, set()):
        pytest.skip(f"{backend} takes no {', '.join(sorted(given - taken.get(op, set())))}")


@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("of", ["torch", "torch_block"])
def test_what_is_hidden_reaches_nothing_of_composed_attention(case, bad, of):
    with attnreg.register(composed(of)):
        assert_nothing_reaches("local_attention", case, bad, "composed", "cpu", torch.float32)


@pytest.mark.parametrize(
    ("query_length", "key_length", "window"),
    [
        (320, 320, Window(6, 0)),
        (300, 300, Window(3, 5)),
        (300, 330, Window(6, 2)),
        (330, 290, Window(2, 30)),
        (320, 250, Window(0, 0)),
        (200, 320, Window(40, 70)),
    ],
)
def test_in_many_blocks_those_at_the_ends_alone_are_cut(query_length, key_length, window):
    case = Case("blocks", batch=1, query_length=query_length, key_length=key_length, window=window)
    clean, dirty = (make_inputs("local_attention", case, torch.float32) for _ in range(2))
    poison("local_attention", case, dirty, torch.nan)
    expected, expected_gradients = call("local_attention", clean, window, backend="torch")
    output, gradients = call("local_attention", dirty, window, backend="torch_block")
    assert torch.allclose(output, expected, atol=1e-5)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, expected_gradients[name], atol=1e-5), name


def assert_nothing_reaches(op, case, bad, backend, device, dtype):
    clean, dirty = (make_inputs(op, case, dtype, device) for _ in range(2))
    poison(op, case, dirty, bad)
    expected, expected_gradients = call(op, clean, case.window, backend=backend)
    output, gradients = call(op, dirty, case.window, backend=backend)
    steps = 8 * torch.finfo(dtype).eps
    for name, got, wanted in (
        ("output", output, expected),
        *((n, g, expected_gradients[n]) for n, g in gradients.items()),
    ):
        size = float(wanted[wanted.isfinite()].abs().max()) if wanted.isfinite().any() else 0.0
        torch.testing.assert_close(
            got, wanted, rtol=steps, atol=steps * size, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(("backend", "device", "dtype"), runs(torch.float32))
def test_a_hidden_key_whose_score_overflows_spoils_no_row(backend, device, dtype):
    """The key is finite and seen by one row, whose own query is small; the bias hides it from the others."""
    case = Case("overflow", batch=1, heads=1, kv_heads=1, query_length=6, key_length=6, window=Window(5, 0), bias="LW")
    inputs = make_inputs("local_attention", case, dtype, device)
    inputs.tensors["query"] *= 1e4
    inputs.tensors["query"][:, :, 0] = 0
    inputs.tensors["key"][:, :, 0] = 1e38
    inputs.tensors["bias"][1:] = 0
    for row in range(1, 6):
        inputs.tensors["bias"][row, 5 - row] = -torch.inf
    output, gradients = call("local_attention", inputs, case.window, backend=backend)
    inputs.tensors["key"][:, :, 0] = 1.0
    expected, expected_gradients = call("local_attention", inputs, case.window, backend=backend)
    assert torch.allclose(output, expected, rtol=1e-5)
    for name in ("query", "value", "bias"):
        assert torch.allclose(
            gradients[name][..., 1:, :], expected_gradients[name][..., 1:, :], rtol=1e-4, atol=1e-4
        ), name


@pytest.mark.parametrize("op", OPS)
def test_the_reference_keeps_what_is_not_finite_where_it_is_seen(op):
    """A NaN in a key or value that some rows see reaches these rows, in `torch`, and no other."""
    case = Case("seen", batch=1, heads=1, kv_heads=1, query_length=12, key_length=12, window=Window(2, 1))
    clean, dirty = (make_inputs(op, case, torch.float32) for _ in range(2))
    last = list(ROWS[op].tensors)[-1]
    dirty.tensors[last][:, :, 5] = torch.nan
    expected, _ = call(op, clean, case.window, backend="torch")
    output, _ = call(op, dirty, case.window, backend="torch")
    sees = torch.tensor([4 <= row <= 7 for row in range(12)])
    assert output[:, :, sees].isnan().any(-1).all()
    assert torch.equal(output[:, :, ~sees], expected[:, :, ~sees])
