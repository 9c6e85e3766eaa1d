"""The adapters for other libraries' kernels: what they refuse, and how they bring a call to the library.

Where there is no GPU, the library is stood in for by the definition; on one, the conformance tests run the library itself.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
import threading
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from attnreg_adapters import flash, flash4, flex, packed

import attnreg
from attnreg import Window, empty_like
from attnreg.backend import refusals, why_unavailable
from attnreg.problem import Given
from attnreg.rows import rows_of

CALL = attnreg.Problem(
    op="local_attention",
    device=torch.device("cuda"),
    dtype=torch.bfloat16,
    batch=2,
    heads=4,
    kv_heads=2,
    query_length=300,
    key_length=400,
    head_dim=64,
    value_dim=64,
    window=Window(20, 5),
    needs_grad=True,
)
BIAS = {"given": (("bias", Given((1, 4, 1, 26), torch.float32)),)}
KEY_LENGTHS = {"given": (("key_lengths", Given((2,), torch.int64)),)}
SOFTCAP = {"given": (("softcap", Given()),)}
DROPOUT = {"given": (("dropout_p", Given()), ("seed", Given((1,), torch.int64)))}
GRAD_LOG_SUM_EXP = {"given": (("grad_log_sum_exp", Given()),)}


def packed_of(*, equal=True, **changes):
    """The facts of a packed call."""
    names = ("cu_seqlens_q",) if equal else ("cu_seqlens_q", "cu_seqlens_k")
    given = tuple((name, Given(dtype=torch.int32)) for name in names)
    return {"batch": 1, "given": given, **changes}


def reasons(name, **changes):
    """Why the adapter refuses the call with these changes, on a machine that has what it needs."""
    (backend,) = (status.backend for status in attnreg.backends() if status.name == name)
    return "; ".join(refusals(replace(backend, unavailable=None, library=None), replace(CALL, **changes)))


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("flash", {"dtype": torch.float32}, "the dtype is float32; it takes bfloat16, float16"),
        ("flash", BIAS, "bias is given; it takes cu_seqlens_k, cu_seqlens_q, sinks"),
        ("flash", KEY_LENGTHS, "key_lengths is given"),
        ("flash", SOFTCAP, "softcap is given"),
        ("flash", DROPOUT, "dropout_p is given"),
        ("flash", GRAD_LOG_SUM_EXP, "grad_log_sum_exp"),
        ("flash", packed_of(query_length=2**31), "a length is 2147483648; packed, it counts to 2147483647"),
        (
            "flash",
            packed_of(key_length=290, window=Window(20, 290)),
            "the window's right side, 290, reaches past all 290 keys",
        ),
        ("flash", {"head_dim": 60, "value_dim": 60}, "the head_dim of query and key is 60"),
        ("flash", {"head_dim": 264, "value_dim": 264}, "the head_dim of query and key is 264"),
        ("flash", {"value_dim": 32}, "E = 64 and D = 32 differ; it takes equal head dims only"),
        ("flash", {"key_length": 290}, "the first 5 queries see no key"),
        (
            "flash",
            {"key_length": 290, "window": Window(20, 290)},
            "the window's right side, 290, reaches past all 290 keys",
        ),
        (
            "flash",
            {"key_length": 290, "window": Window(999, 999)},
            "the window's right side, 999, reaches past all 290 keys",
        ),
        ("flash", {"op": "local_dot_product", "value_dim": 0}, "it has no local_dot_product"),
        ("flash", {"device": torch.device("cpu")}, "the device is cpu; it takes cuda"),
        ("flash4", {"dtype": torch.float32}, "the dtype is float32; it takes bfloat16, float16"),
        ("flash4", BIAS, "bias is given; it takes cu_seqlens_k, cu_seqlens_q, grad_log_sum_exp, sinks, softcap"),
        ("flash4", KEY_LENGTHS, "key_lengths is given"),
        ("flash4", DROPOUT, "dropout_p is given"),
        ("flash4", packed_of(head_dim=48, value_dim=48), "its gradients are wrong at E = 48"),
        ("flash4", {"head_dim": 60, "value_dim": 60}, "the head_dim of query and key is 60"),
        ("flash4", {"value_dim": 32}, "E = 64 and D = 32 differ; it takes equal head dims only"),
        ("flash4", {"key_length": 290}, "the first 5 queries see no key"),
        *(
            ("flash4", {"head_dim": size, "value_dim": size}, f"its gradients are wrong at E = {size}")
            for size in (8, 16, 40, 48, 72, 80, 104, 112)
        ),
        ("flex", {"dtype": torch.float64}, "the dtype is float64"),
        ("flex", {"dtype": torch.float32}, "gradients are needed in float32"),
        ("flex", DROPOUT, "dropout_p is given; it takes bias"),
        (
            "flex",
            {**KEY_LENGTHS, "batch": 32, "query_length": 2**17, "key_length": 2**17},
            "its masks for 32 sequences list 33554432 pairs of blocks",
        ),
        ("flex", {"head_dim": 8}, "the head_dim of query and key is 8; it takes 16 to 256"),
        ("flex", {"key_length": flex.MOST_POSITIONS + 1}, "its mask lists all pairs of blocks"),
    ],
)
def test_what_the_library_cannot_do_is_refused_with_the_reason(name, changes, reason):
    assert reason in reasons(name, **changes)


@pytest.mark.parametrize(("capability", "able"), [((8, 0), True), ((9, 0), True), ((8, 9), False), ((12, 0), False)])
def test_flash_has_gradients_of_the_largest_head_dims_on_large_gpus_alone(monkeypatch, capability, able):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    refused = reasons("flash", head_dim=200, value_dim=200)
    assert able or "need compute capability 8.0 or 9.0; this is {}.{}".format(*capability) in refused
    assert bool(refused) != able
    assert not reasons("flash", head_dim=200, value_dim=200, needs_grad=False)
    assert not reasons("flash", head_dim=192, value_dim=192)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("flash", {}),
        ("flash", {"dtype": torch.float16, "head_dim": 192, "value_dim": 192}),
        ("flash", {"head_dim": 256, "value_dim": 256, "needs_grad": False}),
        ("flash", {"key_length": 295}),
        *(("flash4", {"head_dim": size, "value_dim": size, "key_length": 295}) for size in (24, 32, 96, 136, 144, 256)),
        ("flash4", {"head_dim": 80, "value_dim": 80, "needs_grad": False}),
        ("flex", {}),
        ("flash", packed_of()),
        ("flash", packed_of(key_length=290, equal=False)),
        ("flash4", packed_of(key_length=290, equal=False)),
        ("flash4", SOFTCAP),
        ("flash4", GRAD_LOG_SUM_EXP),
        ("flex", BIAS),
        ("flex", KEY_LENGTHS),
        ("flex", SOFTCAP),
        ("flex", GRAD_LOG_SUM_EXP),
        ("flex", packed_of(equal=False)),
        ("flex", {"dtype": torch.float32, "head_dim": 48, "value_dim": 33, "needs_grad": False}),
        ("flex", {"key_length": 10}),
    ],
)
def test_nothing_else_is_refused(name, changes):
    assert reasons(name, **changes) == ""


LAYOUTS = {
    "contiguous": lambda heads, length: torch.randn(2, heads, length, 8),
    "lengths_first": lambda heads, length: torch.randn(2, length, heads, 8).transpose(1, 2),
    "one_of_three": lambda heads, length: torch.randn(2, length, 3, heads, 8)[:, :, 1].transpose(1, 2),
    "part_of_heads_first": lambda heads, length: torch.randn(2, heads + 1, length, 8)[:, 1:],
    "expanded": lambda heads, length: torch.randn(1, 1, length, 8).expand(2, heads, length, 8),
    "unaligned": lambda heads, length: torch.randn(2, heads, length, 9)[..., 1:],
    "unaligned_lengths_first": lambda heads, length: torch.randn(2, length, heads, 9)[..., 1:].transpose(1, 2),
}
# In these orders the libraries read and write as they are.
THEIR_OWN = ("lengths_first", "one_of_three")
WINDOW = Window(9, 7)


def assert_right(got, expected, tensors):
    """Output and gradients equal what is expected, and lie in memory as the tensors that they belong to."""
    for name, right in expected.items():
        if name == "sinks":
            assert got[name].dtype == tensors[name].dtype
            torch.testing.assert_close(got[name].float(), right.float(), rtol=1e-3, atol=1e-5)
            continue
        torch.testing.assert_close(got[name], right, msg=lambda text, name=name: f"{name}: {text}")
        its = tensors["query" if name == "output" else name]
        for own, wanted, size in zip(got[name].stride(), empty_like(its).stride(), its.shape):
            assert own == wanted or size == 1, name


NOT_GIVEN = {
    flash: ("cu_seqlens_q", "cu_seqlens_k", "sinks"),
    flash4: ("cu_seqlens_q", "cu_seqlens_k", "softcap", "sinks"),
    flex: (
        *("bias", "key_lengths", "key_starts", "query_starts", "cu_seqlens_q", "cu_seqlens_k"),
        *("softcap", "sinks"),
    ),
}


def forward_and_backward(functions, tensors, needs_grad, window=WINDOW, **arguments):
    """The adapter's results and gradients."""
    query, key, value = (tensors[name] for name in ("query", "key", "value"))
    arguments = dict.fromkeys(NOT_GIVEN[functions]) | arguments
    if "sinks" in tensors:
        arguments["sinks"] = tensors["sinks"]
    output, log_sum_exp = functions.local_attention(query, key, value, window, **arguments)
    assert log_sum_exp.is_contiguous()
    assert log_sum_exp.shape == query.shape[:3]
    if functions is flash4:
        arguments["grad_log_sum_exp"] = tensors.get("grad_log_sum_exp")
    gradients = functions.local_attention_backward(
        tensors["grad_output"],
        *(query, key, value, output, log_sum_exp, window),
        **arguments,
        needs_grad=frozenset(needs_grad),
    )
    assert gradients.keys() == set(needs_grad)
    return {"output": output, **gradients}, log_sum_exp


