"""The adapters for other libraries' kernels: what they refuse, and how they bring a call to the library.

Where there is no GPU, the library is stood in for by the definition; on one, the conformance tests run the library itself.
"""

from __future__ import annotations

import itertools
import sys
import threading
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from attnreg_adapters import flash, flash4, flex

import attnreg
from attnreg import Window, empty_like
from attnreg.backend import refusals, why_unavailable
from attnreg.problem import Given

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


def reasons(name, **changes):
    """Why the adapter refuses the call with these changes, on a machine that has what it needs."""
    (backend,) = (status.backend for status in attnreg.backends() if status.name == name)
    return "; ".join(refusals(replace(backend, unavailable=None, library=None), replace(CALL, **changes)))


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("flash", {"dtype": torch.float32}, "the dtype is float32; it takes bfloat16, float16"),
        ("flash", BIAS, "bias is given; it takes none"),
        ("flash", KEY_LENGTHS, "key_lengths is given; it takes none"),
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
        ("flash4", BIAS, "bias is given; it takes none"),
        ("flash4", KEY_LENGTHS, "key_lengths is given; it takes none"),
        ("flash4", {"head_dim": 60, "value_dim": 60}, "the head_dim of query and key is 60"),
        ("flash4", {"value_dim": 32}, "E = 64 and D = 32 differ; it takes equal head dims only"),
        ("flash4", {"key_length": 290}, "the first 5 queries see no key"),
        *(
            ("flash4", {"head_dim": size, "value_dim": size}, f"its gradients are wrong at E = {size}")
            for size in (8, 16, 40, 48, 72, 80, 104, 112)
        ),
        ("flex", {"dtype": torch.float64}, "the dtype is float64"),
        ("flex", {"dtype": torch.float32}, "gradients are needed in float32"),
        ("flex", BIAS, "a bias is given and gradients are needed"),
        ("flex", KEY_LENGTHS, "key_lengths is given; it takes bias"),
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
        torch.testing.assert_close(got[name], right, msg=name)
        its = tensors["query" if name == "output" else name]
        for own, wanted, size in zip(got[name].stride(), empty_like(its).stride(), its.shape):
            assert own == wanted or size == 1, name


def forward_and_backward(functions, tensors, needs_grad, scale):
    """The adapter's output and gradients."""
    query, key, value = (tensors[name] for name in ("query", "key", "value"))
    output, log_sum_exp = functions.local_attention(query, key, value, WINDOW, scale=scale)
    assert log_sum_exp.is_contiguous()
    gradients = functions.local_attention_backward(
        tensors["grad_output"],
        *(query, key, value, output, log_sum_exp, WINDOW),
        scale=scale,
        needs_grad=frozenset(needs_grad),
    )
    assert gradients.keys() == set(needs_grad)
    return {"output": output, **gradients}


