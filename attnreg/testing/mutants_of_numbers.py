"""Broken backends that compute wrong numbers: scores, their sums, log-sum-exp."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnreg.backend import Backend
from attnreg.testing.mutant import (
    Changes,
    function_of,
    mutant,
    of_inputs,
    of_log_sum_exp,
    of_output,
)
from attnreg.window import Window

# Scores and their sums


@mutant("values", "hidden slots have a part in the softmax, with score 0")
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

    return of_output(right, change)


@mutant("values", "scores are scaled twice")
def _scaled_twice(right: Backend) -> Changes:
    return of_inputs(right, lambda q, k, v, window, given: (q, k, v, window, {**given, "scale": given["scale"] ** 2}))


@mutant("values", "scores are not scaled")
def _not_scaled(right: Backend) -> Changes:
    return of_inputs(right, lambda q, k, v, window, given: (q, k, v, window, {**given, "scale": 1.0}))


@mutant("values", "the sign of the scale is lost")
def _scale_without_sign(right: Backend) -> Changes:
    return of_inputs(right, lambda q, k, v, window, given: (q, k, v, window, {**given, "scale": abs(given["scale"])}))


@mutant("magnitudes", "exponentials are taken without the largest score subtracted")
def _softmax_without_maximum(right: Backend) -> Changes:
    def change(output: Tensor, lse: Tensor, *rest: Any) -> Tensor:
        return output.where((lse < 88)[..., None], math.nan)

    return of_output(right, change)


@mutant("values", "float64 is computed in float32")
def _float64_in_float32(right: Backend) -> Changes:
    attention = function_of(right, "local_attention")

    def local_attention(query: Tensor, key: Tensor, value: Tensor, window: Window, **given: Any) -> Any:
        if query.dtype != torch.float64:
            return attention(query, key, value, window, **given)
        output, lse = attention(query.float(), key.float(), value.float(), window, **given)
        return output.double(), lse.double()

    capability = replace(right.capability, dtypes=frozenset({torch.float64}))
    return {"local_attention": local_attention, "capability": capability}


@mutant("accumulation", "products of 16 bits are added up in 16 bits")
def _accumulated_in_16_bits(right: Backend) -> Changes:
    product = function_of(right, "local_dot_product")

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


@mutant("values", "float32 is multiplied in 16 bits")
def _float32_in_16_bits(right: Backend) -> Changes:
    def change(query: Tensor, key: Tensor, value: Tensor, window: Window, given: dict[str, Any]) -> tuple[Any, ...]:
        return query.bfloat16().to(query.dtype), key, value, window, given

    return of_inputs(right, change)


@mutant("autocast", "tensors of 16 bits are rounded anew where autocast was on in the call before")
def _remembers_float32(right: Backend) -> Changes:
    attention = function_of(right, "local_attention")
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


@mutant("log_sum_exp", "the log-sum-exp is to base 2")
def _log_sum_exp_in_base_2(right: Backend) -> Changes:
    return of_log_sum_exp(right, lambda lse: lse / math.log(2))


@mutant("log_sum_exp", "the log-sum-exp is computed without the largest score, and overflows")
def _log_sum_exp_without_maximum(right: Backend) -> Changes:
    return of_log_sum_exp(right, lambda lse: lse.float().exp().log().to(lse.dtype))


@mutant("log_sum_exp", "the log-sum-exp is the largest score")
def _log_sum_exp_of_one(right: Backend) -> Changes:
    return of_log_sum_exp(right, lambda lse: lse - 0.1)


@mutant("blind_rows", "the log-sum-exp of a row that sees nothing is 0")
def _log_sum_exp_of_blind_rows(right: Backend) -> Changes:
    return of_log_sum_exp(right, lambda lse: lse.where(lse != -math.inf, 0.0))


@mutant("blind_rows", "a row that sees nothing gets the average of all values")
def _average_for_blind_rows(right: Backend) -> Changes:
    def change(output: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
        average = value.mean(2, keepdim=True).repeat_interleave(query.shape[1] // value.shape[1], 1)
        return output.where((lse != -math.inf)[..., None], average)

    return of_output(right, change)


@mutant("blind_rows", "hidden scores are a large negative number, not -inf")
def _hidden_scores_are_finite(right: Backend) -> Changes:
    product = function_of(right, "local_dot_product")

    def local_dot_product(query: Tensor, key: Tensor, window: Window, **given: Any) -> Tensor:
        scores: Tensor = product(query, key, window, **given)
        return scores.clamp(min=-1e4)

    return {"local_dot_product": local_dot_product}


# Magnitudes


@mutant("values", "a scale of 0 is taken for none")
def _scale_of_zero_is_none(right: Backend) -> Changes:
    def change(query: Tensor, key: Tensor, value: Tensor, window: Window, given: dict[str, Any]) -> tuple[Any, ...]:
        return query, key, value, window, {**given, "scale": given["scale"] or query.shape[-1] ** -0.5}

    return of_inputs(right, change)


@mutant("values", "a scale of 1 is taken for none")
def _scale_of_one_is_none(right: Backend) -> Changes:
    def change(query: Tensor, key: Tensor, value: Tensor, window: Window, given: dict[str, Any]) -> tuple[Any, ...]:
        scale = query.shape[-1] ** -0.5 if given["scale"] == 1 else given["scale"]
        return query, key, value, window, {**given, "scale": scale}

    return of_inputs(right, change)


@mutant("magnitudes", "the largest score is taken before scaling, and is the smallest where the scale is negative")
def _maximum_before_scaling(right: Backend) -> Changes:
    attention = function_of(right, "local_attention")

    def change(
        output: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, window: Window, given: Any
    ) -> Tensor:
        if given["scale"] >= 0:
            return output
        smallest = -attention(-query, key, value, window, **{**given, "bias": None})[1]
        return output.where((lse - smallest < 88)[..., None], math.nan)

    return of_output(right, change)


@mutant("magnitudes", "the largest score is taken before the bias is added")
def _bias_left_out_of_the_maximum(right: Backend) -> Changes:
    def change(
        output: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, window: Window, given: Any
    ) -> Tensor:
        bias = given["bias"]
        return output if bias is None else output.where((bias.float().amax(-1, keepdim=True) < 80), math.nan)

    return of_output(right, change)


@mutant("magnitudes", "a bias below -10,000 hides")
def _very_negative_bias_hides(right: Backend) -> Changes:
    def change(query: Tensor, key: Tensor, value: Tensor, window: Window, given: dict[str, Any]) -> tuple[Any, ...]:
        bias = given["bias"]
        bias = None if bias is None else bias.masked_fill(bias < -1e4, -math.inf)
        return query, key, value, window, {**given, "bias": bias}

    return of_inputs(right, change)


@mutant("magnitudes", "scores of float16 are held in it")
def _scores_in_float16(right: Backend) -> Changes:
    def change(output: Tensor, lse: Tensor, query: Tensor, *rest: Any) -> Tensor:
        return output.where((lse.abs() < 65504)[..., None], math.nan) if query.dtype == torch.float16 else output

    return of_output(right, change)


@mutant("magnitudes", "products of float16 are held in it before they are scaled")
def _products_in_float16(right: Backend) -> Changes:
    attention = function_of(right, "local_attention")

    def change(
        output: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, window: Window, given: Any
    ) -> Tensor:
        if query.dtype != torch.float16:
            return output
        largest = attention(query, key, value, window, **{**given, "bias": None, "scale": 1.0})[1]
        return output.where((largest < 65504)[..., None], math.nan)

    return of_output(right, change)


@mutant("magnitudes", "weights are divided by their sum after the average, which is held in float16")
def _undivided_average_in_float16(right: Backend) -> Changes:
    def change(
        output: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, window: Window, given: Any
    ) -> Tensor:
        if query.dtype != torch.float16:
            return output
        undivided = output.float() * min(window.size, 16) / 2
        return output.where(undivided.abs() < 65504, math.inf)

    return of_output(right, change)


@mutant("accumulation", "averages of 16 bits are added up in 16 bits")
def _averages_in_16_bits(right: Backend) -> Changes:
    product, average = function_of(right, "local_dot_product"), function_of(right, "local_weighted_average")

    def change(
        output: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, window: Window, given: Any
    ) -> Tensor:
        if query.dtype.itemsize > 2 or window.size < 64:
            return output
        weights = (product(query, key, window, **given).float() - lse[..., None]).exp().nan_to_num(0.0)
        total = torch.zeros_like(output)
        for first in range(0, window.size, 8):
            part = torch.zeros_like(weights, dtype=query.dtype)
            part[..., first : first + 8] = weights[..., first : first + 8]
            total += average(part, value, window, key_lengths=given["key_lengths"])
        return total

    return of_output(right, change)


@mutant("visible_nan", "a NaN is 0 in the output")
def _nan_is_zero(right: Backend) -> Changes:
    return of_output(right, lambda output, *rest: output.nan_to_num(0.0))


@mutant("log_sum_exp", "the log-sum-exp of float64 is computed in float32")
def _log_sum_exp_in_float32(right: Backend) -> Changes:
    return of_log_sum_exp(right, lambda lse: lse.float().to(lse.dtype))
