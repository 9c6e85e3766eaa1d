"""fast-transformers' local attention on attnreg, against what its documentation says, written down densely in float64.

Its masks are stood in for by classes with the same attributes. Where it is installed, its own modules are compared with, too.
"""

from __future__ import annotations

import subprocess
import sys
import types

import pytest
import torch

import attnreg
from attnreg import Window
from attnreg.integrations import fast_transformers
from attnreg.integrations.fast_transformers import (
    LocalAttention,
    install,
    local_dot_backward,
    local_dot_product,
    local_weighted_average,
    local_weighted_average_backward,
)

N, H, E, D = 3, 2, 8, 6
CONTEXTS = [1, 2, 3, 8, 40]
LENGTHS = [(9, 9), (9, 6), (7, 12)]


class FullMask:
    def __init__(self, bool_matrix):
        self.bool_matrix = bool_matrix
        self.all_ones = bool(bool_matrix.all())

    @property
    def lengths(self):
        lengths = self.bool_matrix.sum(-1)
        assert (self.bool_matrix == (torch.arange(self.bool_matrix.shape[-1]) < lengths[..., None])).all()
        return lengths

    @property
    def additive_matrix_finite(self):
        return (~self.bool_matrix).float() * -1e24


class LengthMask(FullMask):
    lengths = None

    def __init__(self, lengths, max_len):
        super().__init__(torch.arange(max_len) < lengths[:, None])
        self.lengths = lengths


class TriangularCausalMask:
    all_ones = False

    def __init__(self, size):
        self.lengths = torch.arange(1, size + 1)

    @property
    def bool_matrix(self):
        raise AssertionError("a matrix of L x L was asked for")

    additive_matrix_finite = bool_matrix


@pytest.fixture
def masking(monkeypatch):
    """The module in which fast-transformers has its masks, with those above."""
    module = types.ModuleType("fast_transformers.masking")
    module.TriangularCausalMask = TriangularCausalMask
    monkeypatch.setitem(sys.modules, "fast_transformers.masking", module)


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(dtype)


