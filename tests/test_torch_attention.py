"""torch's registry of flash attention: what attnreg serves of it, what it leaves to the kernels that were there, and both undone."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch
from torch.nn import attention
from torch.nn.attention.varlen import varlen_attn

import attnreg
import attnreg.integrations.torch as integration
from attnreg import Backend, Capability, Window

FORWARD, INTO = torch.ops.aten._flash_attention_forward, "_flash_attention_forward_no_dropout_inplace"
PARAMETERS = inspect.signature(varlen_attn).parameters
needs_windows = pytest.mark.skipif(
    "window_size" not in PARAMETERS, reason="varlen_attn of this torch has no window_size"
)

H, HKV, E = 4, 2, 8
OFFSETS = {
    "one": ([0, 20], None),
    "several": ([0, 7, 7, 8, 20], None),
    "to capacity": ([0, 5, 16, 16, 16], None),
    "other keys": ([0, 7, 9, 20], [0, 3, 14, 24]),
    "no keys": ([0, 7, 20], [0, 0, 15]),
}
WINDOWS = [(0, 0), (3, 0), (2, 4), (0, 5), (100, 0), (100, 100)]


def pack(name, dtype=torch.float64, device="cpu", head_dim=E, times=1):
    """Query, key and value (T, heads, head_dim), a gradient of the output, and the offsets."""
    of_queries, of_keys = OFFSETS[name]
    generator = torch.Generator().manual_seed(len(name))
    keys = 20 if of_keys is None else 26
    sizes = [(20, H), (keys, HKV), (keys, HKV), (20, H)]
    tensors = [
        torch.randn(times * rows, heads, head_dim, generator=generator, dtype=torch.float64).to(device, dtype)
        for rows, heads in sizes
    ]
    cu_seqlens_q = torch.tensor(of_queries, dtype=torch.int32, device=device) * times
    cu_seqlens_k = cu_seqlens_q if of_keys is None else torch.tensor(of_keys, dtype=torch.int32, device=device) * times
    return [tensor.requires_grad_() for tensor in tensors[:3]], tensors[3], cu_seqlens_q, cu_seqlens_k


def definition(query, key, value, cu_seqlens_q, cu_seqlens_k, window, scale=None):
    """Each sequence by dense attention in float64, ends aligned: the output (T, H, E) and the log-sum-exp (H, T), on the CPU."""
    query, key, value = (tensor.double().cpu() for tensor in (query, key, value))
    key, value = (tensor.repeat_interleave(H // tensor.shape[1], dim=1) for tensor in (key, value))
    output, sums = torch.zeros_like(query), torch.full((H, query.shape[0]), -torch.inf, dtype=torch.float64)
    bounds = [zip(offsets.tolist(), offsets.tolist()[1:]) for offsets in (cu_seqlens_q, cu_seqlens_k)]
    for (begin, end), (first, last) in zip(*bounds):
        if begin == end or first == last:
            continue
        scores = torch.einsum("qhe,khe->hqk", query[begin:end], key[first:last]) * (scale or query.shape[2] ** -0.5)
        distance = torch.arange(first, last) - last - (torch.arange(begin, end) - end)[:, None]
        hidden = (distance < -window[0]) | (distance > window[1])
        blind = hidden.all(-1)[:, None]
        weights = scores.masked_fill(hidden & ~blind, -torch.inf).softmax(-1).masked_fill(blind, 0.0)
        part = torch.einsum("hqk,khe->qhe", weights, value[first:last])
        output = output.index_copy(0, torch.arange(begin, end), part)
        sums[:, begin:end] = scores.masked_fill(hidden, -torch.inf).logsumexp(-1).detach()
    return output, sums


def varlen(query, key, value, cu_seqlens_q, cu_seqlens_k, window, function=varlen_attn, **options):
    options.update({"enable_gqa": True} if "enable_gqa" in PARAMETERS else {})
    lengths = query.shape[0], key.shape[0]
    return function(query, key, value, cu_seqlens_q, cu_seqlens_k, *lengths, window_size=window, **options)


def restore():
    """Undo it. Older torches have no function for it, and keep the handle."""
    if hasattr(attention, "restore_flash_attention_impl"):
        attention.restore_flash_attention_impl()
    else:
        attention._registry._FLASH_ATTENTION_ACTIVE[1].remove()
        attention._registry._FLASH_ATTENTION_ACTIVE = None


@pytest.fixture
def active():
    """It is active, and afterwards is not."""
    attention.activate_flash_attention_impl("attnreg")
    yield
    restore()


@pytest.fixture
def before():
    """Kernels for the CPU that were there before; the list of what they were asked."""
    asked = []

    def kernel(name, results):
        def run(*args, **kwargs):
            asked.append((name, args, kwargs))
            return results(*args)

        return run

    def results(query, *_rest):
        state = torch.zeros(2, dtype=torch.uint64)
        return query.detach() + 1, query.new_ones(H, query.shape[0]).float(), state, state, query.new_zeros(0)

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", kernel("forward", results), "CPU")
    library.impl("_flash_attention_backward", kernel("backward", lambda _, *rest: tuple(rest[:3])), "CPU")
    yield asked
    del library


# What the op is asked, and what it answers


def asked_of(pack_name="several", **changes):
    tensors, _, cu_seqlens_q, cu_seqlens_k = pack(pack_name)
    names = ("query", "key", "value")
    given = {
        **dict(zip(names, tensors)), "cum_seq_q": cu_seqlens_q, "cum_seq_k": cu_seqlens_k, "max_q": 20, "max_k": 20, "dropout_p": 0.0,
        "is_causal": False, "return_debug_mask": False, "scale": None, "window_size_left": 3, "window_size_right": 1, "seqused_k": None,
        "alibi_slopes": None, "block_table": None, "num_splits": None,
    }  # fmt: skip
    return {**given, **changes}


@pytest.mark.parametrize(
    ("given", "window"),
    [
        ({}, Window(3, 1)),
        ({"window_size_left": 0, "window_size_right": 0}, Window(0, 0)),
        ({"is_causal": True}, Window(3, 0)),
        ({"is_causal": True, "window_size_right": -1}, Window(3, 0)),
        ({"is_causal": True, "window_size_right": None}, Window(3, 0)),
    ],
)
def test_a_window_of_two_sides_is_served(given, window):
    call = integration.packed_call(asked_of(**given))
    assert call is not None
    assert call.window == window


ELSE = {
    "full": {"window_size_left": -1, "window_size_right": -1},
    "no window": {"window_size_left": None, "window_size_right": None},
    "causal": {"window_size_left": -1, "window_size_right": 0, "is_causal": True},
    "no limit on the left": {"window_size_left": -1, "window_size_right": 2},
    "no limit on the right": {"window_size_left": 3, "window_size_right": -1},
    "dropout": {"dropout_p": 0.1},
    "a debug mask": {"return_debug_mask": True},
    "used keys": {"seqused_k": torch.tensor([1])},
    "slopes": {"alibi_slopes": torch.zeros(H)},
    "pages": {"block_table": torch.zeros(1, 1, dtype=torch.int32)},
    "splits": {"num_splits": 1},
    "an output to fill": {"out": torch.zeros(20, H, E)},
    "an argument of a later torch": {"sinks": torch.zeros(H)},
    "nothing packed": {"cum_seq_q": None, "cum_seq_k": None},
    "offsets of queries alone": {"cum_seq_k": None},
    "four dimensions": {name: torch.zeros(1, 20, H, E) for name in ("query", "key", "value")},
    "8 bits": {"query": torch.zeros(20, H, E).to(torch.float8_e4m3fn)},
    "another head dim of the values": {"value": torch.zeros(20, HKV, 4)},
}


@pytest.mark.parametrize("given", ELSE.values(), ids=ELSE)
def test_everything_else_is_not(given):
    assert integration.packed_call(asked_of(**given)) is None


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("name", OFFSETS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_results_and_gradients_are_those_of_the_definition(dtype, name, window, scale):
    (query, key, value), upstream, *offsets = pack(name, dtype)
    true, true_sums = definition(query, key, value, *offsets, window, scale)
    call = integration.PackedCall(query, key, value, *offsets, Window(*window), scale)
    output, log_sum_exp = integration.forward(call)
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype is torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(output.double(), true, **tolerance)
    assert not output.requires_grad
    assert (output.dtype, log_sum_exp.dtype, log_sum_exp.is_contiguous()) == (dtype, torch.float32, True)
    torch.testing.assert_close(log_sum_exp, true_sums.float(), rtol=1e-5, atol=1e-5)
    gradients = integration.backward(call, upstream, output, log_sum_exp)
    for gradient, expected in zip(gradients, torch.autograd.grad(true, (query, key, value), upstream.double())):
        torch.testing.assert_close(gradient, expected, **tolerance)


def test_results_lie_in_memory_as_torch_expects_them():
    (query, key, value), upstream, *offsets = pack("several", torch.float32)
    packed = torch.stack([query, query, query], dim=1).detach()[:, 1]
    call = integration.PackedCall(packed, key, value, *offsets, Window(3, 0), None)
    output, log_sum_exp = integration.forward(call)
    assert output.is_contiguous()
    for gradient in integration.backward(call, upstream[:1].expand_as(upstream), output, log_sum_exp):
        assert gradient.is_contiguous()


# In torch's dispatcher


def test_the_name_is_in_the_registry():
    assert "attnreg" in attention.list_flash_attention_impls()


@needs_windows
@pytest.mark.parametrize("way", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", OFFSETS)
@pytest.mark.usefixtures("active")
def test_varlen_attn_with_a_window_is_served(name, way):
    tensors, upstream, *offsets = pack(name)
    torch._dynamo.reset()
    function = varlen_attn if way == "eager" else torch.compile(varlen_attn, backend=way, fullgraph=True)
    output = varlen(*tensors, *offsets, (3, 1), function)
    true, _ = definition(*tensors, *offsets, (3, 1))
    torch.testing.assert_close(output, true, rtol=1e-10, atol=1e-10)
    found, expected = (torch.autograd.grad(each, tensors, upstream) for each in (output, true))
    for gradient, other in zip(found, expected):
        torch.testing.assert_close(gradient, other, rtol=1e-10, atol=1e-10)


@needs_windows
@pytest.mark.usefixtures("active")
def test_the_log_sum_exp_is_handed_out():
    from torch.nn.attention.varlen import AuxRequest

    tensors, _, *offsets = pack("no keys")
    _, log_sum_exp = varlen(*tensors, *offsets, (3, 1), return_aux=AuxRequest(lse=True))
    torch.testing.assert_close(log_sum_exp, definition(*tensors, *offsets, (3, 1))[1].float())


@pytest.mark.skipif(not hasattr(torch.ops.aten, INTO), reason=f"this torch has no {INTO}")
@pytest.mark.usefixtures("active")
def test_an_output_that_is_given_is_filled():
    from torch.nn.attention.varlen import varlen_attn_out

    tensors, _, *offsets = pack("several")
    out = torch.full_like(tensors[0], torch.nan).detach()
    varlen(
        *[tensor.detach() for tensor in tensors],
        *offsets,
        (3, 1),
        lambda *args, **rest: varlen_attn_out(out, *args, **rest),
    )
    torch.testing.assert_close(out, definition(*tensors, *offsets, (3, 1))[0])
    with pytest.raises(ValueError, match=r"out must have the query's shape and dtype, \(20, 4, 8\)"):
        varlen(
            *[tensor.detach() for tensor in tensors],
            *offsets,
            (3, 1),
            lambda *args, **rest: varlen_attn_out(out[:1], *args, **rest),
        )


@pytest.mark.usefixtures("active")
def test_the_op_itself_has_its_gradients():
    tensors, upstream, *offsets = pack("several")
    output, *_ = FORWARD(*tensors, *offsets, 20, 20, 0.0, True, False, window_size_left=3)
    true, _ = definition(*tensors, *offsets, (3, 0))
    found, expected = (torch.autograd.grad(each, tensors, upstream) for each in (output, true))
    for gradient, other in zip(found, expected):
        torch.testing.assert_close(gradient, other, rtol=1e-10, atol=1e-10)


@needs_windows
@pytest.mark.usefixtures("active")
def test_autocast_casts_no_more_than_before():
    tensors, _, *offsets = pack("several", torch.float32)
    expected = varlen(*tensors, *offsets, (3, 1))
    with torch.autocast("cpu", torch.bfloat16):
        output = varlen(*tensors, *offsets, (3, 1))
        assert torch.equal(output, expected)
        assert torch.autograd.grad(output.sum(), tensors)[0].dtype is torch.float32


@needs_windows
@pytest.mark.usefixtures("active")
def test_bad_offsets_are_refused_by_name():
    tensors, _, cu_seqlens_q, _ = pack("several")
    with pytest.raises(ValueError, match="cu_seqlens_q"):
        varlen(*tensors, cu_seqlens_q + 1, cu_seqlens_q + 1, (3, 1))


@needs_windows
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (-1, 3), (3, -1)])
@pytest.mark.usefixtures("active")
def test_where_torch_has_no_kernel_what_is_not_served_is_refused(window):
    tensors, _, *offsets = pack("several")
    with pytest.raises(NotImplementedError, match="torch has no kernel for this device, and attnreg serves"):
        varlen(*tensors, *offsets, window)


NOT_SERVED = {
    "full": {},
    "causal": {"is_causal": True, "window_size_left": -1, "window_size_right": 0},
    "used keys": {
        "window_size_left": 3,
        "window_size_right": 0,
        "seqused_k": torch.tensor([1, 1, 1], dtype=torch.int32),
    },
    "dropout": {"window_size_left": 3, "window_size_right": 0, "dropout_p": 0.25},
}


@pytest.mark.parametrize("given", NOT_SERVED.values(), ids=NOT_SERVED)
def test_what_is_not_served_reaches_the_kernel_that_was_there_as_it_was_given(before, active, given):
    (query, key, value), _, *offsets = pack("several")
    query, key, value = query.detach(), key.detach(), value.detach()
    rest = dict(given)
    args = (query, key, value, *offsets, 20, 19, rest.pop("dropout_p", 0.0), rest.pop("is_causal", False), False)
    output, log_sum_exp, *_ = FORWARD(*args, scale=0.5, **rest)
    assert torch.equal(output, query + 1)
    assert torch.equal(log_sum_exp, torch.ones(H, 20))
    ((name, positional, named),) = before
    assert name == "forward"
    assert all(found is given or found == given for found, given in zip(positional, args))
    assert named == {"scale": 0.5, **rest}


def test_gradients_of_what_is_not_served_come_from_the_kernel_that_was_there(before, active):
    tensors, upstream, *offsets = pack("several")
    output, *_ = FORWARD(*tensors, *offsets, 20, 20, 0.0, True, False)
    output.backward(upstream)
    assert [name for name, *_ in before] == ["forward", "backward"]


def test_a_served_call_does_not_reach_it(before, active):
    tensors, upstream, *offsets = pack("several")
    output, *_ = FORWARD(*tensors, *offsets, 20, 20, 0.0, True, False, window_size_left=2)
    output.backward(upstream)
    assert before == []


def test_a_backend_of_attnreg_that_calls_the_op_reaches_the_kernel_that_was_there(before, active):
    def kernel(query, key, value, window, *, cu_seqlens_q, cu_seqlens_k, scale):
        given = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
        output, log_sum_exp, *_ = FORWARD(
            *given, cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k, 20, 20, 0.0, False, False, scale=scale,
            window_size_left=window.left, window_size_right=window.right,
        )  # fmt: skip
        return output.transpose(0, 1)[None], log_sum_exp[None]

    backend = Backend(
        name="caller", summary="calls torch's op", capability=Capability(dtypes={torch.float32}), local_attention=kernel
    )
    (query, key, value), _, *offsets = pack("several", torch.float32)
    given = [tensor.detach().transpose(0, 1)[None] for tensor in (query, key, value)]
    with attnreg.register(backend), torch.no_grad():
        output = attnreg.local_attention(*given, Window(3, 0), cu_seqlens_q=offsets[0], backend="caller")
        assert torch.equal(output, given[0] + 1)
        with attnreg.use_backend("caller"):
            output, *_ = FORWARD(query, key, value, *offsets, 20, 20, 0.0, True, False, window_size_left=3)
        assert torch.equal(output, query + 1)
    assert len(before) == 2


def test_what_is_restored_is_what_was_there(before):
    tensors, _, *offsets = pack("several")
    call = (*[tensor.detach() for tensor in tensors], *offsets, 20, 20, 0.0, True, False)
    for _ in range(2):
        attention.activate_flash_attention_impl("attnreg")
        assert attention.current_flash_attention_impl() == "attnreg"
        FORWARD(*call, window_size_left=2)
        assert before == []
    restore()
    assert attention.current_flash_attention_impl() is None
    FORWARD(*call, window_size_left=2)
    assert len(before) == 1


def test_a_second_activation_takes_the_place_of_the_first(before):
    tensors, _, *offsets = pack("several")
    call = (*[tensor.detach() for tensor in tensors], *offsets, 20, 20, 0.0, True, False)
    first, second = integration.activate(), integration.activate()
    first.remove()
    FORWARD(*call, window_size_left=2)
    assert before == []
    FORWARD(*call)
    assert len(before) == 1
    second.remove()
    FORWARD(*call, window_size_left=2)
    assert len(before) == 2


def test_a_torch_for_rocm_is_refused(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(RuntimeError, match="built for ROCm"):
        attention.activate_flash_attention_impl("attnreg")
    assert attention.current_flash_attention_impl() is None


def test_activation_warns_of_nothing():
    code = (
        "import torch, attnreg.integrations.torch\n"
        "from torch.nn.attention import activate_flash_attention_impl\n"
        "library = torch.library.Library('aten', 'IMPL')\n"
        "library.impl('_flash_attention_forward', lambda *args: None, 'CPU')\n"
        "activate_flash_attention_impl('attnreg')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_nothing_is_registered_before_it_is_asked_for():
    code = (
        "import attnreg, torch\n"
        "from torch.nn.attention import list_flash_attention_impls\n"
        "assert 'attnreg' not in list_flash_attention_impls()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# On a GPU


def on_gpu(function):
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(needs_windows(skip(function)))


def pack_on_gpu(name, dtype=torch.bfloat16):
    """A larger pack, with as many heads of keys as of queries where this torch takes no fewer."""
    tensors, upstream, *offsets = pack(name, dtype, "cuda", 64, times=30)
    if "enable_gqa" not in PARAMETERS:
        tensors = [each.detach().repeat_interleave(H // each.shape[1], 1).requires_grad_() for each in tensors]
    return tensors, upstream, *offsets


@on_gpu
@pytest.mark.parametrize("way", ["eager", "inductor"])
@pytest.mark.parametrize("window", [(63, 0), (30, 40)], ids=str)
@pytest.mark.parametrize("name", ["several", "to capacity"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("active")
def test_varlen_attn_on_a_gpu_is_right(dtype, name, window, way):
    tensors, upstream, *offsets = pack_on_gpu(name, dtype)
    torch._dynamo.reset()
    function = varlen_attn if way == "eager" else torch.compile(varlen_attn, backend=way, fullgraph=True)
    output = varlen(*tensors, *offsets, window, function)
    true, _ = definition(*tensors, *offsets, window)
    torch.testing.assert_close(output.double().cpu(), true, rtol=2e-2, atol=2e-2)
    found = torch.autograd.grad(output, tensors, upstream)
    for gradient, expected in zip(found, torch.autograd.grad(true, tensors, upstream.double().cpu())):
        torch.testing.assert_close(gradient, expected, rtol=3e-2, atol=3e-2)


@on_gpu
@pytest.mark.usefixtures("active")
def test_a_window_on_a_gpu_runs_on_attnreg(monkeypatch):
    tensors, _, *offsets = pack_on_gpu("several")
    ran = []
    attend = integration.local_attention_with_lse
    monkeypatch.setattr(
        integration, "local_attention_with_lse", lambda *args, **rest: ran.append(args[3]) or attend(*args, **rest)
    )
    output = varlen(*tensors, *offsets, (63, 0))
    varlen(*tensors, *offsets, (-1, 0))
    assert ran == [Window(63, 0)]
    with attnreg.use_backend("torch"):
        torch.testing.assert_close(varlen(*tensors, *offsets, (63, 0)), output, rtol=2e-2, atol=2e-2)


def bits(function, *inputs):
    """The output of a function and its gradients but that of the query, which is added up in any order; before and after."""
    found = []
    for activate in (False, True):
        if activate:
            attention.activate_flash_attention_impl("attnreg")
        try:
            output = function(*inputs)
            upstream = torch.ones_like(output).cumsum(0)
            found.append([output, *torch.autograd.grad(output, inputs[1:3], upstream)])
        finally:
            if activate:
                restore()
    return zip(*found)


@on_gpu
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0)], ids=str)
def test_what_is_not_served_on_a_gpu_keeps_its_bits(window):
    tensors, _, *offsets = pack_on_gpu("several")
    assert all(torch.equal(*pair) for pair in bits(lambda *inputs: varlen(*inputs, *offsets, window), *tensors))


@on_gpu
@pytest.mark.parametrize("is_causal", [False, True])
def test_sdpa_on_a_gpu_keeps_its_bits(is_causal):
    inputs = [torch.randn(2, H, 300, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3)]

    def sdpa(query, key, value):
        with attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=is_causal)

    assert all(torch.equal(*pair) for pair in bits(sdpa, *inputs))


@on_gpu
def test_the_adapter_of_torchs_flash_on_a_gpu_keeps_its_bits():
    (query, key, value), _, cu_seqlens_q, _ = pack_on_gpu("several")

    def flash(*inputs):
        given = [each.transpose(0, 1)[None] for each in inputs]
        return attnreg.local_attention(*given, Window(63, 0), cu_seqlens_q=cu_seqlens_q, backend="flash")

    assert all(torch.equal(*pair) for pair in bits(flash, query, key, value))


@on_gpu
@pytest.mark.usefixtures("active")
def test_a_graph_on_a_gpu_reads_its_offsets_when_it_is_replayed():
    tensors, _, cu_seqlens_q, _ = pack_on_gpu("several")
    tensors, offsets = [each.detach() for each in tensors], cu_seqlens_q.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        varlen(*tensors, offsets, offsets, (63, 0))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = varlen(*tensors, offsets, offsets, (63, 0))
    offsets.copy_(torch.tensor(OFFSETS["to capacity"][0]) * 30)
    graph.replay()
    torch.testing.assert_close(captured, varlen(*tensors, offsets, offsets, (63, 0)), rtol=0, atol=0)