def truth(tensors, needs_grad, scale):
    """The same by the definition."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    inputs = (leaves["query"], leaves["key"], leaves["value"])
    output = attnreg.local_attention(*inputs, WINDOW, scale=scale, backend="torch")
    output.backward(tensors["grad_output"])
    return {"output": output.detach(), **{name: leaves[name].grad for name in needs_grad}}


def tensors_of(layout, key_length):
    """Tensors of a call in a layout; keys that no query sees are NaN."""
    torch.manual_seed(0)
    sizes = {"query": (4, 40), "key": (2, key_length), "value": (2, key_length), "grad_output": (4, 40)}
    tensors = {name: LAYOUTS[layout](*size) for name, size in sizes.items()}
    for name in ("key", "value"):
        rows = tensors[name][:1, :1] if layout == "expanded" else tensors[name]
        rows[:, :, : max(key_length - 40 - WINDOW.left, 0)] = torch.nan
    return tensors


def _definition(query, key, value, scale, left, right):
    """A library reads whole tiles: what it is given of NaN may be anywhere in its results."""
    assert not any(tensor.isnan().any() for tensor in (query, key, value))
    rows = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return attnreg.local_attention(*rows, Window(left, right), scale=scale, backend="torch")


def _gradients(query, key, value, grad_output, scale, left, right):
    """Of the definition, (N, L, H, E)."""
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    with torch.enable_grad():
        output = _definition(*leaves, scale, left, right)
    return torch.autograd.grad(output, leaves, grad_output.transpose(1, 2))


def _assert_loadable(*tensors):
    """Rows of (N, L, H, E) begin where 16 bytes may be loaded."""
    for tensor in tensors:
        assert tensor.stride(3) == 1
        assert all(stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:3])
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
        _assert_loadable(*(tensor for tensor in tensors if tensor.dim() == 4))
        on_meta = [each.to("meta") if isinstance(each, torch.Tensor) else each for each in arguments]
        return operator(*on_meta, scale=scale, **options)

    return check


@pytest.fixture
def library(monkeypatch):
    """The definition in the place of ``aten::_flash_attention_forward`` and its backward: results as ``torch.empty_like``."""
    check_forward = _like_the_library(torch.ops.aten._flash_attention_forward.default)
    check_backward = _like_the_library(torch.ops.aten._flash_attention_backward.default)

    def forward(query, key, value, *others, scale, window_size_left, window_size_right):
        sizes = {"window_size_left": window_size_left, "window_size_right": window_size_right}
        check_forward(query, key, value, *others, scale=scale, **sizes)
        output = _definition(query, key, value, scale, window_size_left, window_size_right)
        return (
            torch.empty_like(query).copy_(output.transpose(1, 2)),
            output.new_zeros(output.shape[:3]),
            None,
            None,
            None,
        )

    def backward(grad_output, query, key, value, *others, scale, window_size_left, window_size_right):
        assert torch.get_deterministic_debug_mode() == 2
        sizes = {"window_size_left": window_size_left, "window_size_right": window_size_right}
        check_backward(grad_output, query, key, value, *others, scale=scale, **sizes)
        gradients = _gradients(query, key, value, grad_output, scale, window_size_left, window_size_right)
        return [torch.empty_like(its).copy_(gradient) for its, gradient in zip((query, key, value), gradients)]

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)


@pytest.mark.parametrize("scale", [0.3, -0.3, 0.0])
@pytest.mark.parametrize("key_length", [40, 60, 33])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("library")
def test_flash_gets_the_call_and_gives_the_results_back_as_the_contract_has_them(scale, key_length, layout):
    tensors, needs_grad = tensors_of(layout, key_length), ("query", "value")
    got = forward_and_backward(flash, tensors, needs_grad, scale)
    assert_right(got, truth(tensors, needs_grad, scale), tensors)


@pytest.mark.parametrize("layout", [*THEIR_OWN, "contiguous"])
@pytest.mark.usefixtures("library", "no_copies")
def test_flash_copies_nothing_where_the_library_reads_and_writes_in_that_order(layout):
    forward_and_backward(flash, tensors_of(layout, 40), ("query", "key", "value"), 0.3)


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

    def _flash_attn_fwd(q, k, v, softmax_scale, window_size_left, window_size_right, return_lse, out):
        assert softmax_scale > 0
        assert return_lse
        _assert_loadable(q, k, v, out)
        output = _definition(q, k, v, softmax_scale, window_size_left, window_size_right)
        out.copy_(output.transpose(1, 2))
        return out, output.new_zeros(output.shape[:3]), None, None, None

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale, window_size_left, window_size_right, deterministic, dq, dk, dv
    ):
        assert deterministic
        assert lse.shape == (q.size(0), q.size(2), q.size(1))
        _assert_loadable(q, k, v, out, dout, dq, dk, dv)
        gradients = _gradients(q, k, v, dout, softmax_scale, window_size_left, window_size_right)
        for into, gradient in zip((dq, dk, dv), gradients):
            into.copy_(gradient)
        return dq, dk, dv

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
    got = forward_and_backward(flash4, tensors, needs_grad, scale)
    assert_right(got, truth(tensors, needs_grad, scale), tensors)


@pytest.mark.parametrize("layout", [*THEIR_OWN, "contiguous"])
@pytest.mark.usefixtures("flash4_library", "no_copies")
def test_flash4_copies_nothing_where_rows_begin_where_it_may_load_them(layout):
    forward_and_backward(flash4, tensors_of(layout, 60), ("query",), 0.3)


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
        flash4_library, "_flash_attn_bwd", lambda q, k, v, dq, dk, dv, deterministic, softmax_scale: None
    )
    assert flash4.prepare() == "flash-attn-4 has changed: <lambda> takes no window_size_left, window_size_right"
    monkeypatch.setitem(sys.modules, flash4_library.__name__, None)
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
    output, log_sum_exp = flex.local_attention(query, key, value, window, bias=bias, scale=0.3)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(log_sum_exp, scores.logsumexp(-1))
    assert output.stride() == empty_like(query, 24).stride()


def _unseen(scores, key_length, window):
    """The keys (N, Hkv, Lk) of two key/value heads that no row sees."""
    visible = (scores != -torch.inf).unflatten(1, (2, -1)).any(2)
    keys = torch.arange(scores.size(2))[:, None] + key_length - scores.size(2) - window.left + torch.arange(window.size)
    unseen = torch.ones(scores.size(0), 2, key_length, dtype=torch.bool)
    for n, h in itertools.product(range(scores.size(0)), range(2)):
        unseen[n, h, keys[visible[n, h]]] = False
    return unseen


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.usefixtures("uncompiled")
def test_flex_hides_nothing_by_a_finite_bias_and_everything_by_an_infinite_one():
    tensor, window = torch.randn(1, 2, 200, 16), Window(3, 0)
    bias = torch.full((1, 2, 1, 4), -1e300, dtype=torch.float64)
    bias[:, 1] = -torch.inf
    output, log_sum_exp = flex.local_attention(tensor, tensor, tensor, window, bias=bias, scale=0.3)
    even = attnreg.local_attention(tensor * 0, tensor, tensor, window, backend="torch")
    torch.testing.assert_close(output[:, 0], even[:, 0])
    assert (output[:, 1] == 0).all()
    assert (log_sum_exp[:, 1] == -torch.inf).all()


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("lengths", [(300, 300), (300, 200), (200, 300)])
def test_flex_lets_nothing_of_rows_that_see_no_key_into_gradients(monkeypatch, lengths):
    """The library's kernels multiply whole tiles: here each of them is one tile."""
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
    monkeypatch.setattr(flex, "_flex_attention", _dense_attention)
    got = gradients(lambda *leaves: flex.local_attention(*leaves, window, bias=None, scale=0.3)[0])
    for ours, right in zip(got, expected):
        torch.testing.assert_close(ours, right)


