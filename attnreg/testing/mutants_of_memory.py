"""Broken backends that read, write or return the wrong memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnreg.backend import Backend
from attnreg.testing.mutant import (
    Changes,
    function_of,
    mutant,
    of_gradient,
    of_inputs,
    of_output,
)
from attnreg.window import Window


def _as_if_contiguous(tensor: Tensor) -> Tensor:
    """What lies where the elements of a contiguous tensor would, from the first one on; 0 past the end of memory."""
    whole = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0)
    found = whole[tensor.storage_offset() :][: tensor.numel()]
    padded = torch.nn.functional.pad(found, (0, tensor.numel() - found.numel()))
    return padded.view(tensor.shape)


@mutant("layouts", "strides of the incoming gradient are ignored")
def _strides_of_the_incoming_gradient_ignored(right: Backend) -> Changes:
    backward = function_of(right, "local_attention_backward")

    def local_attention_backward(grad: Tensor, *inputs: Any, **given: Any) -> Any:
        return backward(_as_if_contiguous(grad), *inputs, **given)

    return {"local_attention_backward": local_attention_backward}


@mutant("layouts", "expanded tensors are read as if they were dense")
def _expanded_misread(right: Backend) -> Changes:
    def change(query: Tensor, key: Tensor, value: Tensor, window: Window, given: dict[str, Any]) -> tuple[Any, ...]:
        return query, _as_if_contiguous(key) if 0 in key.stride() else key, value, window, given

    return of_inputs(right, change)


@mutant("expanded_gradients", "an incoming gradient that is the same for all rows is read as if it were dense")
def _expanded_gradient_misread(right: Backend) -> Changes:
    backward = function_of(right, "local_weighted_average_backward")

    def local_weighted_average_backward(grad: Tensor, *inputs: Any, **given: Any) -> Any:
        return backward(_as_if_contiguous(grad) if grad.stride(2) == 0 else grad, *inputs, **given)

    return {"local_weighted_average_backward": local_weighted_average_backward}


@mutant("inputs_unchanged", "the values are scaled in place")
def _input_changed(right: Backend) -> Changes:
    def change(output: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
        value.mul_(2)
        return output

    return of_output(right, change)


@mutant("inputs_unchanged", "the incoming gradient is changed in place")
def _incoming_gradient_changed(right: Backend) -> Changes:
    backward = function_of(right, "local_attention_backward")

    def local_attention_backward(grad: Tensor, *inputs: Any, **given: Any) -> Any:
        found = backward(grad, *inputs, **given)
        grad.zero_()
        return found

    return {"local_attention_backward": local_attention_backward}


@mutant("inputs_unchanged", "the backward writes into the output of the forward")
def _output_changed_by_the_backward(right: Backend) -> Changes:
    backward = function_of(right, "local_attention_backward")

    def local_attention_backward(
        grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, *rest: Any, **given: Any
    ) -> Any:
        found = backward(grad, query, key, value, output, *rest, **given)
        output.mul_(grad)
        return found

    return {"local_attention_backward": local_attention_backward}


@mutant("nothing_aliased", "where a row sees one key, its value is returned as it is, not a copy")
def _output_is_an_input(right: Backend) -> Changes:
    def change(
        output: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, window: Window, given: Any
    ) -> Tensor:
        plain = given["bias"] is None and given["key_lengths"] is None
        return (
            value if window.size == 1 and plain and value.shape == output.shape and query.shape == key.shape else output
        )

    return of_output(right, change)


@mutant("nothing_aliased", "the output lies in a buffer that the next call writes into")
def _output_in_a_kept_buffer(right: Backend) -> Changes:
    kept: dict[Any, Tensor] = {}

    def change(output: Tensor, *rest: Any) -> Tensor:
        kind = (output.shape, output.stride(), output.dtype, output.device)
        return kept.setdefault(kind, torch.empty_like(output)).copy_(output)

    return of_output(right, change)


@mutant("described", "the output of 16 bits is in float32")
def _output_in_another_dtype(right: Backend) -> Changes:
    return of_output(right, lambda output, *rest: output.float() if output.dtype.itemsize == 2 else output)


@mutant("described", "the gradient of a bias has the dtype of the queries")
def _bias_gradient_in_another_dtype(right: Backend) -> Changes:
    return of_gradient(right, "bias", lambda gradient, inputs, given: gradient.to(inputs[1].dtype))


@mutant("memory_order", "the output is contiguous, however the queries lie")
def _output_in_another_order(right: Backend) -> Changes:
    return of_output(right, lambda output, *rest: output.contiguous())


@mutant("memory_order", "gradients are contiguous, however the tensors lie")
def _gradient_in_another_order(right: Backend) -> Changes:
    return of_gradient(right, "value", lambda gradient, inputs, given: gradient.contiguous())


@mutant("values", "the rows past the last whole tile of 64 are a little off")
def _last_tile_wrong(right: Backend) -> Changes:
    def change(output: Tensor, *rest: Any) -> Tensor:
        rows = output.shape[2]
        if rows > 64 and rows % 64:
            output[:, :, rows - rows % 64 :] *= 1.01
        return output

    return of_output(right, change)


@mutant("values", "the 257th row and those after it are a little off")
def _rows_past_256_wrong(right: Backend) -> Changes:
    def change(output: Tensor, *rest: Any) -> Tensor:
        output[:, :, 256:] *= 1.01
        return output

    return of_output(right, change)


@mutant("values", "the sequences after the second are the second")
def _third_sequence_wrong(right: Backend) -> Changes:
    def change(output: Tensor, *rest: Any) -> Tensor:
        output[2:] = output[1:2]
        return output

    return of_output(right, change)


@mutant("uninitialised", "the last row is not written")
def _last_row_not_written(right: Backend) -> Changes:
    def change(output: Tensor, *rest: Any) -> Tensor:
        made = torch.empty_like(output)
        made[:, :, :-1] = output[:, :, :-1]
        # A fresh page of memory holds zeros, and so the fault shows now and then only.
        return made

    return of_output(right, change)


@mutant("uninitialised", "the gradient of keys that nobody sees is not written")
def _unseen_gradient_not_written(right: Backend) -> Changes:
    def change(gradient: Tensor, inputs: Any, given: Any) -> Tensor:
        made = gradient.new_empty(gradient.shape)
        seen = gradient.abs().sum(-1, keepdim=True) != 0
        return torch.where(seen, gradient, made)

    return of_gradient(right, "key", change)


@mutant("hidden", "hidden keys are multiplied by 0")
def _hidden_key_leaks(right: Backend) -> Changes:
    def change(output: Tensor, lse: Tensor, query: Tensor, key: Tensor, *rest: Any) -> Tensor:
        return output + 0 * key.sum()

    return of_output(right, change)


@mutant("hidden", "the incoming gradient of a row that sees nothing is multiplied by 0")
def _blind_row_leaks(right: Backend) -> Changes:
    return of_gradient(right, "key", lambda gradient, inputs, given: gradient + 0 * inputs[0].sum())


@mutant("hidden", "the weight of a hidden slot is multiplied by 0")
def _hidden_weight_leaks(right: Backend) -> Changes:
    average = function_of(right, "local_weighted_average")

    def local_weighted_average(weights: Tensor, value: Tensor, window: Window, **given: Any) -> Tensor:
        output: Tensor = average(weights, value, window, **given)
        return output + 0 * weights.sum(-1, keepdim=True)

    return {"local_weighted_average": local_weighted_average}


def _by_the_strides_of(tensor: Tensor, other: Tensor) -> Tensor:
    """What lies where the elements of a tensor would, if it had the strides of another one; itself past the end of memory."""
    if tensor.shape != other.shape:
        return tensor
    last = tensor.storage_offset() + sum((size - 1) * step for size, step in zip(tensor.shape, other.stride()))
    inside = (last + 1) * tensor.itemsize <= tensor.untyped_storage().nbytes()
    return tensor.as_strided(tensor.shape, other.stride()) if inside else tensor


@mutant("layouts", "values are read by the strides of the keys")
def _values_by_the_strides_of_keys(right: Backend) -> Changes:
    return of_inputs(right, lambda q, k, v, window, given: (q, k, _by_the_strides_of(v, k), window, given))


def _wrong_for_keys(right: Backend, is_so: Callable[[Tensor], bool]) -> Changes:
    """Attention that is a little off where ``is_so(key)``."""

    def change(output: Tensor, lse: Tensor, query: Tensor, key: Tensor, *rest: Any) -> Tensor:
        return output * 1.05 if is_so(key) else output

    return of_output(right, change)


@mutant("layouts", "one key that is expanded along the sequence is misread")
def _expanded_key_misread(right: Backend) -> Changes:
    return _wrong_for_keys(right, lambda key: key.stride(2) == 0 and key.shape[2] > 1)


@mutant("layouts", "keys that do not begin at a multiple of 8 bytes are misread")
def _misaligned_keys_misread(right: Backend) -> Changes:
    return _wrong_for_keys(right, lambda key: key.data_ptr() % 8 != 0)


@mutant("inputs_unchanged", "what lies after the first row of strided queries is written into")
def _gap_written(right: Backend) -> Changes:
    def change(output: Tensor, lse: Tensor, query: Tensor, *rest: Any) -> Tensor:
        if query.shape[3] < query.stride(2) < query.stride(1):
            query.as_strided((1,), (1,), query.storage_offset() + query.shape[3]).fill_(7)
        return output

    return of_output(right, change)


@mutant("inputs_unchanged", "queries in float16 are scaled in place")
def _input_changed_in_float16(right: Backend) -> Changes:
    def change(output: Tensor, lse: Tensor, query: Tensor, *rest: Any) -> Tensor:
        if query.dtype == torch.float16:
            query.mul_(2)
        return output

    return of_output(right, change)


@mutant("inputs_unchanged", "lengths in 32 bits are cleared")
def _key_lengths_changed(right: Backend) -> Changes:
    def change(
        output: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, window: Window, given: Any
    ) -> Tensor:
        lengths = given["key_lengths"]
        if lengths is not None and lengths.dtype == torch.int32:
            lengths.zero_()
        return output

    return of_output(right, change)


@mutant("memory_order", "the gradient of a bias is contiguous, however the bias lies")
def _bias_gradient_in_another_order(right: Backend) -> Changes:
    return of_gradient(right, "bias", lambda gradient, inputs, given: gradient.contiguous())


@mutant("described", "gradients come back that nobody asked for")
def _gradients_not_asked_for(right: Backend) -> Changes:
    backward = function_of(right, "local_attention_backward")

    def local_attention_backward(grad: Tensor, query: Tensor, *inputs: Any, **given: Any) -> Any:
        return {**backward(grad, query, *inputs, **given), "mask": torch.zeros_like(query)}

    return {"local_attention_backward": local_attention_backward}


@mutant("described", "the output is a parameter")
def _output_is_a_parameter(right: Backend) -> Changes:
    return of_output(right, lambda output, *rest: torch.nn.Parameter(output, requires_grad=False))


@mutant("described", "the output requires gradients")
def _output_requires_gradients(right: Backend) -> Changes:
    return of_output(right, lambda output, *rest: output.detach().requires_grad_())


@mutant("described", "the output is a view that is negated when it is read")
def _output_is_a_negative_view(right: Backend) -> Changes:
    return of_output(right, lambda output, *rest: torch._neg_view(output.neg()))


@mutant("uninitialised", "in float16, rows that see nothing are not written")
def _blind_rows_not_written_in_float16(right: Backend) -> Changes:
    def change(output: Tensor, lse: Tensor, *rest: Any) -> Tensor:
        made = torch.empty_like(output)
        return output.where((lse != -math.inf)[..., None] | (output.dtype != torch.float16), made)

    return of_output(right, change)


@mutant("hidden", "in float64, hidden keys are multiplied by 0")
def _hidden_key_leaks_in_float64(right: Backend) -> Changes:
    def change(output: Tensor, lse: Tensor, query: Tensor, key: Tensor, *rest: Any) -> Tensor:
        return output + 0 * key.sum() if output.dtype == torch.float64 else output

    return of_output(right, change)
