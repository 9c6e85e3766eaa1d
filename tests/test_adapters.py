"""The adapters for other libraries' kernels: what they refuse, and how they bring a call to the library.

Where there is no GPU, the library is stood in for by the definition; on one, the conformance tests run the library itself.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from attnreg_adapters import flash, flash4, flex

import attnreg
from attnreg import Window
from attnreg.backend import refusals, why_unavailable

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
BIAS = {"bias_shape": (1, 4, 1, 26), "bias_dtype": torch.float32}


def reasons(name, **changes):
    """Why the adapter refuses the call with these changes, on a machine that has what it needs."""
    (backend,) = (status.backend for status in attnreg.backends() if status.name == name)
    return "; ".join(refusals(replace(backend, unavailable=None, library=None), replace(CALL, **changes)))


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("flash", {"dtype": torch.float32}, "the dtype is float32; it takes bfloat16, float16"),
        ("flash", BIAS, "a bias is given; it takes none"),
        ("flash", {"has_key_lengths": True}, "key_lengths are given; it takes none"),
        ("flash", {"head_dim": 60, "value_dim": 60}, "the head_dim of query and key is 60"),
        ("flash", {"head_dim": 264, "value_dim": 264}, "the head_dim of query and key is 264"),
        ("flash", {"value_dim": 32}, "E = 64 and D = 32 differ; it takes equal head dims only"),
        ("flash", {"key_length": 290}, "the first 5 queries see no key"),
        ("flash", {"op": "local_dot_product", "value_dim": 0}, "it has no local_dot_product"),
        ("flash", {"device": torch.device("cpu")}, "the device is cpu; it takes cuda"),
        ("flash4", {"dtype": torch.float32}, "the dtype is float32; it takes bfloat16, float16"),
        ("flash4", BIAS, "a bias is given; it takes none"),
        ("flash4", {"has_key_lengths": True}, "key_lengths are given; it takes none"),
        ("flash4", {"head_dim": 60, "value_dim": 60}, "the head_dim of query and key is 60"),
        ("flash4", {"value_dim": 32}, "E = 64 and D = 32 differ; it takes equal head dims only"),
        ("flash4", {"key_length": 290}, "the first 5 queries see no key"),
        *(
            ("flash4", {"head_dim": size, "value_dim": size}, f"its gradients are wrong at E = {size}")
            for size in (8, 16, 40, 48, 72, 80, 104, 112)
        ),
        ("flex", {"dtype": torch.float64}, "the dtype is float64"),
        ("flex", BIAS, "a bias is given and gradients are needed"),
        ("flex", {"has_key_lengths": True}, "key_lengths are given; it takes none"),
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
        ("flex", {**BIAS, "needs_grad": False}),
        ("flex", {"dtype": torch.float32, "head_dim": 48, "value_dim": 33}),
        ("flex", {"key_length": 10}),
    ],
)
def test_nothing_else_is_refused(name, changes):
    assert reasons(name, **changes) == ""


# flash


def _definition(query, key, value, scale, left, right):
    rows = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return attnreg.local_attention(*rows, Window(left, right), scale=scale, backend="torch")


def _like_the_library(operator):
    """Check a call as the library would: its schema, on tensors without memory, and what its kernels need."""

    def check(*arguments, scale, **options):
        assert scale > 0
        tensors = [each for each in arguments if isinstance(each, torch.Tensor) and each.is_floating_point()]
        for tensor in tensors:
            if tensor.dim() == 4:
                assert tensor.stride(3) == 1
                assert all(stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:3])
                assert tensor.data_ptr() % 16 == 0
        on_meta = [each.to("meta") if isinstance(each, torch.Tensor) else each for each in arguments]
        return operator(*on_meta, scale=scale, **options)

    return check


@pytest.fixture
def library(monkeypatch):
    """The definition in the place of ``aten::_flash_attention_forward`` and its backward."""
    check_forward = _like_the_library(torch.ops.aten._flash_attention_forward.default)
    check_backward = _like_the_library(torch.ops.aten._flash_attention_backward.default)

    def forward(query, key, value, *others, scale, window_size_left, window_size_right):
        sizes = {"window_size_left": window_size_left, "window_size_right": window_size_right}
        check_forward(query, key, value, *others, scale=scale, **sizes)
        output = _definition(query, key, value, scale, window_size_left, window_size_right)
        return output.transpose(1, 2), output.new_zeros(output.shape[:3]), None, None, None

    def backward(grad_output, query, key, value, *others, scale, window_size_left, window_size_right):
        assert torch.get_deterministic_debug_mode() == 2
        sizes = {"window_size_left": window_size_left, "window_size_right": window_size_right}
        check_backward(grad_output, query, key, value, *others, scale=scale, **sizes)
        leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        with torch.enable_grad():
            output = _definition(*leaves, scale, window_size_left, window_size_right)
        return torch.autograd.grad(output, leaves, grad_output.transpose(1, 2))

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)


LAYOUTS = {
    "contiguous": lambda heads, length: torch.randn(2, heads, length, 8),
    "lengths_first": lambda heads, length: torch.randn(2, length, heads, 8).transpose(1, 2),
    "unaligned": lambda heads, length: torch.randn(2, heads, length, 9)[..., 1:],
}


@pytest.mark.parametrize("scale", [0.3, -0.3, 0.0])
@pytest.mark.parametrize("key_length", [40, 60, 33])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("library")
def test_flash_gets_the_call_and_gives_the_results_back_as_the_contract_has_them(scale, key_length, layout):
    torch.manual_seed(0)
    window, tensor = Window(9, 7), LAYOUTS[layout]
    query, key, value, grad_output = tensor(4, 40), tensor(2, key_length), tensor(2, key_length), tensor(4, 40)
    options = {"bias": None, "key_lengths": None, "scale": scale}
    output, log_sum_exp = flash.local_attention(query, key, value, window, **options)
    gradients = flash.local_attention_backward(
        grad_output, query, key, value, output, log_sum_exp, window, needs_grad=(True, False, True, False), **options
    )
    leaves = [each.detach().clone().requires_grad_() for each in (query, key, value)]
    expected = attnreg.local_attention(*leaves, window, scale=scale, backend="torch")
    expected.backward(grad_output)
    torch.testing.assert_close(output, expected.detach())
    torch.testing.assert_close(gradients[0], leaves[0].grad)
    torch.testing.assert_close(gradients[2], leaves[2].grad)
    assert gradients[1] is None
    assert gradients[3] is None
    assert all(each.is_contiguous() for each in (output, gradients[0], gradients[2]))


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
    """The definition in the place of ``flash_attn.cute.flash_attn_func``."""

    def flash_attn_func(query, key, value, *, softmax_scale, window_size, deterministic, return_lse):
        assert softmax_scale > 0
        assert deterministic
        assert return_lse
        for tensor in (query, key, value):
            assert all(stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:3])
            assert tensor.data_ptr() % 16 == 0
        output = _definition(query, key, value, softmax_scale, *window_size)
        return output.transpose(1, 2), output.new_zeros(output.shape[:3])

    package, module = ModuleType("flash_attn"), ModuleType("flash_attn.cute")
    module.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", module)


@pytest.mark.parametrize("scale", [0.3, -0.3, 0.0])
@pytest.mark.parametrize("key_length", [40, 60, 33])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("flash4_library")
def test_flash4_gets_the_call_and_gives_the_results_back_as_the_contract_has_them(scale, key_length, layout):
    torch.manual_seed(0)
    window = Window(9, 7)
    inputs = [LAYOUTS[layout](heads, length) for heads, length in ((4, 40), (2, key_length), (2, key_length))]
    leaves = [each.detach().requires_grad_() for each in inputs]
    output, _ = flash4.local_attention(*leaves, window, bias=None, key_lengths=None, scale=scale)
    expected = attnreg.local_attention(*leaves, window, scale=scale, backend="torch")
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(output, expected)
    assert output.is_contiguous()
    for gradient, right in zip(*(torch.autograd.grad(each, leaves, upstream) for each in (output, expected))):
        torch.testing.assert_close(gradient, right)


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


def test_flash4_says_why_the_library_cannot_be_imported(monkeypatch, flash4_library):
    assert flash4.prepare() is None
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
    assert flash4.prepare().startswith("flash-attn-4 cannot be imported: ModuleNotFoundError")


# flex


@pytest.fixture
def uncompiled(monkeypatch):
    """FlexAttention as torch runs it without compiling: slow, with the same mask and score function."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(flex, "_compiled", lambda: flex_attention)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("bias_shape", [None, (1, 1, 1, 49), (2, 4, 300, 49), (1, 4, 300, 1)])
