"""Longformer's attention on attnreg: against Transformers' own in values and all gradients, and against a dense definition."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import (
    LEDConfig,
    LEDModel,
    LongformerConfig,
    LongformerForMaskedLM,
    LongformerForQuestionAnswering,
    LongformerForSequenceClassification,
    LongformerModel,
)
from transformers.models.led import modeling_led
from transformers.models.longformer import modeling_longformer

from attnreg.integrations import longformer
from attnreg.integrations._hidden_keys import rows_of
from attnreg.integrations.longformer import LEDEncoderSelfAttention, LongformerSelfAttention, patch, unpatch
from attnreg.window import Window

LENGTH, HEADS, SIZE = 24, 2, 12
SIZES = {
    "vocab_size": 40,
    "hidden_size": SIZE,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": 16,
    "max_position_embeddings": 90,
    "attention_window": [4, 8],
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def mask_of(*sequences: str) -> torch.Tensor:
    """(N, L) of a letter for each token: '.', 'g' for a global one, '-' for padding."""
    return torch.tensor([[{".": 0.0, "g": 1e4, "-": -1e4}[token] for token in each] for each in sequences])


MASKS = {
    "nothing": mask_of("." * 24, "." * 24),
    "padding on the right": mask_of("." * 24, "." * 11 + "-" * 13),
    "padding on the left": mask_of("-" * 7 + "." * 17, "." * 24),
    "holes": mask_of("..-..--....---.........-", "." * 9 + "-" * 10 + "....."),
    "one global token": mask_of("g" + "." * 23, "g" + "." * 23),
    "one in one sequence": mask_of("....g" + "." * 19, "." * 24),
    "others in each": mask_of("g.....gg" + "." * 16, "." * 20 + "g..." ),
    "global tokens and padding": mask_of("g..g" + "." * 8 + "-" * 12, "-" * 5 + "g......g......g...."),
    "global tokens and holes": mask_of(".g.-..-....-g..---...g--", "g" + "." * 22 + "-"),
    "a sequence of padding": mask_of("-" * 24, "g" + "." * 23),
    "global tokens alone": mask_of("g" * 24, "." * 24),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pair(window=8, theirs=modeling_longformer.LongformerSelfAttention, ours=LongformerSelfAttention, **settings):
    """Their layer and ours, of the same weights."""
    config = LEDConfig if theirs is modeling_led.LEDEncoderSelfAttention else LongformerConfig
    sizes = {**SIZES, "attention_window": [window], "num_hidden_layers": 1}
    if config is LEDConfig:
        sizes = {"d_model": SIZE, "encoder_attention_heads": HEADS, "encoder_layers": 1, "attention_window": [window]}
    made = theirs(config(**sizes), 0)
    mine = ours(config(**sizes), 0, **settings)
    with torch.no_grad():
        # As they are made, scores are next to 0.
        for name, parameter in made.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.4 if "weight" in name else 0.2))
    mine.load_state_dict(made.state_dict())
    return made.eval(), mine.eval()


def arguments(mask):
    return {
        "attention_mask": mask,
        "is_index_masked": mask < 0,
        "is_index_global_attn": mask > 0,
        "is_global_attn": bool((mask > 0).any()),
    }


def with_gradients(layer, states, upstream, **given):
    """The output and its gradients, of the input and of every parameter that has one."""
    leaf = states.clone().requires_grad_()
    output, *weights = layer(leaf, **given)
    used = {"states": leaf, **dict(layer.named_parameters())}
    found = torch.autograd.grad(output, list(used.values()), upstream, allow_unused=True)
    gradients = {name: each for name, each in zip(used, found) if each is not None}
    return output.detach(), gradients, [each.detach() for each in weights]


def assert_alike(found, true, tolerance):
    assert found.keys() == true.keys()
    for name, each in true.items():
        torch.testing.assert_close(
            found[name].double(),
            each.double(),
            rtol=tolerance,
            atol=tolerance * (1 + float(each.abs().max())),
            msg=name,
        )


def dense(layer, states, mask, side, dilation=1):
    """The output by the definition: every token's score with every token."""

    def heads(projected):
        return projected.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)

    length, scale = states.shape[1], layer.head_dim**-0.5
    offset = torch.arange(length)[:, None] - torch.arange(length)
    near = (offset.abs() <= side * dilation) & (offset % dilation == 0)
    is_global, masked = mask > 0, mask < 0
    seen = (near | is_global[:, None]) & ~masked[:, None]

    def attend(query, key, value, seen):
        scores = (scale * heads(query(states)) @ heads(key(states)).mT).masked_fill(~seen[:, None], -torch.inf)
        weights = scores.masked_fill(~seen.any(-1)[:, None, :, None], 0.0).softmax(-1)
        return (weights @ heads(value(states))).transpose(1, 2).flatten(2)

    local = attend(layer.query, layer.key, layer.value, seen)
    of_globals = attend(layer.query_global, layer.key_global, layer.value_global, ~masked[:, None].expand_as(seen))
    output = torch.where(is_global[..., None], of_globals, local)
    return output.masked_fill(masked[..., None], 0.0)


