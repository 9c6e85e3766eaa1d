"""The functions and kernels of cublas_block on host tensors: its index arithmetic, where there is nvcc but no GPU."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from attnreg_benchmarks import cublas_blocks
from attnreg_cublas import blocks, build, call, functions, plugin, rule
from torch.utils._python_dispatch import TorchDispatchMode

import attnreg
from attnreg import Window

LENGTHS = (1, 2, 6)
WINDOWS = [Window(left, size - 1 - left) for size in (1, 2, 3, 5, 9) for left in range(size)]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if build.find_nvcc() is None:
        pytest.skip("no nvcc")
    build.load(build.build(["90"], tmp_path_factory.mktemp("cublas")))


@pytest.fixture(autouse=True)
def _no_blocks_of_another_test():
    call._cut.cache_clear()
    yield
    call._cut.cache_clear()


@pytest.fixture(params=[1, 2, 8, None], ids=lambda rows: f"B{rows}" if rows else "as_shipped")
def block(request, monkeypatch):
    """Tiny blocks without padded columns too, so that short sequences have many of them."""
    if request.param is not None:
        monkeypatch.setattr(blocks, "ALIGNMENT", 1)
    return request.param


def multiply_factors(left, right, result):
    """The CPU has no product of fp16 with an fp32 result."""
    torch.bmm(left.float(), right.float(), out=result)


@pytest.fixture(params=["in_place", "copied", "factors"])
def sides(request, monkeypatch):
    """Lines read in place where they can be, however many edge rows they have; padded copies; fp16 factors."""
    for edge_slots in ("SCORE_EDGE_SLOTS", "AVERAGE_EDGE_SLOTS"):
        monkeypatch.setattr(call, edge_slots, math.inf if request.param == "in_place" else -1)
    # Several chunks, and bytes instead of MiB to say so.
    monkeypatch.setattr(call, "_MEBIBYTE", 1)
    monkeypatch.setattr(call, "factors_pay", lambda size: request.param == "factors")
    monkeypatch.setattr(call, "multiply_factors", multiply_factors)


@pytest.mark.parametrize("queries", LENGTHS)
@pytest.mark.parametrize("keys", LENGTHS)
@pytest.mark.usefixtures("library", "sides", "poisoned_memory")
def test_equals_the_reference_in_float64(queries, keys, block):
    torch.manual_seed(queries * 10 + keys)
    # Head dims that rows are read in place for, and others.
    layouts = [(1, (8, 4)), (2, (8, 4)), (2, (5, 3))]
    for window, (group, dims), masked in itertools.product(WINDOWS, layouts, (False, True)):
        _check(queries, keys, window, group, masked, dims, block)


def _check(len_q, len_k, window, group, masked, dims, block):
    def leaf(*shape):
        return torch.randn(shape, dtype=torch.float64).float().double().requires_grad_()

    head_dim, value_dim = dims
    query, grad_output = leaf(3, group, len_q, head_dim), leaf(3, group, len_q, value_dim).detach()
    key, value = leaf(3, 1, len_k, head_dim), leaf(3, 1, len_k, value_dim)
    weights, grad_scores = leaf(3, group, len_q, window.size), leaf(3, group, len_q, window.size).detach()
    bias = key_lengths = None
    if masked:
        bias = leaf(1, group, 1, window.size)
        bias.data[torch.rand(bias.shape) < 0.3] = -math.inf
        key_lengths = torch.tensor([len_k, len_k // 2, len_k])

    scores = attnreg.local_dot_product(
        query, key, window, bias=bias, key_lengths=key_lengths, scale=0.5, backend="torch"
    )
    visible = scores != -math.inf
    torch.where(visible, scores, 0).backward(grad_scores)
    output = attnreg.local_weighted_average(weights, value, window, key_lengths=key_lengths, backend="torch")
    output.backward(grad_output)

    # What is invisible may be NaN: slots, keys past a key length, queries that see no key.
    def poisoned(tensor, good):
        return torch.where(good, tensor.detach(), math.nan).float()

    seen = attnreg.local_dot_product(query, key, window, key_lengths=key_lengths, backend="torch") != -math.inf
    lengths = torch.full((3,), len_k) if key_lengths is None else key_lengths
    is_key = (torch.arange(len_k) < lengths[:, None])[:, None, :, None]
    q, go = (poisoned(t, seen.any(-1, keepdim=True)) for t in (query, grad_output))
    k, x = (poisoned(t, is_key) for t in (key, value))
    w, g = poisoned(weights, seen), poisoned(grad_scores, visible)
    b = None if bias is None else bias.detach().float()
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
    everywhere = list(itertools.product(range(2), range(2)))
    for spoilt in everywhere:
        inputs = [tensor.clone() for tensor in (query, key, value)]
        for tensor in inputs:
            tensor[spoilt] = math.inf
        for got, expected in zip(results(*inputs), clean):
            assert not got[spoilt].isfinite().all()
            for elsewhere in set(everywhere) - {spoilt}:
                torch.testing.assert_close(got[elsewhere], expected[elsewhere])


@pytest.mark.usefixtures("library", "sides")
def test_queries_that_see_no_key_may_be_nan():
    window, queries, keys = Window(3, 2), 100, 40
    query, key = torch.randn(2, 2, queries, 8), torch.randn(2, 2, keys, 8)
    weights = torch.randn(2, 2, queries, window.size)
    options = {"bias": None, "key_lengths": None, "scale": 1.0, "needs_grad": (True, True, False), "block": 8}
    expected = functions.local_dot_product_backward(weights, query, key, window, **options)
    query[:, :, : queries - keys - window.right] = math.nan
    got = functions.local_dot_product_backward(weights, query, key, window, **options)
    for ours, truth in zip(got[:2], expected):
        torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "not_aligned"])
@pytest.mark.usefixtures("library", "sides", "poisoned_memory")
def test_narrow_rows_are_summed_in_fp32(dtype, offset):
    torch.manual_seed(0)
    window, options = Window(9, 4), {"bias": None, "key_lengths": None, "scale": 0.5, "block": 8}
    query = torch.randn(2, 2, 70, 24 + offset).to(dtype)[..., offset:]
    key = torch.randn(2, 2, 70, 24).to(dtype)
    weights = torch.randn(2, 2, 70, window.size).to(dtype)
    got = (
        functions.local_dot_product(query, key, window, **options),
        *functions.local_dot_product_backward(weights, query, key, window, needs_grad=(True, True, False), **options)[
            :2
        ],
    )
    leaves = [tensor.double().requires_grad_() for tensor in (query, key)]
    scores = attnreg.local_dot_product(*leaves, window, scale=0.5, backend="torch")
    visible = scores != -math.inf
    gradients = torch.autograd.grad(torch.where(visible, scores, 0), leaves, weights.double())
    for ours, truth in zip(got, (scores.detach(), *gradients)):
        torch.testing.assert_close(ours.double(), truth, rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_blocks_lie_within_the_line_or_cover_it(monkeypatch):
    monkeypatch.setattr(blocks, "ALIGNMENT", 1)
    lengths = itertools.product((1, 2, 5), (1, 3, 8, 20), (1, 3, 8, 20))
    reaches = itertools.product((0, 1, 4, 9), (0, 2, 9))
    within = 0
    for (sequences, queries, keys), (left, right), rows, by_key in itertools.product(
        lengths, reaches, (1, 3, 8), (False, True)
    ):
        line = blocks.lay(sequences, queries, keys, left, right)
        cut = blocks.cut(line, rows, by_key=by_key, edge_slots=math.inf)
        assert cut.columns == rows + line.width - 1
        end = cut.first + cut.count * rows
        last = cut.column_spans(cut.count - 1, cut.count)
        if not cut.within:
            assert cut.first == 0
            assert end - rows < line.length <= end
            assert line.length < cut.columns
            continue
        assert cut.column_spans(0, 1).first == 0
        assert line.length - rows < last.first + last.positions <= line.length
        assert end <= line.length
        within += 1
    assert within > 0


def test_blocks_lie_within_the_line_where_edge_rows_are_few():
    line = blocks.lay(4, 1024, 1024, 31, 0)
    within = blocks.cut(line, 64, edge_slots=math.inf)
    slots = (line.length - within.count * within.rows) * line.width / line.length
    assert within.within
    assert blocks.cut(line, 64, edge_slots=slots) == within
    assert not blocks.cut(line, 64, edge_slots=slots * 0.99).within
    assert not blocks.cut(line, 64).within


def launches(run):
    """The ops that a call runs, but those that only make a tensor or a view."""
    made = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            if not function.is_view and "empty" not in function.name():
                made.append(function.name().rpartition("::")[2])
            return function(*arguments, **(options or {}))

    with Record():
        run()
    return made


@pytest.mark.usefixtures("library")
def test_what_is_read_in_place_takes_one_product_and_one_or_two_kernels(monkeypatch):
    window, lengths = Window(3, 2), torch.tensor([128, 100])
    query, key = torch.randn(2, 2, 2, 128, 8).unbind()
    weights = torch.randn(2, 2, 128, window.size)

    def dot(query, key, key_lengths=None):
        options = {"bias": None, "key_lengths": key_lengths, "scale": 1.0}
        return launches(lambda: functions.local_dot_product(query, key, window, **options))

    def average(weights, value, key_lengths=None):
        return launches(lambda: functions.local_weighted_average(weights, value, window, key_lengths=key_lengths))

    def backward(needs_grad):
        options = {"key_lengths": None, "needs_grad": needs_grad}
        return launches(lambda: functions.local_weighted_average_backward(query, weights, key, window, **options))

    assert dot(query, key) == ["baddbmm_", "gather_band"]
    assert dot(query, key, lengths) == ["baddbmm_", "gather_band"]
    assert dot(query.bfloat16(), key.bfloat16()) == ["baddbmm_", "gather_band"]
    assert dot(torch.randn(2, 4, 128, 8), key) == ["pack", "baddbmm_", "gather_band"]
    assert dot(query[..., :5], key[..., :5]) == ["pack", "pack", "baddbmm_", "gather_band"]
    assert average(weights, key) == ["scatter_band", "baddbmm_", "mend_rows"]
    assert average(weights, key, lengths) == ["scatter_band", "pack", "baddbmm_", "mend_rows"]
    assert backward((True, False)) == ["baddbmm_", "gather_band"]
    assert backward((False, True)) == ["scatter_band_by_key", "baddbmm_", "mend_rows_by_key"]
    # The CPU has no product of factors: anything stands for it here.
    monkeypatch.setattr(call, "factors_pay", lambda size: True)
    monkeypatch.setattr(call, "multiply_factors", lambda left, right, result: result.zero_())
    assert dot(query, key) == ["split", "split", "zero_", "gather_band"]


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
    def forbidden(*_):
        raise AssertionError("factors were used")

    monkeypatch.setattr(call, "factors_pay", lambda size: True)
    monkeypatch.setattr(call, "multiply_factors", forbidden)
    query = torch.randn(1, 2, 40, 8)
    torch.backends.cuda.matmul.allow_fp16_accumulation = True  # has no attribute for monkeypatch to put back
    try:
        got = functions.local_dot_product(query, query, Window(9, 0), bias=None, key_lengths=None, scale=1.0)
    finally:
        torch.backends.cuda.matmul.allow_fp16_accumulation = False
    torch.testing.assert_close(got, attnreg.local_dot_product(query, query, Window(9, 0), backend="torch"))


@pytest.mark.usefixtures("library")
def test_the_benchmark_of_the_rule_measures_every_product_at_every_block(monkeypatch):
    measured = {"SHAPE": (1, 2, 64), "HEAD_DIMS": (8,), "WINDOWS": (9,), "BLOCKS": (16, 32), "LINES": ((1, 2, 256),)}
    for name, value in measured.items():
        monkeypatch.setattr(cublas_blocks, name, value)
    monkeypatch.setattr(cublas_blocks, "SECONDS", 0.001)
    monkeypatch.setattr(call, "multiply_factors", multiply_factors)
    found = list(cublas_blocks.blocks(torch.device("cpu")))
    assert len({(row["arithmetic"], row["product"], row["block"], row["factors"]) for row in found}) == len(found) == 20
    assert sum(row["factors"] for row in found) == 2
    rows = list(cublas_blocks.edges(torch.device("cpu")))
    assert len(rows) == 2 * 3 * 3
    assert all(set(row["microseconds"]) == {"edge rows", "copies"} for row in rows)
