"""Broken backends whose gradients are wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnreg.backend import Backend
from attnreg.testing.mutant import (
    Changes,
    function_of,
    mutant,
    of_forward,
    of_gradient,
)


@mutant("gradients", "the gradient of the queries is scaled twice")
def _query_gradient_scaled_twice(right: Backend) -> Changes:
    return of_gradient(right, "query", lambda gradient, inputs, given: gradient * given["scale"])


@mutant("gradients", "the first and the last key get no gradient")
def _key_gradient_without_edges(right: Backend) -> Changes:
    def change(gradient: Tensor, inputs: Any, given: Any) -> Tensor:
        gradient[:, :, :1] = 0
        gradient[:, :, -1:] = 0
        return gradient

    return of_gradient(right, "key", change)


@mutant("gradients", "the gradient of scores lacks the product of output and incoming gradient")
def _softmax_gradient_without_its_sum(right: Backend) -> Changes:
    def change(gradient: Tensor, inputs: Any, given: Any) -> Tensor:
        grad, query, key, _, output, _, window = inputs
        product = (grad.float() * output.float()).sum(-1, keepdim=True)
        average = function_of(right, "local_attention")(query, key, key, window, **of_forward(given))[0]
        missing: Tensor = given["scale"] * product * average
        return gradient + missing.to(gradient.dtype)

    return of_gradient(right, "query", change)


@mutant("gradients", "the gradient of the values is left out")
def _value_gradient_left_out(right: Backend) -> Changes:
    backward = function_of(right, "local_attention_backward")

    def local_attention_backward(*inputs: Any, **given: Any) -> Any:
        return {name: each for name, each in backward(*inputs, **given).items() if name != "value"}

    return {"local_attention_backward": local_attention_backward}


@mutant("wanted_gradients", "the gradient of keys is made along with that of queries alone")
def _key_gradient_with_queries_alone(right: Backend) -> Changes:
    def change(gradient: Tensor, inputs: Any, given: Any) -> Tensor:
        return gradient if "query" in given["needs_grad"] else torch.zeros_like(gradient)

    return of_gradient(right, "key", change)


@mutant("wanted_gradients", "the gradient of the bias is off where those of queries and bias alone are asked for")
def _bias_gradient_with_queries_alone(right: Backend) -> Changes:
    def change(gradient: Tensor, inputs: Any, given: Any) -> Tensor:
        return gradient * 1.05 if given["needs_grad"] == frozenset({"query", "bias"}) else gradient

    return of_gradient(right, "bias", change)


@mutant("gradients", "the gradient of the queries is a little off in float16 alone")
def _query_gradient_wrong_in_float16(right: Backend) -> Changes:
    return of_gradient(
        right, "query", lambda gradient, inputs, given: gradient * (1.05 if gradient.dtype == torch.float16 else 1)
    )


@mutant("bias_gradients", "the gradient of a bias for each sequence and row, but all heads, is a little off")
def _bias_gradient_over_heads_wrong(right: Backend) -> Changes:
    def change(gradient: Tensor, inputs: Any, given: Any) -> Tensor:
        batch, heads, rows, _ = gradient.shape
        return gradient * 1.05 if batch > 1 and heads == 1 and rows > 1 else gradient

    return of_gradient(right, "bias", change)


@mutant("sizes_of_gradients", "tiny gradients are 0")
def _tiny_gradients_flushed(right: Backend) -> Changes:
    return of_gradient(right, "value", lambda gradient, inputs, given: gradient.where(gradient.abs() > 1e-6, 0))


@mutant("sizes_of_gradients", "large incoming gradients are cut")
def _incoming_gradient_cut(right: Backend) -> Changes:
    backward = function_of(right, "local_attention_backward")

    def local_attention_backward(grad: Tensor, *inputs: Any, **given: Any) -> Any:
        return backward(grad.clamp(-1e4, 1e4), *inputs, **given)

    return {"local_attention_backward": local_attention_backward}


@mutant("gradient_sums", "the gradient of values of 16 bits is added up in 16 bits, a few rows at a time")
def _value_gradient_in_16_bits(right: Backend) -> Changes:
    backward = function_of(right, "local_attention_backward")

    def change(gradient: Tensor, inputs: Any, given: Any) -> Tensor:
        grad, *others = inputs
        if grad.dtype.itemsize > 2 or grad.shape[2] < 64:
            return gradient
        total = torch.zeros_like(gradient)
        for first in range(0, grad.shape[2], 8):
            part = torch.zeros_like(grad)
            part[:, :, first : first + 8] = grad[:, :, first : first + 8]
            total += backward(part, *others, **{**given, "needs_grad": frozenset({"value"})})["value"]
        return total

    return of_gradient(right, "value", change)


@mutant("gradient_sums", "the gradients of keys of 16 bits are added up in 16 bits, over the heads that read them")
def _heads_in_16_bits(right: Backend) -> Changes:
    backward = function_of(right, "local_attention_backward")

    def change(gradient: Tensor, inputs: Any, given: Any) -> Tensor:
        grad, query, key, value, output, lse, window = inputs
        group = query.shape[1] // key.shape[1]
        if grad.dtype.itemsize > 2 or group == 1:
            return gradient
        keys, values = (tensor.repeat_interleave(group, 1) for tensor in (key, value))
        alone = {**given, "needs_grad": frozenset({"key"})}
        of_heads = backward(grad, query, keys, values, output, lse, window, **alone)["key"]
        total = torch.zeros_like(gradient)
        for head in range(group):
            total += of_heads[:, head::group]
        return total

    return of_gradient(right, "key", change)
