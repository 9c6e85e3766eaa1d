"""The demo's language model: it learns, alike on every backend, and what it measures is right."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from running import runs

import attnreg
from attnreg import Window
from attnreg.demo import LanguageModel, evaluate, first_layer, measure, own_text, split, train

TEXT = b"the quick brown fox jumps over the lazy dog; " * 40


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_loss_curve(backend: str, device: str = "cpu", seed: int = 0) -> list[float]:
    """Small enough for an interpreter of kernels."""
    training, _ = split(TEXT, context=12)
    model = LanguageModel(window=5, width=16, heads=2, layers=1, backend=backend, seed=seed).to(device)
    return list(train(model, training, steps=5, batch=2, context=12, learning_rate=1e-2, seed=seed))


def test_the_loss_falls_on_text_seen_and_on_text_held_out():
    training, held_out = split(TEXT, context=32)
    model = LanguageModel(window=8, width=32, heads=2)
    before = evaluate(model, held_out, context=32)
    losses = list(train(model, training, steps=60, batch=4, context=32))
    assert len(losses) == 60
    assert 7 < losses[0] < 9  # bits per byte of a model that knows nothing
    assert losses[-1] < 2
    assert evaluate(model, held_out, context=32) < before - 5


@pytest.mark.parametrize(("backend", "device", "dtype"), runs(torch.float32))
def test_the_loss_curve_is_the_same_on_every_backend(backend, device, dtype):
    assert tiny_loss_curve(backend, device) == pytest.approx(tiny_loss_curve("torch"), rel=1e-4)


def test_a_backend_with_a_wrong_key_gradient_shows_in_the_loss_curve():
    (block,) = (each.backend for each in attnreg.backends() if each.name == "torch_block")

    def flipped(*args, **kwargs):
        gradients = block.local_attention_backward(*args, **kwargs)
        return {**gradients, "key": -gradients["key"]}

    wrong = dataclasses.replace(block, name="wrong", local_attention_backward=flipped)
    with attnreg.register(wrong):
        assert tiny_loss_curve("wrong") != pytest.approx(tiny_loss_curve("torch"), rel=1e-4)
        query, key, value = torch.randn(3, 1, 2, 40, 8)
        assert measure(query, key, value, Window.causal(8), backend="wrong", runs=1).gradient_error > 0.1


def test_the_same_seed_gives_the_same_curve_and_another_seed_another():
    assert tiny_loss_curve("torch") == tiny_loss_curve("torch")
    assert tiny_loss_curve("torch") != tiny_loss_curve("torch", seed=1)


def test_the_demo_leaves_the_callers_random_state_alone():
    state = torch.get_rng_state()
    tiny_loss_curve("torch")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("size", [2, 16, 100])
def test_a_measurement_is_exact_to_float32_and_names_its_backend(size):
    model = LanguageModel(width=32, heads=2)
    query, key, value = first_layer(model, torch.randint(256, (60,)))
    assert query.shape == (1, 2, 60, 16)
    result = measure(query, key, value, Window.causal(size), backend="torch_block", runs=2)
    assert result.decision.backend == "torch_block"
    assert result.decision.problem.needs_grad
    assert result.seconds > 0
    assert 0 < result.output_error < 1e-5
    assert 0 < result.gradient_error < 1e-5


def test_in_float64_a_measurement_has_no_error_to_speak_of():
    query, key, value = torch.randn(3, 1, 2, 40, 8, dtype=torch.float64)
    result = measure(query, key, value, Window.causal(7), backend="torch", runs=1)
    assert max(result.output_error, result.gradient_error) < 1e-13


def test_a_refused_window_raises():
    query, key, value = torch.randn(3, 1, 1, 4, 4)
    with pytest.raises(attnreg.BackendError, match="no backend is called 'nobody'"):
        measure(query, key, value, Window.causal(2), backend="nobody")


def test_there_is_always_text_of_some_length():
    text = own_text()
    assert len(text) > 20_000
    assert b"class Window" in text


def test_any_bytes_are_text_and_the_parts_make_the_whole():
    text = bytes(range(256)) * 4
    training, held_out = split(text, context=16)
    assert bytes(torch.cat([training, held_out]).tolist()) == text
    assert len(held_out) == 102


def test_the_shortest_text_has_one_slice_on_either_side():
    training, held_out = split(bytes(2 * 17), context=16)
    assert len(training) == len(held_out) == 17
    model = LanguageModel(window=2, width=4, heads=1, layers=1)
    assert len(list(train(model, training, steps=1, context=16))) == 1
    assert evaluate(model, held_out, context=16) > 0
    with pytest.raises(ValueError, match="has 33 bytes, at least 34 are needed"):
        split(bytes(33), context=16)