# In float64 Transformers' gradients are NaN beside padding: its softmax is in float32, and its least number then -inf.
ALIKE = [(name, torch.float32) for name in MASKS] + [("nothing", torch.float64), ("one global token", torch.float64)]


@pytest.mark.parametrize("window", [4, 8, 24])
@pytest.mark.parametrize(("mask", "dtype"), ALIKE)
def test_values_and_gradients_are_those_of_transformers(mask, dtype, window):
    theirs, ours = (layer.to(dtype) for layer in pair(window))
    states, upstream = torch.randn(2, 2, LENGTH, SIZE, dtype=dtype)
    given = arguments(MASKS[mask].to(dtype))
    true, true_gradients, _ = with_gradients(theirs, states, upstream, **given)
    output, gradients, _ = with_gradients(ours, states, upstream, **given)
    torch.testing.assert_close(output, true, rtol=1e-5, atol=2e-6)
    assert_alike(gradients, true_gradients, 2e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [8, 24])
@pytest.mark.parametrize("mask", MASKS)
def test_values_and_gradients_on_a_gpu_are_those_of_transformers(mask, window):
    theirs, ours = pair(window)
    states, upstream = torch.randn(2, 2, LENGTH, SIZE)
    true, true_gradients, _ = with_gradients(theirs, states, upstream, **arguments(MASKS[mask]))
    given = {name: each.cuda() if torch.is_tensor(each) else each for name, each in arguments(MASKS[mask]).items()}
    output, gradients, _ = with_gradients(ours.cuda(), states.cuda(), upstream.cuda(), **given)
    torch.testing.assert_close(output.cpu(), true, rtol=2e-5, atol=1e-5)
    assert_alike({name: each.cpu() for name, each in gradients.items()}, true_gradients, 5e-5)


