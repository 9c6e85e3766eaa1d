"""The functions and kernels of cublas_block on host tensors: its index arithmetic, where there is nvcc but no GPU."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from attnreg_cublas import blocks, build, functions, operands

import attnreg
from attnreg import Window

LENGTHS = (1, 2, 3, 6)
WINDOWS = [Window(left, size - 1 - left) for size in (1, 2, 3, 5, 9) for left in range(size)]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if build.find_nvcc() is None:
        pytest.skip("no nvcc")
    build.load(build.build(["90"], tmp_path_factory.mktemp("cublas")))


@pytest.fixture(
    params=[None, (1, 1), (2, 8), (4, 1)], ids=lambda p: "as_shipped" if p is None else f"B{p[0]}_pad{p[1]}"
)
def forced_blocks(request, monkeypatch):
    """Tiny blocks and never a whole head in one, so that short sequences have many of them."""
    if request.param is not None:
        rows, alignment = request.param
        monkeypatch.setattr(blocks, "SMALLEST_BLOCK", rows)
        monkeypatch.setattr(blocks, "LARGEST_BLOCK", rows)
        monkeypatch.setattr(blocks, "ALIGNMENT", alignment)
        monkeypatch.setattr(blocks.Blocks, "area", property(lambda self: 0 if self.count > 1 else 1))
    operands._plan.cache_clear()
    yield
    operands._plan.cache_clear()


@pytest.mark.parametrize("queries", LENGTHS)
@pytest.mark.parametrize("keys", LENGTHS)
@pytest.mark.usefixtures("library", "forced_blocks")
def test_equals_the_reference_in_float64(queries, keys):
    torch.manual_seed(queries * 10 + keys)
    for window, group, masked in itertools.product(WINDOWS, (1, 2), (False, True)):
        _check(queries, keys, window, group, masked)


def _check(len_q, len_k, window, group, masked):
    def leaf(*shape):
        return torch.randn(shape, dtype=torch.float64).float().double().requires_grad_()

    query, grad_output = leaf(2, group, len_q, 5), leaf(2, group, len_q, 3).detach()
    key, value = leaf(2, 1, len_k, 5), leaf(2, 1, len_k, 3)
    weights, grad_scores = leaf(2, group, len_q, window.size), leaf(2, group, len_q, window.size).detach()
    bias = key_lengths = None
    if masked:
        bias = leaf(1, group, 1, window.size)
        bias.data[torch.rand(bias.shape) < 0.3] = -math.inf
        key_lengths = torch.tensor([len_k, len_k // 2])

    scores = attnreg.local_dot_product(
        query, key, window, bias=bias, key_lengths=key_lengths, scale=0.5, backend="torch"
    )
    visible = scores != -math.inf
    torch.where(visible, scores, 0).backward(grad_scores)
    output = attnreg.local_weighted_average(weights, value, window, key_lengths=key_lengths, backend="torch")
    output.backward(grad_output)

    q, k, x, w, go = (t.detach().float() for t in (query, key, value, weights, grad_output))
    b = None if bias is None else bias.detach().float()
    g = torch.where(visible, grad_scores, math.nan).float()
    options = {"bias": b, "key_lengths": key_lengths, "scale": 0.5}
    got = [
        functions.local_dot_product(q, k, window, **options),
        *functions.local_dot_product_backward(g, q, k, window, needs_grad=(True, True, masked), **options),
        functions.local_weighted_average(w, x, window, key_lengths=key_lengths),
        *functions.local_weighted_average_backward(go, w, x, window, key_lengths=key_lengths, needs_grad=(True, True)),
    ]
    bias_grad = None if bias is None else bias.grad
    want = [scores, query.grad, key.grad, bias_grad, output, weights.grad, value.grad]
    for ours, truth in zip(got, want):
        if truth is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours.double(), truth.detach(), rtol=1e-5, atol=1e-5)