def _dense_attention(query, key, value, window, bias, scale):
    offset = torch.arange(key.size(2)) - torch.arange(query.size(2))[:, None] - (key.size(2) - query.size(2))
    hidden = (offset < -window.left) | (offset > window.right)
    scores = (scale * query @ key.mT).masked_fill(hidden, -torch.inf)
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


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


def test_flex_keeps_no_inference_tensor_for_a_training_call():
    flex._block_mask.cache_clear()
    with torch.inference_mode():
        mask, bounds = flex._block_mask(2, 1, 300, 300, torch.device("cpu"))
    assert not bounds.is_inference()
    assert not mask.kv_indices.is_inference()


@pytest.mark.parametrize("shape", [(2, 4, 5, 3), (1, 1, 5, 1), (1, 4, 1, 3)])
def test_flex_gives_the_log_sum_exp_of_rows_whose_scores_are_all_the_lowest(shape):
    """In log2, as the library has it, that is -inf."""
    lowest, window = torch.finfo(torch.float32).min, Window(1, 1)
    bias = torch.full(shape, lowest)
    bias[..., :1, :] = -torch.inf  # of all rows, where there is one for all
    log_sum_exp = torch.full((2, 4, 5), -torch.inf)
    log_sum_exp[:, :, 3] = 7.0
    expected = torch.full((2, 4, 5), lowest if shape[2] > 1 else -torch.inf)
    expected[:, :, 0] = -torch.inf
    expected[:, :, 3] = 7.0
    assert torch.equal(flex._of_lowest_scores(log_sum_exp, bias, 5, window), expected)
