"""A bad call is refused before any kernel runs, by an error that names the argument, what it was and what was expected."""

from __future__ import annotations

import functools
import re
import warnings

import pytest
import torch

import attnreg
from attnreg import Window

QUERY = torch.randn(2, 4, 5, 8)
KEY = torch.randn(2, 2, 6, 8)
VALUE = torch.randn(2, 2, 6, 3)
WINDOW = Window(2, 1)
LENGTHS = torch.tensor([6, 3])
OFFSETS = torch.tensor([0, 2, 5])
OF_KEYS = torch.tensor([0, 4, 6])
SEED = torch.tensor([7])


class DuckWindow:
    """Looks like a window, and is none."""

    left, right, size = 2, 1, 4


ATTENTION = {"query": QUERY, "key": KEY, "value": VALUE, "window": WINDOW}
AVERAGE = {"weights": torch.randn(2, 4, 5, 4), "value": VALUE, "window": WINDOW}
# The first sequence alone, which may be a pack.
PACKED = {"query": QUERY[:1], "key": KEY[:1], "value": VALUE[:1], "weights": AVERAGE["weights"][:1]}


def packed(op: str, **offsets) -> dict:
    names = ("weights", "value") if op == "local_weighted_average" else ("query", "key", "value")
    return {**{name: PACKED[name] for name in names if op != "local_dot_product" or name != "value"}, **offsets}


