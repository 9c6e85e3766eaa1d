"""The functions and kernels of cublas_block on host tensors: its index arithmetic, where there is nvcc but no GPU."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os

import pytest
import torch
from attnreg_benchmarks import cublas_blocks, cublas_lines
from attnreg_cublas import blocks, build, call, functions, plugin, products, rule
from attnreg_cublas.given import Given
from torch.utils._python_dispatch import TorchDispatchMode

import attnreg
from attnreg import Window
from attnreg import problem as problems
from attnreg.rows import rows_of

LENGTHS = (1, 2, 6)
WINDOWS = [Window(left, size - 1 - left) for size in (1, 2, 3, 5, 9) for left in range(size)]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if build.LIBRARY.find_compiler() is None:
        pytest.skip("no nvcc")
    # Built once for all that run tests side by side, each in a folder of its own in this one.
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    build.load(build.LIBRARY.build(build.target(["90"]), folder / "cublas"))


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


@pytest.fixture(params=["in_place", "heads_in_place", "copied", "factors"])
def sides(request, monkeypatch):
    """Lines read in place where they can be, however many edge rows they have; padded copies; fp16 factors.

    Each head has a line where tensors are (N, L, H, E) in memory, as they then are to be.
    """
    in_place = request.param.endswith("in_place")
    for edge_slots in ("SCORE_EDGE_SLOTS", "AVERAGE_EDGE_SLOTS"):
        monkeypatch.setattr(call, edge_slots, math.inf if in_place else -1)
    # Several chunks, and bytes instead of MiB to say so.
    monkeypatch.setattr(call, "_MEBIBYTE", 1)
    monkeypatch.setattr(call, "factors_pay", lambda size: request.param == "factors")
    monkeypatch.setattr(call, "multiply_factors", multiply_factors)
    return request.param


@pytest.mark.parametrize("queries", LENGTHS)
@pytest.mark.parametrize("keys", LENGTHS)
@pytest.mark.usefixtures("library", "poisoned_memory")
def test_equals_the_reference_in_float64(queries, keys, block, sides):
    torch.manual_seed(queries * 10 + keys)
    # Head dims that rows are read in place for, and others.
    layouts = [(1, (8, 4)), (2, (8, 4)), (2, (5, 3))]
    for window, (group, dims), masked in itertools.product(WINDOWS, layouts, (False, True)):
        _check(
            queries,
            keys,
            window,
            group,
            masked,
            dims,
            block,
            _lengths_first if sides == "heads_in_place" else _contiguous,
        )


LONG = 21
PACKED = [
    [0, 5, 5, 6, 15, LONG],
    [0, 0, 9, 10, 10, 17, 17, 17],  # rows after the last offset
    [0, LONG, LONG, LONG],
    [0],
    [0, 0],
    [4, 9, 15],  # what only a GPU lets pass, here and below
    [0, 8, 2**31, 2**40],
    [-(2**40), 8, 2**62],
]
BY_SEQUENCE = [
    {"key_lengths": [9, LONG], "key_starts": [3, 0]},
    {"key_starts": [20, 6]},
    {"key_lengths": [9, 2**31], "key_starts": [9, -(2**31)]},
    {"query_starts": [0, 13]},
    {"query_starts": [-4, LONG], "key_starts": [2, LONG - 1], "key_lengths": [LONG, 12]},
    {"query_starts": [2**31, -(2**32)], "key_lengths": [0, LONG]},
    {"query_starts": [2**63 - 1, -(2**63)]},
]


@pytest.mark.parametrize("window", [Window(2, 1), Window(0, 0), Window(0, 6), Window(30, 0)], ids=str)
@pytest.mark.usefixtures("library", "poisoned_memory")
def test_equals_the_reference_where_rows_are_given(window, block, sides):
    torch.manual_seed(0)
    layout = _lengths_first if sides == "heads_in_place" else _contiguous
    for number, given in enumerate([{"cu_seqlens_q": offsets} for offsets in PACKED] + BY_SEQUENCE):
        narrow = all(-(2**31) <= each < 2**31 for values in given.values() for each in values)
        dtype = torch.int32 if narrow and number % 2 else torch.int64
        rows = {name: torch.tensor(values, dtype=dtype) for name, values in given.items()}
        dims, group = ((8, 4), 1) if number % 3 else ((5, 3), 2)
        _check(LONG, LONG, window, group, number % 4 == 3, dims, block, layout, rows)
        if "cu_seqlens_q" not in given:
            _check(7, LONG, window, group, False, dims, block, layout, rows)


@pytest.mark.parametrize(("queries", "keys"), [(25, 21), (21, 25)])
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.usefixtures("library", "sides", "poisoned_memory")
def test_packed_queries_and_keys_may_have_room_of_different_lengths(queries, keys, kv_heads):
    torch.manual_seed(0)
    rows = {"cu_seqlens_q": torch.tensor([0, 5, 5, 6, 18])}
    for layout in (_contiguous, _lengths_first):
        _check(queries, keys, Window(4, 2), 1, False, (8, 4), 8, layout, rows, kv_heads)


def _check(len_q, len_k, window, group, masked, dims, block, layout, given=None, kv_heads=2):
    def leaf(*shape):
        return torch.randn(shape, dtype=torch.float64).float().double().requires_grad_()

    head_dim, value_dim = dims
    given = given or {}
    batch, heads = 1 if "cu_seqlens_q" in given else 2, kv_heads * group
    query, grad_output = leaf(batch, heads, len_q, head_dim), leaf(batch, heads, len_q, value_dim).detach()
    key, value = leaf(batch, kv_heads, len_k, head_dim), leaf(batch, kv_heads, len_k, value_dim)
    weights, grad_scores = leaf(batch, heads, len_q, window.size), leaf(batch, heads, len_q, window.size).detach()
    bias = None
    if masked:
        bias = leaf(1, heads, 1, window.size)
        bias.data[torch.rand(bias.shape) < 0.3] = -math.inf
        given = given or {"key_lengths": torch.tensor([len_k // 2, len_k])}

    by_rows, keys = slots(batch, len_q, len_k, window, given)
    seen = by_rows.expand(batch, heads, len_q, window.size)
    visible = seen if bias is None else seen & (bias.detach() != -math.inf)

    def of_slots(tensor):
        return torch.stack([of_n[:, at] for of_n, at in zip(tensor, keys)]).repeat_interleave(group, 1)

    scores = 0.5 * (query[:, :, :, None] * of_slots(key)).sum(-1) + (
        0 if bias is None else torch.where(visible, bias, 0)
    )
    scores = torch.where(visible, scores, -math.inf)
    torch.where(visible, scores, 0).backward(grad_scores)
    output = (torch.where(seen, weights, 0)[..., None] * of_slots(value)).sum(-2)
    output.backward(grad_output)

    # What is hidden may be NaN: slots, queries that see no key, keys that no query sees; by what rows may see, or by bias.
    def poisoned(tensor, good):
        return layout(torch.where(good, tensor.detach(), math.nan).float())

    q, k = poisoned(query, visible.any(-1, keepdim=True)), poisoned(key, keys_seen(visible, keys, key))
    go, x = poisoned(grad_output, seen.any(-1, keepdim=True)), poisoned(value, keys_seen(seen, keys, key))
    w, g = poisoned(weights, seen), poisoned(grad_scores, visible)
    b = None if bias is None else bias.detach().float()
    blocked = {"block": block, "workspace": 256}
    options = {"bias": b, "scale": 0.5, **given}
    needs_grad = frozenset({"query", "key", "bias"} if masked else {"query", "key"})
    got = {
        "scores": functions.local_dot_product(q, k, window, **options, **blocked),
        **functions.local_dot_product_backward(g, q, k, window, needs_grad=needs_grad, **options, **blocked),
        "output": functions.local_weighted_average(w, x, window, **given, **blocked),
        **functions.local_weighted_average_backward(
            go, w, x, window, needs_grad=frozenset({"weights", "value"}), **given, **blocked
        ),
    }
    want = {"scores": scores, "output": output, "query": query.grad, "key": key.grad}
    want |= {"weights": weights.grad, "value": value.grad} | ({"bias": bias.grad} if masked else {})
    assert got.keys() == want.keys()
    for name, truth in want.items():
        torch.testing.assert_close(got[name].double(), truth.detach(), rtol=1e-5, atol=1e-5, msg=name)


def slots(batch, len_q, len_k, window, given):
    """Which slots are visible, (N, 1, Lq, W), and of which keys they are, (N, Lq, W), some key where they are not."""
    rows = rows_of(len_q, len_k, torch.device("cpu"), **given)
    first, last = (bound[..., None].expand(batch, len_q, 1) for bound in rows.seen(len_q, window))
    keys = (rows.position(len_q) - window.left)[..., None] + torch.arange(window.size)
    visible = (keys >= first) & (keys < last.clamp_max(len_k))
    return visible[:, None], keys.clamp(0, len_k - 1).expand(batch, -1, -1)


def keys_seen(visible, keys, key):
    """The keys that some row sees, (N, Hkv, Lk, 1), of slots (N, H, Lq, W)."""
    found = torch.zeros(*key.shape[:3], 1, dtype=torch.bool)
    by_head = visible.unflatten(1, (key.size(1), -1)).any(2)
    for n, h in itertools.product(range(key.size(0)), range(key.size(1))):
        found[n, h, keys[n][by_head[n, h]]] = True
    return found


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
                weights, query, key, window, needs_grad=frozenset({"query", "key"}), **everything, **options
            ).values(),
            functions.local_weighted_average(weights, value, window, **options),
            *functions.local_weighted_average_backward(
                query, weights, value, window, needs_grad=frozenset({"weights", "value"}), **options
            ).values(),
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


@pytest.mark.parametrize("rows", [1, 8, None])
@pytest.mark.usefixtures("library", "sides")
def test_what_is_not_finite_stays_in_its_packed_sequence(rows):
    torch.manual_seed(0)
    window, parts = Window(3, 2), (9, 1, 30, 12)
    offsets = torch.tensor([0, *itertools.accumulate(parts)])
    query, key, value = torch.randn(3, 1, 2, sum(parts), 8).unbind()
    weights = torch.randn(1, 2, sum(parts), window.size)
    options = {"cu_seqlens_q": offsets, "block": rows}

    def results(query, key, value):
        everything = {"bias": None, "scale": 1.0, **options}
        return (
            functions.local_dot_product(query, key, window, **everything),
            *functions.local_dot_product_backward(
                weights, query, key, window, needs_grad=frozenset({"query", "key"}), **everything
            ).values(),
            functions.local_weighted_average(weights, value, window, **options),
            *functions.local_weighted_average_backward(
                query, weights, value, window, needs_grad=frozenset({"weights", "value"}), **options
            ).values(),
        )

    clean = results(query, key, value)
    for begin, end in itertools.pairwise(offsets.tolist()):
        inputs = [tensor.clone() for tensor in (query, key, value)]
        for tensor in inputs:
            tensor[:, :, begin:end] = math.nan
        for got, expected in zip(results(*inputs), clean):
            torch.testing.assert_close(got[:, :, :begin], expected[:, :, :begin])
            torch.testing.assert_close(got[:, :, end:], expected[:, :, end:])


@pytest.mark.usefixtures("library", "sides")
def test_queries_that_see_no_key_may_be_nan():
    window, queries, keys = Window(3, 2), 100, 40
    query, key = torch.randn(2, 2, queries, 8), torch.randn(2, 2, keys, 8)
    weights = torch.randn(2, 2, queries, window.size)
    options = {"bias": None, "key_lengths": None, "scale": 1.0, "needs_grad": frozenset({"query", "key"}), "block": 8}
    expected = functions.local_dot_product_backward(weights, query, key, window, **options)
    query[:, :, : queries - keys - window.right] = math.nan
    got = functions.local_dot_product_backward(weights, query, key, window, **options)
    for name in ("query", "key"):
        torch.testing.assert_close(got[name], expected[name])


@pytest.mark.usefixtures("library", "sides", "poisoned_memory")
@pytest.mark.parametrize("hides", ["all", "keys", "queries", "one_key_of_one_query"])
@pytest.mark.parametrize("what", [math.nan, math.inf])
@pytest.mark.parametrize("group", [1, 2])
def test_what_a_bias_hides_may_be_anything_and_reaches_nothing(hides, what, group):
    torch.manual_seed(0)
    window, length = Window(5, 3), 90
    query, grad_scores = torch.randn(2, 2 * group, length, 8), torch.randn(2, 2 * group, length, window.size)
    key, bias = torch.randn(2, 2, length, 8), torch.randn(2, 1, length, window.size)
    slot_of_key_30 = 30 - torch.arange(length) + window.left
    if hides == "all":
        bias[:] = -math.inf
    elif hides == "keys":
        for i in range(30 - window.right, 30 + window.left + 1):
            bias[:, :, i, slot_of_key_30[i]] = -math.inf
    elif hides == "queries":
        bias[:, :, 30] = -math.inf
    else:
        bias[0, :, 30, 0] = -math.inf
    options = {"bias": bias, "key_lengths": None, "scale": 0.5, "block": 8}
    needs_grad = frozenset({"query", "key", "bias"})

    def results(query, key, grad_scores):
        gradients = functions.local_dot_product_backward(
            grad_scores, query, key, window, needs_grad=needs_grad, **options
        )
        return {"scores": functions.local_dot_product(query, key, window, **options), **gradients}

    clean = results(query, key, grad_scores)
    grad_scores = grad_scores.masked_fill(bias == -math.inf, what)
    if hides in ("all", "queries"):
        query[:, :, slice(None) if hides == "all" else 30] = what
    if hides in ("all", "keys"):
        key[:, :, slice(None) if hides == "all" else 30] = what
    for name, got in results(query, key, grad_scores).items():
        torch.testing.assert_close(got, clean[name], msg=name)
        assert name == "scores" or got.isfinite().all()


@pytest.mark.usefixtures("library", "sides")
def test_a_bias_keeps_what_is_not_finite_in_the_rows_that_see_it():
    window = Window(2, 1)
    query, key, grad_scores = torch.randn(1, 1, 60, 8), torch.randn(1, 1, 60, 8), torch.randn(1, 1, 60, window.size)
    options = {"bias": torch.zeros(1, 1, 1, 1), "key_lengths": None, "scale": 1.0, "block": 8}
    key[:, :, 30] = math.nan
    needs_grad = frozenset({"query"})
    got = functions.local_dot_product_backward(grad_scores, query, key, window, needs_grad=needs_grad, **options)
    spoilt = (~got["query"].isfinite()).any(-1).flatten().nonzero().flatten()
    assert spoilt.tolist() == [29, 30, 31, 32]


@pytest.mark.usefixtures("library", "sides")
def test_a_finite_bias_of_float64_hides_nothing():
    query = torch.randn(1, 1, 40, 8)
    bias = torch.full((1, 1, 1, 4), -1e300, dtype=torch.float64)
    options = {"bias": bias, "key_lengths": None, "scale": 1.0, "block": 8}
    scores = functions.local_dot_product(query, query, Window(3, 0), **options)
    assert (scores[:, :, 3:] == -torch.finfo(torch.float32).max).all()
    assert (scores[:, :, 0, :3] == -math.inf).all()


def _contiguous(tensor):
    return tensor


def _lengths_first(tensor):
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _one_of_three(tensor):
    """As of a projection (N, L, 3, H, E)."""
    lengths_first = tensor.transpose(1, 2)
    return torch.stack([torch.full_like(lengths_first, math.nan), lengths_first, lengths_first * 9], 2)[
        :, :, 1
    ].transpose(1, 2)


def _expanded(tensor):
    return tensor[:1, :, :1].expand(tensor.shape)


# Blocks are made one by one, some of a line, all of several lines.
@pytest.mark.parametrize(
    ("kv_heads", "group", "mebibyte"), [(1, 1, 10), (1, 2, 2**20), (3, 1, 1), (3, 1, 2**20), (3, 2, 10)]
)
@pytest.mark.parametrize(("queries", "keys"), [(64, 64), (40, 61), (61, 40), (9, 61)])
@pytest.mark.parametrize("dims", [(8, 4), (5, 3)])
@pytest.mark.parametrize("layout", [_contiguous, _lengths_first, _one_of_three, _expanded])
@pytest.mark.usefixtures("library", "sides", "poisoned_memory")
def test_results_lie_in_memory_as_their_tensors(layout, dims, queries, keys, group, kv_heads, mebibyte, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(call, "_MEBIBYTE", mebibyte)
    window, heads = Window(5, 3), group * kv_heads
    shapes = {"query": (2, heads, queries, dims[0]), "key": (2, kv_heads, keys, dims[0])}
    shapes |= {"value": (2, kv_heads, keys, dims[1]), "weights": (2, heads, queries, window.size)}
    shapes |= {"bias": (2, heads, queries, window.size), "grad_output": (2, heads, queries, dims[1])}
    tensors = {name: layout(torch.randn(shape)) for name, shape in shapes.items()}

    def results(query, key, value, weights, bias, grad_output):
        options = {"bias": bias, "key_lengths": None, "scale": 0.5}
        return {
            "query": functions.local_dot_product(query, key, window, **options),
            "weights": functions.local_weighted_average(weights, value, window, key_lengths=None),
        }, {
            **functions.local_dot_product_backward(
                weights, query, key, window, needs_grad=frozenset({"query", "key", "bias"}), **options
            ),
            **functions.local_weighted_average_backward(
                grad_output, weights, value, window, key_lengths=None, needs_grad=frozenset({"weights", "value"})
            ),
        }

    forward, gradients = results(**tensors)
    right_forward, right_gradients = results(**{name: tensor.contiguous() for name, tensor in tensors.items()})
    for name, got in forward.items():
        torch.testing.assert_close(got, right_forward[name])
        assert got.stride() == attnreg.empty_like(tensors[name], got.size(-1)).stride()
    for name, got in gradients.items():
        torch.testing.assert_close(got, right_gradients[name])
        assert got.shape == tensors[name].shape
        assert got.stride() == attnreg.empty_like(tensors[name]).stride()


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
        *functions.local_dot_product_backward(
            weights, query, key, window, needs_grad=frozenset({"query", "key"}), **options
        ).values(),
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
    for (sequences, queries, keys), (left, right), rows, by_key, starts in itertools.product(
        lengths, reaches, (1, 3, 8), (False, True), ("ends aligned", "together", "anywhere")
    ):
        start = {"ends aligned": keys - queries, "together": 0, "anywhere": None}[starts]
        line = blocks.lay(1, sequences, queries, keys, left, right, start)
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
    line = blocks.lay(1, 4, 1024, 1024, 31, 0, 0)
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
    window, lengths = Window(3, 2), {"key_lengths": torch.tensor([128, 100])}
    starts, packed = {"query_starts": torch.tensor([0, 9])}, {"cu_seqlens_q": torch.tensor([0, 40, 40, 99])}
    query, key = torch.randn(2, 2, 2, 128, 8).unbind()
    weights = torch.randn(2, 2, 128, window.size)

    def dot(query, key, rows=()):
        options = {"bias": None, "scale": 1.0, **dict(rows)}
        return launches(lambda: functions.local_dot_product(query, key, window, **options))

    def average(weights, value, rows=()):
        return launches(lambda: functions.local_weighted_average(weights, value, window, **dict(rows)))

    def backward(name):
        options = {"key_lengths": None, "needs_grad": frozenset({name})}
        return launches(lambda: functions.local_weighted_average_backward(query, weights, key, window, **options))

    assert dot(query, key) == ["baddbmm_", "gather_band"]
    assert dot(query, key, lengths) == ["baddbmm_", "gather_band"]
    assert dot(query.bfloat16(), key.bfloat16()) == ["baddbmm_", "gather_band"]
    assert dot(torch.randn(2, 4, 128, 8), key) == ["pack", "baddbmm_", "gather_band"]
    assert dot(query[..., :5], key[..., :5]) == ["pack", "pack", "baddbmm_", "gather_band"]
    assert average(weights, key) == ["scatter_band", "baddbmm_", "mend_rows"]
    assert average(weights, key, lengths) == ["scatter_band", "baddbmm_", "mend_rows"]
    # Offsets take a table; keys that begin anywhere are copied to where they are seen.
    assert dot(query[:1], key[:1], packed) == ["bound_packed_rows", "baddbmm_", "gather_band"]
    assert average(weights[:1], key[:1], packed) == ["bound_packed_rows", "scatter_band", "baddbmm_", "mend_rows"]
    assert dot(query, key, starts) == ["pack", "pack", "baddbmm_", "gather_band"]
    # Where each head is a line, a product of them all is spared a copy of each side and of the result.
    heads_apart = [_lengths_first(tensor) for tensor in (query, key)]
    assert dot(*heads_apart) == ["multiply", "gather_band"]
    assert average(_lengths_first(weights), heads_apart[1]) == ["scatter_band", "multiply", "mend_rows"]
    assert average(_lengths_first(weights), key) == ["scatter_band", "pack", "multiply", "mend_rows"]
    assert dot(query, heads_apart[1]) == ["pack", "baddbmm_", "gather_band"]
    assert average(_lengths_first(torch.randn(2, 4, 128, window.size)), key[:, :1]) == [
        *("scatter_band", "pack", "baddbmm_", "mend_rows"),
    ]
    assert backward("weights") == ["baddbmm_", "gather_band"]
    assert backward("value") == ["scatter_band_by_key", "baddbmm_", "mend_rows_by_key"]
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


@pytest.mark.parametrize(("heads", "at_once"), [(1, [(0, 1)]), (5, [(0, 2), (2, 2), (4, 1)])])
def test_dense_blocks_keep_to_the_workspace(monkeypatch, heads, at_once):
    """Of the blocks of a line, or of several lines at once."""
    monkeypatch.setattr(call, "ops", lambda: None)
    rows = torch.empty(1, 5, 2048, 4)
    for workspace in (1, 13):
        one = call.Call(rows, rows, Window.centered(512), None, Given(), 128, workspace)
        geometry = blocks.cut(one.line if heads == 1 else one.lines_of_heads, 128)
        chunks = list(one._chunks(geometry, rows, (geometry.rows, geometry.columns)))
        assert all(chunk.dense.numel() * chunk.dense.element_size() <= workspace * 2**20 for chunk in chunks)
        assert len({chunk.dense.data_ptr() for chunk in chunks}) == 1
        assert all(chunk.dense.size(0) == chunk.lines * (chunk.end - chunk.begin) for chunk in chunks)
        owned = [
            (line, block)
            for chunk in chunks
            for line, dense in enumerate(chunk.by_line(), chunk.line)
            for block, _ in enumerate(dense, chunk.begin)
        ]
        assert owned == list(itertools.product(range(heads), range(geometry.count)))
    assert [(chunk.line, chunk.lines) for chunk in chunks if chunk.begin == 0] == at_once


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
    # Keys that begin anywhere are laid under the window of each query.
    anywhere = dataclasses.replace(
        problem, batch=2**4, given=(("query_starts", problems.Given()),), window=Window(2**22, 0)
    )
    assert "queries and windows have" in plugin._refuse(anywhere)
    assert plugin._refuse(dataclasses.replace(anywhere, given=())) is None


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
    data = cublas_blocks.tensors((1, 2, 64), 8, 9, torch.float32, torch.device("cpu"))
    assert set(cublas_blocks.calls("average by key", [data], 9)[0]()) == {"key"}
    rows = list(cublas_blocks.edges(torch.device("cpu")))
    assert len(rows) == 2 * 3 * 3
    assert all(set(row["microseconds"]) == {"edge rows", "copies"} for row in rows)


@pytest.mark.usefixtures("library")
def test_the_benchmark_of_lines_measures_every_product_in_place_and_copied(monkeypatch):
    copied = []
    measured = {"HEADS": ((2, 8),), "WINDOWS": (9,), "POSITIONS": (2048,), "SECONDS": 0.001}
    for name, value in measured.items():
        monkeypatch.setattr(cublas_lines, name, value)
    monkeypatch.setattr(cublas_lines, "sets_for_cold_cache", lambda size, device: 1)
    monkeypatch.setattr(cublas_lines, "eager", lambda runs: copied.append("pack" in launches(runs[0])) or 1.0)
    monkeypatch.setattr(cublas_lines, "copies", lambda runs: [])
    rows = list(cublas_lines.rows(torch.device("cpu")))
    assert [(row["dtype"], row["product"]) for row in rows] == list(
        itertools.product(("float32", "bfloat16"), cublas_lines.PRODUCTS)
    )
    assert all(list(row["graph"]) == list(row["eager"]) == ["contiguous", "in place", "copied"] for row in rows)
    assert copied == [False, False, True] * len(rows)
    assert cublas_lines.ratios(rows, "eager", "copied") == "1.000, at most 1.000"


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_products_by_address_are_those_of_evenly_spaced_matrices(dtype):
    torch.manual_seed(0)
    left, right = torch.randn(3, 2, 4, 6).to(dtype), torch.randn(3, 2, 6, 5).to(dtype)
    # Heads of a group are summed one by one by key alone: the left matrices lie column by column, the right ones row by row.
    for of_left, of_right, heads in (
        (False, False, 1),
        (False, True, 1),
        (True, False, 1),
        (True, True, 1),
        (True, False, 2),
    ):
        result = torch.full((2, 4, 3, 7), math.nan, dtype=dtype).permute(2, 0, 1, 3)[..., 1:6]
        given = [
            tensor.mT.contiguous().mT if turned else tensor for tensor, turned in ((left, of_left), (right, of_right))
        ]
        products.multiply(*given, result, 0.5, heads)
        tolerance = torch.finfo(dtype).eps
        torch.testing.assert_close(
            result.double(), 0.5 * left.double() @ right.double(), rtol=tolerance, atol=tolerance
        )
