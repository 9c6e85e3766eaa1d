"""The window audit: it finds every way to lie about a window that is written down here, and accuses nobody who is honest."""

from __future__ import annotations

import functools
import json
import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from typer.testing import CliRunner

from attnreg import Window, local_attention
from attnreg.cli import app
from attnreg.testing import audit_window
from attnreg.testing.audit import Pattern, WindowLie, chunks, full, window_and_first

W = 8
CLAIM = Window.causal(W)


def causal(row, key):
    return key <= row


def sliding(row, key, size=W):
    return (key <= row) & (key > row - size)


def dense(query, key, value, rule, *, softcap=None, sinks=None):
    """Attention by a rule of positions; it may be another one for each head."""
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
    length = query.shape[2]
    row, column = torch.arange(length)[:, None], torch.arange(length)[None]
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~rule(row, column), -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores)[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1).nan_to_num()
    return weights[..., : key.shape[2]] @ value


def by(rule, **options):
    return lambda query, key, value: dense(query, key, value, rule, **options)


def when(condition, lie, truth=sliding):
    """An attention that lies where a condition of the query holds."""
    return lambda query, key, value: dense(query, key, value, lie if condition(query) else truth)


class OtherBackward(torch.autograd.Function):
    """The window in the forward; in the backward, of each tensor, what its own rule says."""

    @staticmethod
    def forward(ctx, query, key, value, rules):
        ctx.rules = rules
        ctx.save_for_backward(query, key, value)
        return dense(query, key, value, sliding)

    @staticmethod
    def backward(ctx, incoming):
        found = []
        for place, rule in enumerate(ctx.rules):
            leaves = [each.detach().requires_grad_() for each in ctx.saved_tensors]
            with torch.enable_grad():
                output = dense(*leaves, rule)
            found.append(torch.autograd.grad(output, leaves[place], incoming)[0])
        return (*found, None)


def backward(query=sliding, key=sliding, value=sliding):
    return lambda q, k, v: OtherBackward.apply(q, k, v, (query, key, value))


def shifted(row, key):
    first = (row - W + 1).clamp_min(0)
    return (key >= first) & (key < first + W)


def without_own(row, key):
    return sliding(row, key) & ((row != key) | (row == 0))


def best(query, key, value, rule=sliding, keep=4, weigh=None):
    """Attention that chooses the keys with the largest scores, and weighs them by these, in a softmax or each alone."""
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
    position = torch.arange(query.shape[2])
    scores = (query @ key.mT / 4).masked_fill(~rule(position[:, None], position), -math.inf)
    least = scores.topk(keep).values[..., -1:]
    if weigh is not None:
        return torch.where(scores < least, 0.0, weigh(scores)) @ value
    return scores.masked_fill(scores < least, -math.inf).softmax(-1) @ value


def rectified(query, key, value, rule=sliding):
    """Linear attention whose weights are cut at 0."""
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
    position = torch.arange(query.shape[2])
    weights = (query @ key.mT).relu() * rule(position[:, None], position)
    return weights / (weights.sum(-1, keepdim=True) + 1e-3) @ value


def in_first_head(lie):
    return lambda row, key: torch.stack([lie(row, key), *[sliding(row, key)] * 3])


class OfFirstHead(torch.autograd.Function):
    """Keys or values for four heads; each group's first head alone gives them a gradient."""

    @staticmethod
    def forward(ctx, tensor):
        ctx.groups = 4 // tensor.shape[1]
        return tensor.repeat_interleave(ctx.groups, 1)

    @staticmethod
    def backward(ctx, incoming):
        return incoming[:, :: ctx.groups]


