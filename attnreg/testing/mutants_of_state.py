"""Broken backends that keep something between calls."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from attnreg.backend import Backend
from attnreg.testing.mutant import (
    Changes,
    function_of,
    mutant,
    of_inputs,
    of_output,
)
from attnreg.window import Window


@mutant("interleaved", "the backward takes queries and keys from the last forward of these shapes")
def _backward_of_the_last_forward(right: Backend) -> Changes:
    attention, backward = function_of(right, "local_attention"), function_of(right, "local_attention_backward")
    last: dict[Any, tuple[Tensor, Tensor]] = {}

    def shapes(query: Tensor, key: Tensor, window: Window) -> Any:
        return query.shape, key.shape, window, query.dtype, query.device

    def local_attention(query: Tensor, key: Tensor, value: Tensor, window: Window, **given: Any) -> Any:
        last[shapes(query, key, window)] = query.clone(), key.clone()
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
        query, key = last.get(shapes(query, key, window), (query, key))
        return backward(grad, query, key, value, output, lse, window, **given)

    return {"local_attention": local_attention, "local_attention_backward": local_attention_backward}


@mutant("other_numbers", "the lengths of the first call are kept for all of its shapes")
def _stale_key_lengths(right: Backend) -> Changes:
    first: dict[Any, Tensor] = {}

    def change(query: Tensor, key: Tensor, value: Tensor, window: Window, given: dict[str, Any]) -> tuple[Any, ...]:
        lengths = given["key_lengths"]
        if lengths is not None:
            lengths = first.setdefault((query.shape, key.shape, window, query.dtype), lengths.clone())
        return query, key, value, window, {**given, "key_lengths": lengths}

    return of_inputs(right, change)


@mutant("other_numbers", "a bias is kept for all calls whose bias lies in the same place")
def _stale_bias(right: Backend) -> Changes:
    # The bias itself too, so that nothing else comes to lie there.
    first: dict[Any, tuple[Tensor, Tensor]] = {}

    def change(query: Tensor, key: Tensor, value: Tensor, window: Window, given: dict[str, Any]) -> tuple[Any, ...]:
        bias = given["bias"]
        if bias is not None:
            place = (bias.data_ptr(), bias.shape, bias.stride(), bias.dtype)
            _, bias = first.setdefault(place, (bias, bias.clone()))
        return query, key, value, window, {**given, "bias": bias}

    return of_inputs(right, change)


@mutant("lets_go", "the tensors of every call are kept")
def _inputs_kept(right: Backend) -> Changes:
    kept: list[tuple[Tensor, ...]] = []

    def change(query: Tensor, key: Tensor, value: Tensor, window: Window, given: dict[str, Any]) -> tuple[Any, ...]:
        kept.append((query, key, value))
        return query, key, value, window, given

    return of_inputs(right, change)


@mutant("threads", "the threads of a process share a scratch for each shape")
def _scratch_of_all_threads(right: Backend) -> Changes:
    kept: dict[Any, Tensor] = {}

    def change(query: Tensor, key: Tensor, value: Tensor, window: Window, given: dict[str, Any]) -> tuple[Any, ...]:
        kind = (query.shape, query.stride(), query.dtype, query.device)
        scratch = kept.setdefault(kind, torch.empty_like(query)).copy_(query)
        # As long as a larger call takes.
        time.sleep(0.002)
        return scratch.clone(), key, value, window, given

    return of_inputs(right, change)


@mutant("inference_mode", "the output is a little off under torch.inference_mode()")
def _wrong_under_inference_mode(right: Backend) -> Changes:
    return of_output(right, lambda output, *rest: output * (1.05 if torch.is_inference_mode_enabled() else 1))
