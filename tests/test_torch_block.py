"""Attention of torch_block on a CPU: by torch's fused kernel where that is right and fast, else by torch's own operations."""

from __future__ import annotations

import pytest
import torch
from attnreg_torch import fused

import attnreg
from attnreg import Window

WINDOWS = [Window(15, 0), Window(40, 25), Window(0, 9), Window(299, 299)]


@pytest.fixture
def taken(monkeypatch):
    """What the kernel was called for: a list that grows, None where it turned out not to be right."""
    calls = []
    for name in ("local_attention", "local_attention_backward"):
        monkeypatch.setattr(fused, name, recording(getattr(fused, name), calls))
    return calls


def recording(function, calls):
    def recorded(*arguments):
        found = function(*arguments)
        calls.append(found is not None)
        return found

    return recorded


def tensors(
    batch=1, heads=4, kv_heads=4, length=300, key_length=None, size=16, dtype=torch.float32, seed=0, model=False
):
    """Query, key and value with gradients; in memory as models have them where ``model``."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for of_heads, of_length in ((heads, length), (kv_heads, key_length or length), (kv_heads, key_length or length)):
        shape = (batch, of_length, of_heads, size) if model else (batch, of_heads, of_length, size)
        tensor = torch.randn(shape, generator=generator).to(dtype)
        found.append((tensor.transpose(1, 2) if model else tensor).requires_grad_())
    return found


def results(inputs, window, backend, **arguments):
    leaves = [*inputs, *(each for each in arguments.values() if isinstance(each, torch.Tensor) and each.requires_grad)]
    output = attnreg.local_attention(*inputs, window, backend=backend, **arguments)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(9)).to(output.dtype)
    return [output, *torch.autograd.grad(output, leaves, grad)]


def assert_as_reference(inputs, window, **arguments):
    found = results(inputs, window, "torch_block", **arguments)
    for got, wanted in zip(found, results(inputs, window, "torch", **arguments)):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    return found


@pytest.mark.parametrize("model", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("window", WINDOWS)
def test_a_call_of_queries_keys_and_values_goes_through_the_kernel(taken, window, batch, kv_heads, model):
    assert_as_reference(tensors(batch=batch, kv_heads=kv_heads, model=model), window)
    assert taken == [True, True]


@pytest.mark.parametrize("size", [5, 24, 80])
@pytest.mark.parametrize(("length", "key_length"), [(300, 130), (130, 300), (1, 300), (200, 7)])
def test_so_does_one_of_any_lengths_and_head_dim(taken, length, key_length, size):
    assert_as_reference(tensors(length=length, key_length=key_length, size=size), Window(20, 3), scale=-0.3)
    assert taken == ([True, True] if size >= fused.SMALLEST_HEAD_DIM else [True])


@pytest.mark.parametrize(
    "rows",
    [
        {"key_lengths": [300, 0, 41]},
        {"key_starts": [0, 299, 41], "key_lengths": [290, 300, 41]},
        {"query_starts": [-(2**62), 7, -150]},
        {"query_starts": [2**63 - 1, 290, 0], "key_starts": [1, 2, 3]},
    ],
)
@pytest.mark.parametrize("window", WINDOWS)
def test_so_do_rows_wherever_they_stand(taken, window, rows):
    given = {name: torch.tensor(each) for name, each in rows.items()}
    assert_as_reference(tensors(batch=3, kv_heads=2), window, sinks=torch.randn(4).requires_grad_(), **given)
    assert taken == [True, True]


@pytest.mark.parametrize("window", WINDOWS)
def test_so_do_packed_sequences(taken, window):
    offsets = torch.tensor([0, 0, 130, 131, 290])
    assert_as_reference(tensors(), window, cu_seqlens_q=offsets, cu_seqlens_k=torch.tensor([0, 20, 20, 150, 299]))
    assert taken == [True, True]


def test_but_not_very_short_ones(taken):
    assert_as_reference(tensors(heads=1, kv_heads=1), Window(3, 0), cu_seqlens_q=torch.arange(0, 301, 2))
    assert taken == [False, False]


@pytest.mark.parametrize("size", [1e3, 1e19])
def test_large_scores_do_not(taken, size):
    query, key, value = tensors(length=60)
    leaves = [(query.detach() * size).requires_grad_(), key, value]
    output = attnreg.local_attention(*leaves, Window(9, 0), backend="torch_block")
    output.sum().backward()
    assert taken == [False, False]


@pytest.mark.parametrize(
    "arguments",
    [{"bias": torch.zeros(10)}, {"softcap": 5.0}, {"dropout_p": 0.5, "seed": torch.tensor([3])}],
)
def test_what_the_kernel_does_not_know_is_never_asked_of_it(taken, arguments):
    assert_as_reference(tensors(length=60), Window(9, 0), **arguments)
    assert taken == []


def test_a_release_of_torch_without_the_kernel_needs_none(taken, monkeypatch):
    monkeypatch.setattr(fused, "_is_there", lambda: False)
    assert_as_reference(tensors(length=60), Window(9, 0))
    assert taken == []


def test_a_few_blocks_at_a_time_give_the_same_bits_as_all(monkeypatch):
    inputs = tensors(batch=2, length=700)
    monkeypatch.setattr(fused, "BYTES_AT_A_TIME", 2**30)
    wanted = results(inputs, Window(20, 30), "torch_block")
    monkeypatch.setattr(fused, "BYTES_AT_A_TIME", 1)
    for got, each in zip(results(inputs, Window(20, 30), "torch_block"), wanted):
        assert torch.equal(got, each)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_of_16_bits_are_rounded_once(dtype):
    query, key, value = tensors(length=100, dtype=dtype)
    output = attnreg.local_attention(query, key, value, Window(9, 4), backend="torch_block")
    wide = attnreg.local_attention(query.double(), key.double(), value.double(), Window(9, 4), backend="torch")
    torch.testing.assert_close(output.double(), wide, rtol=0.6 * torch.finfo(dtype).eps, atol=1e-6)
