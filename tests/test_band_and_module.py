"""band_from_dense and the module."""

from __future__ import annotations

import copy

import pytest
import torch

import attnreg
from attnreg import LocalAttention, Window, band_from_dense


@pytest.mark.parametrize(("query_length", "key_length"), [(1, 1), (4, 4), (3, 6), (6, 3), (1, 5), (5, 1)])
@pytest.mark.parametrize("window", [Window(0, 0), Window(2, 0), Window(0, 2), Window(3, 1), Window(9, 9)], ids=str)
def test_each_slot_of_the_band_is_the_masks_element_for_its_key(query_length, key_length, window):
    mask = torch.randn(2, query_length, key_length)
    band = band_from_dense(mask, window)
    assert band.shape == (2, query_length, window.size)
    for i in range(query_length):
        for c in range(window.size):
            j = i + key_length - query_length - window.left + c
            expected = mask[:, i, j] if 0 <= j < key_length else torch.full((2,), -torch.inf)
            assert torch.equal(band[:, i, c], expected)


def test_a_boolean_mask_hides_where_it_is_false():
    mask = torch.rand(6, 6) < 0.5
    band = band_from_dense(mask, Window(2, 1))
    assert band.dtype == torch.get_default_dtype()
    additive = torch.zeros(6, 6).masked_fill(~mask, -torch.inf)
    assert torch.equal(band, band_from_dense(additive, Window(2, 1)))
    assert band_from_dense(mask, Window(2, 1), dtype=torch.float16).dtype == torch.float16


def test_attention_with_the_band_is_attention_with_the_dense_mask():
    query, key, value = torch.randn(2, 3, 7, 8), torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 4)
    mask = torch.randn(2, 1, 7, 9)
    window = Window(3, 2)
    dense_window = torch.full((7, 9), -torch.inf)
    for i in range(7):
        for j in range(9):
            if -3 <= j - (i + 2) <= 2:
                dense_window[i, j] = 0
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask + dense_window)
    got = attnreg.local_attention(query, key, value, window, bias=band_from_dense(mask, window))
    assert torch.allclose(got, expected, atol=1e-5)


def test_the_band_passes_gradients_to_an_additive_mask():
    mask = torch.randn(4, 4, requires_grad=True)
    band = band_from_dense(mask, Window(1, 0))
    band.where(band.isfinite(), 0).sum().backward()
    assert torch.equal(mask.grad, torch.eye(4) + torch.eye(4).roll(1, 0).tril())


def test_no_tensor_larger_than_the_result_is_built():
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if (
                isinstance(result, torch.Tensor)
                and result.untyped_storage().data_ptr() != mask.untyped_storage().data_ptr()
            ):
                largest = max(largest, result.untyped_storage().nbytes())
            return result

    mask = torch.randn(300, 300)
    with Watch():
        band = band_from_dense(mask, Window(3, 0))
    assert largest == band.untyped_storage().nbytes() == 300 * 4 * 4


@pytest.mark.parametrize(
    ("mask", "options", "error", "message"),
    [
        ([[1.0]], {}, TypeError, "mask must be a torch.Tensor, got list"),
        (torch.ones(3, 3, dtype=torch.int32), {}, TypeError, "mask must be boolean .* got torch.int32"),
        (torch.ones(3), {}, ValueError, r"at least two dimensions.*\(3,\)"),
        (torch.ones(3, 3), {"dtype": torch.int64}, TypeError, "dtype must be a floating-point dtype, got torch.int64"),
    ],
)
def test_a_bad_mask_is_refused(mask, options, error, message):
    with pytest.raises(error, match=message):
        band_from_dense(mask, Window(1, 0), **options)


def test_the_module_is_the_function_with_its_settings_kept():
    query, key, value = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 3)
    bias, lengths = torch.randn(4, 1, 4), torch.tensor([6, 2])
    module = LocalAttention(Window(2, 1), scale=0.3, backend="torch")
    got = module(query, key, value, bias=bias, key_lengths=lengths)
    assert torch.equal(
        got,
        attnreg.local_attention(
            query, key, value, Window(2, 1), bias=bias, key_lengths=lengths, scale=0.3, backend="torch"
        ),
    )
    assert not list(module.parameters())
    assert "Window(left=2, right=1)" in repr(module)
    assert torch.equal(copy.deepcopy(module)(query, key, value, bias=bias, key_lengths=lengths), got)
    assert module.state_dict() == {}


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"scale": "1"}, TypeError),
        ({"scale": float("inf")}, ValueError),
        ({"backend": 1}, TypeError),
        ({"softcap": 0.0}, ValueError),
        ({"softcap": True}, TypeError),
        ({"dropout_p": 1.0}, ValueError),
        ({"dropout_p": -0.1}, ValueError),
        ({"dropout_p": None}, TypeError),
    ],
)
def test_a_module_put_together_wrongly_says_so_at_once(options, error):
    with pytest.raises(error, match=next(iter(options))):
        LocalAttention(Window(2, 1), **options)


