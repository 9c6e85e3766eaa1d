"""What only a GPU shows of cublas_block: streams, graphs, its workspace, and long sequences."""

from __future__ import annotations

import itertools

import pytest
import torch
from attnreg_cublas import build, call, functions
from torch.autograd import DeviceType

import attnreg
from attnreg import Window

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WINDOW = Window.centered(40)
NAME = "cublas_block"


@pytest.fixture(scope="module")
def prepared():
    """The functions are called past the core, which would prepare the backend."""
    reason = build.prepare()
    assert reason is None, reason


def tensors(*shapes, dtype=torch.float32):
    return [torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes]


def step(query, key, value, backend):
    """Both products and all their gradients."""
    scores = attnreg.local_dot_product(query, key, WINDOW, backend=backend)
    weights = scores.softmax(-1)
    output = attnreg.local_weighted_average(weights, value, WINDOW, backend=backend)
    return (output, *torch.autograd.grad(output, (query, key, value), torch.ones_like(output)))


def assert_same(got, expected):
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", ["", ":block=16", ":block=256", ":block=40,workspace=1"])
@pytest.mark.parametrize("length", [1200, 77])
def test_every_block_and_workspace_gives_the_same(options, length):
    inputs = tensors(*[(2, 3, length, 64)] * 3)
    assert_same(step(*inputs, NAME + options), step(*inputs, "torch"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_read_in_place_takes_one_product_and_one_or_two_kernels(dtype):
    query, key = (tensor.detach() for tensor in tensors(*[(2, 3, 1200, 64)] * 2, dtype=dtype))
    weights = torch.randn(2, 3, 1200, WINDOW.size, device="cuda", dtype=dtype)

    def dot():
        attnreg.local_dot_product(query, key, WINDOW, backend=NAME)

    def average():
        attnreg.local_weighted_average(weights, key, WINDOW, backend=NAME)

    for run, count in ((dot, 2), (average, 3)):
        assert len(kernels(run)) == count, kernels(run)


def kernels(run):
    """The kernels of a call, by name."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == DeviceType.CUDA]


@pytest.mark.parametrize("in_place", [True, False], ids=["in_place", "copied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_lie_as_lengths_first_tensors_and_no_kernel_of_torch_copies_them(dtype, in_place, monkeypatch):
    if not in_place:
        monkeypatch.setattr(call, "as_heads", lambda tensor: None)
    shapes = [(2, 4096, 3, 64)] * 3 + [(2, 4096, 3, WINDOW.size)]
    inputs = [torch.randn(shape, device="cuda", dtype=dtype).transpose(1, 2) for shape in shapes]
    query, key, value, weights = (tensor.requires_grad_() for tensor in inputs)
    upstream = torch.randn_like(weights), torch.randn_like(value)
    found = {}

    def run():
        scores = attnreg.local_dot_product(query, key, WINDOW, backend=NAME)
        output = attnreg.local_weighted_average(weights, value, WINDOW, backend=NAME)
        gradients = torch.autograd.grad((scores, output), (query, key, weights, value), upstream)
        found.update(enumerate((scores, output, *gradients)))

    names = kernels(run)
    for got, its in zip(found.values(), (query, weights, query, key, weights, value), strict=True):
        assert got.stride() == attnreg.empty_like(its, got.size(-1)).stride()
    copies = (
        "elementwise",
        "copy",
        "Memcpy",
        "CatArray",
        *(["attnreg::Pack", "attnreg::Unpack"] if in_place else []),
    )
    assert not [name for name in names if any(word in name for word in copies)]
    reference = [tensor.detach().float().contiguous().requires_grad_() for tensor in inputs]
    scores = attnreg.local_dot_product(*reference[:2], WINDOW, backend="torch")
    output = attnreg.local_weighted_average(reference[3], reference[2], WINDOW, backend="torch")
    gradients = torch.autograd.grad(
        (torch.where(scores == -torch.inf, 0, scores), output),
        [reference[index] for index in (0, 1, 3, 2)],
        [tensor.float() for tensor in upstream],
    )
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-1}
    for got, right in zip(found.values(), (scores, output, *gradients), strict=True):
        torch.testing.assert_close(got.float(), right, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_bias_hides_may_be_nan(dtype):
    length = 700
    query, key = tensors(*[(1, 2, length, 64)] * 2, dtype=dtype)
    bias = torch.zeros(1, 1, length, WINDOW.size, device="cuda", dtype=dtype)
    rows, slots = torch.arange(length)[:, None], torch.arange(WINDOW.size)
    keys = rows - WINDOW.left + slots
    bias[0, 0, (keys == 300) | (rows == 400)] = -torch.inf
    upstream = torch.randn(1, 2, length, WINDOW.size, device="cuda", dtype=dtype)

    def run(upstream):
        scores = attnreg.local_dot_product(query, key, WINDOW, bias=bias, backend=NAME)
        return (scores, *torch.autograd.grad(scores, (query, key), upstream))

    expected = run(upstream)
    with torch.no_grad():
        key[:, :, 300], query[:, :, 400] = torch.nan, torch.inf
    got = run(upstream.masked_fill(bias == -torch.inf, torch.nan))
    # What another kernel has computed anew is rounded otherwise.
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-2}
    for ours, right in zip(got, expected):
        torch.testing.assert_close(ours, right, **tolerance)


def test_a_graph_replays_on_new_numbers():
    inputs = tensors(*[(2, 3, 1200, 64)] * 3)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(*inputs, NAME)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step(*inputs, NAME)
    with torch.no_grad():
        for tensor in inputs:
            tensor.normal_()
    graph.replay()
    assert_same(got, step(*inputs, "torch"))


LENGTH = 1200
# Offsets are repeated up to a fixed number of them; some rows may come after the last one.
PACKED = [
    [0, 300, 300, 301, 900, LENGTH, LENGTH, LENGTH],
    [0, 1, 2, 3, 67, 131, 1000, 1000],
    [0, LENGTH, LENGTH, LENGTH, LENGTH, LENGTH, LENGTH, LENGTH],
    [0] * 8,
]


def products(query, key, weights, value, grad_scores, grad_output, **rows):
    """Both products and all their gradients, as the backend has them."""
    of_dot, of_average = frozenset({"query", "key"}), frozenset({"weights", "value"})
    options = {"bias": None, "scale": 0.5, **rows}
    return {
        "scores": functions.local_dot_product(query, key, WINDOW, **options),
        "output": functions.local_weighted_average(weights, value, WINDOW, **rows),
        **functions.local_dot_product_backward(grad_scores, query, key, WINDOW, needs_grad=of_dot, **options),
        **functions.local_weighted_average_backward(grad_output, weights, value, WINDOW, needs_grad=of_average, **rows),
    }


def inputs_of_products(batch=1, dtype=torch.float32):
    widths = (64, 64, WINDOW.size, 64, WINDOW.size, 64)
    return [torch.randn(batch, 3, LENGTH, width, device="cuda", dtype=dtype) for width in widths]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("prepared")
def test_a_graph_replays_on_other_offsets_as_if_each_sequence_were_alone(dtype):
    inputs = inputs_of_products(dtype=dtype)
    offsets = torch.tensor(PACKED[0], device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        products(*inputs, cu_seqlens_q=offsets)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = products(*inputs, cu_seqlens_q=offsets)
    for numbers in PACKED:
        for tensor in inputs:
            tensor.normal_()
            # Nothing of the rows after the last offset may reach any other.
            tensor[:, :, numbers[-1] :] = torch.nan
        offsets.copy_(torch.tensor(numbers))
        graph.replay()
        expected = {
            name: torch.full_like(result, -torch.inf if name == "scores" else 0) for name, result in got.items()
        }
        for begin, end in itertools.pairwise(numbers):
            if begin < end:
                alone = products(*(tensor[:, :, begin:end].contiguous() for tensor in inputs))
                for name, result in alone.items():
                    expected[name][:, :, begin:end] = result
        tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 5e-2}
        for name, result in got.items():
            torch.testing.assert_close(result, expected[name], **tolerance, msg=name)


@pytest.mark.usefixtures("prepared")
def test_nothing_of_the_rows_is_read_on_the_host():
    for batch, rows in (
        (1, {"cu_seqlens_q": PACKED[0]}),
        (2, {"key_lengths": [99, 7], "key_starts": [3, 0]}),
        (2, {"query_starts": [99, -7]}),
    ):
        inputs = inputs_of_products(batch)
        given = {name: torch.tensor(numbers, device="cuda") for name, numbers in rows.items()}
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            products(*inputs, **given)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("prepared")
def test_lengths_and_starts_take_no_more_kernels_and_offsets_one():
    query, key, weights, *_ = inputs_of_products()
    lengths = {name: torch.tensor([99], device="cuda") for name in ("key_lengths", "key_starts")}
    packed = {"cu_seqlens_q": torch.tensor(PACKED[0], device="cuda")}
    for rows, more in (({}, 0), (lengths, 0), (packed, 1)):
        names = kernels(lambda rows=rows: functions.local_dot_product(query, key, WINDOW, bias=None, scale=1.0, **rows))
        assert len(names) == 2 + more, names
        names = kernels(lambda rows=rows: functions.local_weighted_average(weights, key, WINDOW, **rows))
        assert len(names) == 3 + more, names


def test_it_runs_on_the_current_stream():
    inputs = tensors(*[(2, 3, 1200, 64)] * 3)
    expected = step(*inputs, "torch")
    late = [torch.full_like(tensor, torch.nan).requires_grad_() for tensor in inputs]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        # The numbers come only after a while, and on this stream alone is that waited for.
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            for tensor, given in zip(late, inputs):
                tensor.copy_(given)
        got = step(*late, NAME)
    torch.cuda.current_stream().wait_stream(side)
    assert_same(got, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_it_runs_on_the_tensors_device_whatever_the_current_one_is():
    inputs = tensors(*[(2, 3, 1200, 64)] * 3)
    there = [tensor.detach().to("cuda:1").requires_grad_() for tensor in inputs]
    assert_same([tensor.to("cuda:0") for tensor in step(*there, NAME)], step(*inputs, "torch"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_million_positions_keep_to_the_workspace(dtype):
    length, head_dim, window = 2**20, 64, Window.centered(512)
    query, key = (tensor.detach() for tensor in tensors(*[(1, 1, length, head_dim)] * 2, dtype=dtype))
    attnreg.local_dot_product(query[:, :, :4096], key[:, :, :4096], window, backend=NAME)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    scores = attnreg.local_dot_product(query, key, window, backend=NAME)
    band_bytes = scores.numel() * scores.element_size()
    # Of one chunk, beside its dense blocks: both sides in three factors, and their scales.
    factors = 2 * 3 * 2 * query.numel() + 8 * length if dtype == torch.float32 else 0
    assert torch.cuda.max_memory_allocated() - before <= band_bytes + 256 * 2**20 + factors + 2**20
    middle = slice(length // 2 - 300, length // 2 + 300)
    expected = attnreg.local_dot_product(
        query[:, :, middle].float(), key[:, :, middle].float(), window, backend="torch"
    )
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-1}
    torch.testing.assert_close(scores[:, :, middle][:, :, 260:340].float(), expected[:, :, 260:340], **tolerance)
