"""Attention made of two products: how much of the band there is at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import attnreg
from attnreg import Window, composition

WINDOW = Window.causal(8)
BATCH, HEADS, KV_HEADS, LENGTH = 3, 8, 2, 100
# Of fp32 scores: of one key head's queries, of one sequence, of all.
HEAD, SEQUENCE, ALL = (heads * LENGTH * WINDOW.size * 4 for heads in (HEADS // KV_HEADS, HEADS, BATCH * HEADS))


@pytest.fixture
def bands():
    """The bytes of every band that the products of the backend "composed" make."""
    made = []
    (block,) = (status.backend for status in attnreg.backends() if status.name == "torch_block")

    def local_dot_product(*arguments, **options):
        scores = block.local_dot_product(*arguments, **options)
        made.append(scores.nbytes)
        return scores

    alone = replace(
        block,
        name="composed",
        capability=replace(block.capability, takes={"bias", "key_lengths"}),
        local_dot_product=local_dot_product,
        local_attention=None,
        local_attention_backward=None,
    )
    with attnreg.register(alone):
        yield made


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (ALL, [ALL]),
        (ALL - 1, [2 * SEQUENCE, SEQUENCE]),
        (SEQUENCE, [SEQUENCE] * BATCH),
        (SEQUENCE - 1, [HEAD] * BATCH * KV_HEADS),
        (1, [HEAD] * BATCH * KV_HEADS),
    ],
)
def test_no_more_of_the_band_is_made_at_a_time_than_the_limit_or_one_key_head(bands, monkeypatch, limit, expected):
    monkeypatch.setattr(composition, "LARGEST_BAND", limit)
    query = torch.randn(BATCH, HEADS, LENGTH, 4, requires_grad=True)
    key, value = (torch.randn(BATCH, KV_HEADS, LENGTH, 4, requires_grad=True) for _ in range(2))
    lengths = torch.tensor([100, 50, 0])
    bias = torch.randn(1, HEADS, 1, WINDOW.size, requires_grad=True)
    inputs = (query, key, value, bias)

    def gradients(backend):
        output = attnreg.local_attention(query, key, value, WINDOW, bias=bias, key_lengths=lengths, backend=backend)
        return output, *torch.autograd.grad(output.square().sum(), inputs)

    for got, whole in zip(gradients("composed"), gradients("torch")):
        torch.testing.assert_close(got, whole, rtol=1e-4, atol=1e-4)
    # Once in the forward, and once more in the backward.
    assert bands == expected * 2


def test_products_without_float32_make_no_attention_of_16_bits():
    """Scores rounded to 16 bits before the softmax would be off by an eighth at 64."""
    (block,) = (status.backend for status in attnreg.backends() if status.name == "torch_block")
    narrow = replace(
        block,
        name="narrow",
        capability=replace(block.capability, dtypes={torch.bfloat16}),
        local_attention=None,
        local_attention_backward=None,
    )
    query = torch.randn(1, 1, 6, 4, dtype=torch.bfloat16)
    with attnreg.register(narrow):
        attnreg.local_dot_product(query, query, WINDOW, backend="narrow")
        with pytest.raises(attnreg.BackendError, match="products would have to run in float32, which it lacks"):
            attnreg.local_attention(query, query, query, WINDOW, backend="narrow")