def truth(tensors, needs_grad, window=WINDOW, **arguments):
    """The same by the definition."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    inputs = (leaves["query"], leaves["key"], leaves["value"])
    if "sinks" in leaves:
        arguments["sinks"] = leaves["sinks"]
    output, log_sum_exp = attnreg.local_attention_with_lse(*inputs, window, **arguments, backend="torch")
    incoming = [(output, tensors["grad_output"])]
    if "grad_log_sum_exp" in tensors:
        incoming.append((log_sum_exp, tensors["grad_log_sum_exp"]))
    torch.autograd.backward(*zip(*incoming))
    gradients = {name: leaves[name].grad for name in needs_grad}
    return {"output": output.detach(), **gradients}, log_sum_exp.detach()


def tensors_of(layout, key_length):
    """Tensors of a call in a layout; keys that no query sees are NaN."""
    torch.manual_seed(0)
    sizes = {"query": (4, 40), "key": (2, key_length), "value": (2, key_length), "grad_output": (4, 40)}
    tensors = {name: LAYOUTS[layout](*size) for name, size in sizes.items()}
    for name in ("key", "value"):
        rows = tensors[name][:1, :1] if layout == "expanded" else tensors[name]
        rows[:, :, : max(key_length - 40 - WINDOW.left, 0)] = torch.nan
    return tensors


def _definition(query, key, value, scale, left, right, **options):
    """Of tensors (N, L, H, E). A library reads whole tiles: what it is given of NaN may be anywhere in its results."""
    assert not any(tensor.isnan().any() for tensor in (query, key, value))
    rows = (tensor.transpose(1, 2) for tensor in (query, key, value))
    output, log_sum_exp = attnreg.local_attention_with_lse(
        *rows, Window(left, right), scale=scale, backend="torch", **options
    )
    return output.transpose(1, 2), log_sum_exp


def _gradients(query, key, value, grad_output, output, log_sum_exp, scale, left, right, softcap=None, dlse=None):
    """By a library's formulas, from what it is given: weights from the log-sum-exp, D from the output."""
    assert not any(tensor.isnan().any() for tensor in (query, key, value, grad_output, output))
    group = query.size(2) // key.size(2)
    q, do, o = (tensor.transpose(1, 2) for tensor in (query, grad_output, output))
    k, v = (tensor.transpose(1, 2).repeat_interleave(group, 1) for tensor in (key, value))
    scores = scale * q @ k.mT
    slope = 1 if softcap is None else 1 - (scores / softcap).tanh() ** 2
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    offset = torch.arange(k.size(2)) - torch.arange(q.size(2))[:, None] - (k.size(2) - q.size(2))
    weights = (scores - log_sum_exp[..., None]).exp().masked_fill((offset < -left) | (offset > right), 0)
    d = (do * o).sum(-1) - (0 if dlse is None else dlse)
    of_scores = scale * slope * weights * (do @ v.mT - d[..., None])
    of_keys = (of_scores.mT @ q, weights.mT @ do)
    return [
        (of_scores @ k).transpose(1, 2),
        *(each.unflatten(1, (-1, group)).sum(2).transpose(1, 2) for each in of_keys),
    ]