BAD = [
    # (op, changed arguments, error, what the message must say)
    ("local_attention", {"query": [1.0]}, TypeError, "query must be a torch.Tensor, got list"),
    ("local_attention", {"value": None}, TypeError, "value must be a torch.Tensor, got NoneType"),
    ("local_attention", {"query": QUERY[0]}, ValueError, "query must have four dimensions.*(4, 5, 8)"),
    ("local_attention", {"key": KEY.long()}, TypeError, "key must have a floating-point dtype, got torch.int64"),
    ("local_attention", {"key": KEY.double()}, TypeError, "key must have query's dtype, torch.float32; got torch.float64"),
    ("local_attention", {"value": VALUE.half()}, TypeError, "value must have query's dtype.*torch.float16"),
    ("local_attention", {"key": KEY.to("meta")}, ValueError, "key must be on query's device, cpu; got meta"),
    ("local_attention", {"value": VALUE.to("meta")}, ValueError, "value must be on query's device, cpu; got meta"),
    ("local_attention", {"query": QUERY.to_sparse()}, TypeError, "must be a dense"),
    ("local_attention", {"query": QUERY[..., :7]}, ValueError, "head_dim must be query's, 7.*(2, 4, 5, 7).*(2, 2, 6, 8)"),
    ("local_attention", {"query": QUERY[..., :0], "key": KEY[..., :0]}, ValueError, "head_dim must be at least 1"),
    ("local_attention", {"value": VALUE[..., :0]}, ValueError, "value: head_dim must be at least 1, got shape (2, 2, 6, 0)"),
    ("local_attention", {"query": QUERY[:1]}, ValueError, "key: its batch size must be query's, 1"),
    ("local_attention", {"query": QUERY[:, :3]}, ValueError, "H = 3.*must be a multiple of.*Hkv = 2"),
    ("local_attention", {"key": KEY[:, :0], "value": VALUE[:, :0]}, ValueError, "Hkv = 0"),
    ("local_attention", {"value": VALUE[:, :, :4]}, ValueError, "value: must agree with key in (N, Hkv, Lk), (2, 2, 6); got shape (2, 2, 4, 3)"),
    ("local_attention", {"window": None}, TypeError, "window must be an attnreg.Window, got None"),
    ("local_attention", {"window": (2, 1)}, TypeError, "window must be an attnreg.Window, got (2, 1) (tuple); write Window(2, 1)"),
    ("local_attention", {"window": [2, 0]}, TypeError, "got [2, 0] (list); write Window(2, 0)"),
    ("local_attention", {"window": (-1, 0)}, TypeError, "write Window(n, 0), where n is the number of keys"),
    ("local_attention", {"window": (2, True)}, TypeError, "got (2, True) (tuple); write Window.causal(n)"),
    ("local_attention", {"window": -1}, TypeError, "window: got the int -1.*Window.causal(n)"),
    ("local_attention", {"window": torch.ones(9, 9)}, TypeError, "got tensor(.*...* (Tensor); give window=.*a mask as bias=band_from_dense(mask, window)"),
    ("local_attention", {"value": VALUE.transpose(1, 2)}, ValueError, "value: must agree with key.*got shape (2, 6, 2, 3); of tensors in (N, L, H, E) give tensor.transpose(1, 2)"),
    ("local_attention", {"bias": torch.randn(5, 1, 4)}, ValueError, "does not broadcast to (N, H, Lq, W) = (2, 4, 5, 4).*; of tensors in (N, L, H, E)"),
    ("local_attention", {"bias": 1.0}, TypeError, "bias must be a torch.Tensor or None, got float"),
    ("local_attention", {"bias": torch.ones(5, 4, dtype=torch.bool)}, TypeError, "torch.bool; band_from_dense"),
    ("local_attention", {"bias": torch.randn(5, 6)}, ValueError, "bias: shape (5, 6) does not broadcast to (N, H, Lq, W) = (2, 4, 5, 4)"),
    ("local_attention", {"bias": torch.randn(1, 2, 4, 5, 4)}, ValueError, "bias: shape (1, 2, 4, 5, 4) does not broadcast"),
    ("local_attention", {"bias": torch.randn(4, device="meta")}, ValueError, "bias must be on query's device, cpu; got meta"),
    ("local_attention", {"key_lengths": [6, 3]}, TypeError, "key_lengths must be an integer torch.Tensor or None, got list"),
    ("local_attention", {"key_lengths": LENGTHS.float()}, TypeError, "key_lengths must have an integer dtype, got torch.float32"),
    ("local_attention", {"key_lengths": LENGTHS[:1]}, ValueError, "key_lengths must have shape (N,) = (2,), got (1,)"),
    ("local_attention", {"key_lengths": LENGTHS.to("meta")}, ValueError, "key_lengths must be on query's device, cpu; got meta"),
    ("local_attention", {"key_lengths": torch.tensor([7, 3])}, ValueError, "key_lengths: every length must lie in 0..6 (Lk), got 7; of tensors in (N, L, H, E) give tensor.transpose(1, 2)"),
    ("local_attention", {"key_lengths": torch.tensor([6, -1])}, ValueError, "key_lengths: every length must lie in 0..6 (Lk), got -1"),
    ("local_attention", {"scale": "big"}, TypeError, "scale must be a float, got 'big'"),
    ("local_attention", {"scale": torch.tensor(1.0)}, TypeError, "scale must be a float, got tensor(1.)"),
    ("local_attention", {"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
    ("local_attention", {"scale": True}, TypeError, "scale must be a float, got True (bool)"),
    ("local_attention", {"scale": 10**400}, ValueError, "scale must be finite, got an int too large for a float"),
    ("local_attention", {"scale": -float("inf")}, ValueError, "scale must be finite, got -inf"),
    ("local_attention", {"scale": 1j}, TypeError, "scale must be a float, got 1j (complex)"),
    ("local_attention", {"scale": torch.nn.Parameter(torch.tensor(1.0))}, TypeError, "scale must be a float, got Parameter"),
    ("local_attention", {"bias": torch.randn(5, 4).to_sparse()}, TypeError, "bias must be a dense (strided) tensor, got layout torch.sparse_coo"),
    ("local_attention", {"bias": torch.randn(5, 4).cfloat()}, TypeError, "bias must have a floating-point dtype, got torch.complex64"),
    ("local_attention", {"key_lengths": LENGTHS.to_sparse()}, TypeError, "key_lengths must be a dense (strided) tensor"),
    ("local_attention", {"key_lengths": LENGTHS > 0}, TypeError, "key_lengths must have an integer dtype, got torch.bool"),
    ("local_attention", {"window": DuckWindow()}, TypeError, "window must be an attnreg.Window, got <"),
    ("local_attention", {"key": None}, TypeError, "key must be a torch.Tensor, got NoneType"),
    ("local_attention", {"key": torch.nested.nested_tensor([KEY[0], KEY[1]])}, TypeError, "key must be a dense (strided) tensor, got a nested one"),
    ("local_attention", {"backend": b"torch"}, TypeError, "backend must be a backend's name or None, got b'torch' (bytes)"),
    ("local_attention", {"backend": 3}, TypeError, "backend must be a backend's name or None, got 3"),
    ("local_attention", {"backend": ["torch", 3]}, TypeError, "backend must be a backend's name or None, got ['torch', 3]"),
    ("local_attention", {"backend": []}, TypeError, "backend must be a backend's name or None, got []"),
    ("local_attention", {"backend": ""}, ValueError, "no backend is called ''"),
    ("local_attention", {"backend": "nonesuch"}, ValueError, "no backend is called 'nonesuch'.*registered:.*torch_block"),
    ("local_dot_product", {"key": KEY[..., :7]}, ValueError, "key: its head_dim must be query's, 8"),
    ("local_dot_product", {"bias": torch.randn(3)}, ValueError, "bias: shape (3,) does not broadcast"),
    ("local_dot_product", {"scale": None}, TypeError, "scale must be a float, got None"),
    ("local_dot_product", {"scale": True}, TypeError, "scale must be a float, got True"),
    ("local_dot_product", {"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
    ("local_dot_product", {"window": 3}, TypeError, "window: got the int 3"),
    ("local_weighted_average", {"window": DuckWindow()}, TypeError, "window must be an attnreg.Window"),
    ("local_weighted_average", {"weights": None}, TypeError, "weights must be a torch.Tensor, got NoneType"),
    ("local_weighted_average", {"backend": b"torch"}, TypeError, "backend must be a backend's name or None"),
    ("local_weighted_average", {"weights": torch.randn(2, 4, 5, 5)}, ValueError, "weights: the last dimension must be the window's size, 4"),
    ("local_weighted_average", {"value": VALUE[:1]}, ValueError, "value: its batch size must be weights's, 2"),
    ("local_weighted_average", {"value": VALUE.double()}, TypeError, "value must have weights's dtype"),
    ("local_weighted_average", {"key_lengths": torch.tensor([7, 3])}, ValueError, "key_lengths: every length must lie in"),
    ("local_attention", {"key_starts": [0, 3]}, TypeError, "key_starts must be an integer torch.Tensor or None, got list"),
    ("local_attention", {"key_starts": LENGTHS.half()}, TypeError, "key_starts must have an integer dtype, got torch.float16"),
    ("local_attention", {"key_starts": LENGTHS[None]}, ValueError, "key_starts must have shape (N,) = (2,), got (1, 2)"),
    ("local_attention", {"key_starts": LENGTHS.to("meta")}, ValueError, "key_starts must be on query's device, cpu; got meta"),
    ("local_attention", {"key_starts": torch.tensor([7, 0])}, ValueError, "key_starts: every start must lie in 0..6 (Lk), got 7"),
    ("local_attention", {"key_starts": torch.tensor([0, -2])}, ValueError, "key_starts: every start must lie in 0..6 (Lk), got -2"),
    ("local_attention", {"query_starts": 3}, TypeError, "query_starts must be an integer torch.Tensor or None, got int"),
    ("local_attention", {"query_starts": LENGTHS.double()}, TypeError, "query_starts must have an integer dtype, got torch.float64"),
    ("local_attention", {"query_starts": LENGTHS[:1]}, ValueError, "query_starts must have shape (N,) = (2,), got (1,)"),
    ("local_attention", {"query_starts": LENGTHS.to("meta")}, ValueError, "query_starts must be on query's device, cpu; got meta"),
    ("local_attention", {"cu_seqlens_q": OFFSETS}, ValueError, "cu_seqlens_q: with it the batch size must be 1, as sequences lie one after the other in (1, H, T, E); got query (2, 4, 5, 8)"),
    ("local_attention", {"cu_seqlens_k": OFFSETS}, ValueError, "cu_seqlens_k: it needs cu_seqlens_q beside it, which is not given"),
    ("local_attention", {"softcap": 0.0}, ValueError, "softcap must be greater than 0, got 0.0"),
    ("local_attention", {"softcap": 0}, ValueError, "softcap must be greater than 0, got 0"),
    ("local_attention", {"softcap": -50.0}, ValueError, "softcap must be greater than 0, got -50.0"),
    ("local_attention", {"softcap": float("nan")}, ValueError, "softcap must be finite, got nan"),
    ("local_attention", {"softcap": float("inf")}, ValueError, "softcap must be finite, got inf"),
    ("local_attention", {"softcap": True}, TypeError, "softcap must be a float, got True (bool)"),
    ("local_attention", {"softcap": "50"}, TypeError, "softcap must be a float, got '50'"),
    ("local_attention", {"softcap": torch.tensor(50.0)}, TypeError, "softcap must be a float, got tensor(50.)"),
    ("local_attention", {"sinks": 1.0}, TypeError, "sinks must be a torch.Tensor or None, got float"),
    ("local_attention", {"sinks": torch.zeros(2)}, ValueError, "sinks must have shape (H,) = (4,), got (2,)"),
    ("local_attention", {"sinks": torch.zeros(1)}, ValueError, "sinks must have shape (H,) = (4,), got (1,)"),
    ("local_attention", {"sinks": torch.zeros(4, 1)}, ValueError, "sinks must have shape (H,) = (4,), got (4, 1)"),
    ("local_attention", {"sinks": torch.zeros(4, dtype=torch.int64)}, TypeError, "sinks must have a floating-point dtype, got torch.int64"),
    ("local_attention", {"sinks": torch.zeros(4, device="meta")}, ValueError, "sinks must be on query's device, cpu; got meta"),
    ("local_attention", {"dropout_p": -0.1, "seed": SEED}, ValueError, "dropout_p must be at least 0 and less than 1, got -0.1"),
    ("local_attention", {"dropout_p": 1.0, "seed": SEED}, ValueError, "dropout_p must be at least 0 and less than 1, got 1.0"),
    ("local_attention", {"dropout_p": 1}, ValueError, "dropout_p must be at least 0 and less than 1, got 1"),
    ("local_attention", {"dropout_p": float("nan")}, ValueError, "dropout_p must be finite, got nan"),
    ("local_attention", {"dropout_p": True}, TypeError, "dropout_p must be a float, got True (bool)"),
    ("local_attention", {"dropout_p": False}, TypeError, "dropout_p must be a float, got False (bool)"),
    ("local_attention", {"dropout_p": "a half"}, TypeError, "dropout_p must be a float, got 'a half'"),
    ("local_attention", {"dropout_p": torch.tensor(0.5)}, TypeError, "dropout_p must be a float, got tensor(0.5000)"),
    ("local_attention", {"dropout_p": 0.5, "seed": 7}, TypeError, "seed must be an integer torch.Tensor or None, got int"),
    ("local_attention", {"dropout_p": 0.5, "seed": torch.tensor([1, 2])}, ValueError, "seed: shape (2,) does not broadcast to (1,)"),
    ("local_attention", {"dropout_p": 0.5, "seed": torch.tensor([1.0])}, TypeError, "seed must have an integer dtype, got torch.float32"),
    ("local_attention", {"dropout_p": 0.5, "seed": torch.tensor([True])}, TypeError, "seed must have an integer dtype, got torch.bool"),
    ("local_attention", {"dropout_p": 0.5, "seed": SEED.to("meta")}, ValueError, "seed must be on query's device, cpu; got meta"),
    *[
        (op, packed(op, **offsets), error, message)
        for op in ("local_dot_product", "local_weighted_average", "local_attention")
        for offsets, error, message in (
            ({"cu_seqlens_q": [0, 2, 5]}, TypeError, "cu_seqlens_q must be an integer torch.Tensor or None, got list"),
            ({"cu_seqlens_q": OFFSETS.float()}, TypeError, "cu_seqlens_q must have an integer dtype, got torch.float32"),
            ({"cu_seqlens_q": OFFSETS[None]}, ValueError, "cu_seqlens_q must have shape (S + 1,), for S sequences where each ends behind a 0; got (1, 3)"),
            ({"cu_seqlens_q": OFFSETS[:0]}, ValueError, "cu_seqlens_q must have shape (S + 1,), for S sequences where each ends behind a 0; got (0,)"),
            ({"cu_seqlens_q": OFFSETS.to("meta")}, ValueError, "cu_seqlens_q must be on.*device, cpu; got meta"),
            ({"cu_seqlens_q": torch.tensor([0, 3, 6])}, ValueError, "cu_seqlens_q: every offset must lie in 0..5 (Lq), got 6"),
            ({"cu_seqlens_q": torch.tensor([0, -1, 5])}, ValueError, "cu_seqlens_q: every offset must lie in 0..5 (Lq), got -1"),
            ({"cu_seqlens_q": torch.tensor([1, 2, 5])}, ValueError, "cu_seqlens_q: offsets are 0 and then where each sequence ends, lengths.cumsum(0) behind a 0; got 1 as the first"),
            ({"cu_seqlens_q": torch.tensor([0, 3, 2])}, ValueError, "cu_seqlens_q: offsets are 0 and then where each sequence ends.*; got some that decrease"),
            ({"cu_seqlens_q": OFFSETS, "cu_seqlens_k": OF_KEYS[:2]}, ValueError, "cu_seqlens_k must have shape (S + 1,) = (3,), got (2,)"),
            ({"cu_seqlens_q": OFFSETS, "cu_seqlens_k": torch.tensor([0, 4, 7])}, ValueError, "cu_seqlens_k: every offset must lie in 0..6 (Lk), got 7"),
            ({"cu_seqlens_q": OFFSETS, "cu_seqlens_k": torch.tensor([0, 4, 3])}, ValueError, "cu_seqlens_k: offsets are 0 and then where.*; got some that decrease"),
            ({"cu_seqlens_q": OFFSETS, "cu_seqlens_k": OF_KEYS.bool()}, TypeError, "cu_seqlens_k must have an integer dtype, got torch.bool"),
            ({"cu_seqlens_k": OF_KEYS}, ValueError, "cu_seqlens_k: it needs cu_seqlens_q beside it"),
            *[
                ({"cu_seqlens_q": OFFSETS, name: torch.tensor([1])}, ValueError, f"cu_seqlens_q: it cannot be given together with {name}")
                for name in ("key_lengths", "key_starts", "query_starts")
            ],
        )
    ],
    ("local_dot_product", {"key_starts": torch.tensor([7, 3])}, ValueError, "key_starts: every start must lie in 0..6"),
    ("local_weighted_average", {"key_starts": torch.tensor([7, 3])}, ValueError, "key_starts: every start must lie in 0..6"),
    ("local_weighted_average", {"query_starts": LENGTHS.float()}, TypeError, "query_starts must have an integer dtype"),
]  # fmt: skip
IDS = [f"{place}-{row[0]}-{row[3][:40]}" for place, row in enumerate(BAD)]


def _arguments(op: str) -> dict:
    if op == "local_weighted_average":
        return dict(AVERAGE)
    return {name: given for name, given in ATTENTION.items() if op == "local_attention" or name != "value"}


def _pattern(message: str) -> str:
    return ".*".join(re.escape(part) for part in message.split(".*"))


@pytest.mark.parametrize(("op", "change", "error", "message"), BAD, ids=IDS)
def test_the_error_says_which_argument_was_bad_and_how(op, change, error, message):
    arguments = {**_arguments(op), **change}
    with pytest.raises(error, match=_pattern(message)):
        getattr(attnreg, op)(**arguments)


@pytest.mark.parametrize(("op", "change", "error", "message"), BAD, ids=IDS)
def test_a_bad_call_is_refused_after_good_calls_of_the_same_kind_too(op, change, error, message):
    """The plan of an earlier call must not let a later, bad one slip through."""
    good = _arguments(op)
    getattr(attnreg, op)(**good)
    getattr(attnreg, op)(**good, key_lengths=LENGTHS)
    getattr(attnreg, op)(**good, key_starts=LENGTHS)
    getattr(attnreg, op)(**good, query_starts=LENGTHS)
    of_pack = {**good, **packed(op)}
    getattr(attnreg, op)(**of_pack, cu_seqlens_q=OFFSETS)
    getattr(attnreg, op)(**of_pack, cu_seqlens_q=OFFSETS, cu_seqlens_k=OF_KEYS)
    if op == "local_attention":
        getattr(attnreg, op)(**good, softcap=50.0)
        getattr(attnreg, op)(**good, sinks=torch.zeros(4))
        getattr(attnreg, op)(**good, dropout_p=0.5)
        getattr(attnreg, op)(**good, dropout_p=0.5, seed=SEED)
    if op != "local_weighted_average":
        getattr(attnreg, op)(**good, scale=0.5)
        getattr(attnreg, op)(**good, bias=torch.randn(5, 4))
        getattr(attnreg, op)(**good, bias=torch.randn(1), key_lengths=LENGTHS)
    with pytest.raises(error, match=_pattern(message)):
        getattr(attnreg, op)(**{**good, **change})


@pytest.mark.parametrize(("op", "change", "error", "message"), BAD, ids=IDS)
def test_a_compiled_call_is_refused_by_the_same_error(op, change, error, message):
    arguments = {**_arguments(op), **change}
    torch._dynamo.reset()
    compiled = torch.compile(lambda: getattr(attnreg, op)(**arguments), backend="eager")
    with pytest.raises(error, match=_pattern(message)):
        compiled()


@pytest.mark.parametrize(
    ("op", "change", "error", "message"), [row for row in BAD if not re.search("must lie in|offsets are 0", row[3])]
)
def test_explain_which_reads_no_numbers_of_tensors_refuses_the_rest_likewise(op, change, error, message):
    with pytest.raises(error, match=_pattern(message)):
        attnreg.explain(**{**_arguments(op), **change}, op=op)


@pytest.mark.parametrize(
    ("name", "good", "bad"), [("softcap", 50.0, 0.0), ("dropout_p", 0.5, 1.0), ("scale", 0.5, float("nan"))]
)
@pytest.mark.parametrize("way", ["eager", "compiled", "with all results"])
def test_a_number_is_checked_also_where_the_plan_of_the_call_is_known(way, name, good, bad):
    function = attnreg.local_attention_with_lse if way == "with all results" else attnreg.local_attention

    def call(number):
        return function(**ATTENTION, **{name: number})

    torch._dynamo.reset()
    call = torch.compile(call, backend="eager") if way == "compiled" else call
    for _ in range(2):
        call(good)
        with pytest.raises(ValueError, match=f"{name} must be .*, got {bad}"):
            call(bad)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("given", "of_pack"),
    [
        ({"key_starts": LENGTHS}, False),
        ({"query_starts": LENGTHS}, False),
        ({"cu_seqlens_q": OFFSETS}, True),
        ({"cu_seqlens_q": OFFSETS, "cu_seqlens_k": OF_KEYS}, True),
        ({"dropout_p": 0.5, "seed": SEED}, False),
        ({"dropout_p": 0.5, "seed": SEED.squeeze()}, False),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_integers_may_have_any_dtype_and_any_strides(given, of_pack, dtype):
    arguments = {**ATTENTION, **(packed("local_attention") if of_pack else {})}
    expected = attnreg.local_attention(**arguments, **given)
    cast = {
        name: torch.stack([each, each], -1).to(dtype)[..., 0] if isinstance(each, torch.Tensor) else each
        for name, each in given.items()
    }
    assert torch.equal(attnreg.local_attention(**arguments, **cast), expected)


def test_explain_refuses_what_the_op_refuses():
    with pytest.raises(ValueError, match="head_dim must be query's"):
        attnreg.explain(QUERY[..., :7], KEY, VALUE, WINDOW)
    with pytest.raises(TypeError, match="op="):
        attnreg.explain(QUERY, KEY, WINDOW)
    with pytest.raises(ValueError, match="op must be one of"):
        attnreg.explain(QUERY, KEY, WINDOW, op="attention")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_key_lengths_may_have_any_integer_dtype(dtype):
    expected = attnreg.local_attention(QUERY, KEY, VALUE, WINDOW, key_lengths=LENGTHS)
    assert torch.equal(attnreg.local_attention(QUERY, KEY, VALUE, WINDOW, key_lengths=LENGTHS.to(dtype)), expected)


def test_explain_refuses_what_the_call_refuses():
    tensor = torch.randn(1, 1, 5, 4)
    call = {"query": tensor, "key": tensor, "window": Window(1, 1), "scale": None}
    for function in (attnreg.local_dot_product, attnreg.explain):
        with pytest.raises(TypeError, match="scale must be a float, got None"):
            function(**call)


@pytest.mark.parametrize("op", ["local_dot_product", "local_weighted_average", "local_attention"])
@pytest.mark.parametrize("way", ["eager", "aot_eager"])
@pytest.mark.parametrize("number", [99, -1])
def test_a_length_out_of_range_is_refused_in_every_kind_of_tensor_that_has_numbers(op, way, number):
    plain = torch.tensor([number])
    kinds = [plain, torch.nn.Parameter(plain, requires_grad=False)]
    if way == "eager":
        kinds.append(plain.as_subclass(type("Own", (torch.Tensor,), {})))
    tensor = torch.randn(1, 1, 5, 3)
    tensors = (tensor,) * (3 if op == "local_attention" else 2)

    def call(lengths):
        return getattr(attnreg, op)(*tensors, Window(1, 1), key_lengths=lengths)

    call(torch.tensor([5]))
    if way != "eager":
        call = torch.compile(call, backend=way)
    for lengths in kinds:
        with pytest.raises(ValueError, match=f"key_lengths: every length must lie in 0..5 .*got {number}"):
            call(lengths)


@pytest.mark.parametrize("number", [2**62, 2**63, 10**40])
def test_a_window_beyond_torchs_integers_is_refused(number):
    with pytest.raises(ValueError, match=r"Window: left must be at most 2\*\*62 - 1"):
        Window(number, 0)


def test_a_band_that_no_memory_holds_is_refused_by_the_windows_name():
    tensor = torch.randn(1, 1, 5, 3)
    widest = Window(2**62 - 1, 2**62 - 1)
    with pytest.raises(ValueError, match=r"window: .* columns, more than local_dot_product can have"):
        attnreg.local_dot_product(tensor, tensor, widest)
    torch.testing.assert_close(
        attnreg.local_attention(tensor, tensor, tensor, widest),
        attnreg.local_attention(tensor, tensor, tensor, Window(9, 9)),
    )


# Calls of the wrong form

OPS = ("local_dot_product", "local_weighted_average", "local_attention")
WINDOWS = "Window.causal(n), Window.centered(n) or Window(left, right)"


def _ways(op: str) -> list:
    """The op's function, and explain of it."""
    return [getattr(attnreg, op), functools.partial(attnreg.explain, op=op)]


def _tensors(op: str) -> dict:
    return {name: given for name, given in _arguments(op).items() if name != "window"}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("by_name", [False, True])
def test_a_missing_window_is_answered_with_what_to_write(op, by_name):
    tensors = _tensors(op)
    message = _pattern(f"{op}() is missing its argument 'window'; give window={WINDOWS}")
    for function in _ways(op):
        with pytest.raises(TypeError, match=message):
            function(**tensors) if by_name else function(*tensors.values())
    compiled = torch.compile(lambda: getattr(attnreg, op)(**tensors), backend="eager")
    with pytest.raises(TypeError, match=message):
        compiled()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("name", "given", "advice"),
    [
        ("window_size", (3, 0), f"; give window={WINDOWS}"),
        ("is_causal", True, "; give window=Window.causal(n)"),
        ("causal", True, "; give window=Window.causal(n)"),
        ("logits_soft_cap", 30.0, "give softcap="),
        ("alibi_slopes", None, "bias=-slopes[:, None, None] * (window.left - torch.arange(window.size)).abs()"),
        ("score_mod", None, "give bias= for what is added to them"),
        ("return_lse", True, "; call local_attention_with_lse, which returns both"),
        ("layout", "BSHD", "; tensors are (N, H, L, E); of tensors in (N, L, H, E) give tensor.transpose(1, 2)"),
        ("block_size", 64, "; leave it out: blocks are a backend's own"),
        ("learnable_sink", None, "give sinks=, of shape (H,)"),
        ("cu_seqlens", None, "; give cu_seqlens_q="),
        ("max_seqlen_k", 9, "; leave it out: no length is needed beside the offsets"),
        ("mask", None, "give bias=band_from_dense(mask, window)"),
        ("dropout", 0.1, "give dropout_p="),
        ("enable_gqa", True, "; leave it out"),
    ],
)
def test_an_unknown_name_is_answered_before_anything_is_missed(op, name, given, advice):
    for function in _ways(op):
        with pytest.raises(TypeError, match=_pattern(f"{op}() has no argument '{name}'.*{advice}")):
            function(*_tensors(op).values(), **{name: given})
        with pytest.raises(TypeError, match=_pattern(f"{op}() has no argument '{name}'.*{advice}")):
            function(**{name: given})


@pytest.mark.parametrize(
    ("op", "name", "advice"),
    [
        ("local_weighted_average", "attn_mask", "in local_dot_product, give bias="),
        ("local_weighted_average", "softmax_scale", "in local_dot_product, give scale="),
        ("local_weighted_average", "scale", "in local_dot_product, give scale="),
        ("local_dot_product", "value", "in local_weighted_average, give value="),
        *[
            (op, name, f"in local_attention, give {name}=")
            for op in ("local_dot_product", "local_weighted_average")
            for name in ("softcap", "sinks", "dropout_p", "seed")
        ],
        ("local_dot_product", "s_aux", "in local_attention, give sinks="),
        ("local_weighted_average", "dropout", "in local_attention, give dropout_p="),
        ("local_attention", "q", "give query="),
    ],
)
def test_no_advice_names_an_argument_that_the_op_lacks(op, name, advice):
    with pytest.raises(TypeError, match=_pattern(f"{op}() has no argument '{name}'; .*{advice}")):
        getattr(attnreg, op)(**{**_tensors(op), name: 1})


def test_explain_answers_unknown_names_where_it_cannot_tell_the_op():
    with pytest.raises(TypeError, match=_pattern(f"explain() has no argument 'window_size'; give window={WINDOWS}")):
        attnreg.explain(QUERY, KEY, window_size=(3, 0))


def test_too_few_and_too_many_arguments_are_named():
    for function in _ways("local_attention"):
        with pytest.raises(TypeError, match=r"is missing its arguments 'key', 'value', 'window'; give window="):
            function(QUERY)
        with pytest.raises(TypeError, match="is missing its argument 'value': a Window is given in its place"):
            function(QUERY, KEY, WINDOW)
        with pytest.raises(TypeError, match=r"takes query, key, value, window by position.*bias.*got 5 arguments"):
            function(QUERY, KEY, VALUE, WINDOW, None)
        with pytest.raises(TypeError, match="multiple values for argument 'window'"):
            function(QUERY, KEY, VALUE, WINDOW, window=WINDOW)


def test_the_advice_for_alibi_and_for_the_log_sum_exp_is_right():
    query, key, window = torch.randn(1, 4, 7, 8), torch.randn(1, 4, 9, 8), Window(3, 2)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    bias = -slopes[:, None, None] * (window.left - torch.arange(window.size)).abs()
    distance = (torch.arange(9) - torch.arange(7)[:, None] - 2).float()
    dense = -slopes[:, None, None] * distance.abs() + torch.where((distance >= -3) & (distance <= 2), 0, -torch.inf)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, key, attn_mask=dense)
    torch.testing.assert_close(attnreg.local_attention(query, key, key, window, bias=bias), expected)
    scores = attnreg.local_dot_product(query, key, window, scale=8**-0.5, bias=bias)
    expected = (query @ key.mT * 8**-0.5 + dense).logsumexp(-1)
    torch.testing.assert_close(scores.logsumexp(-1), expected)


# The order of dimensions


@pytest.mark.parametrize(("heads", "length"), [(32, 8), (128, 8), (1024, 8)])
def test_sizes_that_may_be_meant_pass_without_a_warning(heads, length):
    """A prompt of 8 tokens for 32 heads has the sizes of 32 tokens for 8 heads, in (N, L, H, E): nothing tells one from the other."""
    tensor = torch.randn(2, heads, length, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attnreg.local_attention(tensor, tensor, tensor, Window.causal(4096))


def test_no_hint_is_given_where_transposed_tensors_would_not_do():
    for change, error in (
        ({"bias": torch.randn(5, 6)}, "does not broadcast"),
        ({"key_lengths": torch.tensor([6, -1])}, "got -1"),
        ({"value": VALUE[:, :, :4]}, "must agree with key"),
        ({"query": torch.randn(2, 3, 7, 8)}, "must be a multiple"),
    ):
        with pytest.raises(ValueError, match=error) as raised:
            attnreg.local_attention(**{**ATTENTION, **change})
        assert "transpose" not in str(raised.value)