def around(length, key_length, context):
    """(L, S): whether a key is among the ``context`` ones around a query; the first of both stand beside each other."""
    offset = torch.arange(key_length) - torch.arange(length)[:, None]
    return (offset >= -(context // 2)) & (offset < (context + 1) // 2)


def as_band(dense, context, fill):
    """(..., L, context) of (..., L, S), by one slot after the other."""
    length, key_length = dense.shape[-2:]
    rows = []
    for row in range(length):
        keys = [row - context // 2 + slot for slot in range(context)]
        slots = [
            dense[..., row, key] if 0 <= key < key_length else dense.new_full(dense.shape[:-2], fill) for key in keys
        ]
        rows.append(torch.stack(slots, -1))
    return torch.stack(rows, -2)


def dense_attention(query, key, value, mask, lengths, context, temperature):
    """Of (N, L, H, E), with an additive (L, S) mask: full attention in which all but the keys around a query are hidden."""
    scores = temperature * (torch.einsum("nlhe,nshe->nhls", query, key) + mask)
    visible = around(*scores.shape[-2:], context) & (torch.arange(scores.shape[-1]) < lengths[:, None, None])
    scores = scores.masked_fill(~visible[:, None], -torch.inf)
    hidden = scores.isneginf().all(-1, keepdim=True)
    weights = scores.masked_fill(hidden, 0.0).softmax(-1).masked_fill(hidden, 0.0)
    return torch.einsum("nhls,nshd->nlhd", weights, value)


def leaves(*tensors):
    return [tensor.clone().requires_grad_() for tensor in tensors]


def masks_of(length, key_length):
    """Masks of (L, S) by name, as a mask and as what it adds."""
    hides = torch.rand(length, key_length, generator=torch.Generator().manual_seed(1)) < 0.3
    hides[2] = True
    upto = torch.arange(key_length) < (torch.arange(length) * 5 % key_length + 1)[:, None]
    additive = types.SimpleNamespace(all_ones=False, bool_matrix=torch.ones(length, key_length, dtype=torch.bool))
    additive.additive_matrix_finite = randn(length, key_length)
    infinite = types.SimpleNamespace(all_ones=False, bool_matrix=~hides)
    infinite.additive_matrix = torch.zeros(length, key_length).masked_fill(hides, -torch.inf)
    masks = {
        "full": (FullMask(torch.ones(length, key_length, dtype=torch.bool)), ~hides | hides),
        "boolean": (FullMask(~hides), ~hides),
        "length": (FullMask(upto), upto),
        "infinite": (infinite, ~hides),
    }
    made = {
        name: (mask, torch.zeros(upto.shape).double().masked_fill(~shows, -torch.inf))
        for name, (mask, shows) in masks.items()
    }
    if length == key_length:
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        made["causal"] = (
            TriangularCausalMask(length),
            torch.zeros(length, length).double().masked_fill(~causal, -torch.inf),
        )
        made["causal matrix"] = FullMask(causal), made["causal"][1]
    return {**made, "additive": (additive, additive.additive_matrix_finite)}


KEYS = {
    "all": lambda size: FullMask(torch.ones(N, size, dtype=torch.bool)),
    "lengths": lambda size: LengthMask(torch.tensor([size, size - 2, 1]), size),
    "all of one length, which is shorter": lambda size: LengthMask(torch.tensor([4, 4, 4]), 4),
}


# The products


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize(("length", "key_length"), LENGTHS)
def test_scores_and_their_gradients_are_those_of_the_definition(length, key_length, context):
    lengths = torch.tensor([key_length, key_length - 2, 0])
    query, key, mask = leaves(randn(N, H, length, E), randn(N, H, key_length, E, seed=1), randn(length, key_length))
    with torch.no_grad():
        mask[1, 0] = -1e24
    upstream = randn(N, H, length, context, seed=2)
    scores = local_dot_product(query, key, mask, lengths, context)

    dense = (query @ key.mT + mask).masked_fill((torch.arange(key_length) >= lengths[:, None, None])[:, None], -1e24)
    expected = as_band(dense, context, -1e24)
    torch.testing.assert_close(scores, expected, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(scores, (query, key, mask), upstream)
    for gradient, true in zip(found, torch.autograd.grad(expected, (query, key, mask), upstream)):
        torch.testing.assert_close(gradient, true, rtol=1e-12, atol=1e-12)

    by_hand = local_dot_backward(query, key, lengths, upstream, context)
    assert all(torch.equal(*pair) for pair in zip(by_hand, found))


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize(("length", "key_length"), LENGTHS)
def test_averages_and_their_gradients_are_those_of_the_definition(length, key_length, context):
    weights, value = leaves(randn(N, H, length, context), randn(N, H, key_length, D))
    upstream = randn(N, H, length, D, seed=2)
    output = local_weighted_average(weights, value)

    expected = 0.0
    for slot in range(context):
        keys = torch.arange(length) - context // 2 + slot
        inside = (keys >= 0) & (keys < key_length)
        expected = expected + (weights[..., slot] * inside)[..., None] * value[:, :, keys.clamp(0, key_length - 1)]
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(output, (weights, value), upstream)
    for gradient, true in zip(found, torch.autograd.grad(expected, (weights, value), upstream)):
        torch.testing.assert_close(gradient, true, rtol=1e-12, atol=1e-12)

    by_hand = local_weighted_average_backward(weights, value, upstream)
    assert all(torch.equal(*pair) for pair in zip(by_hand, found))


def test_a_slot_that_a_mask_hides_with_minus_infinity_stays_so_and_one_outside_does_not():
    mask = torch.zeros(4, 4).masked_fill(torch.eye(4, dtype=torch.bool), -torch.inf)
    scores = local_dot_product(torch.ones(1, 1, 4, 2), torch.ones(1, 1, 4, 2), mask, torch.tensor([3]), 3)
    hidden, none = -torch.inf, -1e24
    expected = [[none, hidden, 2], [2, hidden, 2], [2, hidden, none], [2, none, none]]
    assert torch.equal(scores[0, 0], torch.tensor(expected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_softmax_of_a_row_without_a_key_is_no_nan(dtype):
    tensors = torch.ones(2, 1, 1, 3, 4, dtype=dtype)
    scores = local_dot_product(*tensors, torch.zeros(3, 3, dtype=dtype), torch.tensor([0]), 5)
    assert scores.dtype is dtype
    assert torch.equal(scores.softmax(-1), torch.full((1, 1, 3, 5), 0.2, dtype=dtype))


# The module


@pytest.mark.parametrize("context", [3, 8])
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize(
    ("length", "key_length", "kind"), [(*lengths, kind) for lengths in LENGTHS for kind in masks_of(*lengths)]
)
@pytest.mark.usefixtures("masking")
def test_attention_under_each_mask_has_the_output_and_gradients_of_the_definition(
    length, key_length, keys, kind, context
):
    mask_of_keys = KEYS[keys](key_length)
    mask, additive = masks_of(length, key_length)[kind]
    tensors = leaves(randn(N, length, H, E), randn(N, key_length, H, E, seed=1), randn(N, key_length, H, D, seed=2))
    upstream = randn(N, length, H, D, seed=3)
    attention = LocalAttention(context, softmax_temp=0.7, attention_dropout=0.0)
    output = attention(*tensors, mask, None, mask_of_keys)
    expected = dense_attention(*tensors, additive, mask_of_keys.lengths, context, 0.7)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    assert output.is_contiguous()
    found, true = (torch.autograd.grad(each, tensors, upstream) for each in (output, expected))
    for gradient, other in zip(found, true):
        torch.testing.assert_close(gradient, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("softmax_temp", [None, 0, 0.0])
def test_no_temperature_is_that_of_the_head_dim(softmax_temp):
    tensors = randn(N, 5, H, E), randn(N, 5, H, E, seed=1), randn(N, 5, H, D, seed=2)
    mask, keys = FullMask(torch.ones(5, 5, dtype=torch.bool)), KEYS["all"](5)
    output = LocalAttention(3, softmax_temp).eval()(*tensors, mask, keys, keys)
    expected = dense_attention(*tensors, torch.zeros(5, 5), keys.lengths, 3, E**-0.5)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)


def test_nothing_of_a_key_that_masks_hide_reaches_anything():
    tensors = leaves(randn(N, 9, H, E), randn(N, 9, H, E, seed=1), randn(N, 9, H, D, seed=2))
    shows = torch.ones(9, 9, dtype=torch.bool)
    shows[:, 3] = False
    mask, keys = FullMask(shows), LengthMask(torch.tensor([9, 6, 1]), 9)
    attention = LocalAttention(5, attention_dropout=0.0)
    expected = attention(*tensors, mask, keys, keys)
    with torch.no_grad():
        for tensor in tensors[1:]:
            tensor[:, 3], tensor[1, 6:], tensor[2, 1:] = torch.nan, torch.nan, torch.inf
    output = attention(*tensors, mask, keys, keys)
    assert torch.equal(output, expected)
    assert not output[2, 3:].any()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(output.sum(), tensors))


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_that_of_attnreg_in_training_alone(training):
    tensors = randn(N, 9, H, E), randn(N, 9, H, E, seed=1), randn(N, 9, H, D, seed=2)
    mask, keys = FullMask(torch.ones(9, 9, dtype=torch.bool)), KEYS["all"](9)
    attention = LocalAttention(4).train(training)
    assert attention.dropout.p == 0.1
    torch.manual_seed(5)
    output = attention(*tensors, mask, keys, keys)
    torch.manual_seed(5)
    heads = [tensor.transpose(1, 2) for tensor in tensors]
    expected = attnreg.local_attention(*heads, Window(2, 1), dropout_p=0.1 if training else 0.0)
    torch.testing.assert_close(output, expected.transpose(1, 2))
    kept = attnreg.local_attention(*heads, Window(2, 1)).transpose(1, 2)
    assert torch.allclose(output, kept) is not training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_takes_16_bits_and_keeps_them(dtype):
    tensors = [randn(N, 9, H, E, seed=seed) for seed in range(3)]
    mask, keys = masks_of(9, 9)["boolean"][0], KEYS["lengths"](9)
    attention = LocalAttention(4).eval()
    output = attention(*[tensor.to(dtype) for tensor in tensors], mask, keys, keys)
    assert output.dtype is dtype
    torch.testing.assert_close(output.double(), attention(*tensors, mask, keys, keys), rtol=3e-2, atol=3e-2)


def test_a_compiled_module_gives_the_same():
    tensors = [randn(N, 9, H, E, seed=seed) for seed in range(3)]
    mask, keys = masks_of(9, 9)["boolean"][0], KEYS["lengths"](9)
    attention = LocalAttention(4).eval()
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors, mask, keys, keys), attention(*tensors, mask, keys, keys))


# What is refused

ONES = torch.ones(2, 1, 3, 4)
FULL = FullMask(torch.ones(3, 3, dtype=torch.bool))
FULL_KEYS = FullMask(torch.ones(2, 3, dtype=torch.bool))
ZEROS, THREE = torch.zeros(3, 3), torch.tensor([3, 3])
IN_ROWS = torch.ones(2, 3, 1, 4)


def attend(*arguments):
    return LocalAttention(3)(*arguments)


BAD = {
    "queries, no tensor": (local_dot_product, (None, ONES, ZEROS, THREE, 3), "queries must be a torch.Tensor, got NoneType"),
    "keys, three dimensions": (local_dot_product, (ONES, ONES[0], ZEROS, THREE, 3), "keys must have four dimensions"),
    "a mask of another shape": (local_dot_product, (ONES, ONES, ZEROS[:2], THREE, 3), r"attn_mask must have shape \(3, 3\), got \(2, 3\)"),
    "no mask": (local_dot_product, (ONES, ONES, None, THREE, 3), "attn_mask must be a torch.Tensor"),
    "no lengths": (local_dot_product, (ONES, ONES, ZEROS, None, 3), "key_lengths must be a torch.Tensor"),
    "lengths of another batch": (local_dot_product, (ONES, ONES, ZEROS, THREE[:1], 3), r"key_lengths must have shape \(2\), got \(1,\)"),
    "a length past the keys": (local_dot_product, (ONES, ONES, ZEROS, THREE + 1, 3), "key_lengths"),
    "no window": (local_dot_product, (ONES, ONES, ZEROS, THREE, 0), "local_context must be at least 1, got 0"),
    "half a window": (local_dot_product, (ONES, ONES, ZEROS, THREE, 2.5), "local_context must be an int, got float 2.5"),
    "a gradient of another shape": (local_dot_backward, (ONES, ONES, THREE, ONES, 3), "grad must have shape"),
    "weights, no tensor": (local_weighted_average, ([1], ONES), "A must be a torch.Tensor, got list"),
    "values of other dimensions": (local_weighted_average, (ONES, ONES[0]), "V must have four dimensions"),
    "a gradient of an average": (local_weighted_average_backward, (ONES, ONES, ONES[:1]), "grad must have shape"),
    "a module without a window": (LocalAttention, (0,), "local_context must be at least 1"),
    "a window that is none": (LocalAttention, (True,), "local_context must be an int, got bool"),
    "all dropped": (LocalAttention, (3, None, 1.0), "attention_dropout must be at least 0 and less than 1, got 1.0"),
    "dropout, no number": (LocalAttention, (3, None, "x"), "attention_dropout must be a float, got str 'x'"),
    "a temperature to learn": (LocalAttention, (3, torch.nn.Parameter(torch.ones(1))), "softmax_temp must be a float or None, got Parameter"),
    "a dispatcher that is none": (LocalAttention, (3, None, 0.1, 7), "event_dispatcher must be a name or an EventDispatcher, got int 7"),
    "keys of another batch": (attend, (IN_ROWS, IN_ROWS[:1], IN_ROWS, FULL, None, FULL_KEYS), "keys must have shape"),
    "values of another length": (attend, (IN_ROWS, IN_ROWS, IN_ROWS[:, :2], FULL, None, FULL_KEYS), "values must have shape"),
    "a tensor as mask": (attend, (IN_ROWS, IN_ROWS, IN_ROWS, ZEROS, None, FULL_KEYS), "attn_mask must be a mask of fast_transformers.masking"),
    "no mask of keys": (attend, (IN_ROWS, IN_ROWS, IN_ROWS, FULL, None, None), "key_lengths must be a mask of fast_transformers.masking"),
    "a full mask of another shape": (attend, (IN_ROWS, IN_ROWS, IN_ROWS, FULL_KEYS, None, FULL_KEYS), r"attn_mask must have shape \(3, 3\), got \(2, 3\)"),
    "lengths of other sequences": (attend, (IN_ROWS, IN_ROWS, IN_ROWS, FULL, None, LengthMask(torch.tensor([1]), 3)), "key_lengths must have shape"),
    "a causal mask of another length": (attend, (IN_ROWS, IN_ROWS, IN_ROWS, TriangularCausalMask(4), None, FULL_KEYS), r"attn_mask must have shape \(3, 3\), got \(4, 4\)"),
}  # fmt: skip


@pytest.mark.parametrize(("function", "arguments", "message"), BAD.values(), ids=BAD)
@pytest.mark.usefixtures("masking")
def test_bad_input_is_refused_by_name(function, arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        function(*arguments)


# In the package


class Dispatcher:
    def __init__(self):
        self.events = []

    def dispatch(self, event):
        self.events.append(event)


def test_an_event_dispatcher_is_kept_and_gets_no_event():
    dispatcher = Dispatcher()
    attention = LocalAttention(3, event_dispatcher=dispatcher)
    attention(IN_ROWS, IN_ROWS, IN_ROWS, FULL, None, FULL_KEYS)
    assert attention.event_dispatcher is dispatcher
    assert dispatcher.events == []


def test_a_dispatcher_by_name_needs_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "fast_transformers", None)
    monkeypatch.delitem(sys.modules, "fast_transformers.events", raising=False)
    assert LocalAttention(3).event_dispatcher is None
    with pytest.raises(ImportError, match="event_dispatcher='mine' is the name of a dispatcher of fast_transformers"):
        LocalAttention(3, event_dispatcher="mine")


class Registry:
    def __init__(self, **classes):
        self._classes = classes


@pytest.fixture
def package(monkeypatch):
    """A package with the names that ``install`` replaces."""
    names = ["", ".local_product", ".attention", ".attention.local_attention", ".attention_registry", ".events"]
    modules = {name: types.ModuleType(f"fast_transformers{name}") for name in names}
    for name, module in modules.items():
        module.__path__ = []
        monkeypatch.setitem(sys.modules, f"fast_transformers{name}", module)
    for name in (".local_product", ".attention.local_attention"):
        modules[name].local_dot_product, modules[name].local_weighted_average = "their dot", "their average"
    for name in (".attention", ".attention.local_attention"):
        modules[name].LocalAttention = "their attention"
    modules[".attention_registry"].AttentionRegistry = Registry(local="their attention", full="full")
    modules[".events"].EventDispatcher = types.SimpleNamespace(get=lambda name: f"the dispatcher {name!r}")
    return modules


def what_is_there(package):
    registry = package[".attention_registry"].AttentionRegistry
    return {
        **{
            (name, each): value
            for name, module in package.items()
            for each, value in vars(module).items()
            if "ocal" in each
        },
        **registry._classes,
    }


def test_a_dispatcher_by_name_is_that_of_the_package(package):
    assert LocalAttention(3).event_dispatcher == "the dispatcher ''"
    assert LocalAttention(3, event_dispatcher="mine").event_dispatcher == "the dispatcher 'mine'"


def test_what_is_installed_is_used_everywhere_and_can_be_removed(package):
    before = what_is_there(package)
    with install() as installation:
        there = what_is_there(package)
        assert there.pop("full") == "full"
        ours = {
            "their dot": local_dot_product,
            "their average": local_weighted_average,
            "their attention": LocalAttention,
        }
        assert there == {name: ours[before[name]] for name in there}
        assert not install().replaced
        assert what_is_there(package)["local"] is LocalAttention
        package[".attention"].LocalAttention = "somebody else's"
    assert not installation.replaced
    assert what_is_there(package) == {**before, (".attention", "LocalAttention"): "somebody else's"}


def test_installing_without_the_package_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "fast_transformers", None)
    for name in [name for name in sys.modules if name.startswith("fast_transformers.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match="fast_transformers"):
        install()


def test_the_package_is_not_imported_before_it_is_asked_for():
    code = (
        "import sys, attnreg\n"
        "assert 'attnreg.integrations' not in sys.modules\n"
        "import attnreg.integrations.fast_transformers\n"
        "assert not [name for name in sys.modules if name.partition('.')[0] == 'fast_transformers']"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_is_there():
    assert all(hasattr(fast_transformers, name) for name in fast_transformers.__all__)


@pytest.mark.parametrize("kind", ["full", "causal", "boolean"])
def test_an_encoder_of_its_builder_gives_the_same_with_attnreg(kind):
    pytest.importorskip("fast_transformers.attention", reason="pytorch-fast-transformers is not installed")
    from fast_transformers.builders import TransformerEncoderBuilder
    from fast_transformers.masking import FullMask, LengthMask, TriangularCausalMask

    def build():
        torch.manual_seed(0)
        return TransformerEncoderBuilder.from_kwargs(
            attention_type="local", local_context=5, n_layers=2, n_heads=2, query_dimensions=8, value_dimensions=8, dropout=0.0,
            attention_dropout=0.0,
        ).get()  # fmt: skip

    masks = {"full": FullMask(9), "causal": TriangularCausalMask(9), "boolean": FullMask(around(9, 9, 4))}
    lengths, inputs = LengthMask(torch.tensor([9, 4, 6])), randn(3, 9, 16, dtype=torch.float32)
    padding = torch.arange(9) < lengths.lengths[:, None]
    upstream, found = randn(3, 9, 16, dtype=torch.float32, seed=1) * padding[..., None], []
    for model in (build(), installed(build)):
        output = model(inputs, attn_mask=masks[kind], length_mask=lengths)
        output.backward(upstream)
        found.append([output[padding], *[each.grad for each in model.parameters()]])
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def installed(build):
    with install():
        model = build()
    assert any(type(each) is LocalAttention for each in model.modules())
    return model