def _sequences(of_queries, of_keys):
    """Slices of rows and of keys. Offsets follow each other from 0 without gaps."""
    assert of_queries.dtype == of_keys.dtype == torch.int32
    assert of_queries.is_contiguous()
    assert of_keys.is_contiguous()
    offsets = [each.tolist() for each in (of_queries, of_keys)]
    assert all(each[0] == 0 and each == sorted(each) for each in offsets)
    return zip(*([slice(*pair) for pair in itertools.pairwise(each)] for each in offsets))


def _assert_loadable(*tensors):
    """Rows of (N, L, H, E), or (T, H, E), begin where 16 bytes may be loaded."""
    for tensor in tensors:
        *strides, last = tensor.stride()
        assert last == 1
        assert all(stride * tensor.element_size() % 16 == 0 for stride in strides)
        assert tensor.data_ptr() % 16 == 0


@pytest.fixture
def no_copies(monkeypatch):
    """An adapter that copies fails."""

    def forbidden(*_):
        raise AssertionError("a tensor is copied")

    monkeypatch.setattr("attnreg_adapters.layout.empty_like", forbidden)


# flash


def _like_the_library(operator):
    """Check a call as the library would: its schema, on tensors without memory, and what its kernels need."""

    def check(*arguments, scale, **options):
        assert scale > 0
        tensors = [each for each in arguments if isinstance(each, torch.Tensor) and each.is_floating_point()]
        _assert_loadable(*(tensor for tensor in tensors if tensor.dim() == arguments[0].dim()))
        on_meta = [each.to("meta") if isinstance(each, torch.Tensor) else each for each in arguments]
        return operator(*on_meta, scale=scale, **options)

    return check


@pytest.fixture
def library(monkeypatch):
    """The definition in the place of ``aten::_flash_attention_forward`` and its backward: results as ``torch.empty_like``.

    It reads of a sequence what belongs to it, nothing of one without rows or without keys, and writes what has a sequence.
    """
    check_forward = _like_the_library(torch.ops.aten._flash_attention_forward.default)
    check_backward = _like_the_library(torch.ops.aten._flash_attention_backward.default)

    def forward(query, key, value, *others, scale, window_size_left, window_size_right):
        sizes = {"window_size_left": window_size_left, "window_size_right": window_size_right}
        check_forward(query, key, value, *others, scale=scale, **sizes)
        of_queries, of_keys, most_queries, most_keys, *_ = others
        output = torch.full_like(query, torch.nan)
        if of_queries is None:
            found, log_sum_exp = _definition(query, key, value, scale, *sizes.values())
            return output.copy_(found), log_sum_exp, None, None, None
        log_sum_exp = torch.full((query.size(1), query.size(0)), torch.nan)
        assert most_queries > 1
        for rows, keys in _sequences(of_queries, of_keys):
            assert rows.stop - rows.start <= most_queries
            assert keys.stop - keys.start <= most_keys
            output[rows], log_sum_exp[:, rows] = 0, math.inf
            if rows.start < rows.stop and keys.start < keys.stop:
                found, statistic = _definition(
                    *(each[None] for each in (query[rows], key[keys], value[keys])), scale, *sizes.values()
                )
                output[rows], log_sum_exp[:, rows] = found[0], statistic[0]
        return output, log_sum_exp, None, None, None

    def backward(
        grad_output,
        query,
        key,
        value,
        output,
        log_sum_exp,
        *others,
        scale,
        window_size_left,
        window_size_right,
    ):
        assert torch.get_deterministic_debug_mode() == 2
        sizes = {"window_size_left": window_size_left, "window_size_right": window_size_right}
        check_backward(grad_output, query, key, value, output, log_sum_exp, *others, scale=scale, **sizes)
        of_queries, of_keys, *_ = others
        gradients = [torch.full_like(each, torch.nan) for each in (query, key, value)]
        if of_queries is None:
            found = _gradients(query, key, value, grad_output, output, log_sum_exp, scale, *sizes.values())
            return [into.copy_(gradient) for into, gradient in zip(gradients, found)]
        for rows, keys in _sequences(of_queries, of_keys):
            parts = [gradients[0][rows], gradients[1][keys], gradients[2][keys]]
            found = (0, 0, 0)
            if rows.start < rows.stop and keys.start < keys.stop:
                given = (query[rows], key[keys], value[keys], grad_output[rows], output[rows], log_sum_exp[:, rows])
                found = _gradients(*(each[None] for each in given), scale, *sizes.values())
            for part, gradient in zip(parts, found):
                part[:] = gradient
        return gradients

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)