LIES = {
    "ignored": (by(causal), r"forward and backward: left: the window is ignored; Window\(7, 0\) is claimed: row 60 sees key 0"),
    "ignored, both": (by(lambda row, key: (row == row) & (key == key)), r"right: the window is ignored"),
    "one too many": (by(lambda r, k: sliding(r, k, W + 1)), r"left: 1 key too many; .*Window\(8, 0\) is seen: row 8 sees key 0, 8 before"),
    "one too few": (by(lambda r, k: sliding(r, k, W - 1)), r"left: 1 key too few; .*Window\(6, 0\) is seen"),
    "two too many": (by(lambda r, k: sliding(r, k, W + 2)), r"left: 2 keys too many"),
    "one to the right": (by(lambda r, k: (k <= r + 1) & (k > r - W)), r"right: 1 key too many; .*Window\(7, 1\) is seen"),
    "twice as many": (by(lambda r, k: (k <= r + W) & (k > r - W)), r"right: 8 keys too many"),
    "nothing but itself": (by(lambda r, k: k == r), r"left: no key is seen"),
    "not its own key": (by(lambda r, k: (k < r) & (k >= r - W)), r"left: 1 key too many"),
    "first keys": (by(lambda r, k: sliding(r, k) | (causal(r, k) & (k < 4))), r"left: keys seen that are not to be.*Window\(7, 0\) and the first 4 keys"),
    "first key": (by(lambda r, k: sliding(r, k) | (causal(r, k) & (k < 1))), r"Window\(7, 0\) and the first 1 key is seen"),
    "chunks": (by(lambda r, k: causal(r, k) & (r // W == k // W)), r"chunks of 8 is seen"),
    "dilated": (by(lambda r, k: (k <= r) & (k > r - 2 * W) & ((r - k) % 2 == 0)), r"dilated by 2: Window\(14, 0\)"),
    "shifted": (by(shifted), r"right: keys seen that are not to be.*Window\(7, 0\), shifted at the ends is seen"),
    "a gap": (by(lambda r, k: sliding(r, k) & (r - k != 3)), r"left: keys missing.*row \d+ does not see key \d+, 3 before it"),
    "blocks of rows": (by(lambda r, k: sliding(r, k) | (causal(r, k) & (k >= r // 16 * 16 - W))), r"left: up to 16 keys too many in some rows"),
    "late rows": (by(lambda r, k: sliding(r, k) | (causal(r, k) & (r >= 128))), r"left: up to 141 keys too many in some rows; .*rows 128 to 148"),
    "one pair": (by(lambda r, k: sliding(r, k) | ((r == 50) & (k == 37))), r"row 50 sees key 37"),
    "one head": (by(in_first_head(causal)), r"left: the window is ignored in some heads"),
    "one head, one too many": (by(in_first_head(lambda r, k: sliding(r, k, W + 1))), r"left: 1 key too many in some heads"),
    "one head, one too few": (by(in_first_head(lambda r, k: sliding(r, k, W - 1))), r"left: 1 key too few in some heads; .*Window\(6, 0\) is seen there"),
    "backward": (backward(causal, causal, causal), r": backward: left: the window is ignored"),
    "backward, one": (backward(*[lambda r, k: sliding(r, k, W + 1)] * 3), r": backward: left: 1 key too many"),
    "backward, less": (backward(*[lambda r, k: sliding(r, k, W - 1)] * 3), r": backward: left: 1 key too few"),
    "gradient of queries": (backward(query=causal), r"what a row's gradients depend on: left: the window is ignored"),
    "gradient of keys": (backward(key=causal), r": backward: left: the window is ignored"),
    "gradient of values": (backward(value=causal), r": backward: left: the window is ignored"),
    "gradient of values, less": (backward(value=lambda r, k: sliding(r, k, W - 1)), r": backward: left: 1 key too few"),
    "gradient of keys, less": (backward(key=lambda r, k: sliding(r, k, W - 2)), r": backward: left: 2 keys too few"),
    "long": (when(lambda query: query.shape[2] > 256, causal), r"the window is ignored.*\(640 positions\)"),
    "short": (when(lambda query: query.shape[2] < 64, causal), r"the window is ignored.*\(21 positions\)"),
    "alone": (when(lambda query: query.shape[0] == 1, causal), r"the window is ignored.*\(a batch of one\)"),
    "bf16": (when(lambda query: query.dtype == torch.bfloat16, causal), r"the window is ignored.*\(bfloat16\)"),
    "without gradients": (when(lambda query: not torch.is_grad_enabled(), causal), r": forward: left: the window is ignored"),
    "one head, nothing but itself": (by(in_first_head(lambda r, k: k == r)), r"forward: left: no key is seen in some heads"),
    "one head, a gap": (by(in_first_head(lambda r, k: sliding(r, k) & (r - k != 3))), r"left: keys missing in some heads; Window\(7, 0\) is claimed"),
    "one head, chunks": (by(in_first_head(lambda r, k: causal(r, k) & (r // W == k // W))), r"keys missing in some heads; .*chunks of 8 is seen there"),
    "never its own key": (by(without_own), r"backward and forward: no row sees its own key"),
    "gradient of values, not its own": (backward(value=without_own), r": backward: no row sees its own key"),
    "gradient of values, a gap": (backward(value=lambda r, k: sliding(r, k) & (r - k != 3)), r": backward: left: keys missing in some gradients"),
    "no gradient of values": (lambda q, k, v: dense(q, k, v.detach(), sliding), r": backward: no gradient reaches the value"),
    "no gradient of keys": (lambda q, k, v: dense(q, k.detach(), v, sliding), r": backward: no gradient reaches the key"),
    "rows cut at blocks": (by(lambda r, k: sliding(r, k) & (r // 16 == k // 16)), r"left: up to 7 keys too few in some rows; Window\(7, 0\) is claimed"),
    "a key is lost": (by(lambda r, k: sliding(r, k) & ((k != 30) | (r == k))), r"left: keys missing; .*keys 30 to 30"),
    "the first key is lost": (by(lambda r, k: sliding(r, k) & ((k != 0) | (r == k))), r"left: up to 7 keys too few in some rows.*keys 0 to 0"),
    "sparse, ignored": (lambda q, k, v: best(q, k, v, causal), r"left: (the window is ignored|\d+ keys too many) in some heads"),
    "sparse, one too many": (lambda q, k, v: best(q, k, v, lambda r, k: sliding(r, k, W + 1)), r"left: 1 key too many"),
    "sparse, one too few": (lambda q, k, v: best(q, k, v, lambda r, k: sliding(r, k, W - 1)), r"left: 1 key too few; .*Window\(6, 0\) is seen"),
    "gradient of queries, less": (backward(query=lambda r, k: sliding(r, k, W - 4)), r"of the query, left: 4 keys too few; .*Window\(3, 0\) is seen"),
    "gradient of queries, a gap": (backward(query=lambda r, k: sliding(r, k) & (r - k != 3)), r"of the query, left: keys missing"),
    "gradient of queries, one head": (backward(query=in_first_head(lambda r, k: sliding(r, k, W - 1))), r"of the query, left: 1 key too few in some gradients"),
    "gradient of queries, itself": (backward(query=lambda r, k: r == k), r": backward: no gradient reaches the query"),
    "no gradient of queries": (lambda q, k, v: dense(q.detach(), k, v, sliding), r": backward: no gradient reaches the query"),
    "shared heads, gradient of keys": (backward(key=in_first_head(lambda r, k: sliding(r, k, W - 1))), r": backward: left: 1 key too few in some gradients"),
    "shared heads, gradient of values": (backward(value=in_first_head(lambda r, k: r == k)), r": backward: left: no key is seen in some gradients"),
    "shared heads, the first alone": (lambda q, k, v: dense(q, OfFirstHead.apply(k), OfFirstHead.apply(v), sliding), r": backward: left: no key is seen in some gradients"),
    "not its own key in odd rows": (by(lambda r, k: sliding(r, k) & ((r != k) | (r % 2 == 0))), r"some rows do not see their own key; .*30 of 60"),
    "not its own key in late rows": (by(lambda r, k: sliding(r, k) & ((r != k) | (r < 30))), r"some rows do not see their own key; .*31 of 60"),
    "not its own key in the last row": (by(lambda r, k: sliding(r, k) & ((r != k) | (r < r.max()))), r"some rows do not see their own key; .*1 of 60 that were tried, the last is row 60 of 61"),
    "gradient of values, not the last": (backward(value=lambda r, k: sliding(r, k) & ((r != k) | (r < r.max()))), r": backward: some rows do not see their own key; .*1 of 60"),
    "last row, one too few": (by(lambda r, k: sliding(r, k) & ((r < r.max()) | (k > r - W + 1))), r"left: up to 1 key too few in some rows; .*row 60 does not see key 53"),
    "first full row, one too few": (by(lambda r, k: sliding(r, k) & ((r != W - 1) | (k > 0))), r"left: up to 1 key too few in some rows; .*row 7 does not see key 0"),
    "odd rows, a gap": (by(lambda r, k: sliding(r, k) & ((r % 2 == 0) | (r - k != 3))), r"left: keys missing; .*row 3 does not see key 0"),
    "transposes": (when(lambda query: not query.is_contiguous(), causal), r"the window is ignored.*\(as transposes\)"),
    "one shared head": (lambda q, k, v: dense(q, k, v, causal if k.shape[1] == 1 else sliding), r"the window is ignored.*\(one head of key and value\)"),
    "two sequences": (when(lambda query: query.shape[0] == 2, causal), r"the window is ignored.*\(two sequences\)"),
    "gradient of queries alone": (lambda q, k, v: dense(q, k, v, causal if q.requires_grad and not k.requires_grad else sliding), r"the window is ignored.*\(a gradient of the query alone\)"),
    "with gradients": (when(lambda query: torch.is_grad_enabled() and query.requires_grad, causal), r"the window is ignored"),
}  # fmt: skip


# A length at which one audit takes a fraction of a second; some lies need another, or another way to run.
SHORT = {"length": 61, "train": False, "dtypes": ()}
EVERYTHING = {
    "long": {"train": False, "dtypes": ()},
    "short": {"train": False, "dtypes": ()},
    "bf16": {"length": 61, "train": False},
    "late rows": {**SHORT, "length": 149},
}


def lies_as(audit, said):
    assert not audit.ok
    assert any(re.search(said, fault) for fault in audit.faults), str(audit)


def without_length(options):
    return {name: each for name, each in options.items() if name != "length"}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_named(lie):
    attention, said = LIES[lie]
    audit = audit_window(attention, window=CLAIM, **EVERYTHING.get(lie, SHORT))
    lies_as(audit, said)
    with pytest.raises(WindowLie, match="LIES"):
        audit.raise_if_faulty()
    # What is seen is never said to be what is claimed.
    assert not any("Window(7, 0) is claimed, Window(7, 0) is seen" in fault for fault in audit.faults), str(audit)


SINKS = torch.tensor([1.0, -1.0, 0.5, 2.0])
HONEST = {
    "sliding": (by(sliding), CLAIM),
    "centered": (by(lambda r, k: (r - k <= 5) & (k - r <= 4)), Window.centered(10)),
    "right only": (by(lambda r, k: (k >= r) & (k - r <= 3)), Window(0, 3)),
    "nothing but itself": (by(lambda r, k: r == k), Window(0, 0)),
    "soft cap": (by(sliding, softcap=5.0), CLAIM),
    "sinks": (by(sliding, sinks=SINKS), CLAIM),
    "first keys": (by(lambda r, k: sliding(r, k) | (causal(r, k) & (k < 4))), window_and_first(CLAIM, 4)),
    "chunks": (by(lambda r, k: causal(r, k) & (r // W == k // W)), chunks(W)),
    "chunks, not causal": (by(lambda r, k: r // W == k // W), chunks(W, causal=False)),
    "full": (by(causal), full()),
    "full, not causal": (by(lambda r, k: (r == r) & (k == k)), full(causal=False)),
    "dilated": (by(lambda r, k: sliding(r, k) & ((r - k) % 2 == 0)), Pattern("every other", lambda r, k: sliding(r, k) & ((r - k) % 2 == 0))),
    "larger than the sequence": (by(lambda r, k: sliding(r, k, 200)), Window.causal(200)),
    "dropout": (lambda q, k, v: F.dropout(dense(q, k, v, sliding), 0.3), CLAIM),
    "equal weights": (lambda q, k, v: dense(q * 0, k, v, sliding), CLAIM),
    "rows of one other key": (by(lambda r, k: sliding(r, k, 2)), Window(1, 0)),
    "attnreg": (lambda q, k, v: local_attention(q, k, v, CLAIM, backend="torch_block"), CLAIM),
    "sdpa": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), full()),
}  # fmt: skip


# Length 41: every position, in half the time.
@pytest.mark.parametrize("honest", HONEST)
def test_an_honest_attention_is_not_accused(honest):
    attention, claim = HONEST[honest]
    audit = audit_window(attention, window=claim, **{**SHORT, "length": 41, "dtypes": (torch.bfloat16,)})
    assert audit.ok, str(audit)
    assert not audit.faults
    audit.raise_if_faulty()


def strided(row, key):
    return (key <= row) & ((row - key < 4) | ((key % 8 == 7) & (row - key < 32)))


def in_blocks(row, key):
    return (key <= row) & (row - key < 32) & ((row // 8 == key // 8) | ((row // 8 * 7 + key // 8 * 3) % 4 != 1))


SPARSE = {
    "best four": (best, CLAIM),
    "best two": (lambda q, k, v: best(q, k, v, keep=2), CLAIM),
    "rectified": (rectified, CLAIM),
    "strided": (by(strided), Window(31, 0)),
    "blocks": (by(in_blocks), Window(31, 0)),
    "full": (lambda q, k, v: best(q, k, v, causal, 8), full()),
}


def test_an_attention_that_chooses_one_key_of_its_window_does_not_lie():
    assert audit_window(lambda q, k, v: best(q, k, v, keep=1, weigh=torch.sigmoid), window=CLAIM).ok


@pytest.mark.parametrize("sparse", SPARSE)
def test_an_attention_that_chooses_among_the_keys_of_its_window_is_sparse_and_does_not_lie(sparse):
    attention, claim = SPARSE[sparse]
    audit = audit_window(attention, window=claim, **SHORT)
    assert audit.ok, str(audit)
    assert audit.layers[0].faults == ()
    assert re.search(r"left: keys inside .* are not seen by some rows", audit.gaps[0]), str(audit)
    audit.raise_if_faulty()
    assert "as claimed, sparse" in str(audit)
    assert "1 of them is sparse inside the window, which is no lie" in str(audit)


def test_a_sparse_layer_is_told_from_one_that_lies():
    class Sparse(Attention):
        def forward(self, hidden):
            return self.out(best(*self.split(hidden), self.rule).transpose(1, 2).flatten(2))

    audit = audit_window(Model(Sparse(), Sparse(lambda r, k: sliding(r, k, W + 1))), window=CLAIM, **SHORT)
    assert [bool(layer.faults) for layer in audit.layers] == [False, True], str(audit)
    lies_as(audit, r"layers\.1\.attention: .*left: 1 key too many")


# How an attention is called


def equal_heads(query, key, value):
    position = torch.arange(query.shape[2])
    return F.scaled_dot_product_attention(query, key, value, attn_mask=sliding(position[:, None], position))


def test_an_attention_without_grouped_heads_is_called_with_equal_ones():
    audit = audit_window(equal_heads, window=CLAIM, **SHORT)
    assert audit.ok, str(audit)
    assert audit.called_with == "query (1, 4, 61, 16), key and value (1, 4, 61, 16), NHLE"
    assert audit.called_with in str(audit)
    assert any(re.search(r"grouped heads, .*key and value \(1, 2, 61, 16\): ", note) for note in audit.notes)
    grouped = audit_window(by(sliding), window=CLAIM, **SHORT)
    assert grouped.called_with == "query (1, 4, 61, 16), key and value (1, 2, 61, 16), NHLE"
    assert not grouped.notes


def test_heads_that_were_asked_for_are_not_replaced():
    with pytest.raises(ValueError, match=r"key and value \(1, 2, 61, 16\)") as refused:
        audit_window(equal_heads, window=CLAIM, kv_heads=2, **SHORT)
    assert "(1, 4, 61, 16), key and value (1, 4" not in str(refused.value)


def test_an_attention_that_cannot_be_called_is_told_with_the_shapes_it_was_given():
    def fails(query, key, value):
        if query.shape[-1] != 64:
            raise RuntimeError("head_dim must be 64")
        return equal_heads(query, key, value)

    said = (
        r"cannot be called with query \(1, 4, 61, 16\).*RuntimeError: head_dim must be 64; give the layout=.*head_dim="
    )
    with pytest.raises(ValueError, match=said) as refused:
        audit_window(fails, window=CLAIM, **SHORT)
    assert isinstance(refused.value.__cause__, RuntimeError)
    assert audit_window(fails, window=CLAIM, head_dim=64, **SHORT).ok


def test_an_attention_that_takes_one_sequence_is_audited():
    def alone(query, key, value):
        if len(query) > 1:
            raise RuntimeError("one sequence at a time")
        return equal_heads(query, key, value)

    options = {**SHORT, "length": 31, "kv_heads": 4}
    audit = audit_window(alone, window=CLAIM, **options)
    assert audit.ok, str(audit)
    assert audit.notes == ("a batch of more than one: RuntimeError: one sequence at a time",)
    lies_as(audit_window(alone, window=Window(6, 0), **options), "left: 1 key too many")


@pytest.mark.parametrize("output", [None, torch.zeros(3)], ids=["nothing", "no rows"])
def test_an_attention_that_gives_no_rows_is_refused(output):
    with pytest.raises(ValueError, match="must return a tensor of rows"):
        audit_window(lambda query, key, value: output, window=CLAIM, **SHORT)


def test_what_is_not_told_is_chosen():
    audit = audit_window(by(sliding), window=CLAIM)
    assert audit.ok, str(audit)
    assert audit.ways == (
        "eval, 149 positions",
        "a batch of one",
        "as transposes",
        "one head of key and value",
        "two sequences",
        "a gradient of the query alone",
        "bfloat16",
        "21 positions",
        "640 positions",
    )
    assert str(audit).splitlines()[1].split() == ["attention", *["Window(7,", "0)"] * 3, "as", "claimed"]


# What a sequence holds beside one document.


def in_documents(lengths, rule=sliding):
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return lambda row, key: rule(row, key) & (document[row] == document[key])


def test_documents_that_see_each_other_are_named():
    lengths, options = (20, 30, 11), without_length(SHORT)
    assert audit_window(by(in_documents(lengths)), window=CLAIM, documents=lengths, **options).ok
    audit = audit_window(by(sliding), window=CLAIM, documents=lengths, **options)
    lies_as(audit, r"forward and backward: documents are mixed: row 2\d sees key 1\d")


def test_padding_that_is_seen_is_named():
    def padded(row, key):
        return sliding(row, key) & (key >= 9) & (key < 55)

    assert audit_window(by(padded), window=CLAIM, padding=(9, 6), **SHORT).ok
    lies_as(audit_window(by(sliding), window=CLAIM, padding=(9, 6), **SHORT), r"padding leaks.*: row \d+ sees key \d,")
    both_sides = by(lambda row, key: (row - key).abs() < W)
    lies_as(
        audit_window(both_sides, window=Window(7, 7), padding=(0, 6), **SHORT),
        r"padding leaks.*: row \d+ sees key (5[5-9]|60), ",
    )


@pytest.mark.parametrize("layout", ["NHLE", "NLHE", "HLE", "LHE", "LNHE"])
def test_every_layout_is_audited(layout):
    inner = "NHLE" if "N" in layout else "HLE"
    order = [layout.index(letter) for letter in inner]
    back = [inner.index(letter) for letter in layout]

    def attention(size):
        def run(*tensors):
            query, key, value = (
                each.permute(order) if "N" in layout else each.permute(order)[None] for each in tensors
            )
            output = dense(query, key, value, lambda row, key: sliding(row, key, size))
            return (output if "N" in layout else output[0]).permute(back)

        return run

    options = {**SHORT, "length": 31, "layout": layout}
    assert audit_window(attention(W), window=CLAIM, **options).ok
    lies_as(audit_window(attention(W + 1), window=CLAIM, **options), "left: 1 key too many")


# Models


class Attention(nn.Module):
    """Self-attention by a rule of positions."""

    def __init__(self, rule=sliding, width=32, heads=4, dropout=0.0, **attributes):
        super().__init__()
        self.rule, self.num_heads, self.dropout = rule, heads, dropout
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        for name, value in attributes.items():
            setattr(self, name, value)

    def split(self, hidden):
        return (
            each(hidden).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for each in (self.query, self.key, self.value)
        )

    def forward(self, hidden):
        output = dense(*self.split(hidden), self.rule)
        return F.dropout(self.out(output.transpose(1, 2).flatten(2)), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, attention, width=32):
        super().__init__()
        self.norm, self.attention = nn.RMSNorm(width), attention
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, hidden):
        hidden = hidden + self.attention(self.norm(hidden))
        return hidden + self.mlp(hidden)


class Model(nn.Module):
    def __init__(self, *attentions, width=32):
        super().__init__()
        self.embedding = nn.Embedding(50, width)
        self.layers = nn.ModuleList(Block(each, width) for each in attentions)
        self.head = nn.Linear(width, 50)

    def forward(self, tokens):
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)


def test_each_layer_of_a_model_is_measured_alone():
    rules = [sliding, causal, lambda r, k: sliding(r, k, 3), lambda r, k: (r - k).abs() <= 2, lambda r, k: r == k]
    claims = [CLAIM, full(), Window(2, 0), Window(2, 2), Window(0, 0)]
    model = Model(*map(Attention, rules))
    audit = audit_window(model, window={f"layers.{i}.*": claim for i, claim in enumerate(claims)}, **SHORT)
    assert audit.ok, str(audit)
    assert [layer.name for layer in audit.layers] == [f"layers.{i}.attention" for i in range(5)]
    assert [layer.forward for layer in audit.layers] == [CLAIM, None, Window(2, 0), Window(2, 2), Window(0, 0)]


def test_the_layer_that_lies_is_named():
    model = Model(*(Attention() for _ in range(3)), Attention(lambda r, k: sliding(r, k, W + 1)), Attention())
    audit = audit_window(model, window=CLAIM, **SHORT)
    assert [layer.name for layer in audit.layers if layer.faults] == ["layers.3.attention"]
    lies_as(audit, r"^layers\.3\.attention: forward and backward: left: 1 key too many")
    only = audit_window(model, window=CLAIM, layers="layers.[0-2].*", **SHORT)
    assert only.ok
    assert len(only.layers) == 3


@pytest.mark.parametrize(
    "attributes",
    [{"sliding_window": W}, {"window": CLAIM}, {"window_size": (W - 1, 0)}, {"window_size": W, "is_causal": True}],
    ids=str,
)
def test_a_claim_is_read_from_the_layer(attributes):
    assert audit_window(Model(Attention(sliding, **attributes)), **SHORT).ok
    lies_as(
        audit_window(Model(Attention(causal, **attributes)), **SHORT), r"left: the window is ignored; Window\(7, 0\)"
    )


def test_a_model_that_claims_nothing_proves_nothing():
    audit = audit_window(Model(Attention(sliding)), **SHORT)
    assert not audit.ok
    assert not audit.faults
    assert audit.layers[0].forward == CLAIM
    with pytest.raises(WindowLie, match="nothing was proved"):
        audit.raise_if_faulty()


def test_a_window_that_is_ignored_in_training_alone_is_named():
    class Trained(Attention):
        def forward(self, hidden):
            self.rule = causal if self.training else sliding
            return super().forward(hidden)

    model = Model(Attention(), Trained()).eval()
    audit = audit_window(model, window=CLAIM, length=61, dtypes=())
    lies_as(audit, r"layers\.1\.attention: forward and backward: left: the window is ignored; .* \(training\)")
    assert not model.training


def test_dropout_in_training_hides_and_invents_nothing():
    audit = audit_window(Model(Attention(dropout=0.5), Attention(dropout=0.5)), window=CLAIM, length=61, dtypes=())
    assert audit.ok, str(audit)


def test_a_window_that_is_lost_where_dropout_drops_is_named():
    class Dropped(Attention):
        def forward(self, hidden):
            self.rule = causal if self.training and self.dropout else sliding
            return super().forward(hidden)

    audit = audit_window(Model(Attention(dropout=0.5), Dropped(dropout=0.5)), window=CLAIM, length=61, dtypes=())
    assert audit.layers[0].faults == (), str(audit)
    lies_as(audit, r"layers\.1\.attention: forward.*: left: the window is ignored.*\(training with dropout\)")


class Functional(nn.Module):
    """A block whose attention is no module."""

    def __init__(self, rule, width=32):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.rule = rule

    def forward(self, hidden):
        query, key, value = self.qkv(self.norm(hidden)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        return hidden + self.out(dense(query, key, value, self.rule).transpose(1, 2).flatten(2))


class Product(nn.Module):
    def __init__(self, rule):
        super().__init__()
        self.rule = rule

    def forward(self, query, key, value):
        return dense(query, key, value, self.rule)


class Core(nn.Module):
    """An attention whose inner part takes query, key and value."""

    def __init__(self, rule, width=32):
        super().__init__()
        self.qkv, self.product = nn.Linear(width, 3 * width), Product(rule)

    def forward(self, hidden):
        query, key, value = self.qkv(hidden).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        return hidden + self.product(query, key, value).transpose(1, 2).flatten(2)


class OfTorch(nn.Module):
    def __init__(self, rule, width=32):
        super().__init__()
        self.rule, self.inner = rule, nn.MultiheadAttention(width, 4, batch_first=True)

    def forward(self, hidden):
        position = torch.arange(hidden.shape[1])
        mask = ~self.rule(position[:, None], position[None])
        return hidden + self.inner(hidden, hidden, hidden, attn_mask=mask, need_weights=False)[0]


class Twice(nn.Module):
    """One layer's weights, used twice."""

    def __init__(self, rule):
        super().__init__()
        self.shared = Attention(rule)

    def forward(self, hidden):
        return self.shared(self.shared(hidden))


class LengthFirst(Functional):
    def forward(self, hidden):
        return super().forward(hidden.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("kind", [Functional, Core, OfTorch, Twice, Attention], ids=lambda kind: kind.__name__)
def test_layers_are_found_however_they_are_written(kind):
    options = {**SHORT, "inputs": torch.randn(1, 61, 32)}
    assert audit_window(nn.Sequential(kind(sliding), kind(sliding)), window=CLAIM, **options).ok
    audit = audit_window(nn.Sequential(kind(sliding), kind(lambda r, k: sliding(r, k, W + 1))), window=CLAIM, **options)
    assert [bool(layer.faults) for layer in audit.layers] == (
        [False] * 2 + [True] * 2 if kind is Twice else [False, True]
    )
    lies_as(audit, "^1.*left: 1 key too many")


def test_a_layer_whose_sequence_comes_first_is_audited():
    options = {**SHORT, "inputs": torch.randn(61, 1, 32)}
    assert audit_window(LengthFirst(sliding), window=CLAIM, **options).ok
    lies_as(audit_window(LengthFirst(causal), window=CLAIM, **options), "left: the window is ignored")


def test_a_head_that_sees_less_is_found_behind_a_projection():
    def narrow(row, key):
        return torch.stack([sliding(row, key, W - 1), *[sliding(row, key)] * 3])

    lies_as(audit_window(Model(Attention(narrow)), window=CLAIM, **SHORT), r"left: 1 key too few in some heads")


def test_a_backward_that_forgets_the_window_is_found_in_a_model():
    class Forgets(Attention):
        def forward(self, hidden):
            return self.out(OtherBackward.apply(*self.split(hidden), self.rule).transpose(1, 2).flatten(2))

    rules = (causal, causal, causal), (causal, sliding, sliding), (sliding, causal, sliding), (sliding, sliding, causal)
    model = Model(*map(Forgets, rules), Forgets((sliding,) * 3))
    audit = audit_window(model, window=CLAIM, **SHORT)
    assert [bool(layer.faults) for layer in audit.layers] == [True] * 4 + [False], audit
    for layer in audit.layers[:4]:
        assert layer.forward == CLAIM
        assert all(fault.startswith("backward") for fault in layer.faults)
    assert audit.layers[0].backward is None
    assert audit.layers[4].backward == CLAIM


def test_a_gradient_of_the_query_that_lacks_keys_is_found_in_a_model():
    class Lacks(Attention):
        def forward(self, hidden):
            return self.out(OtherBackward.apply(*self.split(hidden), self.rule).transpose(1, 2).flatten(2))

    rules = (lambda r, k: sliding(r, k, W - 4), sliding, sliding), (sliding,) * 3
    audit = audit_window(Model(*map(Lacks, rules)), window=CLAIM, **SHORT)
    assert [bool(layer.faults) for layer in audit.layers] == [True, False], str(audit)
    lies_as(audit, r"layers\.0\.attention: backward.*of the query, left: 4 keys too few")


# torch.compile


class Compiled(Attention):
    """Loses its window under a compiler."""

    def forward(self, hidden):
        self.rule = causal if torch.compiler.is_compiling() else sliding
        return super().forward(hidden)


def test_a_window_that_is_lost_under_compile_is_named():
    model = Model(Attention(), Compiled())
    assert audit_window(model, window=CLAIM, **SHORT).ok
    audit = audit_window(model, window=CLAIM, compile="eager", **SHORT)
    lies_as(audit, r"layers\.1\.attention: forward and backward: left: the window is ignored.*\(compiled by eager\)")
    lies_as(audit, r"the output differs from that of the model as it is")
    assert not audit.layers[0].faults


def test_an_honest_model_is_honest_under_compile():
    audit = audit_window(Model(*(Attention() for _ in range(10))), window=CLAIM, compile="eager", **SHORT)
    assert audit.ok, str(audit)
    assert audit.ways == ("eval, 61 positions", "a batch of one", "compiled by eager")
    assert not audit.notes


def test_a_backend_that_compiles_another_window_is_named():
    def forgets(graph, examples):
        for node in graph.graph.nodes:
            if node.op == "call_method" and node.target == "masked_fill":
                node.replace_all_uses_with(node.args[0])
        graph.recompile()
        return graph

    audit = audit_window(Model(Attention()), window=CLAIM, compile=forgets, **SHORT)
    lies_as(audit, r"the window is ignored.*\(compiled by forgets\)")


# Models of Hugging Face

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 97,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING, FULL = "sliding_attention", "full_attention"
# By family: the class of the model, that of the configuration, what that has beside TINY (None takes away), the implementations,
# and the claims that are to be read.
FAMILIES = {
    "mistral": ("MistralForCausalLM", "MistralConfig", {"sliding_window": W}, ("eager", "sdpa"), (CLAIM, CLAIM)),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {"sliding_window": W}, ("eager",), (CLAIM, None)),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {"sliding_window": W, "layer_types": [SLIDING, FULL]},
        ("eager", "sdpa"),
        (CLAIM, None),
    ),
    "modernbert": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {"local_attention": W, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2, "head_dim": None, "num_key_value_heads": None},
        ("eager", "sdpa"),
        (None, Window(W // 2, W // 2)),
    ),
    "gpt-oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {"sliding_window": W, "num_local_experts": 4, "num_experts_per_tok": 2},
        ("eager",),
        (CLAIM, None),
    ),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            "attention_chunk_size": W,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "layer_types": ["chunked_attention", FULL],
            "no_rope_layers": [1, 0],
        },
        ("eager", "sdpa"),
        ("chunks of 8", None),
    ),
}  # fmt: skip
PAIRS = [pytest.param(family, each, id=f"{family}-{each}") for family, facts in FAMILIES.items() for each in facts[3]]
TOGETHER = {"length": 61, "dtypes": ()}


def hugging_face(family, implementation="eager"):
    import transformers

    model, config, facts, _, _ = FAMILIES[family]
    given = {name: value for name, value in {**TINY, **facts}.items() if value is not None}
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**given))
    made.set_attn_implementation(implementation)
    return made.eval()


@pytest.mark.parametrize(("family", "implementation"), PAIRS)
def test_a_model_of_hugging_face_is_not_accused(family, implementation):
    audit = audit_window(hugging_face(family, implementation), **TOGETHER)
    assert audit.ok, str(audit)
    assert not audit.notes
    found = FAMILIES[family][4]
    assert (
        tuple(str(each.forward) if isinstance(each.forward, Pattern) else each.forward for each in audit.layers)
        == found
    )
    padded = ("12 padded on the left", "12 padded on the right", "12 padded on the left, training")
    cached = (
        ()
        if family == "modernbert"
        else (
            "with a cache, token by token",
            "with a cache, in pieces",
            "with a cache, token by token, some padded on the left",
        )
    )
    ways = tuple(re.sub(r"token, \d+ padded", "token, some padded", way) for way in audit.ways)
    assert ways == ("eval, 61 positions", "a batch of one", "training", *padded, *cached)


ON_A_GPU = [
    *((family, each) for family in ("mistral", "gemma3") for each in ("eager", "sdpa", "attnreg")),
    *(("modernbert", each) for each in ("eager", "sdpa", "attnreg")),
]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("family", "implementation"), ON_A_GPU, ids=["-".join(each) for each in ON_A_GPU])
def test_a_model_on_a_gpu_is_audited(family, implementation):
    import attnreg.integrations.transformers  # noqa: F401

    audit = audit_window(hugging_face(family, implementation).cuda(), **TOGETHER)
    assert audit.ok, str(audit)
    assert tuple(each.forward for each in audit.layers) == FAMILIES[family][4]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_attention_on_a_gpu_is_audited():
    def attention(query, key, value):
        return local_attention(query, key, value, CLAIM)

    found = {"device": "cuda", "length": 61, "dtypes": (torch.float32, torch.bfloat16)}
    assert audit_window(attention, window=CLAIM, **found).ok
    lies_as(audit_window(attention, window=Window.causal(W + 1), **found), "left: 1 key too few")


@pytest.mark.parametrize(("family", "implementation"), PAIRS)
def test_a_model_whose_mask_ignores_the_window_is_named(family, implementation, monkeypatch):
    from transformers import masking_utils

    monkeypatch.setattr(masking_utils, "sliding_window_overlay", lambda size: lambda n, h, row, key: key >= 0)
    monkeypatch.setattr(
        masking_utils, "sliding_window_bidirectional_overlay", lambda size: lambda n, h, row, key: key >= 0
    )
    monkeypatch.setattr(masking_utils, "chunked_overlay", lambda size, left: lambda n, h, row, key: key >= 0)
    audit = audit_window(hugging_face(family, implementation), cache=False, train=False, **TOGETHER)
    lying = [place for place, claim in enumerate(FAMILIES[family][4]) if claim is not None]
    assert [place for place, layer in enumerate(audit.layers) if layer.faults] == lying, audit
    lies_as(audit, "chunks of 8 is claimed, full is seen" if family == "llama4" else "left: the window is ignored")


def test_a_model_whose_window_is_off_says_that_it_is_full_and_is_held_to_a_window_that_is_given():
    import transformers

    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**TINY, sliding_window=None)).eval()
    options = {**TOGETHER, "train": False, "cache": False}
    audit = audit_window(model, **options)
    assert audit.ok
    assert [str(layer.claimed) for layer in audit.layers] == ["full, causal"] * 2
    assert "2 of them claim full attention, no window" in str(audit)
    lies_as(
        audit_window(model, window=CLAIM, **options),
        r"layers\.1\.self_attn: forward and backward: left: the window is ignored; Window\(7, 0\) is claimed",
    )


def test_a_mask_that_is_off_by_one_is_named(monkeypatch):
    from transformers import masking_utils

    monkeypatch.setattr(masking_utils, "sliding_window_overlay", lambda size: lambda n, h, row, key: key >= row - size)
    audit = audit_window(hugging_face("mistral"), cache=False, **TOGETHER)
    lies_as(audit, r"layers\.1\.self_attn: forward and backward: left: 1 key too many; .*Window\(8, 0\) is seen:")


@pytest.mark.parametrize("extra", [1, 100])
def test_a_cache_that_forgets_the_window_is_named(extra, monkeypatch):
    from transformers import masking_utils
    from transformers.models.mistral import modeling_mistral

    right = masking_utils.create_sliding_window_causal_mask

    def wrong(config, **given):
        if given.get("cache") is not None and given["cache"].get_seq_length():
            config = type(config)(**{**config.to_dict(), "sliding_window": W + extra})
            config._attn_implementation = "eager"
        return right(config=config, **given)

    # A sliding cache drops keys: this one keeps them all.
    class Keeps(modeling_mistral.DynamicCache):
        def __init__(self, config=None):
            super().__init__()

    monkeypatch.setattr(modeling_mistral, "DynamicCache", Keeps)
    model = hugging_face("mistral")
    assert audit_window(model, **TOGETHER).ok
    monkeypatch.setattr(modeling_mistral, "create_sliding_window_causal_mask", wrong)
    audit = audit_window(model, **TOGETHER)
    lies_as(
        audit,
        r"layers\.0\.self_attn: forward: left: up to (1 key|33 keys) too many in some rows; .*\(with a cache, token by token[;)]",
    )
    lies_as(
        audit,
        r"layers\.0\.self_attn: forward: left: (1 key too many|the window is ignored); .*\(with a cache, in pieces\)",
    )
    lies_as(audit, r"layers\.1\.self_attn: forward: the output differs from that without a cache")
    assert all("cache" in fault for fault in audit.faults)


def change_in_decoding(model, change, monkeypatch):
    """Changes what a model's forward does where it is called with a cache that holds something."""
    right = model.forward

    @functools.wraps(right)
    def forward(*tensors, **given):
        cache = given.get("cache", given.get("past_key_values"))
        if cache is None or not cache.get_seq_length():
            return right(*tensors, **given)
        with monkeypatch.context() as patched:
            given = change(model, patched, given) or given
            return right(*tensors, **given)

    model.forward = forward


def positions_restart(model, patched, given):
    tokens = given["input_ids"]
    return {**given, "position_ids": torch.arange(tokens.shape[1])[None]}


def no_last_norm(model, patched, given):
    patched.setattr(model.model.norm, "forward", lambda hidden: hidden)


def no_mlp(model, patched, given):
    patched.setattr(model.model.layers[1].mlp, "forward", torch.zeros_like)


def no_second_layer(model, patched, given):
    def as_it_is(hidden, cache=None, past_key_values=None, **rest):
        made = cache if past_key_values is None else past_key_values
        empty = hidden.new_zeros(1, 2, hidden.shape[1], 8)
        made.update(empty, empty, 1)
        return hidden

    patched.setattr(model.model.layers[1], "forward", as_it_is)


@pytest.mark.parametrize("change", [positions_restart, no_last_norm, no_mlp, no_second_layer])
def test_a_cache_path_that_differs_anywhere_in_the_model_is_named(change, monkeypatch):
    model = hugging_face("mistral")
    change_in_decoding(model, change, monkeypatch)
    audit = audit_window(model, **TOGETHER)
    lies_as(
        audit,
        r"the whole model\): with a cache, token by token: logits: the output differs from that without a cache: rows",
    )


LOST_WHERE = {
    "in training with padding": lambda training, dtype, padded, cached: training and padded,
    "in bfloat16 with padding": lambda training, dtype, padded, cached: dtype == torch.bfloat16 and padded,
    "with padding and a cache": lambda training, dtype, padded, cached: padded and cached,
}


@pytest.mark.parametrize("when_lost", LOST_WHERE)
def test_a_window_that_is_lost_where_two_things_come_together_is_named(when_lost, monkeypatch):
    from transformers import masking_utils
    from transformers.models.mistral import modeling_mistral

    right = masking_utils.create_sliding_window_causal_mask
    model = hugging_face("mistral")

    class Keeps(modeling_mistral.DynamicCache):
        def __init__(self, config=None):
            super().__init__()

    def wrong(config, **given):
        mask, cache = given.get("attention_mask"), given.get("cache", given.get("past_key_values"))
        padded = mask is not None and not bool(mask.all())
        cached = cache is not None and bool(cache.get_seq_length())
        if LOST_WHERE[when_lost](
            torch.is_grad_enabled() and model.training, given["inputs_embeds"].dtype, padded, cached
        ):
            config = type(config)(**{**config.to_dict(), "sliding_window": 1000})
            config._attn_implementation = "eager"
        return right(config=config, **given)

    monkeypatch.setattr(modeling_mistral, "DynamicCache", Keeps)
    monkeypatch.setattr(modeling_mistral, "create_sliding_window_causal_mask", wrong)
    audit = audit_window(model, length=61)
    lies_as(audit, r"layers\.0\.self_attn: .*left: .*(too many|the window is ignored)")
    assert all("padded" in fault for fault in audit.faults)


@pytest.mark.parametrize(("reach", "tile", "border"), [(16, 128, "last"), (64, 64, "first")])
def test_rows_at_the_borders_of_tiles_that_lack_a_key_are_no_chance(reach, tile, border):
    def attention(query, key, value):
        row = torch.arange(query.shape[2])
        distance = row[:, None] - row
        short = (row % tile == (0 if border == "first" else tile - 1))[:, None]
        mask = (distance >= 0) & (distance <= reach) & ~(short & (distance == reach))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    audit = audit_window(attention, window=Window(reach, 0), kv_heads=4, train=False, dtypes=())
    assert not audit.ok
    lies_as(audit, r"attention: .*left: .*too few")


def test_a_window_that_is_wrong_at_lengths_of_whole_tiles_is_named():
    def attention(query, key, value):
        length = query.shape[2]
        row = torch.arange(length)
        distance = row[:, None] - row
        mask = (distance >= 0) & (distance <= (9 if length % 64 == 0 else 8))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    audit = audit_window(attention, window=Window(8, 0), kv_heads=4, train=False, dtypes=())
    lies_as(audit, r"attention: .*left: 1 key too many.*\(640 positions\)")


def test_what_a_layer_adds_up_at_padding_that_it_zeroed_is_no_leak():
    """As linear attentions of Hugging Face do: positions are zeroed, and then joined behind a projection with a bias."""

    class Joins(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = nn.Linear(16, 16)

        def forward(self, hidden):
            kept = hidden * (torch.arange(hidden.shape[1]) >= 9)[:, None]
            return self.inside(kept).cumsum(1)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Joins()
            self.attention.causal = True

        def forward(self, hidden):
            return self.attention(hidden)

    torch.manual_seed(0)
    audit = audit_window(
        Model(), inputs=torch.randn(1, 31, 16), window={"attention": full()}, padding=(9, 0), dtypes=(), train=False
    )
    assert not [fault for fault in audit.faults if "padding" in fault], audit.faults


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_packed_documents_that_leak_are_named(family, monkeypatch):
    from transformers import masking_utils

    options = {"documents": (20, 30, 13), "train": False, "dtypes": (), "cache": False}
    model = hugging_face(family)
    assert audit_window(model, **options).ok
    # Without being told, the model makes a cache, and with one the library looks for no documents.
    audit = audit_window(model, **{**options, "cache": None})
    assert len(audit.faults) == len(audit.layers)
    lies_as(
        audit,
        r"layers\.0\.self_attn: .*documents are mixed \(with the cache that it makes unasked\): row 2\d sees key 1\d",
    )
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    audit = audit_window(model, **options)
    assert all(layer.faults for layer in audit.layers)
    lies_as(audit, r"layers\.0\.self_attn: forward and backward: documents are mixed: row 2\d sees key 1\d")


def test_padding_that_leaks_is_named(monkeypatch):
    from transformers import masking_utils

    model = hugging_face("mistral")
    monkeypatch.setattr(masking_utils, "padding_mask_function", lambda mask: lambda n, h, row, key: key >= 0)
    lies_as(
        audit_window(model, cache=False, **TOGETHER),
        r"padding leaks \(12 padded on the left[;)].*: row 1\d sees key \d+",
    )


class Packed(nn.Module):
    """Rows without a batch, as FlashAttention's users have them, with the offsets of their documents."""

    def __init__(self, mixes):
        super().__init__()
        self.attention, self.mixes = Attention(), mixes

    def forward(self, hidden, cu_seqlens):
        document = torch.bucketize(torch.arange(len(hidden)), cu_seqlens[1:], right=True)
        query, key, value = self.attention.split(hidden[None])
        output = dense(query, key, value, lambda r, k: sliding(r, k) & (self.mixes | (document[r] == document[k])))
        return self.attention.out(output[0].transpose(0, 1).flatten(1))


def test_packed_rows_without_a_batch_are_audited():
    inputs = {"hidden": torch.randn(61, 32), "cu_seqlens": torch.tensor([0, 20, 50, 61])}
    options = {"window": CLAIM, "inputs": inputs, "documents": (20, 30, 11), "train": False, "dtypes": ()}
    assert audit_window(Packed(False), **options).ok
    lies_as(audit_window(Packed(True), **options), r"forward and backward: documents are mixed: row 2\d sees key 1\d")


# What looks like a lie and is none


class Checkpointed(Block):
    def forward(self, hidden):
        return checkpoint(super().forward, hidden, use_reentrant=False)


class Sharp(Attention):
    """Most weights are 0 in floating point."""

    def split(self, hidden):
        query, key, value = super().split(hidden)
        return query * 50, key, value


class Biased(Attention):
    def forward(self, hidden):
        position = torch.arange(hidden.shape[1])
        distance = position[:, None] - position
        bias = -distance.abs() * torch.tensor([2.0**-n for n in (2, 4, 6, 8)])[:, None, None]
        bias = torch.where(self.rule(position[:, None], position[None]), bias, -1e4)
        output = F.scaled_dot_product_attention(*self.split(hidden), attn_mask=bias)
        return self.out(output.transpose(1, 2).flatten(2))


class Convolution(nn.Conv1d):
    """Joins positions, and is no attention."""

    def __init__(self):
        super().__init__(32, 32, 3, padding=2)

    def forward(self, hidden):
        return super().forward(hidden.mT)[..., : hidden.shape[1]].mT


def odd(kind):
    model = Model(Attention(sliding_window=W), Attention(sliding_window=W))
    if kind == "checkpoint":
        model.layers[1] = Checkpointed(Attention(sliding_window=W))
    elif kind == "sharp":
        model.layers[1] = Block(Sharp(sliding_window=W))
    elif kind == "biased":
        model.layers[1] = Block(Biased(sliding_window=W))
    elif kind == "convolution":
        model.layers[1] = Block(Convolution())
    elif kind == "zero":
        nn.init.zeros_(model.layers[1].attention.out.weight)
    elif kind == "frozen":
        model.requires_grad_(False)
    elif kind == "double":
        model.double()
    elif kind == "compiled":
        model.layers[1] = torch.compile(model.layers[1], backend="eager")
    return model


@pytest.mark.parametrize(
    "kind", ["checkpoint", "sharp", "biased", "convolution", "zero", "frozen", "double", "compiled"]
)
def test_what_is_odd_is_not_accused(kind):
    torch.manual_seed(3)
    audit = audit_window(odd(kind), **SHORT)
    assert audit.ok, str(audit)
    assert [layer.name for layer in audit.layers] == ["layers.0.attention", "layers.1.attention"]
    assert bool(audit.notes) == (kind == "zero")


@pytest.mark.parametrize("where", ["attention", "block"])
def test_positions_that_are_joined_beside_the_attention_are_found(where):
    class Mean(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, hidden):
            return self.inner(hidden) + 1e-3 * hidden.mean(1, keepdim=True)

    model = Model(Attention(), Attention())
    if where == "attention":
        model.layers[1].attention = Mean(model.layers[1].attention)
    else:
        model.layers[1] = Mean(model.layers[1])
    audit = audit_window(model, window=CLAIM, **SHORT)
    name = r"layers\.1\.attention" if where == "attention" else r"layers\.1"
    lies_as(audit, rf"^{name}: forward and backward: right: the window is ignored")
    assert [layer.faults == () for layer in audit.layers].count(False) == 1


class NextEmbedding(nn.Embedding):
    def forward(self, tokens):
        return super().forward(tokens) + 0.1 * super().forward(tokens.roll(-1, 1))


class Leaky(Model):
    """Joins positions between the tokens and the first layer, or behind the last one."""

    def __init__(self, where):
        super().__init__(Attention(), Attention())
        self.where = where
        if where == "in the embedding":
            self.embedding = NextEmbedding(50, 32)

    def forward(self, tokens):
        hidden = self.embedding(tokens)
        if self.where == "before the layers":
            hidden = hidden + 0.1 * self.embedding(tokens.roll(-1, 1))
        for layer in self.layers:
            hidden = layer(hidden)
        if self.where == "behind the layers":
            hidden = hidden + 0.1 * hidden.mean(1, keepdim=True)
        return self.head(hidden)


def test_what_a_model_of_tokens_joins_beside_its_layers_is_found():
    assert audit_window(Leaky("nowhere"), window=CLAIM, **SHORT).ok
    for where, said in {
        "in the embedding": r"^embedding: forward: right: up to 1 key too many",
        "before the layers": r"^Leaky: forward: right: ",
        "behind the layers": r"^Leaky: forward: right: the window is ignored",
    }.items():
        audit = audit_window(Leaky(where), window=CLAIM, **SHORT)
        lies_as(audit, said)
        assert [bool(layer.faults) for layer in audit.layers].count(True) == 1, str(audit)
        # Its layers say what their window is, and it does not.
        unclaimed = audit_window(Leaky(where), window={"layers.*": CLAIM}, **SHORT)
        if where != "in the embedding":
            assert "what the model joins beside the layers in it, as it claims nothing itself" in unclaimed.notes


def test_what_a_model_of_hugging_face_joins_beside_its_layers_is_found():
    model = hugging_face("mistral")
    inner = model.model.forward

    def forward(*args, **kwargs):
        output = inner(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state + 0.1 * output.last_hidden_state.mean(1, keepdim=True)
        return output

    model.model.forward = forward
    audit = audit_window(model, cache=False, train=False, **TOGETHER)
    lies_as(audit, r"^model: forward: right: the window is ignored; Window\(7, 0\)")
    assert [bool(layer.faults) for layer in audit.layers].count(True) == 1, str(audit)


class ChannelsFirst(nn.Module):
    """A block whose attention takes the positions last."""

    class Inner(Attention):
        def forward(self, hidden):
            return super().forward(hidden.mT).mT

    def __init__(self):
        super().__init__()
        self.attention = self.Inner(causal)
        self.attention.__class__.__name__ = "ChannelsFirstAttention"

    def forward(self, hidden):
        return hidden + self.attention(hidden.mT).mT


def test_an_attention_that_cannot_be_measured_is_told():
    model = Model(Attention(), Attention())
    model.layers[1] = ChannelsFirst()
    audit = audit_window(model, window={"layers.*.attention": CLAIM}, **SHORT)
    assert any(note.startswith("layers.1.attention, which takes or gives no tensor with") for note in audit.notes)
    audit = audit_window(
        model, window={"layers.0.attention": CLAIM, "layers.1.attention": CLAIM, "nothing": CLAIM}, **SHORT
    )
    lies_as(audit, "window for 'layers.1.attention': none of the modules it names was measured: layers.1.attention")
    assert len(audit.faults) == 1


class OfAnother(Attention):
    """Takes the keys and values of the layer before it."""

    def __init__(self, rule, other):
        super().__init__(rule)
        self.others = [other]

    def forward(self, hidden):
        query = next(iter(self.split(hidden)))
        return self.out(dense(query, *self.others[0].kept, self.rule).transpose(1, 2).flatten(2))


class Keeps(Attention):
    def split(self, hidden):
        query, *self.kept = super().split(hidden)
        return query, *self.kept


def test_a_layer_that_has_its_keys_of_another_is_audited():
    def model(rule):
        keeps = Keeps()
        return Model(keeps, OfAnother(rule, keeps))

    audit = audit_window(model(sliding), window=CLAIM, **SHORT)
    assert audit.ok, str(audit)
    assert audit.layers[1].backward == CLAIM
    audit = audit_window(model(lambda r, k: sliding(r, k, W + 1)), window=CLAIM, **SHORT)
    lies_as(audit, r"layers\.1\.attention: forward and backward: left: 1 key too many")


class GatingAttention(nn.Module):
    """Joins nothing, whatever it is called."""

    def forward(self, output):
        return output * output.sigmoid()


class GatedAttention(Attention):
    def __init__(self, rule=sliding):
        super().__init__(rule)
        self.gate = GatingAttention()

    def forward(self, hidden):
        return self.out(self.gate(dense(*self.split(hidden), self.rule)).transpose(1, 2).flatten(2))


def test_what_an_attention_does_position_by_position_is_no_layer_of_its_own():
    audit = audit_window(Model(GatedAttention(), GatedAttention()), window=CLAIM, **SHORT)
    assert audit.ok, str(audit)
    assert [layer.name for layer in audit.layers] == ["layers.0.attention", "layers.1.attention"]
    audit = audit_window(
        Model(GatedAttention(), GatedAttention(lambda r, k: sliding(r, k, W - 1))), window=CLAIM, **SHORT
    )
    lies_as(audit, r"layers\.1\.attention: forward and backward: left: 1 key too few")


class Experts(nn.Module):
    """Joins nothing; how it rounds depends on how many tokens each expert gets."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(32, 32) / 6)

    def forward(self, hidden):
        tokens = hidden.flatten(0, -2)
        chosen = tokens[:, 0] > 0
        rounding = 1 + torch.finfo(hidden.dtype).eps * chosen.sum()
        return ((tokens @ self.first) * rounding).view_as(hidden)


def test_rounding_of_what_is_no_attention_is_no_leak():
    model = Model(Attention(), Attention())
    model.layers[1].mlp = Experts()
    audit = audit_window(model, window=CLAIM, **SHORT)
    assert audit.ok, str(audit)
    assert [layer.name for layer in audit.layers] == ["layers.0.attention", "layers.1.attention"]


def test_an_audit_leaves_the_model_and_random_numbers_as_they_were():
    model = Model(Attention(dropout=0.25)).train()
    model.layers[0].eval()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    audit_window(model, window=CLAIM, length=61)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert model.layers[0].attention.dropout == 0.25
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert all(each.grad is None for each in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# What is refused


@pytest.mark.parametrize(
    ("given", "error", "told"),
    [
        ({"window": 8}, TypeError, "window must be a Window"),
        ({"window": {"layers.*": 8}}, TypeError, "window must map patterns of layer names"),
        ({"window": None}, ValueError, "give window="),
        ({"window": CLAIM, "layout": "NHEL"}, ValueError, "layout must have the letters"),
        ({"window": CLAIM, "heads": 3, "kv_heads": 2}, ValueError, "heads must be a multiple of kv_heads, got 3 and 2"),
        ({"window": CLAIM, "documents": (3, 0)}, ValueError, "documents must be lengths of at least 1"),
        (
            {"window": CLAIM, "documents": (30, 31), "length": 60},
            ValueError,
            "length must be that of inputs and documents, 61",
        ),
        ({"window": CLAIM, "padding": (-1, 0)}, ValueError, "padding must be two counts"),
        ({"window": CLAIM, "compile": 3}, TypeError, "compile must be a bool or a backend"),
        ({"window": CLAIM, "cache": True}, ValueError, "cache=True needs a language model"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_named(given, error, told):
    with pytest.raises(error, match=told):
        audit_window(by(sliding), **given)


def test_what_was_asked_for_and_cannot_be_run_is_a_fault():
    def refuses(graph, examples):
        raise RuntimeError("no")

    audit = audit_window(Model(Attention()), window=CLAIM, compile=refuses, **SHORT)
    lies_as(audit, r"compiled by refuses: cannot be run: .*no")


# The command

SCRIPT = """
import torch
from torch.nn import functional as F

def attention(query, key, value, keys=8):
    distance = torch.arange(query.shape[2])[:, None] - torch.arange(query.shape[2])
    mask = (distance >= 0) & (distance < keys)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)

def sparse(query, key, value):
    row, column = torch.arange(query.shape[2])[:, None], torch.arange(query.shape[2])
    mask = (column <= row) & ((row - column < 4) | ((column % 8 == 7) & (row - column < 32)))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)

class Layer(torch.nn.Module):
    window_size = 8

    def __init__(self, keys=9):
        super().__init__()
        self.project, self.keys = torch.nn.Linear(32, 96), keys

    def forward(self, hidden):
        query, key, value = self.project(hidden).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return attention(query, key, value, self.keys).transpose(1, 2).flatten(2)

def make():
    return torch.nn.Sequential(Layer(8), Layer())
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    name = f"audited_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        named = [each.replace("HERE", name) for each in arguments]
        return CliRunner().invoke(app, ["audit", *named, "--no-train", "--dtype", "float32"], env={"COLUMNS": "200"})

    return run


def test_the_command_tells_a_lie_by_its_exit_code(command):
    honest = command("HERE:attention", "--causal", "8", "--length", "61")
    assert honest.exit_code == 0, honest.output
    assert re.search(r"attention +Window\(7, 0\) +Window\(7, 0\) +Window\(7, 0\) +as claimed", honest.output)
    lie = command("HERE:attention", "--window", "6,0", "--length", "61")
    assert lie.exit_code == 1
    assert "attention: forward and backward: left: 1 key too many; Window(6, 0) is claimed" in lie.output


def test_the_command_audits_what_a_function_makes(command):
    result = command("HERE:make", "--length", "61", "--json")
    assert result.exit_code == 1
    found = json.loads(result.output)
    assert [layer["name"] for layer in found["layers"]] == ["0", "1"]
    assert [bool(layer["faults"]) for layer in found["layers"]] == [False, True]
    assert command("HERE:make", "--length", "61", "--layer", "0").exit_code == 0


def test_the_command_makes_a_small_model_of_a_configuration(command, tmp_path):
    config = {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "num_hidden_layers": 32,
        "sliding_window": 4096,
    }
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"hidden_size": 4096, "num_attention_heads": 32, "vocab_size": 32000})
    )
    result = command("--config", "config.json", "--length", "61", "--no-cache")
    assert result.exit_code == 0, result.output
    assert "sliding_window 4096 -> 16" in result.stderr
    assert len(re.findall(r"self_attn +Window\(15, 0\).*as claimed", result.output)) == 2


def test_the_command_holds_a_configuration_without_a_window_to_the_one_that_is_given(command, tmp_path):
    config = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    given = ("--config", "config.json", "--length", "61", "--no-cache")
    plain = command(*given)
    assert plain.exit_code == 0, plain.output
    assert len(re.findall(r"self_attn +full, causal +full +full +as claimed", plain.output)) == 2
    assert "2 of them claim full attention, no window" in plain.output
    held = command(*given, "--window", "15,0")
    assert held.exit_code == 1
    assert "left: the window is ignored; Window(15, 0) is claimed" in held.output


def test_the_command_does_not_call_a_sparse_attention_a_lie(command):
    result = command("HERE:sparse", "--window", "31,0", "--length", "61")
    assert result.exit_code == 0, result.output
    assert "as claimed, sparse" in result.output
    assert json.loads(command("HERE:sparse", "--window", "31,0", "--length", "61", "--json").output)["layers"][0][
        "gaps"
    ]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "give one of MODULE:NAME and --config"),
        (("HERE",), "expected MODULE:NAME"),
        (("HERE:nothing",), "has no attribute 'nothing'"),
        (("HERE:attention",), "give window="),
        (("HERE:SCRIPT_",), "has no attribute"),
        (("HERE:make", "--causal", "8", "--centered", "8"), "give only one of --causal, --centered and --window"),
        (("--config", "nothing.json"), "nothing.json: No such file"),
    ],
    ids=str,
)
def test_the_command_says_what_is_wrong(command, arguments, told):
    result = command(*arguments)
    assert result.exit_code == 2
    assert told in result.output.replace("\n", " ")
