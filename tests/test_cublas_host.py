"""The functions and kernels of cublas_block on host tensors: its index arithmetic, where there is nvcc but no GPU."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from attnreg_cublas import blocks, build, call, functions, plugin, rule

import attnreg
from attnreg import Window

LENGTHS = (1, 2, 6)
WINDOWS = [Window(left, size - 1 - left) for size in (1, 2, 3, 5, 9) for left in range(size)]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if build.find_nvcc() is None:
        pytest.skip("no nvcc")
    build.load(build.build(["90"], tmp_path_factory.mktemp("cublas")))


@pytest.fixture(params=[1, 2, 8, None], ids=lambda rows: f"B{rows}" if rows else "as_shipped")
def block(request, monkeypatch):
    """Tiny blocks without padded columns too, so that short sequences have many of them."""
    if request.param is not None:
        monkeypatch.setattr(blocks, "ALIGNMENT", 1)
    call._cut.cache_clear()
    yield request.param
    call._cut.cache_clear()


@pytest.fixture(params=["in_place", "copied", "factors"])
def sides(request, monkeypatch):
    """Lines read in place where they can be, whatever their edges; padded copies; fp16 factors."""
    monkeypatch.setattr(call, "LARGEST_EDGE", 0.99 if request.param == "in_place" else -1.0)
    # Several chunks, and bytes instead of MiB to say so.
    monkeypatch.setattr(call, "_MEBIBYTE", 1)
    monkeypatch.setattr(call, "factors_pay", lambda size: request.param == "factors")
    # The CPU has no product of fp16 with an fp32 result.
    monkeypatch.setattr(call, "multiply_factors", lambda x, y, out: torch.bmm(x.float(), y.float(), out=out))


@pytest.mark.parametrize("queries", LENGTHS)
@pytest.mark.parametrize("keys", LENGTHS)
@pytest.mark.usefixtures("library", "sides")
def test_equals_the_reference_in_float64(queries, keys, block):
    torch.manual_seed(queries * 10 + keys)
    for window, group, masked in itertools.product(WINDOWS, (1, 2), (False, True)):
        _check(queries, keys, window, group, masked, block)


def _check(len_q, len_k, window, group, masked, block):
    def leaf(*shape):
        return torch.randn(shape, dtype=torch.float64).float().double().requires_grad_()

    # Head dims that rows are read in place for, and others.
    head_dim, value_dim = (8, 4) if group == 1 else (5, 3)
    query, grad_output = leaf(2, group, len_q, head_dim), leaf(2, group, len_q, value_dim).detach()
    key, value = leaf(2, 1, len_k, head_dim), leaf(2, 1, len_k, value_dim)
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
    blocked = {"block": block, "workspace": 256}
    options = {"bias": b, "key_lengths": key_lengths, "scale": 0.5}
    got = [
        functions.local_dot_product(q, k, window, **options, **blocked),
        *functions.local_dot_product_backward(g, q, k, window, needs_grad=(True, True, masked), **options, **blocked),
        functions.local_weighted_average(w, x, window, key_lengths=key_lengths, **blocked),
        *functions.local_weighted_average_backward(
            go, w, x, window, key_lengths=key_lengths, needs_grad=(True, True), **blocked
        ),
    ]
    bias_grad = None if bias is None else bias.grad
    want = [scores, query.grad, key.grad, bias_grad, output, weights.grad, value.grad]
    for ours, truth in zip(got, want):
        if truth is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours.double(), truth.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 8, None])
@pytest.mark.usefixtures("library", "sides")
def test_what_is_not_finite_stays_in_its_sequence(rows):
    window, options = Window(3, 2), {"key_lengths": None, "block": rows}
    query, key, value = torch.randn(3, 2, 2, 9, 8).unbind()
    weights = torch.randn(2, 2, 9, window.size)
    everything = {"bias": None, "scale": 1.0}

    def results(query, key, value):
        return (
            functions.local_dot_product(query, key, window, **everything, **options),
            *functions.local_dot_product_backward(
                weights, query, key, window, needs_grad=(True, True, False), **everything, **options
            )[:2],
            functions.local_weighted_average(weights, value, window, **options),
            *functions.local_weighted_average_backward(
                query, weights, value, window, needs_grad=(True, True), **options
            ),
        )

    clean = results(query, key, value)
    for tensor in (query, key, value):
        tensor[0, 1] = math.inf
    for got, expected in zip(results(query, key, value), clean):
        assert not got[0, 1].isfinite().all()
        for elsewhere in ((0, 0), (1, 0), (1, 1)):
            torch.testing.assert_close(got[elsewhere], expected[elsewhere])


def test_the_options_say_what_they_take():
    for text in ("8", "512", "20", "many"):
        with pytest.raises(ValueError, match="a multiple of 8 from 16 to 256"):
            rule.parse_block(text)
    for text in ("0", "-1", "1.5"):
        with pytest.raises(ValueError, match="MiB"):
            rule.parse_workspace(text)
    assert (rule.parse_block("48"), rule.parse_workspace("64")) == (48, 64)


def test_dense_blocks_keep_to_the_workspace(monkeypatch):
    rows = torch.empty(1, 64, 2048, 4)
    monkeypatch.setattr(call, "ops", lambda: None)
    one = call.Call(rows, rows, Window.centered(512), None, None, 128, 1)
    geometry = blocks.cut(one.line, 128)
    chunks = list(one._chunks(geometry, rows, (geometry.rows, geometry.columns)))
    assert all(dense.numel() * dense.element_size() <= 2**20 for *_, dense in chunks)
    assert len({dense.data_ptr() for *_, dense in chunks}) == 1
    assert all(dense.size(0) == end - begin for begin, end, dense in chunks)
    assert (chunks[0][0], chunks[-1][1]) == (0, geometry.count)
    assert all(first[1] == second[0] for first, second in itertools.pairwise(chunks))


def test_more_rows_than_the_kernels_can_count_are_refused():
    problem = attnreg.Problem(
        op="local_dot_product",
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
        batch=2**12,
        heads=2**6,
        kv_heads=2**6,
        query_length=2**13,
        key_length=2**13,
        head_dim=16,
        value_dim=0,
        window=Window(3, 0),
        needs_grad=False,
    )
    assert "at most 1073741824 rows" in plugin._refuse(problem)
    assert plugin._refuse(dataclasses.replace(problem, batch=2**4)) is None


@pytest.mark.usefixtures("library")
def test_factors_are_not_used_where_torch_may_sum_them_in_fp16(monkeypatch):
    def multiply_factors(*_):
        raise AssertionError("factors were used")

    monkeypatch.setattr(call, "factors_pay", lambda size: True)
    monkeypatch.setattr(call, "multiply_factors", multiply_factors)
    query = torch.randn(1, 2, 40, 8)
    torch.backends.cuda.matmul.allow_fp16_accumulation = True  # has no attribute for monkeypatch to put back
    try:
        got = functions.local_dot_product(query, query, Window(9, 0), bias=None, key_lengths=None, scale=1.0)
    finally:
        torch.backends.cuda.matmul.allow_fp16_accumulation = False
    torch.testing.assert_close(got, attnreg.local_dot_product(query, query, Window(9, 0), backend="torch"))
