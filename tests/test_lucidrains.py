"""lucidrains' local attention on attnreg: against its definition in values and all gradients, and against the package."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from attnreg.integrations import local_attention as module
from attnreg.integrations.local_attention import LocalAttention, RotaryEmbedding, patch, unpatch

WIDTH, DIM, BATCH, HEADS = 4, 8, 2, 3

SETTINGS = {
    "buckets": {},
    "causal buckets": {"causal": True},
    "its own bucket alone": {"look_backward": 0, "look_forward": 0},
    "its own bucket alone, causal": {"causal": True, "look_backward": 0},
    "two buckets back": {"look_backward": 2},
    "two buckets back, causal": {"look_backward": 2, "causal": True},
    "two buckets forward": {"look_backward": 0, "look_forward": 2},
    "exact": {"exact_windowsize": True},
    "exact, causal": {"exact_windowsize": True, "causal": True},
    "exact, two back": {"exact_windowsize": True, "look_backward": 2, "look_forward": 0},
    "exact, itself alone": {"exact_windowsize": True, "look_backward": 0, "causal": True},
    "shared": {"shared_qk": True},
    "shared, causal": {"shared_qk": True, "causal": True},
    "shared, exact, causal": {"shared_qk": True, "causal": True, "exact_windowsize": True},
    "scale": {"scale": 0.9, "exact_windowsize": True},
    "rotary": {"dim": DIM},
    "rotary, causal": {"dim": DIM, "causal": True},
    "rotary, exact": {"dim": DIM, "exact_windowsize": True},
    "rotary, exact, causal": {"rel_pos_emb_config": (DIM, HEADS), "exact_windowsize": True, "causal": True},
    "rotary, shared, two back": {"dim": DIM, "shared_qk": True, "look_backward": 2, "causal": True},
    "xpos": {"dim": DIM, "use_xpos": True},
    "xpos, causal": {"dim": DIM, "use_xpos": True, "causal": True, "xpos_scale_base": 5},
    "xpos, exact, causal": {"dim": DIM, "use_xpos": True, "causal": True, "exact_windowsize": True},
    "xpos without rotary": {"use_xpos": True, "exact_windowsize": True},
    "no rotary": {"dim": DIM, "use_rotary_pos_emb": False},
}
MASKS = {
    "no mask": lambda length: None,
    "lengths": lambda length: torch.arange(length) < torch.tensor([[length], [length // 2 + 1]]),
    "starts": lambda length: torch.arange(length) >= torch.tensor([[0], [length // 3]]),
    "holes": lambda length: torch.rand(BATCH, length, generator=torch.Generator().manual_seed(length)) > 0.4,
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def package():
    return pytest.importorskip("local_attention", reason="lucidrains' local-attention is not installed")


def inputs(length, dtype=torch.float64, shape=(BATCH, HEADS)):
    query, key, value, upstream = torch.randn(4, *shape, length, DIM, dtype=dtype)
    return [each.requires_grad_() for each in (query, key, value)], upstream


def visible(layer, length, mask=None, width=WIDTH):
    """(N or 1, L, keys): which keys a query sees; those that autopad adds are keys where nothing hides them."""
    keys = length if mask is not None or layer.causal else length + -length % layer.window_size
    row, key = torch.arange(length)[:, None], torch.arange(keys)
    bucket = row // width
    seen = (key >= (bucket - layer.look_backward) * width) & (key < (bucket + 1 + layer.look_forward) * width)
    if layer.causal:
        seen &= key <= row
    if layer.exact_windowsize:
        seen &= row - key <= layer.window_size * layer.look_backward
        seen &= key - row <= layer.window_size * layer.look_forward
    return seen[None] if mask is None else seen & mask[:, None]


def dense(layer, query, key, value, mask=None, attn_bias=None, width=WIDTH):
    """The output by the definition: every query's score with every key, in one matrix."""
    length = query.shape[-2]
    seen = visible(layer, length, mask, width)
    missing = seen.shape[2] - length
    if layer.shared_qk:
        key = key / key.norm(dim=-1, keepdim=True)
    key, value = (torch.cat((each, each.new_zeros(*each.shape[:-2], missing, DIM)), -2) for each in (key, value))
    row, column = torch.arange(length)[:, None], torch.arange(length + missing)
    if layer.rel_pos is None:
        scores = query @ key.mT
    else:
        distance = row + layer.look_forward * width - column
        angles = distance[..., None] * layer.rel_pos.inv_freq.double()
        decay = 1.0
        if layer.use_xpos:
            decay = layer.rel_pos.scale.double() ** (distance[..., None].double() / layer.rel_pos.scale_base)
        (first, second), (key_first, key_second) = (each.chunk(2, -1) for each in (query, key))
        along = torch.einsum("nhie,nhje->nhije", first, key_first) + torch.einsum(
            "nhie,nhje->nhije", second, key_second
        )
        across = torch.einsum("nhie,nhje->nhije", first, key_second) - torch.einsum(
            "nhie,nhje->nhije", second, key_first
        )
        scores = ((along * angles.cos() + across * angles.sin()) * decay).sum(-1)
    scores = scores * (DIM**-0.5 if layer.scale is None else layer.scale)
    if attn_bias is not None:
        place = column - (row // width - layer.look_backward) * width
        scores = scores + attn_bias[:, row % width, place.clamp(0, attn_bias.shape[2] - 1)]
    if layer.shared_qk:
        scores = scores.masked_fill(row == column, -5e4)
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    sees = seen.any(-1)[:, None, :, None]
    return scores.masked_fill(~sees, 0.0).softmax(-1).masked_fill(~sees, 0.0) @ value


def assert_alike(found, true, leaves, upstream, tolerance=1e-9):
    torch.testing.assert_close(found, true, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(*(torch.autograd.grad(each, leaves, upstream) for each in (found, true))):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * (1 + float(theirs.abs().max())))


# By the definition


# Where rows see all of a frame, only a backend that is named makes a band of it.
@pytest.mark.parametrize("backend", [None, "torch_block"])
@pytest.mark.parametrize("length", [3, 8, 21])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_values_and_gradients_are_those_of_the_definition(settings, mask, length, backend):
    layer = LocalAttention(WIDTH, autopad=True, backend=backend, **SETTINGS[settings])
    leaves, upstream = inputs(length)
    mask = MASKS[mask](length)
    assert_alike(layer(*leaves, mask=mask), dense(layer, *leaves, mask), leaves, upstream)


@pytest.mark.parametrize("backend", [None, "torch_block"])
@pytest.mark.parametrize("length", [3, 21])
@pytest.mark.parametrize("mask", ["no mask", "holes"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_bias_of_buckets_and_its_gradient_are_those_of_the_definition(settings, mask, length, backend):
    layer = LocalAttention(WIDTH, autopad=True, backend=backend, **SETTINGS[settings])
    leaves, upstream = inputs(length)
    frame = (layer.look_backward + 1 + layer.look_forward) * WIDTH
    bias = torch.randn(HEADS, WIDTH, frame, dtype=torch.float64, requires_grad=True)
    mask = MASKS[mask](length)
    found = layer(*leaves, mask=mask, attn_bias=bias)
    assert_alike(found, dense(layer, *leaves, mask, bias), [*leaves, bias], upstream)


@pytest.mark.parametrize("settings", ["xpos", "xpos, causal", "xpos, exact, causal", "xpos without rotary"])
@pytest.mark.parametrize("width", [2, 8])
def test_a_window_of_a_call_is_that_of_the_definition(settings, width):
    layer = LocalAttention(WIDTH, **SETTINGS[settings])
    leaves, upstream = inputs(16)
    assert_alike(layer(*leaves, window_size=width), dense(layer, *leaves, width=width), leaves, upstream)


@pytest.mark.parametrize("settings", ["buckets", "causal buckets", "exact"])
@pytest.mark.parametrize("shape", [(HEADS, 1, None), (1, WIDTH, 1), (HEADS, WIDTH, 1)])
def test_a_bias_may_be_the_same_for_all_rows_or_keys(settings, shape):
    layer = LocalAttention(WIDTH, **SETTINGS[settings])
    leaves, upstream = inputs(12)
    frame = (layer.look_backward + 1 + layer.look_forward) * WIDTH
    bias = torch.randn([size or frame for size in shape], dtype=torch.float64, requires_grad=True)
    true = dense(layer, *leaves, attn_bias=bias.expand(HEADS, WIDTH, frame))
    assert_alike(layer(*leaves, attn_bias=bias), true, [*leaves, bias], upstream)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_mask_that_may_not_be_looked_at_changes_nothing(settings, mask, monkeypatch):
    """As on an accelerator, for which the host does not wait."""
    monkeypatch.setattr(module, "can_be_read", lambda mask: False)
    layer = LocalAttention(WIDTH, autopad=True, padding_at_ends=mask != "holes", **SETTINGS[settings])
    leaves, upstream = inputs(21)
    mask = MASKS[mask](21)
    assert_alike(layer(*leaves, mask=mask), dense(layer, *leaves, mask), leaves, upstream)


@pytest.mark.parametrize("shape", [(), (6,), (3, 2), (1, 2, 3)])
@pytest.mark.parametrize("settings", ["buckets", "exact, causal", "rotary, causal"])
def test_leading_dimensions_may_be_any(settings, shape):
    layer = LocalAttention(WIDTH, **SETTINGS[settings])
    leaves, _ = inputs(8, shape=shape)
    true = dense(layer, *(each.reshape(1, -1, 8, DIM) for each in leaves))
    torch.testing.assert_close(layer(*leaves), true.reshape(*shape, 8, DIM), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("sequences", "heads"), [(2, 3), (2, 6), (3, 6), (3, 1), (3, 4), (12, 3)])
@pytest.mark.parametrize("causal", [True, False])
def test_a_mask_of_sequences_and_a_bias_of_heads_go_together(sequences, heads, causal):
    layer = LocalAttention(WIDTH, causal=causal)
    leaves, upstream = inputs(8, shape=(12,))
    mask = torch.rand(sequences, 8) > 0.3
    bias = torch.randn(heads, WIDTH, (2 if causal else 3) * WIDTH, dtype=torch.float64, requires_grad=True)
    found = layer(*leaves, mask=mask, attn_bias=bias)
    of_all = (
        dense(
            layer,
            *(each[place].view(1, 1, 8, DIM) for each in leaves),
            mask[place * sequences // 12][None],
            bias[place % heads][None],
        )
        for place in range(12)
    )
    assert_alike(found, torch.cat(list(of_all)).view(12, 8, DIM), [*leaves, bias], upstream)


def test_values_may_have_a_head_dim_of_their_own():
    layer = LocalAttention(WIDTH, causal=True, dim=DIM)
    (query, key, value), _ = inputs(8)
    torch.testing.assert_close(layer(query, key, value[..., :3]), layer(query, key, value)[..., :3])
    assert layer(query, key, value[..., :3]).shape == (BATCH, HEADS, 8, 3)


def test_an_exact_window_holds_in_a_long_sequence():
    """Angles are large there, and so would powers of the distance from a sequence's middle be."""
    for settings in ("rotary, exact, causal", "xpos, causal"):
        layer = LocalAttention(WIDTH, **SETTINGS[settings])
        leaves, _ = inputs(8, torch.float32, (1, 1))
        at_the_end = [torch.cat((torch.randn(1, 1, 40_000, DIM), each), -2) for each in leaves]
        # From the second of its buckets on, a query sees the same at any place.
        found, true = layer(*at_the_end)[:, :, -4:], layer(*leaves)[:, :, -4:]
        torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-5)


def test_dropout_has_the_mean_of_none_and_stops_in_evaluation():
    for settings in ("buckets", "exact, causal"):
        layer = LocalAttention(WIDTH, dropout=0.4, **SETTINGS[settings]).eval()
        leaves, _ = inputs(8, torch.float32, (1, 1))
        true = layer(*leaves)
        assert torch.equal(layer(*leaves), true)
        many = layer.train()(*(each.expand(4000, 1, -1, -1) for each in leaves))
        deviation = many.std(0, keepdim=True) / 4000**0.5
        assert ((many.mean(0, keepdim=True) - true).abs() <= 5 * deviation + 1e-6).all()
        assert (many.std(0) > 1e-3).all()


def test_checkpointing_drops_again_what_was_dropped():
    layer, found = LocalAttention(WIDTH, dropout=0.5), []
    leaves, upstream = inputs(8)
    for run in (layer, lambda *given: checkpoint(layer, *given, use_reentrant=False)):
        torch.manual_seed(3)
        found.append(torch.autograd.grad(run(*leaves), leaves, upstream))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("mask", ["no mask", "starts", "holes"])
@pytest.mark.parametrize("settings", ["buckets", "shared, exact, causal", "rotary, exact", "xpos, causal"])
def test_a_call_that_is_traced_whole_gives_the_same(settings, mask):
    layer = LocalAttention(WIDTH, autopad=True, **SETTINGS[settings])
    leaves, upstream = inputs(14, torch.float32)
    mask = MASKS[mask](14)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_alike(compiled(*leaves, mask=mask), layer(*leaves, mask=mask), leaves, upstream, 2e-5)


def test_half_precision_keeps_its_dtype():
    for settings in ("rotary, causal", "rotary, exact", "shared, causal"):
        layer = LocalAttention(WIDTH, **SETTINGS[settings])
        leaves, _ = inputs(8, torch.float32)
        found = layer(*(each.bfloat16() for each in leaves))
        assert found.dtype is torch.bfloat16
        torch.testing.assert_close(found.float(), layer(*leaves), rtol=0, atol=0.05)


# Refusals


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"window_size": 0}, ValueError, "window_size must be at least 1, got 0"),
        ({"window_size": 2.5}, TypeError, "window_size must be an int, got 2.5"),
        ({"look_backward": -1}, ValueError, "look_backward must be at least 0, got -1"),
        ({"causal": True, "look_forward": 1}, ValueError, "look_forward must be 0 where causal is True, got 1"),
        ({"dropout": 1.0}, ValueError, "dropout must be at least 0 and less than 1, got 1.0"),
        ({"padding_at_ends": 1}, TypeError, "padding_at_ends must be True or False, got 1"),
        ({"dim": 7}, ValueError, "dim must be even for rotary embeddings, got 7"),
        ({"flavour": 3}, TypeError, "flavour"),
    ],
)
def test_bad_settings_are_named(settings, error, message):
    with pytest.raises(error, match=message):
        LocalAttention(**{"window_size": WIDTH, **settings})


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"q": None}, TypeError, "q must be a torch.Tensor, got NoneType"),
        ({"k": torch.zeros(2, 3, 4, DIM)}, ValueError, r"k must have q's shape but for the last, \(2, 3, 8, 8\); got \(2, 3, 4, 8\)"),
        ({"q": torch.zeros(2, 3, 0, DIM)}, ValueError, "q must be .* with a token at least"),
        ({"mask": torch.ones(2, 8)}, TypeError, "mask must be boolean, True where a key may be seen; got torch.float32"),
        ({"mask": torch.ones(4, 8, dtype=torch.bool)}, ValueError, "mask must have a number of sequences that divides q's, 6; got 4"),
        ({"mask": torch.ones(2, 7, dtype=torch.bool)}, ValueError, r"mask must have shape \(N, 8\), got \(2, 7\)"),
        ({"mask": torch.ones(2, 8, dtype=torch.bool), "input_mask": torch.ones(2, 8, dtype=torch.bool)}, ValueError, "mask and input_mask are two names"),
        ({"attn_bias": torch.zeros(3, 4, 8)}, ValueError, r"attn_bias must have shape \(H, 4, 12\), got \(3, 4, 8\)"),
        ({"attn_bias": torch.zeros(3, 4, 12, dtype=torch.int64)}, TypeError, "attn_bias must be of a floating-point dtype, got torch.int64"),
        ({"attn_bias": torch.zeros(4, 4, 12)}, ValueError, "attn_bias must have a number of heads that divides q's sequences, 6; got 4"),
        ({"window_size": 2}, ValueError, "window_size=2 is another one than the module's; that needs use_xpos=True"),
        ({"key_lengths": None}, TypeError, "key_lengths"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(given, error, message):
    (query, key, value), _ = inputs(8, torch.float32)
    with pytest.raises(error, match=message):
        LocalAttention(WIDTH)(**{"q": query, "k": key, "v": value, **given})


def test_a_length_that_the_window_does_not_divide_needs_autopad():
    leaves, _ = inputs(7)
    with pytest.raises(ValueError, match="q must have a length that window_size=4 divides, got 7; or autopad"):
        LocalAttention(WIDTH)(*leaves)
    with pytest.raises(ValueError, match="q must have a length that window_size=5 divides, got 8"):
        LocalAttention(WIDTH, autopad=True, dim=DIM, use_xpos=True)(*leaves, window_size=5)


def test_holes_that_were_said_not_to_be_there_are_found(monkeypatch):
    monkeypatch.setattr(module, "can_be_read", lambda mask: False)
    leaves, _ = inputs(8)
    with pytest.raises(RuntimeError, match="hidden keys stand between others"):
        LocalAttention(WIDTH, causal=True, padding_at_ends=True)(*leaves, mask=MASKS["holes"](8))


def test_rotary_embeddings_of_another_head_dim_are_refused():
    leaves, _ = inputs(8)
    with pytest.raises(ValueError, match="q must have the head dim of the rotary embeddings, 6; got 8"):
        LocalAttention(WIDTH, dim=6)(*leaves)


# Beside the package


@pytest.mark.parametrize("length", [16, 21, 3])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_values_and_gradients_are_those_of_the_package(package, settings, mask, length):
    ours, theirs = (
        each(WIDTH, autopad=True, **SETTINGS[settings]) for each in (LocalAttention, package.LocalAttention)
    )
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    leaves, upstream = inputs(length, torch.float32)
    mask = MASKS[mask](length)
    # Where a query sees no key, theirs is an average of hidden ones.
    sees = visible(ours, length, mask).any(-1)[:, None, :, None]
    found, true = (layer(*leaves, mask=mask) * sees for layer in (ours, theirs))
    assert_alike(found, true, leaves, upstream, 2e-5)


def test_xpos_without_a_base_is_refused():
    LocalAttention(1, dim=DIM, use_xpos=True, xpos_scale_base=3)
    LocalAttention(1, dim=DIM)
    message = r"xpos_scale_base must not be 0, which is window_size // 2 where it is left out; got window_size=1"
    with pytest.raises(ValueError, match=message):
        LocalAttention(1, dim=DIM, use_xpos=True)


def test_xpos_without_a_base_is_refused_in_a_model(package):
    settings = {"window_size": 1, "dim": DIM, "use_xpos": True}
    with pytest.raises(ValueError, match=r"model has xpos_scale_base 0, which is window_size // 2"):
        patch(package.LocalAttention(**settings))
    for given in ({"xpos_scale_base": 3}, {"use_xpos": False}):
        query, key, value = torch.randn(3, 1, 2, 4, DIM, dtype=torch.float64)
        layer = package.LocalAttention(**(settings | given))
        true = layer(query, key, value)
        patch(layer)
        torch.testing.assert_close(layer(query, key, value), true, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("use_xpos", [False, True])
def test_its_rotary_embeddings_are_those_of_the_package(package, use_xpos):
    theirs = package.rotary.SinusoidalEmbeddings(DIM, use_xpos=use_xpos, scale_base=3)
    ours = RotaryEmbedding(DIM, 3, use_xpos)
    for found, true in zip(ours(torch.zeros(1, 9, DIM)), theirs(torch.zeros(1, 9, DIM))):
        torch.testing.assert_close(found, true)


def transformer(package, **settings):
    sizes = {"num_tokens": 20, "max_seq_len": 32, "dim": 12, "depth": 2, "heads": 2, "dim_head": 8}
    return package.LocalTransformer(**sizes, local_attn_window_size=WIDTH, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"causal": False},
        {"exact_windowsize": False},
        {"use_xpos": True},
        {"use_dynamic_pos_bias": True},
        {"qk_rmsnorm": True, "gate_values_per_head": True},
        {"look_backward": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("length", [3, 8, 17])
def test_a_model_that_is_patched_computes_what_it_did(package, settings, length):
    model = transformer(package, **settings)
    tokens = torch.randint(0, 20, (2, length))
    found = []
    for change in (None, patch, unpatch):
        if change is not None:
            assert change(model) == [f"layers.{layer}.0.branch.attn_fn" for layer in range(2)]
        logits = model(tokens)
        upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
        gradients = torch.autograd.grad(
            logits, list(model.parameters()), upstream, allow_unused=True, materialize_grads=True
        )
        found.append([logits.detach(), *gradients])
    for ours, theirs in zip(found[1], found[0]):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=0)


@pytest.mark.parametrize("use_kv_cache", [False, True])
def test_a_patched_model_generates_what_it_did(package, use_kv_cache):
    model = transformer(package).eval()
    prime = torch.randint(0, 20, (1, 5))
    true = model.generate(prime, 12, temperature=0.0, use_kv_cache=use_kv_cache)
    patch(model)
    assert torch.equal(model.generate(prime, 12, temperature=0.0, use_kv_cache=use_kv_cache), true)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_patched_module_can_be_copied_and_the_copy_unpatched(package, copied):
    layer = package.LocalAttention(WIDTH, dim=DIM)
    keys = list(layer.state_dict())
    patch(layer, backend="torch")
    assert (type(layer), layer.backend) == (LocalAttention, "torch")
    assert list(layer.state_dict()) == keys
    other = copied(layer)
    unpatch(other)
    assert type(other) is package.LocalAttention
    assert vars(other).keys() == vars(package.LocalAttention(WIDTH, dim=DIM)).keys()
    assert type(layer) is LocalAttention


def test_what_is_new_in_the_package_is_refused(package, monkeypatch):
    layer = package.LocalAttention(WIDTH)
    layer.temperature = 2.0
    with pytest.raises(TypeError, match="model has what attnreg does not know: temperature"):
        patch(layer)
    del layer.temperature

    def forward(self, q, k, v, mask=None, input_mask=None, attn_bias=None, window_size=None, sinks=None):
        raise AssertionError

    monkeypatch.setattr(package.LocalAttention, "forward", forward)
    with pytest.raises(TypeError, match=r"LocalAttention.forward .* what attnreg does not know: sinks"):
        patch(layer)
    assert type(layer) is package.LocalAttention


def test_a_model_without_such_attention_is_refused(package):
    with pytest.raises(ValueError, match=r"model must hold a local_attention.LocalAttention, got Linear"):
        patch(torch.nn.Linear(2, 2))