@pytest.mark.parametrize("looks", [True, False])
@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("length", [24, 23, 7, 1])
@pytest.mark.parametrize("mask", MASKS)
def test_values_and_gradients_are_those_of_the_definition_at_any_length(mask, length, dilation, looks, monkeypatch):
    if not looks:
        # As on an accelerator, for which the host does not wait.
        monkeypatch.setattr(longformer, "can_be_read", lambda mask: False)
    _, ours = pair(8, dilation=dilation, padding_at_ends=not looks and "holes" not in mask)
    ours = ours.double()
    states, upstream = torch.randn(2, 2, length, SIZE, dtype=torch.float64)
    mask = MASKS[mask][:, :length]
    output, gradients, _ = with_gradients(ours, states, upstream, attention_mask=mask)
    leaf = states.clone().requires_grad_()
    true = dense(ours, leaf, mask, 4, dilation)
    used = {"states": leaf, **dict(ours.named_parameters())}
    found = torch.autograd.grad(true, list(used.values()), upstream, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(output, true.detach(), rtol=1e-10, atol=1e-10)
    true_gradients = dict(zip(used, found))
    for name in used.keys() - gradients.keys():
        assert not true_gradients.pop(name).any(), name
    assert_alike(gradients, true_gradients, 1e-9)


@pytest.mark.parametrize("mask", MASKS)
def test_the_encoder_of_led_has_the_same_attention(mask):
    theirs, ours = pair(8, modeling_led.LEDEncoderSelfAttention, LEDEncoderSelfAttention)
    states, upstream = torch.randn(2, 2, LENGTH, SIZE)
    true, true_gradients, _ = with_gradients(theirs, states, upstream, **arguments(MASKS[mask]))
    output, gradients, _ = with_gradients(ours, states, upstream, **arguments(MASKS[mask]))
    torch.testing.assert_close(output, true, rtol=1e-5, atol=2e-6)
    assert_alike(gradients, true_gradients, 2e-5)


@pytest.mark.parametrize("window", [8, 24])
@pytest.mark.parametrize("mask", MASKS)
def test_weights_that_are_asked_for_are_those_of_transformers(mask, window):
    theirs, ours = pair(window)
    states, upstream = torch.randn(2, 2, LENGTH, SIZE)
    given = {**arguments(MASKS[mask]), "output_attentions": True}
    true, true_gradients, true_weights = with_gradients(theirs, states, upstream, **given)
    output, gradients, weights = with_gradients(ours, states, upstream, **given)
    torch.testing.assert_close(output, true, rtol=1e-5, atol=2e-6)
    assert_alike(gradients, true_gradients, 2e-5)
    assert len(weights) == len(true_weights)
    torch.testing.assert_close(weights[0], true_weights[0], rtol=1e-5, atol=2e-6)
    if len(weights) == 2:
        # Those of global tokens that a sequence does not have are of no use in either.
        exist = torch.arange(weights[1].shape[2]) < (MASKS[mask] > 0).sum(1)[:, None]
        of_ours, of_theirs = (each.transpose(1, 2)[exist] for each in (weights[1], true_weights[1]))
        torch.testing.assert_close(of_ours, of_theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dilation", [1, 3])
def test_weights_change_no_output(dilation):
    _, ours = pair(8, dilation=dilation)
    states, mask = torch.randn(2, LENGTH, SIZE), MASKS["global tokens and holes"]
    output, weights, of_globals = ours(states, mask, output_attentions=True)
    torch.testing.assert_close(output, ours(states, mask)[0], rtol=1e-5, atol=2e-6)
    assert weights.shape == (2, LENGTH, HEADS, 3 + 9)
    assert of_globals.shape == (2, HEADS, 3, LENGTH)
    torch.testing.assert_close(weights.sum(-1)[mask == 0], torch.ones(int((mask == 0).sum()), HEADS))


# Without a look at the mask


@pytest.mark.parametrize("mask", ["nothing", "padding on the left", "global tokens and holes", "a sequence of padding"])
def test_a_call_that_is_traced_whole_gives_the_same(mask):
    _, ours = pair(8, max_global_tokens=LENGTH)
    states, upstream = torch.randn(2, 2, LENGTH, SIZE)
    given = arguments(MASKS[mask])
    true, true_gradients, _ = with_gradients(ours, states, upstream, **given)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    leaf = states.clone().requires_grad_()
    output, = compiled(leaf, **given)  # fmt: skip
    torch.testing.assert_close(output, true, rtol=1e-5, atol=2e-6)
    found = torch.autograd.grad(output, leaf, upstream)[0]
    assert_alike({"states": found}, {"states": true_gradients["states"]}, 2e-5)


def test_a_bound_on_global_tokens_changes_nothing():
    mask = MASKS["others in each"]
    _, ours = pair(8)
    _, bound = pair(8, max_global_tokens=7)
    bound.load_state_dict(ours.state_dict())
    states = torch.randn(2, LENGTH, SIZE)
    torch.testing.assert_close(bound(states, mask)[0], ours(states, mask)[0])


def test_more_global_tokens_than_the_bound_are_refused():
    _, ours = pair(8, max_global_tokens=2)
    states = torch.randn(2, LENGTH, SIZE)
    with pytest.raises(ValueError, match="3 global tokens; max_global_tokens=2"):
        ours(states, MASKS["others in each"])
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="max_global_tokens=2"):
        compiled(states, MASKS["others in each"])


def test_holes_are_found_where_it_was_promised_that_there_are_none():
    hidden = MASKS["holes"] < 0
    with pytest.raises(RuntimeError, match="between others"):
        rows_of(hidden, Window(2, 2), LENGTH, torch.float32, holes=False)
    ends = MASKS["padding on the left"] < 0
    assert rows_of(ends, Window(2, 2), LENGTH, torch.float32, holes=False).keys() == {"key_starts", "key_lengths"}


def test_padding_at_the_ends_needs_no_bias_and_no_padding_no_argument():
    assert rows_of(MASKS["padding on the left"] < 0, Window(2, 2), LENGTH, torch.float32).keys() == {
        "key_starts",
        "key_lengths",
    }
    assert not rows_of(MASKS["nothing"] < 0, Window(2, 2), LENGTH, torch.float32)


# Dropout


@pytest.mark.parametrize("weights", [False, True])
def test_dropout_has_the_mean_of_none(weights):
    _, ours = pair(8)
    ours.dropout = 0.3
    states, mask = torch.randn(1, LENGTH, SIZE), MASKS["global tokens and holes"][:1]
    true = ours(states, mask)[0]
    ours.train()
    many = ours(states.expand(3000, -1, -1), mask.expand(3000, -1), output_attentions=weights)[0]
    deviation = many.std(0) / 3000**0.5
    assert ((many.mean(0, keepdim=True) - true).abs() <= 5 * deviation + 1e-6).all()
    # Rows of tokens, near and global ones, do drop.
    assert (many.std(0)[mask[0] >= 0] > 1e-3).all()


def test_dropout_spreads_as_that_of_transformers():
    theirs, ours = pair(8)
    states, mask = torch.randn(1, LENGTH, SIZE), MASKS["global tokens and padding"][:1]
    given = arguments(mask.expand(4000, -1))
    spread = []
    for layer in (theirs.train(), ours.train()):
        layer.dropout = 0.3
        spread.append(layer(states.expand(4000, -1, -1), **given)[0].std(0))
    torch.testing.assert_close(spread[1], spread[0], rtol=0.12, atol=1e-4)


def test_gradient_checkpointing_drops_again_what_was_dropped():
    _, ours = pair(8)
    ours.dropout = 0.5
    ours.train()
    states, mask = torch.randn(2, LENGTH, SIZE, requires_grad=True), MASKS["global tokens and padding"]
    upstream = torch.randn(2, LENGTH, SIZE)
    found = []
    for run in (ours, lambda *given: checkpoint(ours, *given, use_reentrant=False)):
        torch.manual_seed(3)
        found.append(torch.autograd.grad(run(states, mask)[0], states, upstream)[0])
    torch.testing.assert_close(found[1], found[0])


# Whole models


def model_of(kind=LongformerModel, **changes):
    model = kind(LongformerConfig(**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm" not in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def inputs_of(length, sequences=2):
    attention_mask = torch.ones(sequences, length, dtype=torch.long)
    attention_mask[1, length // 2 :] = 0
    global_attention_mask = torch.zeros_like(attention_mask)
    global_attention_mask[:, 0] = 1
    global_attention_mask[0, length // 2] = 1
    return {
        "input_ids": torch.randint(2, 40, (sequences, length)),
        "attention_mask": attention_mask,
        "global_attention_mask": global_attention_mask,
    }


def run(model, name, **given):
    model.zero_grad()
    output = getattr(model(**given), name)
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(1)))
    return output.detach(), {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("length", [5, 16, 37])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (LongformerModel, "last_hidden_state"),
        (LongformerForMaskedLM, "logits"),
        (LongformerForSequenceClassification, "logits"),
        (LongformerForQuestionAnswering, "start_logits"),
    ],
)
def test_a_model_that_is_patched_computes_what_it_did(kind, name, length):
    model, given = model_of(kind), inputs_of(length)
    if kind is LongformerForQuestionAnswering:
        # Its global tokens are those of the question, up to a separator.
        given.pop("global_attention_mask")
        given["input_ids"].clamp_min_(4)[:, [2, 3, -1]] = model.config.sep_token_id
    true, true_gradients = run(model, name, **given)
    assert len(patch(model)) == 2
    output, gradients = run(model, name, **given)
    torch.testing.assert_close(output, true, rtol=1e-4, atol=1e-5)
    assert_alike(gradients, true_gradients, 2e-4)


def test_unpatch_brings_everything_back():
    model, given = model_of(LongformerForMaskedLM), inputs_of(13)
    before, keys = model(**given).logits, list(model.state_dict())
    modules = {name: (module, type(module), set(vars(module))) for name, module in model.named_modules()}
    names = patch(model, padding_at_ends=True, max_global_tokens=4, backend="torch")
    assert names == [f"longformer.encoder.layer.{layer}.attention.self" for layer in range(2)]
    assert list(model.state_dict()) == keys
    assert all(type(model.get_submodule(name)) is LongformerSelfAttention for name in names)
    assert "max_global_tokens=4" in repr(model)
    assert unpatch(model) == names
    after = {name: (module, type(module), set(vars(module))) for name, module in model.named_modules()}
    assert after == modules
    assert torch.equal(model(**given).logits, before)
    assert unpatch(model) == []


def test_a_patched_model_pads_nothing():
    model, lengths = model_of(), []
    model.encoder.register_forward_pre_hook(lambda _, given: lengths.append(given[0].shape[1]))
    given = inputs_of(13)
    model(**given)
    patch(model)
    model(**given)
    unpatch(model)
    model(**given)
    assert lengths == [16, 13, 16]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_patched_model_can_be_copied_and_the_copy_unpatched(copied):
    model, given = model_of(), inputs_of(11)
    before = model(**given)[0]
    patch(model)
    copy_of_it = copied(model)
    torch.testing.assert_close(copy_of_it(**given)[0], model(**given)[0], rtol=0, atol=0)
    assert len(unpatch(copy_of_it)) == 2
    assert torch.equal(copy_of_it(**given)[0], before)
    assert type(model.encoder.layer[0].attention.self) is LongformerSelfAttention


def test_hooks_stay():
    model, seen = model_of(), []
    model.encoder.layer[1].attention.self.register_forward_hook(lambda *_: seen.append(1))
    patch(model)
    model(**inputs_of(8))
    assert seen == [1]


def test_a_patched_model_gives_its_attentions():
    model, given = model_of(), inputs_of(16)
    true = model(**given, output_attentions=True)
    patch(model)
    output = model(**given, output_attentions=True)
    for found, expected in zip(output.attentions, true.attentions):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for found, expected in zip(output.global_attentions, true.global_attentions):
        # The second sequence has one global token of two.
        torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[1, ..., :1], expected[1, ..., :1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_patched_model_trains_with_gradient_checkpointing(reentrant):
    given, found = {**inputs_of(13)}, []
    model = model_of(attention_probs_dropout_prob=0.2)
    patch(model)
    model.train()
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(5)
        found.append(run(model, "last_hidden_state", **given))
    torch.testing.assert_close(found[1][0], found[0][0])
    assert_alike(found[1][1], found[0][1], 1e-5)


def test_a_patched_model_compiles_as_it_does_without():
    model, given = model_of(), inputs_of(16)
    patch(model, max_global_tokens=2)
    expected = model(**given)[0]
    torch._dynamo.reset()
    found = torch.compile(model, backend="aot_eager")(**given)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_encoder_of_an_led_model_is_patched_and_its_decoder_left():
    config = LEDConfig(
        vocab_size=40, d_model=SIZE, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, attention_window=[4, 8], max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=32, dropout=0.0,
    )  # fmt: skip
    model, given = LEDModel(config).eval(), inputs_of(13)
    given["decoder_input_ids"] = torch.randint(2, 40, (2, 4))
    true, true_gradients = run(model, "last_hidden_state", **given)
    assert len(patch(model)) == 2
    output, gradients = run(model, "last_hidden_state", **given)
    torch.testing.assert_close(output, true, rtol=1e-4, atol=1e-5)
    assert_alike(gradients, true_gradients, 1e-4)
    assert len(unpatch(model)) == 2
    assert "_pad_to_window_size" not in vars(model.encoder)


def test_layers_may_have_dilations_of_their_own():
    model = model_of()
    patch(model, dilation=[1, 3])
    assert [layer.attention.self.dilation for layer in model.encoder.layer] == [1, 3]
    patch(model)
    assert [layer.attention.self.dilation for layer in model.encoder.layer] == [1, 1]


def test_half_precision_and_autocast_are_as_near_as_those_of_transformers():
    theirs, ours = pair(8)
    states, given = torch.randn(2, LENGTH, SIZE), arguments(MASKS["global tokens and padding"])
    true = theirs(states, **given)[0]
    for layer in (theirs, ours):
        with torch.autocast("cpu", torch.bfloat16):
            found = layer(states, **given)[0]
        assert found.dtype is torch.bfloat16
        assert (found - true).abs().max() < 0.05
    errors = [(layer.bfloat16()(states.bfloat16(), **given)[0] - true).abs().max() for layer in (theirs, ours)]
    assert errors[1] <= 2 * errors[0]


# Refusals


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            {"hidden_states": torch.zeros(2, 4, 5)},
            ValueError,
            r"hidden_states must have shape \(N, L, 12\), got \(2, 4, 5\)",
        ),
        ({"attention_mask": torch.zeros(2, 5)}, ValueError, r"attention_mask must have shape \(2, 24\), got \(2, 5\)"),
        ({"attention_mask": torch.zeros(2, 24, dtype=torch.bool)}, TypeError, "attention_mask must be numbers"),
        ({"is_index_masked": torch.zeros(2, 24)}, TypeError, "is_index_masked must be boolean; got torch.float32"),
        ({"is_index_global_attn": 3}, TypeError, "is_index_global_attn must be a torch.Tensor, got int"),
        ({"is_global_attn": True}, ValueError, "is_global_attn is True, and neither"),
        ({"head_mask": None}, TypeError, "head_mask"),
    ],
)
def test_bad_arguments_are_named(given, error, message):
    _, ours = pair()
    with pytest.raises(error, match=message):
        ours(**{"hidden_states": torch.randn(2, LENGTH, SIZE), **given})


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"dilation": 0}, ValueError, "dilation must be at least 1, got 0"),
        ({"dilation": 1.5}, TypeError, "dilation must be an int, got 1.5"),
        ({"dilation": [1]}, ValueError, "dilation must have one number for each layer, got 1; there is a layer 1"),
        ({"max_global_tokens": -1}, ValueError, "max_global_tokens must be at least 0, got -1"),
        ({"padding_at_ends": None}, TypeError, "padding_at_ends must be True or False"),
    ],
)
def test_bad_settings_are_named_and_change_nothing(settings, error, message):
    model = model_of()
    with pytest.raises(error, match=message):
        patch(model, **settings)
    assert unpatch(model) == []


def test_a_model_without_such_attention_is_refused():
    with pytest.raises(
        ValueError, match="model must hold a LongformerSelfAttention or LEDEncoderSelfAttention, got Linear"
    ):
        patch(torch.nn.Linear(2, 2))


def test_arguments_of_another_version_of_transformers_are_refused(monkeypatch):
    def forward(self, hidden_states, head_mask=None):
        raise AssertionError

    monkeypatch.setattr(modeling_longformer.LongformerSelfAttention, "forward", forward)
    with pytest.raises(TypeError, match=r"has other arguments than attnreg knows: .*head_mask"):
        patch(model_of())