@pytest.mark.parametrize("scale", [0.3, -0.3, 0.0])
@pytest.mark.parametrize("key_length", [40, 60, 33])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("library")
def test_flash_gets_the_call_and_gives_the_results_back_as_the_contract_has_them(scale, key_length, layout):
    tensors, needs_grad = tensors_of(layout, key_length), ("query", "value")
    got, _ = forward_and_backward(flash, tensors, needs_grad, scale=scale)
    assert_right(got, truth(tensors, needs_grad, scale=scale)[0], tensors)


@pytest.mark.parametrize("layout", [*THEIR_OWN, "contiguous"])
@pytest.mark.usefixtures("library", "no_copies")
def test_flash_copies_nothing_where_the_library_reads_and_writes_in_that_order(layout):
    forward_and_backward(flash, tensors_of(layout, 40), ("query", "key", "value"), scale=0.3)


def test_flash_leaves_torchs_setting_of_determinism_as_it_was():
    entered, leave = threading.Event(), threading.Event()

    def in_another_thread():
        with flash._deterministic():
            entered.set()
            leave.wait(5)

    torch.set_deterministic_debug_mode("warn")
    try:
        other = threading.Thread(target=in_another_thread)
        other.start()
        assert entered.wait(5)
        threading.Timer(0.05, leave.set).start()
        with flash._deterministic():  # not before the other has left
            assert leave.is_set()
            assert torch.get_deterministic_debug_mode() == 2
        other.join()
        assert torch.get_deterministic_debug_mode() == 1
    finally:
        torch.set_deterministic_debug_mode("default")


# flash4


@pytest.fixture
def flash4_library(monkeypatch):
    """The definition in the place of what ``flash_attn.cute.flash_attn_func`` calls: it writes its results where it is told."""

    def _flash_attn_fwd(
        q,
        k,
        v,
        softmax_scale,
        window_size_left,
        window_size_right,
        return_lse,
        out,
        cu_seqlens_q,
        cu_seqlens_k,
        softcap,
        learnable_sink,
    ):
        assert softmax_scale > 0
        assert return_lse
        _assert_loadable(q, k, v, out)
        options = {"softcap": softcap, "sinks": learnable_sink}
        sizes = (softmax_scale, window_size_left, window_size_right)
        if cu_seqlens_q is None:
            found, log_sum_exp = _definition(q, k, v, *sizes, **options)
            out.copy_(found)
            return out, log_sum_exp, None, None, None
        # Of what it multiplies by a weight of 0; scores are selected.
        assert not v.isnan().any()
        log_sum_exp = q.new_full((q.size(1), q.size(0)), torch.nan)
        for rows, keys in _sequences(cu_seqlens_q, cu_seqlens_k):
            if rows.start < rows.stop and keys.start < keys.stop:
                found, statistic = _definition(*(each[None] for each in (q[rows], k[keys], v[keys])), *sizes, **options)
                out[rows], log_sum_exp[:, rows] = found[0], statistic[0]
        return out, log_sum_exp, None, None, None

    def _flash_attn_bwd(
        q,
        k,
        v,
        out,
        dout,
        lse,
        softmax_scale,
        window_size_left,
        window_size_right,
        deterministic,
        dq,
        dk,
        dv,
        dlse,
        cu_seqlens_q,
        cu_seqlens_k,
        softcap,
        learnable_sink,
    ):
        assert deterministic
        _assert_loadable(q, k, v, out, dout, dq, dk, dv)
        sizes = (softmax_scale, window_size_left, window_size_right, softcap or None)
        d = (dout * out).sum(-1).mT - (0 if dlse is None else dlse)
        if cu_seqlens_q is None:
            assert lse.shape == (q.size(0), q.size(2), q.size(1))
            for into, gradient in zip((dq, dk, dv), _gradients(q, k, v, dout, out, lse, *sizes, dlse)):
                into.copy_(gradient)
            parts = (0, 2)
        else:
            assert lse.shape == (q.size(1), q.size(0))
            assert not any(each.isnan().any() for each in (q, k, v, dout))
            for rows, keys in _sequences(cu_seqlens_q, cu_seqlens_k):
                dq[rows], dk[keys], dv[keys] = 0, 0, 0
                if rows.start < rows.stop and keys.start < keys.stop:
                    given = [each[None] for each in (q[rows], k[keys], v[keys], dout[rows], out[rows], lse[:, rows])]
                    of_statistic = None if dlse is None else dlse[None, :, rows]
                    dq[rows], dk[keys], dv[keys] = (each[0] for each in _gradients(*given, *sizes, of_statistic))
            parts = 1
        if learnable_sink is None:
            return dq, dk, dv
        weight = (learnable_sink[:, None] - lse).exp().where(lse != -torch.inf, 1)
        return dq, dk, dv, -(weight * d).sum(parts)

    interface = ModuleType("flash_attn.cute.interface")
    interface._flash_attn_fwd, interface._flash_attn_bwd = _flash_attn_fwd, _flash_attn_bwd
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    return interface


@pytest.mark.parametrize("scale", [0.3, -0.3, 0.0])
@pytest.mark.parametrize("key_length", [40, 60, 33])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("flash4_library", "poisoned_memory")
def test_flash4_gets_the_call_and_gives_the_results_back_as_the_contract_has_them(scale, key_length, layout):
    tensors, needs_grad = tensors_of(layout, key_length), ("query", "key", "value")
    got, _ = forward_and_backward(flash4, tensors, needs_grad, scale=scale)
    assert_right(got, truth(tensors, needs_grad, scale=scale)[0], tensors)


@pytest.mark.parametrize("layout", [*THEIR_OWN, "contiguous"])
@pytest.mark.usefixtures("flash4_library", "no_copies")
def test_flash4_copies_nothing_where_rows_begin_where_it_may_load_them(layout):
    forward_and_backward(flash4, tensors_of(layout, 60), ("query",), scale=0.3)


