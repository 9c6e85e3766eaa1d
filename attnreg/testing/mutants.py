"""Broken backends, each made from a right one by a small change, and the property that must find it.

They are the test of the kit: a fault that none of its properties finds is a hole in it. They are published so that another
kit, or another right backend, can be tried with the same faults: ``mutant.of(backend)`` for one that has all three ops, their
gradients, and takes ``bias`` and ``key_lengths``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnreg.backend import Backend, Function
from attnreg.window import Window

Changes = Mapping[str, Any]


@dataclass(frozen=True)
class Mutant:
    """A broken backend.

    Attributes:
        name: what it is called.
        says: what is wrong with it.
        property: the property that must be broken; others may be, too.
        change: the fields of a right backend that make it broken.
    """

    name: str
    says: str
    property: str
    change: Callable[[Backend], Changes]

    def of(self, right: Backend) -> Backend:
        """``right``, broken, called ``mutant.NAME``."""
        return replace(right, name=f"mutant.{self.name}", **self.change(right))


MUTANTS: dict[str, Mutant] = {}


def _mutant(property: str, says: str) -> Callable[[Callable[[Backend], Changes]], Callable[[Backend], Changes]]:
    def add(change: Callable[[Backend], Changes]) -> Callable[[Backend], Changes]:
        name = change.__name__.removeprefix("_")
        MUTANTS[name] = Mutant(name, says, property, change)
        return change

    return add


# The ways in which most are made


def _forward(right: Backend, change: Callable[..., Tensor]) -> Changes:
    """Attention whose output is ``change(output, log_sum_exp, query, key, value, window, given)``."""
    attention = _of(right, "local_attention")

    def local_attention(query: Tensor, key: Tensor, value: Tensor, window: Window, **given: Any) -> Any:
        output, log_sum_exp = attention(query, key, value, window, **given)
        return change(output, log_sum_exp, query, key, value, window, given), log_sum_exp

    return {"local_attention": local_attention}


def _log_sum_exp(right: Backend, change: Callable[[Tensor], Tensor]) -> Changes:
    """Attention whose log-sum-exp is ``change(log_sum_exp)``; its own backward gets the right one."""
    attention, backward = _of(right, "local_attention"), _of(right, "local_attention_backward")

    def local_attention(*inputs: Any, **given: Any) -> Any:
        output, log_sum_exp = attention(*inputs, **given)
        return output, change(log_sum_exp)

    def local_attention_backward(grad: Tensor, *inputs: Any, **given: Any) -> Any:
        query, key, value, _, _, window = inputs
        needs_grad = given.pop("needs_grad")
        output, log_sum_exp = attention(query, key, value, window, **given)
        return backward(grad, query, key, value, output, log_sum_exp, window, needs_grad=needs_grad, **given)

    return {"local_attention": local_attention, "local_attention_backward": local_attention_backward}


def _given(right: Backend, change: Callable[..., tuple[Any, ...]]) -> Changes:
    """Attention, forward and backward, of ``change(query, key, value, window, given)`` instead of what is given."""
    attention, backward = _of(right, "local_attention"), _of(right, "local_attention_backward")

    def local_attention(query: Tensor, key: Tensor, value: Tensor, window: Window, **given: Any) -> Any:
        query, key, value, window, given = change(query, key, value, window, given)
        return attention(query, key, value, window, **given)

    def local_attention_backward(
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        lse: Tensor,
        window: Window,
        **given: Any,
    ) -> Any:
        query, key, value, window, given = change(query, key, value, window, given)
        return backward(grad, query, key, value, output, lse, window, **given)

    return {"local_attention": local_attention, "local_attention_backward": local_attention_backward}


def _gradient(right: Backend, name: str, change: Callable[..., Any]) -> Changes:
    """Attention whose gradient of ``name`` is ``change(gradient, inputs, given)``."""
    backward = _of(right, "local_attention_backward")

    def local_attention_backward(*inputs: Any, **given: Any) -> Any:
        gradients = dict(backward(*inputs, **given))
        if name in gradients:
            gradients[name] = change(gradients[name], inputs, given)
        return gradients

    return {"local_attention_backward": local_attention_backward}


def _of(right: Backend, name: str) -> Function:
    function: Function | None = getattr(right, name)
    if function is None:
        raise ValueError(f"a mutant is made of a backend that has {name}, which {right.name!r} lacks")
    return function


def _with_window(right: Backend, change: Callable[[Window, Tensor], Window]) -> Changes:
    """Attention that sees another window where no bias has a column for each of its slots."""

    def changed(query: Tensor, key: Tensor, value: Tensor, window: Window, given: dict[str, Any]) -> tuple[Any, ...]:
        bias = given["bias"]
        other = window if bias is not None and bias.shape[-1] > 1 else change(window, key)
        return query, key, value, other, given

    return _given(right, changed)


# Windows


@_mutant("windows", "sees one key more on the left")
def _left_off_by_one(right: Backend) -> Changes:
    return _with_window(right, lambda window, key: Window(window.left + 1, window.right))


@_mutant("windows", "sees one key more on the right")
def _right_off_by_one(right: Backend) -> Changes:
    return _with_window(right, lambda window, key: Window(window.left, window.right + 1))


@_mutant("windows", "sees one key too few on the left")
def _left_too_short(right: Backend) -> Changes:
    return _with_window(right, lambda window, key: Window(max(window.left - 1, 0), window.right))


@_mutant("windows", "sees all keys")
def _window_dropped(right: Backend) -> Changes:
    return _with_window(right, lambda window, key: Window(key.shape[2] + 1000, key.shape[2] + 1000))


@_mutant("windows", "left and right are exchanged")
def _window_flipped(right: Backend) -> Changes:
    return _with_window(right, lambda window, key: Window(window.right, window.left))


@_mutant("windows", "a window of one key is taken for one of two")
def _wrong_for_one_key(right: Backend) -> Changes:
    return _with_window(right, lambda window, key: Window(1, 0) if window.size == 1 else window)


@_mutant("windows", "the window of the first call is kept for all of its length")
def _stale_window(right: Backend) -> Changes:
    first: dict[int, Window] = {}
    return _with_window(right, lambda window, key: first.setdefault(key.shape[2], window))


@_mutant("windows", "left and right are exchanged in the gradient of the keys of the product")
def _window_flipped_in_key_gradient(right: Backend) -> Changes:
    backward = _of(right, "local_dot_product_backward")

    def local_dot_product_backward(grad: Tensor, query: Tensor, key: Tensor, window: Window, **given: Any) -> Any:
        gradients = dict(backward(grad, query, key, window, **given))
        if "key" in gradients and given["bias"] is None:
            only_key = {**given, "needs_grad": frozenset({"key"})}
            flipped = Window(window.right, window.left)
            gradients["key"] = backward(grad, query, key, flipped, **only_key)["key"]
        return gradients

    return {"local_dot_product_backward": local_dot_product_backward}


@_mutant(
    "gradients",
    "as fast-transformers' local_product: keys' gradients are those of transposed blocks, right for W = 1 alone",
)
def _key_gradient_of_transposed_blocks(right: Backend) -> Changes:
    def change(gradient: Tensor, inputs: Any, given: Any) -> Tensor:
        window = inputs[6]
        return gradient if window.size == 1 else gradient.roll(1, 2)

    return _gradient(right, "key", change)


@_mutant("unequal_lengths", "the starts of the sequences are aligned, not the ends")
def _starts_aligned(right: Backend) -> Changes:
    def change(query: Tensor, key: Tensor, value: Tensor, window: Window, given: dict[str, Any]) -> tuple[Any, ...]:
        shift = key.shape[2] - query.shape[2]
        return query, key.roll(shift, 2), value.roll(shift, 2), window, given

    return _given(right, change)


# Scores and their sums


@_mutant("values", "hidden slots have a part in the softmax, with score 0")
def _hidden_slots_in_the_softmax(right: Backend) -> Changes:
    def change(
        output: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, window: Window, given: Any
    ) -> Tensor:
        position = torch.arange(query.shape[2], device=query.device) + key.shape[2] - query.shape[2]
        first, last = position - window.left, position + window.right
        inside = (last.clamp(max=key.shape[2] - 1) - first.clamp(min=0) + 1).clamp(min=0)
        hidden = (min(window.size, 10_000) - inside).clamp(min=0)
        share = lse.exp() / (lse.exp() + hidden)
        return (output * share[..., None]).to(output.dtype).where(output != 0, 0)

    return _forward(right, change)


@_mutant("values", "scores are scaled twice")
def _scaled_twice(right: Backend) -> Changes:
    return _given(right, lambda q, k, v, window, given: (q, k, v, window, {**given, "scale": given["scale"] ** 2}))


@_mutant("values", "scores are not scaled")
def _not_scaled(right: Backend) -> Changes:
    return _given(right, lambda q, k, v, window, given: (q, k, v, window, {**given, "scale": 1.0}))


@_mutant("values", "the sign of the scale is lost")
def _scale_without_sign(right: Backend) -> Changes:
    return _given(right, lambda q, k, v, window, given: (q, k, v, window, {**given, "scale": abs(given["scale"])}))


@_mutant("magnitudes", "exponentials are taken without the largest score subtracted")
def _softmax_without_maximum(right: Backend) -> Changes:
    def change(output: Tensor, lse: Tensor, *rest: Any) -> Tensor:
        return output.where((lse < 88)[..., None], math.nan)

    return _forward(right, change)


@_mutant("values", "float64 is computed in float32")
def _float64_in_float32(right: Backend) -> Changes:
    attention = _of(right, "local_attention")

    def local_attention(query: Tensor, key: Tensor, value: Tensor, window: Window, **given: Any) -> Any:
        if query.dtype != torch.float64:
            return attention(query, key, value, window, **given)
        output, lse = attention(query.float(), key.float(), value.float(), window, **given)
        return output.double(), lse.double()

    capability = replace(right.capability, dtypes=frozenset({torch.float64}))
    return {"local_attention": local_attention, "capability": capability}


@_mutant("accumulation", "products of 16 bits are added up in 16 bits")
def _accumulated_in_16_bits(right: Backend) -> Changes:
    product = _of(right, "local_dot_product")

    def local_dot_product(query: Tensor, key: Tensor, window: Window, **given: Any) -> Tensor:
        if query.dtype.itemsize > 2:
            return product(query, key, window, **given)  # type: ignore[no-any-return]
        total: Tensor | None = None
        for first in range(0, query.shape[3], 8):
            part = slice(first, first + 8)
            bias = given["bias"] if total is None else None
            added = product(query[..., part], key[..., part], window, **{**given, "bias": bias})
            total = added if total is None else total + added
        assert total is not None
        return total

    return {"local_dot_product": local_dot_product}


@_mutant("values", "float32 is multiplied in 16 bits")
def _float32_in_16_bits(right: Backend) -> Changes:
    def change(query: Tensor, key: Tensor, value: Tensor, window: Window, given: dict[str, Any]) -> tuple[Any, ...]:
        return query.bfloat16().to(query.dtype), key, value, window, given

    return _given(right, change)


@_mutant("autocast", "tensors of 16 bits are rounded anew where autocast was on in the call before")
def _remembers_float32(right: Backend) -> Changes:
    attention = _of(right, "local_attention")
    calls = []

    def local_attention(query: Tensor, *inputs: Any, **given: Any) -> Any:
        output, lse = attention(query, *inputs, **given)
        if query.dtype.itemsize == 2:
            calls.append(query)
            if len(calls) % 2 == 0:
                output = output * 1.01
        return output, lse

    return {"local_attention": local_attention}


# The log-sum-exp


@_mutant("log_sum_exp", "the log-sum-exp is to base 2")
def _log_sum_exp_in_base_2(right: Backend) -> Changes:
    return _log_sum_exp(right, lambda lse: lse / math.log(2))


@_mutant("log_sum_exp", "the log-sum-exp is computed without the largest score, and overflows")
def _log_sum_exp_without_maximum(right: Backend) -> Changes:
    return _log_sum_exp(right, lambda lse: lse.float().exp().log().to(lse.dtype))


@_mutant("log_sum_exp", "the log-sum-exp is the largest score")
def _log_sum_exp_of_one(right: Backend) -> Changes:
    return _log_sum_exp(right, lambda lse: lse - 0.1)


@_mutant("blind_rows", "the log-sum-exp of a row that sees nothing is 0")
def _log_sum_exp_of_blind_rows(right: Backend) -> Changes:
    return _log_sum_exp(right, lambda lse: lse.where(lse != -math.inf, 0.0))


@_mutant("blind_rows", "a row that sees nothing gets the average of all values")
def _average_for_blind_rows(right: Backend) -> Changes:
    def change(output: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
        average = value.mean(2, keepdim=True).repeat_interleave(query.shape[1] // value.shape[1], 1)
        return output.where((lse != -math.inf)[..., None], average)

    return _forward(right, change)


@_mutant("blind_rows", "hidden scores are a large negative number, not -inf")
def _hidden_scores_are_finite(right: Backend) -> Changes:
    product = _of(right, "local_dot_product")

    def local_dot_product(query: Tensor, key: Tensor, window: Window, **given: Any) -> Tensor:
        scores: Tensor = product(query, key, window, **given)
        return scores.clamp(min=-1e4)

    return {"local_dot_product": local_dot_product}


# Heads, lengths, bias


@_mutant("grouped_heads", "query head h reads key/value head h % Hkv")
def _heads_transposed(right: Backend) -> Changes:
    def change(
        output: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, window: Window, given: Any
    ) -> Tensor:
        heads = torch.arange(query.shape[1], device=query.device) % key.shape[1]
        found: Tensor = _of(right, "local_attention")(query, key[:, heads], value[:, heads], window, **given)[0]
        return found

    return _forward(right, change)


@_mutant("grouped_heads", "gradients of grouped keys are those of one query head alone")
def _heads_not_added_up(right: Backend) -> Changes:
    def change(gradient: Tensor, inputs: Any, given: Any) -> Tensor:
        query, key = inputs[1:3]
        share: float = key.shape[1] / query.shape[1]
        return gradient * share

    return _gradient(right, "key", change)


def _with_lengths(right: Backend, change: Callable[[Tensor, int], Tensor | None]) -> Changes:
    def changed(query: Tensor, key: Tensor, value: Tensor, window: Window, given: dict[str, Any]) -> tuple[Any, ...]:
        lengths = given["key_lengths"]
        lengths = None if lengths is None else change(lengths, key.shape[2])
        return query, key, value, window, {**given, "key_lengths": lengths}

    return _given(right, changed)


@_mutant("key_lengths", "key lengths are ignored")
def _key_lengths_ignored(right: Backend) -> Changes:
    return _with_lengths(right, lambda lengths, most: None)


@_mutant("key_lengths", "the key at a sequence's length is seen")
def _key_lengths_off_by_one(right: Backend) -> Changes:
    return _with_lengths(right, lambda lengths, most: (lengths + 1).clamp(max=most))


@_mutant("key_lengths", "all sequences have the length of the first")
def _one_key_length(right: Backend) -> Changes:
    return _with_lengths(right, lambda lengths, most: lengths[:1].expand(lengths.shape).contiguous())


@_mutant("key_lengths", "lengths in 32 bits are read as if they had 64")
def _key_lengths_in_64_bits(right: Backend) -> Changes:
    def change(lengths: Tensor, most: int) -> Tensor:
        if lengths.dtype == torch.int64:
            return lengths
        padded = torch.cat([lengths, torch.zeros_like(lengths)])
        return padded.view(torch.int64).clamp(0, most)

    return _with_lengths(right, change)


@_mutant("key_lengths", "the average reads values past a sequence's length")
def _values_past_the_length(right: Backend) -> Changes:
    average = _of(right, "local_weighted_average")

    def local_weighted_average(weights: Tensor, value: Tensor, window: Window, **given: Any) -> Any:
        return average(weights, value, window, **{**given, "key_lengths": None})

    return {"local_weighted_average": local_weighted_average}


@_mutant("bias_gradients", "the gradient of a broadcast bias is not summed to its shape")
def _bias_gradient_not_reduced(right: Backend) -> Changes:
    def change(gradient: Tensor, inputs: Any, given: Any) -> Tensor:
        query, window = inputs[1], inputs[6]
        return gradient.expand(*query.shape[:3], window.size).contiguous()

    return _gradient(right, "bias", change)


@_mutant("bias_gradients", "the gradient of a bias is 0")
def _bias_gradient_missing(right: Backend) -> Changes:
    return _gradient(right, "bias", lambda gradient, inputs, given: torch.zeros_like(gradient))


@_mutant("bias_gradients", "the gradient of a bias that broadcasts over sequences is the average over them")
def _bias_gradient_averaged(right: Backend) -> Changes:
    def change(gradient: Tensor, inputs: Any, given: Any) -> Tensor:
        return gradient / inputs[1].shape[0] if given["bias"].shape[0] == 1 else gradient

    return _gradient(right, "bias", change)


@_mutant("bias", "the bias is added before scaling")
def _bias_before_scaling(right: Backend) -> Changes:
    def change(query: Tensor, key: Tensor, value: Tensor, window: Window, given: dict[str, Any]) -> tuple[Any, ...]:
        bias = given["bias"]
        return query, key, value, window, {**given, "bias": None if bias is None else bias * abs(given["scale"])}

    return _given(right, change)


@_mutant("bias", "a bias of -inf hides a slot with a number, and not at all in rows of nothing else")
def _bias_that_does_not_hide(right: Backend) -> Changes:
    def change(query: Tensor, key: Tensor, value: Tensor, window: Window, given: dict[str, Any]) -> tuple[Any, ...]:
        bias = given["bias"]
        return query, key, value, window, {**given, "bias": None if bias is None else bias.clamp(min=-1e4)}

    return _given(right, change)


# Gradients


@_mutant("gradients", "the gradient of the queries is scaled twice")
def _query_gradient_scaled_twice(right: Backend) -> Changes:
    return _gradient(right, "query", lambda gradient, inputs, given: gradient * given["scale"])


@_mutant("gradients", "the first and the last key get no gradient")
def _key_gradient_without_edges(right: Backend) -> Changes:
    def change(gradient: Tensor, inputs: Any, given: Any) -> Tensor:
        gradient[:, :, :1] = 0
        gradient[:, :, -1:] = 0
        return gradient

    return _gradient(right, "key", change)


@_mutant("gradients", "the gradient of scores lacks the product of output and incoming gradient")
def _softmax_gradient_without_its_sum(right: Backend) -> Changes:
    def change(gradient: Tensor, inputs: Any, given: Any) -> Tensor:
        grad, query, key, _, output, _, window = inputs
        product = (grad.float() * output.float()).sum(-1, keepdim=True)
        forward = {name: each for name, each in given.items() if name != "needs_grad"}
        average = _of(right, "local_attention")(query, key, key, window, **forward)[0]
        missing: Tensor = given["scale"] * product * average
        return gradient + missing.to(gradient.dtype)

    return _gradient(right, "query", change)


@_mutant("gradients", "the gradient of the values is left out")
def _value_gradient_left_out(right: Backend) -> Changes:
    backward = _of(right, "local_attention_backward")

    def local_attention_backward(*inputs: Any, **given: Any) -> Any:
        return {name: each for name, each in backward(*inputs, **given).items() if name != "value"}

    return {"local_attention_backward": local_attention_backward}


@_mutant("wanted_gradients", "the gradient of keys is made along with that of queries alone")
def _key_gradient_with_queries_alone(right: Backend) -> Changes:
    def change(gradient: Tensor, inputs: Any, given: Any) -> Tensor:
        return gradient if "query" in given["needs_grad"] else torch.zeros_like(gradient)

    return _gradient(right, "key", change)


# Memory


def _as_if_contiguous(tensor: Tensor) -> Tensor:
    """What lies where the elements of a contiguous tensor would, from the first one on; 0 past the end of memory."""
    whole = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0)
    found = whole[tensor.storage_offset() :][: tensor.numel()]
    padded = torch.nn.functional.pad(found, (0, tensor.numel() - found.numel()))
    return padded.view(tensor.shape)


@_mutant("layouts", "strides of the incoming gradient are ignored")
def _strides_of_the_incoming_gradient_ignored(right: Backend) -> Changes:
    backward = _of(right, "local_attention_backward")

    def local_attention_backward(grad: Tensor, *inputs: Any, **given: Any) -> Any:
        return backward(_as_if_contiguous(grad), *inputs, **given)

    return {"local_attention_backward": local_attention_backward}


@_mutant("layouts", "expanded tensors are read as if they were dense")
def _expanded_misread(right: Backend) -> Changes:
    def change(query: Tensor, key: Tensor, value: Tensor, window: Window, given: dict[str, Any]) -> tuple[Any, ...]:
        return query, _as_if_contiguous(key) if 0 in key.stride() else key, value, window, given

    return _given(right, change)


@_mutant("expanded_gradients", "an incoming gradient that is the same for all rows is read as if it were dense")
def _expanded_gradient_misread(right: Backend) -> Changes:
    backward = _of(right, "local_weighted_average_backward")

    def local_weighted_average_backward(grad: Tensor, *inputs: Any, **given: Any) -> Any:
        return backward(_as_if_contiguous(grad) if grad.stride(2) == 0 else grad, *inputs, **given)

    return {"local_weighted_average_backward": local_weighted_average_backward}


@_mutant("inputs_unchanged", "the values are scaled in place")
def _input_changed(right: Backend) -> Changes:
    def change(output: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
        value.mul_(2)
        return output

    return _forward(right, change)


@_mutant("inputs_unchanged", "the incoming gradient is changed in place")
def _incoming_gradient_changed(right: Backend) -> Changes:
    backward = _of(right, "local_attention_backward")

    def local_attention_backward(grad: Tensor, *inputs: Any, **given: Any) -> Any:
        found = backward(grad, *inputs, **given)
        grad.zero_()
        return found

    return {"local_attention_backward": local_attention_backward}


@_mutant("inputs_unchanged", "the backward writes into the output of the forward")
def _output_changed_by_the_backward(right: Backend) -> Changes:
    backward = _of(right, "local_attention_backward")

    def local_attention_backward(
        grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, *rest: Any, **given: Any
    ) -> Any:
        found = backward(grad, query, key, value, output, *rest, **given)
        output.mul_(grad)
        return found

    return {"local_attention_backward": local_attention_backward}


@_mutant("nothing_aliased", "where a row sees one key, its value is returned as it is, not a copy")
def _output_is_an_input(right: Backend) -> Changes:
    def change(
        output: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, window: Window, given: Any
    ) -> Tensor:
        plain = given["bias"] is None and given["key_lengths"] is None
        return (
            value if window.size == 1 and plain and value.shape == output.shape and query.shape == key.shape else output
        )

    return _forward(right, change)


@_mutant("nothing_aliased", "the output lies in a buffer that the next call writes into")
def _output_in_a_kept_buffer(right: Backend) -> Changes:
    kept: dict[Any, Tensor] = {}

    def change(output: Tensor, *rest: Any) -> Tensor:
        kind = (output.shape, output.stride(), output.dtype, output.device)
        return kept.setdefault(kind, torch.empty_like(output)).copy_(output)

    return _forward(right, change)


@_mutant("described", "the output of 16 bits is in float32")
def _output_in_another_dtype(right: Backend) -> Changes:
    return _forward(right, lambda output, *rest: output.float() if output.dtype.itemsize == 2 else output)


@_mutant("described", "the gradient of a bias has the dtype of the queries")
def _bias_gradient_in_another_dtype(right: Backend) -> Changes:
    return _gradient(right, "bias", lambda gradient, inputs, given: gradient.to(inputs[1].dtype))


@_mutant("memory_order", "the output is contiguous, however the queries lie")
def _output_in_another_order(right: Backend) -> Changes:
    return _forward(right, lambda output, *rest: output.contiguous())


@_mutant("memory_order", "gradients are contiguous, however the tensors lie")
def _gradient_in_another_order(right: Backend) -> Changes:
    return _gradient(right, "value", lambda gradient, inputs, given: gradient.contiguous())


@_mutant("values", "the rows past the last whole tile of 64 are a little off")
def _last_tile_wrong(right: Backend) -> Changes:
    def change(output: Tensor, *rest: Any) -> Tensor:
        rows = output.shape[2]
        if rows > 64 and rows % 64:
            output[:, :, rows - rows % 64 :] *= 1.01
        return output

    return _forward(right, change)


@_mutant("values", "the 257th row and those after it are a little off")
def _rows_past_256_wrong(right: Backend) -> Changes:
    def change(output: Tensor, *rest: Any) -> Tensor:
        output[:, :, 256:] *= 1.01
        return output

    return _forward(right, change)


@_mutant("values", "the sequences after the second are the second")
def _third_sequence_wrong(right: Backend) -> Changes:
    def change(output: Tensor, *rest: Any) -> Tensor:
        output[2:] = output[1:2]
        return output

    return _forward(right, change)


@_mutant("uninitialised", "the last row is not written")
def _last_row_not_written(right: Backend) -> Changes:
    def change(output: Tensor, *rest: Any) -> Tensor:
        made = torch.empty_like(output)
        made[:, :, :-1] = output[:, :, :-1]
        # A fresh page of memory holds zeros, and so the fault shows now and then only.
        return made

    return _forward(right, change)


@_mutant("uninitialised", "the gradient of keys that nobody sees is not written")
def _unseen_gradient_not_written(right: Backend) -> Changes:
    def change(gradient: Tensor, inputs: Any, given: Any) -> Tensor:
        made = gradient.new_empty(gradient.shape)
        seen = gradient.abs().sum(-1, keepdim=True) != 0
        return torch.where(seen, gradient, made)

    return _gradient(right, "key", change)


@_mutant("hidden", "hidden keys are multiplied by 0")
def _hidden_key_leaks(right: Backend) -> Changes:
    def change(output: Tensor, lse: Tensor, query: Tensor, key: Tensor, *rest: Any) -> Tensor:
        return output + 0 * key.sum()

    return _forward(right, change)


@_mutant("hidden", "the incoming gradient of a row that sees nothing is multiplied by 0")
def _blind_row_leaks(right: Backend) -> Changes:
    return _gradient(right, "key", lambda gradient, inputs, given: gradient + 0 * inputs[0].sum())


@_mutant("hidden", "the weight of a hidden slot is multiplied by 0")
def _hidden_weight_leaks(right: Backend) -> Changes:
    average = _of(right, "local_weighted_average")

    def local_weighted_average(weights: Tensor, value: Tensor, window: Window, **given: Any) -> Tensor:
        output: Tensor = average(weights, value, window, **given)
        return output + 0 * weights.sum(-1, keepdim=True)

    return {"local_weighted_average": local_weighted_average}


# Calls


@_mutant("repeatable", "the last bits are another time other ones")
def _last_bits_at_random(right: Backend) -> Changes:
    calls: list[int] = []

    def change(output: Tensor, *rest: Any) -> Tensor:
        calls.append(len(calls))
        return output * (1 + calls[-1] % 2 * 2 * torch.finfo(output.dtype).eps)

    return _forward(right, change)


@_mutant("settings", "the number of threads is set and left so")
def _threads_left_set(right: Backend) -> Changes:
    def change(output: Tensor, *rest: Any) -> Tensor:
        torch.set_num_threads(torch.get_num_threads() % 2 + 1)
        return output

    return _forward(right, change)


@_mutant("settings", "a random number is drawn from torch's generator")
def _draws_random_numbers(right: Backend) -> Changes:
    def change(output: Tensor, *rest: Any) -> Tensor:
        torch.rand(1)
        return output

    return _forward(right, change)


@_mutant("refusals", "its own filter raises instead of giving a reason")
def _filter_that_raises(right: Backend) -> Changes:
    def refuse(problem: Any) -> str | None:
        raise ValueError(f"{problem.window.size} is odd") if problem.window.size % 2 else KeyError("even")

    return {"refuse": refuse}


@_mutant("refusals", "its own filter answers with False")
def _filter_that_answers_false(right: Backend) -> Changes:
    return {"refuse": lambda problem: False if problem.head_dim == 16 else None}


@_mutant("values", "its own filter refuses every call")
def _refuses_everything(right: Backend) -> Changes:
    return {"refuse": lambda problem: "not today"}


@_mutant("values", "the process is ended where a window reaches into the future")
def _ends_the_process(right: Backend) -> Changes:
    def change(
        output: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, window: Window, given: Any
    ) -> Tensor:
        if window.right:
            raise SystemExit(0)
        return output

    return _forward(right, change)


@_mutant("key_lengths", "key lengths are declared, and raise")
def _declares_more_than_it_can(right: Backend) -> Changes:
    def change(lengths: Tensor, most: int) -> Tensor:
        raise NotImplementedError("key_lengths")

    return _with_lengths(right, change)