def test_a_module_gives_on_all_that_the_function_takes():
    query, key, value = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 3)
    given = {
        "bias": torch.randn(4, 1, 4), "key_lengths": torch.tensor([6, 2]), "key_starts": torch.tensor([1, 0]),
        "query_starts": torch.tensor([0, 1]), "sinks": torch.randn(4), "seed": torch.tensor([3]),
    }  # fmt: skip
    settings = {"scale": 0.3, "softcap": 2.0, "dropout_p": 0.5, "backend": "torch"}
    module = LocalAttention(Window(2, 1), **settings)
    expected = attnreg.local_attention(query, key, value, Window(2, 1), **given, **settings)
    assert torch.equal(module(query, key, value, **given), expected)
    assert "softcap=2.0, dropout_p=0.5" in repr(module)
    offsets = {"cu_seqlens_q": torch.tensor([0, 2, 6]), "cu_seqlens_k": torch.tensor([0, 3, 5])}
    packed = [tensor[:1] for tensor in (query, key, value)]
    plain = LocalAttention(Window(2, 1))
    assert torch.equal(plain(*packed, **offsets), attnreg.local_attention(*packed, Window(2, 1), **offsets))


def test_a_module_drops_in_training_alone():
    query = torch.randn(1, 2, 6, 8)
    module = LocalAttention(Window(2, 1), dropout_p=0.5)
    plain = attnreg.local_attention(query, query, query, Window(2, 1))
    assert not torch.equal(module(query, query, query), plain)
    for _ in range(2):
        assert torch.equal(module.eval()(query, query, query), plain)
        assert torch.equal(module(query, query, query, seed=torch.tensor([1])), plain)
    assert not torch.equal(module.train()(query, query, query), plain)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((), {"window_size": 3}, r"LocalAttention\(\) has no argument 'window_size'; give window=Window\.causal\(n\)"),
        ((8, 2), {"dropout": 0.1}, r"LocalAttention\(\) has no argument 'dropout'; give dropout_p="),
        ((), {"embed_dim": 64}, "'embed_dim'; leave it out: heads are a dimension"),
        ((), {"attn_mask": None}, "'attn_mask'; in the call of the module, give bias=band_from_dense"),
        ((), {}, r"LocalAttention\(\) is missing its argument 'window'; give window=Window\.causal\(n\)"),
        (
            (Window(1, 0), 0.5),
            {},
            "takes window by position, and scale, softcap, dropout_p, backend by name alone; got 2",
        ),
        (((3, 0),), {}, r"write Window\(3, 0\)"),
        ((3,), {}, r"Window\.causal\(3\)"),
    ],
)
def test_a_module_made_in_the_wrong_form_says_what_to_write(args, options, message):
    with pytest.raises(TypeError, match=message):
        LocalAttention(*args, **options)


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (3, {"attn_mask": None}, r"LocalAttention\.forward\(\) has no argument 'attn_mask'; give bias=band_from_dense"),
        (3, {"is_causal": True}, r"'is_causal'; where the module is made, give window=Window\.causal\(n\)"),
        (3, {"scale": 1.0}, "'scale'; where the module is made, give scale="),
        (3, {"dropout_p": 0.1}, "'dropout_p'; where the module is made, give dropout_p="),
        (3, {"softcap": 2.0}, "'softcap'; where the module is made, give softcap="),
        (3, {"logits_soft_cap": 2.0}, "'logits_soft_cap'; where the module is made, give softcap="),
        (3, {"s_aux": None}, r"'s_aux'; give sinks=, of shape \(H,\)"),
        (2, {}, "is missing its argument 'value'"),
        (4, {}, "takes query, key, value by position, and bias, key_lengths, .* by name alone; got 4"),
    ],
)
def test_a_module_called_in_the_wrong_form_says_what_to_write(count, options, message):
    tensor = torch.randn(1, 2, 5, 4)
    with pytest.raises(TypeError, match=message):
        LocalAttention(Window(1, 0))(*[tensor] * count, **options)


@pytest.mark.parametrize("strict", [True, False])
def test_a_module_is_compiled_and_exported_whole(strict):
    module, tensor = LocalAttention(Window(2, 1)), torch.randn(1, 2, 6, 8)
    expected = module(tensor, tensor, tensor)
    program = torch.export.export(module, (tensor, tensor), {"value": tensor}, strict=strict)
    torch.testing.assert_close(program.module()(tensor, tensor, value=tensor), expected)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tensor, tensor, tensor), expected)