@pytest.mark.parametrize(
    ("capability", "installed", "reason"),
    [
        ((9, 0), True, None),
        ((9, 0), False, "not-there is not installed"),
        ((8, 0), True, "it was tested on compute capability 9.0 alone; this is 8.0"),
        ((10, 0), True, "it was tested on compute capability 9.0 alone; this is 10.0"),
    ],
)
def test_flash4_says_what_it_lacks(monkeypatch, capability, installed, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    (backend,) = (status.backend for status in attnreg.backends() if status.name == "flash4")
    assert backend.library == "flash-attn-4"
    assert why_unavailable(replace(backend, library="pluggy" if installed else "not-there")) == reason


def test_flash4_says_why_the_library_cannot_be_called(monkeypatch, flash4_library):
    assert flash4.prepare() is None
    monkeypatch.setattr(
        flash4_library,
        "_flash_attn_bwd",
        lambda q, dq, dk, dv, deterministic, softmax_scale, cu_seqlens_q, cu_seqlens_k, softcap, learnable_sink: None,
    )
    assert flash4.prepare() == "flash-attn-4 has changed: <lambda> takes no dlse, window_size_left, window_size_right"
    monkeypatch.setitem(sys.modules, flash4_library.__name__, None)
    assert flash4.prepare().startswith("flash-attn-4 cannot be imported: ModuleNotFoundError")


# packed and further arguments, of both


def packed_tensors(layout, lengths):
    tensors = tensors_of(layout, lengths[1])
    for name, tensor in tensors.items():
        size = (tensor.size(1), lengths[0] if name in ("query", "grad_output") else lengths[1])
        tensors[name] = LAYOUTS[layout](*size)[:1]
    return tensors


def with_nan(tensors, sees, seen):
    """What belongs to rows that see no key and to keys that no row sees is NaN."""
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if name in ("key", "value"):
            tensor[:, :, ~seen] = torch.nan
        elif name != "sinks":
            tensor[:, :, ~sees] = torch.nan
    return tensors


def what_is_seen(lengths, window, offsets):
    mask = torch.zeros(lengths, dtype=torch.bool)
    of_queries, of_keys = offsets["cu_seqlens_q"], offsets.get("cu_seqlens_k", offsets["cu_seqlens_q"])
    for (begin, end), (first, last) in zip(
        itertools.pairwise(of_queries.tolist()), itertools.pairwise(of_keys.tolist())
    ):
        for row in range(begin, end):
            position = last - end + row
            mask[row, max(position - window.left, first) : max(min(position + window.right + 1, last), 0)] = True
    return mask.any(1), mask.any(0)


PACKS = {
    "whole": ((40, 40), {"cu_seqlens_q": [0, 1, 1, 24, 40]}),
    "to_capacity": ((40, 40), {"cu_seqlens_q": [0, 11, 30, 30, 30]}),
    "no_rows": ((40, 40), {"cu_seqlens_q": [0, 0]}),
    "one_row": ((1, 1), {"cu_seqlens_q": [0, 1]}),
    "unequal": ((60, 70), {"cu_seqlens_q": [0, 5, 25, 25, 40, 50, 57], "cu_seqlens_k": [0, 30, 33, 40, 40, 50, 68]}),
}
# As only a GPU's tensors can be, whose values are not looked at.
UNCHECKED_PACKS = PACKS | {
    "between": ((40, 40), {"cu_seqlens_q": [3, 4, 38]}),
    "between_unequal": ((40, 50), {"cu_seqlens_q": [3, 4, 38], "cu_seqlens_k": [5, 5, 45]}),
}


@pytest.mark.parametrize(
    ("layout", "index"),
    [("contiguous", torch.int32), ("one_of_three", torch.int64), ("unaligned_lengths_first", torch.int32)],
    ids=str,
)
@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize(
    ("functions", "options"),
    [
        (flash, {}),
        (flash, {"sinks": True}),
        (flash4, {}),
        (flash4, {"sinks": True, "softcap": 1.5, "grad_log_sum_exp": True}),
        (flash4, {"grad_log_sum_exp": True}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@pytest.mark.usefixtures("library", "flash4_library", "poisoned_memory")
def test_packed_sequences_reach_the_library_and_nothing_else_of_the_pack_does(functions, options, pack, layout, index):
    (lengths, offsets) = PACKS[pack]
    offsets = {name: torch.tensor(numbers, dtype=index) for name, numbers in offsets.items()}
    tensors, given = packed_tensors(layout, lengths), dict(options)
    if given.pop("sinks", False):
        tensors["sinks"] = torch.tensor(
            [0.5, -torch.inf, 3.0, -1.0], dtype=torch.float64 if index is torch.int64 else torch.float16
        )
    if given.pop("grad_log_sum_exp", False):
        tensors["grad_log_sum_exp"] = torch.randn(1, 4, lengths[0])
    needs_grad = ("query", "key", "value", *(["sinks"] if "sinks" in tensors else []))
    sees, seen = what_is_seen(lengths, WINDOW, offsets)
    expected, right = truth(tensors, needs_grad, scale=0.3, **offsets, **given)
    hidden = with_nan(tensors, sees, seen)
    got, log_sum_exp = forward_and_backward(functions, hidden, needs_grad, scale=0.3, **offsets, **given)
    assert_right(got, expected, hidden)
    torch.testing.assert_close(log_sum_exp, right)


@pytest.mark.parametrize(
    ("functions", "options"),
    [(flash, {}), (flash4, {}), (flash4, {"softcap": 1.5}), (flash4, {"grad_log_sum_exp": True})],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@pytest.mark.usefixtures("library", "flash4_library", "poisoned_memory")
def test_sinks_soft_cap_and_a_gradient_of_the_log_sum_exp_are_as_the_contract_has_them(functions, options):
    tensors, given = tensors_of("lengths_first", 60), dict(options)
    tensors["sinks"] = torch.tensor([0.5, -torch.inf, 30.0, -1.0])
    if given.pop("grad_log_sum_exp", False):
        tensors["grad_log_sum_exp"] = torch.randn(2, 4, 40)
    needs_grad = ("query", "key", "value", "sinks")
    expected, right = truth(tensors, needs_grad, scale=-0.3, **given)
    got, log_sum_exp = forward_and_backward(functions, tensors, needs_grad, scale=-0.3, **given)
    assert_right(got, expected, tensors)
    torch.testing.assert_close(log_sum_exp, right)


@pytest.mark.parametrize("pack", UNCHECKED_PACKS)
@pytest.mark.parametrize("window", [Window(0, 0), Window(3, 1), Window(2, 90), Window(200, 200)], ids=str)
def test_sequences_hold_all_of_a_pack_and_each_with_rows_and_keys_sees_itself_wholly(pack, window):
    (queries, keys), offsets = UNCHECKED_PACKS[pack]
    offsets = {name: torch.tensor(numbers) for name, numbers in offsets.items()}
    found = packed.sequences_of(queries, keys, window, offsets["cu_seqlens_q"], offsets.get("cu_seqlens_k"))
    assert len(found.of_queries) == len(found.of_keys)
    for own, length in ((found.of_queries, queries), (found.of_keys, keys)):
        assert own[0] == 0
        assert own[-1] == length
        assert (own.diff() >= 0).all()
    sees, seen = what_is_seen((queries, keys), window, offsets)
    assert torch.equal(found.rows_that_see(queries)[:, 0], sees)
    assert torch.equal(found.keys_that_are_seen(keys)[:, 0], seen)
    whole = {"cu_seqlens_q": found.of_queries, "cu_seqlens_k": found.of_keys}
    assert all(torch.equal(*pair) for pair in zip(what_is_seen((queries, keys), window, whole), (sees, seen)))


def test_offsets_outside_of_the_pack_are_cut_to_it():
    wild = torch.tensor([-5, 3, 2**40])
    found = packed.sequences_of(10, 10, Window(1, 1), wild, None)
    assert found.of_queries.tolist() == [0, 0, 0, 3, 10, 10, 10]
    assert found.of_keys.tolist() == [0, 0, 0, 3, 10, 10, 10]


def test_more_sequences_than_the_libraries_take_are_refused_where_they_are_given():
    offsets = torch.zeros(2**16, dtype=torch.int64)
    packed.sequences_of(10, 10, Window(1, 1), offsets[: 2**16 - 4], None)
    with pytest.raises(
        ValueError, match="cu_seqlens_q: 65537 sequences have to be told apart; the library takes 65535"
    ):
        packed.sequences_of(10, 10, Window(1, 1), offsets[: 2**16 - 2], None)
    with pytest.raises(ValueError, match="65538 sequences"):
        packed.sequences_of(10, 10, Window(1, 1), offsets[: 2**15], offsets[: 2**15])


def test_workspaces_count_what_packed_calls_of_many_sequences_need():
    large = replace(CALL, **packed_of(query_length=2**20, key_length=2**20))
    assert flash4.workspace(large) > flash4.workspace(replace(large, given=())) + 2**30
    assert flash.workspace(large) >= 4 * 2**20 * 4 * 64
    assert flash.workspace(replace(large, needs_grad=False)) == 0
    assert flash4.workspace(replace(large, needs_grad=False)) == 2 * 2**20 * 2 * 64


# flex


@pytest.fixture
def uncompiled(monkeypatch):
    """FlexAttention as torch runs it without compiling: slow, with the same mask and score function.

    All of a call is one tile then, and what has weight 0 is multiplied. Its gradients are those of any device.
    """
    import torch.nn.attention.flex_attention as library

    monkeypatch.setattr(flex, "_compiled", lambda: library.flex_attention)
    monkeypatch.setattr(library, "_validate_device", lambda *_: None)


def flexed(query, key, value, window, **arguments):
    return flex.local_attention(query, key, value, window, **(dict.fromkeys(NOT_GIVEN[flex]) | arguments))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("bias_shape", [None, (1, 1, 1, 49), (2, 4, 300, 49), (1, 4, 300, 1)])
@pytest.mark.parametrize("key_length", [300, 420, 260])
@pytest.mark.usefixtures("uncompiled")
def test_flex_gives_the_results_as_the_contract_has_them(key_length, bias_shape):
    torch.manual_seed(0)
    window = Window(37, 11)
    sizes = {"query": (4, 300, 16), "key": (2, key_length, 16), "value": (2, key_length, 24)}
    query, key, value = (torch.randn(2, length, heads, dim).transpose(1, 2) for heads, length, dim in sizes.values())
    bias = None if bias_shape is None else torch.randn(bias_shape)
    if bias is not None:
        bias[torch.rand(bias_shape) < 0.2] = -torch.inf
    expected = attnreg.local_attention(query, key, value, window, bias=bias, scale=0.3, backend="torch")
    scores = attnreg.local_dot_product(query, key, window, bias=bias, scale=0.3, backend="torch")
    # Queries that see no key and keys that no query sees may be NaN.
    query[(scores == -torch.inf).all(-1)] = torch.nan
    unseen = _unseen(scores, key_length, window)
    key[unseen], value[unseen] = torch.nan, torch.nan
    output, log_sum_exp = flexed(query, key, value, window, bias=bias, scale=0.3)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(log_sum_exp, scores.logsumexp(-1))
    assert output.stride() == empty_like(query, 24).stride()


def _unseen(scores, key_length, window, position=None):
    """The keys (N, Hkv, Lk) of two key/value heads that no row sees."""
    visible = (scores != -torch.inf).unflatten(1, (2, -1)).any(2)
    if position is None:
        position = torch.arange(scores.size(2))[None] + key_length - scores.size(2)
    keys = (position[..., None] - window.left + torch.arange(window.size)).expand(scores.size(0), -1, -1)
    unseen = torch.ones(scores.size(0), 2, key_length, dtype=torch.bool)
    for n, h in itertools.product(range(scores.size(0)), range(2)):
        unseen[n, h, keys[n][visible[n, h]]] = False
    return unseen


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.usefixtures("uncompiled")
def test_flex_hides_nothing_by_a_finite_bias_and_everything_by_an_infinite_one():
    tensor, window = torch.randn(1, 2, 200, 16), Window(3, 0)
    bias = torch.full((1, 2, 1, 4), -1e300, dtype=torch.float64)
    bias[:, 1] = -torch.inf
    output, log_sum_exp = flexed(tensor, tensor, tensor, window, bias=bias, scale=0.3)
    even = attnreg.local_attention(tensor * 0, tensor, tensor, window, backend="torch")
    torch.testing.assert_close(output[:, 0], even[:, 0])
    assert (output[:, 1] == 0).all()
    assert (log_sum_exp[:, 1] == -torch.inf).all()


def _placed(name):
    """Arguments that place two sequences of 200 rows and 300 keys, or pack them, among them rows that see no key."""
    return {
        "nothing": {},
        "key_lengths": {"key_lengths": torch.tensor([300, 111], dtype=torch.int32)},
        "key_starts": {"key_starts": torch.tensor([280, 0])},
        "query_starts": {"query_starts": torch.tensor([2**31 + 7, 150])},
        "all_of_them": {
            "key_lengths": torch.tensor([290, 0]),
            "key_starts": torch.tensor([7, 0]),
            "query_starts": torch.tensor([-90, 3]),
        },
        "packed": {"cu_seqlens_q": torch.tensor([0, 1, 1, 130, 180, 180])},
        "packed_unequal": {
            "cu_seqlens_q": torch.tensor([0, 60, 60, 140, 150, 180], dtype=torch.int32),
            "cu_seqlens_k": torch.tensor([0, 10, 30, 30, 210, 290], dtype=torch.int32),
        },
    }[name]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("bias_shape", "options"),
    [
        (None, {"softcap": 0.8, "sinks": True}),
        ((1, 4, 200, 49), {}),
        ((-1, 1, 1, 49), {"softcap": 0.8, "sinks": True}),
        ((1, 4, 200, 1), {"sinks": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "placing",
    ["nothing", "key_lengths", "key_starts", "query_starts", "all_of_them", "packed", "packed_unequal"],
)
def test_flex_has_rows_and_gradients_as_the_contract_has_them(placing, bias_shape, options):
    torch.manual_seed(0)
    window, placed, options = Window(37, 11), _placed(placing), dict(options)
    batch = 1 if "cu_seqlens_q" in placed else 2
    sizes = {"query": (4, 200, 16), "key": (2, 300, 16), "value": (2, 300, 24)}
    leaves = {name: torch.randn(batch, length, h, dim).transpose(1, 2) for name, (h, length, dim) in sizes.items()}
    if options.pop("sinks", False):
        leaves["sinks"] = torch.tensor([0.5, -torch.inf, 30.0, -1.0], dtype=torch.float64)
    if bias_shape is not None:
        leaves["bias"] = torch.randn(*(batch if size == -1 else size for size in bias_shape))
        leaves["bias"][torch.rand(leaves["bias"].shape) < 0.2] = -torch.inf
    grads = (torch.randn(batch, 4, 200, 24), torch.randn(batch, 4, 200))

    def results(function, tensors, grads):
        learned = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
        further = {name: learned[name] for name in ("sinks", "bias") if name in learned}
        inputs = (learned["query"], learned["key"], learned["value"])
        found = function(*inputs, window, scale=0.3, **placed, **options, **further)
        gradients = torch.autograd.grad(found, list(learned.values()), grads)
        return dict(zip(("output", "log_sum_exp", *learned), (*found, *gradients)))

    scores = attnreg.local_dot_product(
        leaves["query"], leaves["key"], window, bias=leaves.get("bias"), **placed, backend="torch"
    )
    hidden = (scores == -torch.inf).all(-1)
    unseen = _unseen(scores, 300, window, rows_of(200, 300, torch.device("cpu"), **placed).position(200))
    definition = functools.partial(attnreg.local_attention_with_lse, backend="torch")
    expected = results(definition, leaves, (grads[0], grads[1].masked_fill(hidden, 0)))
    given = {name: tensor.clone() for name, tensor in leaves.items()}
    given["query"][hidden], given["key"][unseen], given["value"][unseen] = torch.nan, torch.nan, torch.nan
    for grad in grads:
        grad[hidden] = torch.nan
    got = results(flexed, given, grads)
    for name, right in expected.items():
        torch.testing.assert_close(
            got[name], right, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    with torch.no_grad():
        further = {name: given[name] for name in ("sinks", "bias") if name in given}
        without = flexed(
            given["query"], given["key"], given["value"], window, scale=0.3, **placed, **options, **further
        )
    for tensor, name in zip(without, ("output", "log_sum_exp")):
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=2e-5)
    assert without[0].stride() == empty_like(given["query"], 24).stride()
    assert without[1].is_contiguous()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("lengths", [(300, 300), (300, 200), (200, 300)])
def test_flex_lets_nothing_of_rows_that_see_no_key_into_gradients(lengths):
    torch.manual_seed(0)
    window, (queries, keys) = Window(37, 11), lengths
    query, key, value = torch.randn(1, 2, queries, 16), torch.randn(1, 2, keys, 16), torch.randn(1, 2, keys, 16)
    grad_output = torch.randn(1, 2, queries, 16)

    def gradients(function):
        leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        return torch.autograd.grad(function(*leaves), leaves, grad_output)

    expected = gradients(lambda *leaves: attnreg.local_attention(*leaves, window, scale=0.3, backend="torch"))
    for tensor, unseen in (
        (query, queries - keys - window.right),
        (grad_output, queries - keys - window.right),
        (key, keys - queries - window.left),
        (value, keys - queries - window.left),
    ):
        tensor[:, :, : max(unseen, 0)] = torch.nan
    got = gradients(lambda *leaves: flexed(*leaves, window, scale=0.3)[0])
    for ours, right in zip(got, expected):
        torch.testing.assert_close(ours, right)


@pytest.mark.parametrize(
    ("queries", "keys"), [(1, 1), (128, 128), (129, 500), (500, 129), (700, 700), (640, 1000), (5, 2000)]
)
@pytest.mark.parametrize(
    "window",
    [
        Window(0, 0),
        Window(126, 126),
        Window(127, 127),
        Window(128, 128),
        Window(300, 126),
        Window(129, 1),
        Window(0, 900),
    ],
    ids=str,
)
def test_the_block_mask_of_flex_lists_every_block_once_and_none_full_that_is_not(queries, keys, window):
    mask, _ = flex._block_mask(window.left, window.right, queries, keys, torch.device("cpu"))
    offset = torch.arange(keys) - torch.arange(queries)[:, None] - (keys - queries)
    assert_lists(mask, 0, (offset >= -window.left) & (offset <= window.right))


def assert_lists(mask, sequence, visible):
    """All blocks in which something is visible are listed once, and as full only those in which all is."""
    queries, keys = visible.shape
    visible = torch.nn.functional.pad(visible, (0, -keys % 128, 0, -queries % 128))
    tiles = visible.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
    inside = torch.nn.functional.pad(torch.ones(queries, keys, dtype=torch.bool), (0, -keys % 128, 0, -queries % 128))
    inside = inside.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
    some, every = tiles.any(3).any(1), (tiles | ~inside).all(3).all(1)
    for row in range(len(tiles)):
        partial = mask.kv_indices[sequence, 0, row, : mask.kv_num_blocks[sequence, 0, row]].tolist()
        full = mask.full_kv_indices[sequence, 0, row, : mask.full_kv_num_blocks[sequence, 0, row]].tolist()
        listed = partial + full
        assert len(set(listed)) == len(listed)
        assert set(some[row].nonzero().flatten().tolist()) <= set(listed)
        assert all(every[row, block] for block in full)


@pytest.mark.parametrize(
    "window", [Window(0, 0), Window(200, 3), Window(900, 900), Window(2**62 - 1, 2**62 - 1)], ids=str
)
@pytest.mark.parametrize(
    "placed",
    [
        {"key_lengths": [1000, 300, 0]},
        {"key_starts": [0, 500, 1000]},
        {"query_starts": [-(2**62), 2**31, 128], "key_lengths": [900, 900, 900]},
        {"query_starts": [0, 200, 640]},
        {"cu_seqlens_q": [0, 1, 129, 129, 640, 650]},
        {"cu_seqlens_q": [0, 200, 200, 600, 700], "cu_seqlens_k": [0, 30, 400, 1000, 1000]},
    ],
    ids=str,
)
def test_the_block_masks_of_rows_list_every_block_once_and_none_full_that_is_not(placed, window):
    placed = {name: torch.tensor(numbers) for name, numbers in placed.items()}
    rows = rows_of(700, 1000, torch.device("cpu"), **placed)
    view = flex._view_of_rows(rows, window, 700, 1000)
    first, last = torch.broadcast_tensors(*rows.seen(700, window))
    keys = torch.arange(1000)
    for sequence in range(len(first)):
        visible = (keys >= first[sequence, :, None]) & (keys < last[sequence, :, None])
        assert_lists(view.mask, sequence, visible)
        seen = flex._union(first.where(first < last, 1000), last.where(first < last, 0), 1000)
        assert torch.equal(seen[sequence], visible.any(0))


def test_flex_keeps_no_inference_tensor_for_a_training_call():
    flex._block_mask.cache_clear()
    with torch.inference_mode():
        mask, bounds = flex._block_mask(2, 1, 300, 300, torch.device("cpu"))
    assert not bounds.is_inference()
    assert not mask.kv_indices.is_inference()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("shape", [(1, 2, 200, 1), (1, 1, 1, 1)])
def test_flex_gives_a_bias_that_changes_no_output_no_gradient(shape):
    tensor, bias = torch.randn(1, 2, 200, 16, requires_grad=True), torch.randn(shape)
    bias[..., :1, :] = -torch.inf
    bias.requires_grad_()
    output, _ = flexed(tensor, tensor, tensor, Window(3, 0), bias=bias, scale=0.3)
    grad = torch.randn_like(output)
    grad[:, :, 0] = torch.nan
    (found,) = torch.autograd.grad(output, [bias], grad)
    torch.testing.assert_close(found, torch.zeros(shape), rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.usefixtures("uncompiled")
def test_flex_gives_the_lowest_of_biases_the_gradient_of_any_other():
    tensor, window = torch.randn(1, 2, 200, 16), Window(3, 0)
    biases = [
        torch.full((1, 2, 200, 4), number, requires_grad=True) for number in (torch.finfo(torch.float32).min, 0.0)
    ]
    outputs = [flexed(tensor * 0, tensor, tensor, window, bias=bias, scale=0.3)[0] for bias in biases]
    torch.testing.assert_close(*outputs)
    grad = torch.randn_like(outputs[0])
    torch.testing.assert_close(*[torch.autograd.grad(output, bias, grad)[0] for output, bias in zip(outputs, biases)])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.usefixtures("uncompiled")
def test_flex_gives_the_log_sum_exp_of_rows_whose_scores_are_all_the_lowest():
    lowest, tensor = torch.finfo(torch.float32).min, torch.randn(1, 2, 200, 16)
    bias = torch.full((1, 2, 200, 4), lowest)
    bias[:, :, 0], bias[:, :, 3] = -torch.inf, 7.0
    _, log_sum_exp = flexed(tensor * 0, tensor, tensor, Window(3, 0), bias=bias, scale=0.3)
    expected = torch.full((1, 2, 200), lowest)
    expected[:, :, 0], expected[:, :, 3] = -torch.inf, 7.0 + math.log(4)
    torch.testing.assert_close(log_sum_exp, expected)