@pytest.mark.parametrize("key_length", [300, 420, 260])
@pytest.mark.usefixtures("uncompiled")
def test_flex_gives_the_results_as_the_contract_has_them(key_length, bias_shape):
    torch.manual_seed(0)
    window = Window(37, 11)
    query, key, value = torch.randn(2, 4, 300, 16), torch.randn(2, 2, key_length, 16), torch.randn(2, 2, key_length, 24)
    bias = None if bias_shape is None else torch.randn(bias_shape)
    output, log_sum_exp = flex.local_attention(query, key, value, window, bias=bias, key_lengths=None, scale=0.3)
    expected = attnreg.local_attention(query, key, value, window, bias=bias, scale=0.3, backend="torch")
    scores = attnreg.local_dot_product(query, key, window, bias=bias, scale=0.3, backend="torch")
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(log_sum_exp, scores.logsumexp(-1))


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
    visible = torch.nn.functional.pad(
        (offset >= -window.left) & (offset <= window.right), (0, -keys % 128, 0, -queries % 128)
    )
    tiles = visible.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
    inside = torch.nn.functional.pad(torch.ones(queries, keys, dtype=torch.bool), (0, -keys % 128, 0, -queries % 128))
    inside = inside.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
    some, every = tiles.any(3).any(1), (tiles | ~inside).all(3).all(1)
    for row in range(len(tiles)):
        partial = mask.kv_indices[0, 0, row, : mask.kv_num_blocks[0, 0, row]].tolist()
        full = mask.full_kv_indices[0, 0, row, : mask.full_kv_num_blocks[0, 0, row]].tolist()
        listed = partial + full
        assert len(set(listed)) == len(listed)
        assert set(some[row].nonzero().flatten().tolist()) <= set(listed)
        assert all(every[row, block] for block in full)
