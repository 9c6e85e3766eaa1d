"""Broken backends that see the wrong keys: windows, heads, lengths, biases, sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from attnreg.backend import Backend
from attnreg.testing.mutant import (
    Changes,
    function_of,
    mutant,
    of_argument,
    of_gradient,
    of_inputs,
    of_lengths,
    of_output,
)
from attnreg.window import Window


def _with_window(right: Backend, change: Callable[[Window, Tensor], Window]) -> Changes:
    """Attention that sees another window where no bias has a column for each of its slots."""

    def changed(query: Tensor, key: Tensor, value: Tensor, window: Window, given: dict[str, Any]) -> tuple[Any, ...]:
        bias = given["bias"]
        other = window if bias is not None and bias.shape[-1] > 1 else change(window, key)
        return query, key, value, other, given

    return of_inputs(right, changed)


# Windows


@mutant("windows", "sees one key more on the left")
def _left_off_by_one(right: Backend) -> Changes:
    return _with_window(right, lambda window, key: Window(window.left + 1, window.right))


@mutant("windows", "sees one key more on the right")
def _right_off_by_one(right: Backend) -> Changes:
    return _with_window(right, lambda window, key: Window(window.left, window.right + 1))


@mutant("windows", "sees one key too few on the left")
def _left_too_short(right: Backend) -> Changes:
    return _with_window(right, lambda window, key: Window(max(window.left - 1, 0), window.right))


@mutant("windows", "sees all keys")
def _window_dropped(right: Backend) -> Changes:
    return _with_window(right, lambda window, key: Window(key.shape[2] + 1000, key.shape[2] + 1000))


@mutant("windows", "left and right are exchanged")
def _window_flipped(right: Backend) -> Changes:
    return _with_window(right, lambda window, key: Window(window.right, window.left))


@mutant("windows", "a window of one key is taken for one of two")
def _wrong_for_one_key(right: Backend) -> Changes:
    return _with_window(right, lambda window, key: Window(1, 0) if window.size == 1 else window)


@mutant("windows", "the window of the first call is kept for all of its length")
def _stale_window(right: Backend) -> Changes:
    first: dict[int, Window] = {}
    return _with_window(right, lambda window, key: first.setdefault(key.shape[2], window))


@mutant("windows", "left and right are exchanged in the gradient of the keys of the product")
def _window_flipped_in_key_gradient(right: Backend) -> Changes:
    backward = function_of(right, "local_dot_product_backward")

    def local_dot_product_backward(grad: Tensor, query: Tensor, key: Tensor, window: Window, **given: Any) -> Any:
        gradients = dict(backward(grad, query, key, window, **given))
        if "key" in gradients and given["bias"] is None:
            only_key = {**given, "needs_grad": frozenset({"key"})}
            flipped = Window(window.right, window.left)
            gradients["key"] = backward(grad, query, key, flipped, **only_key)["key"]
        return gradients

    return {"local_dot_product_backward": local_dot_product_backward}


@mutant(
    "gradients",
    "as fast-transformers' local_product: keys' gradients are those of transposed blocks, right for W = 1 alone",
)
def _key_gradient_of_transposed_blocks(right: Backend) -> Changes:
    def change(gradient: Tensor, inputs: Any, given: Any) -> Tensor:
        window = inputs[6]
        return gradient if window.size == 1 else gradient.roll(1, 2)

    return of_gradient(right, "key", change)


@mutant("unequal_lengths", "the starts of the sequences are aligned, not the ends")
def _starts_aligned(right: Backend) -> Changes:
    def change(query: Tensor, key: Tensor, value: Tensor, window: Window, given: dict[str, Any]) -> tuple[Any, ...]:
        shift = key.shape[2] - query.shape[2]
        return query, key.roll(shift, 2), value.roll(shift, 2), window, given

    return of_inputs(right, change)


# Heads, lengths, bias


@mutant("grouped_heads", "query head h reads key/value head h % Hkv")
def _heads_transposed(right: Backend) -> Changes:
    def change(
        output: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, window: Window, given: Any
    ) -> Tensor:
        heads = torch.arange(query.shape[1], device=query.device) % key.shape[1]
        found: Tensor = function_of(right, "local_attention")(query, key[:, heads], value[:, heads], window, **given)[0]
        return found

    return of_output(right, change)


@mutant("grouped_heads", "gradients of grouped keys are those of one query head alone")
def _heads_not_added_up(right: Backend) -> Changes:
    def change(gradient: Tensor, inputs: Any, given: Any) -> Tensor:
        query, key = inputs[1:3]
        share: float = key.shape[1] / query.shape[1]
        return gradient * share

    return of_gradient(right, "key", change)


@mutant("key_lengths", "key lengths are ignored")
def _key_lengths_ignored(right: Backend) -> Changes:
    return of_lengths(right, lambda lengths, most: None)


@mutant("key_lengths", "the key at a sequence's length is seen")
def _key_lengths_off_by_one(right: Backend) -> Changes:
    return of_lengths(right, lambda lengths, most: (lengths + 1).clamp(max=most))


@mutant("key_lengths", "all sequences have the length of the first")
def _one_key_length(right: Backend) -> Changes:
    return of_lengths(right, lambda lengths, most: lengths[:1].expand(lengths.shape).contiguous())


@mutant("key_lengths", "lengths in 32 bits are read as if they had 64")
def _key_lengths_in_64_bits(right: Backend) -> Changes:
    def change(lengths: Tensor, most: int) -> Tensor:
        if lengths.dtype == torch.int64:
            return lengths
        padded = torch.cat([lengths, torch.zeros_like(lengths)])
        return padded.view(torch.int64).clamp(0, most)

    return of_lengths(right, change)


@mutant("key_lengths", "the average reads values past a sequence's length")
def _values_past_the_length(right: Backend) -> Changes:
    average = function_of(right, "local_weighted_average")

    def local_weighted_average(weights: Tensor, value: Tensor, window: Window, **given: Any) -> Any:
        return average(weights, value, window, **{**given, "key_lengths": None})

    return {"local_weighted_average": local_weighted_average}


@mutant("bias_gradients", "the gradient of a broadcast bias is not summed to its shape")
def _bias_gradient_not_reduced(right: Backend) -> Changes:
    def change(gradient: Tensor, inputs: Any, given: Any) -> Tensor:
        query, window = inputs[1], inputs[6]
        return gradient.expand(*query.shape[:3], window.size).contiguous()

    return of_gradient(right, "bias", change)


@mutant("bias_gradients", "the gradient of a bias is 0")
def _bias_gradient_missing(right: Backend) -> Changes:
    return of_gradient(right, "bias", lambda gradient, inputs, given: torch.zeros_like(gradient))


@mutant("bias_gradients", "the gradient of a bias that broadcasts over sequences is the average over them")
def _bias_gradient_averaged(right: Backend) -> Changes:
    def change(gradient: Tensor, inputs: Any, given: Any) -> Tensor:
        return gradient / inputs[1].shape[0] if given["bias"].shape[0] == 1 else gradient

    return of_gradient(right, "bias", change)


@mutant("bias", "the bias is added before scaling")
def _bias_before_scaling(right: Backend) -> Changes:
    def change(query: Tensor, key: Tensor, value: Tensor, window: Window, given: dict[str, Any]) -> tuple[Any, ...]:
        bias = given["bias"]
        return query, key, value, window, {**given, "bias": None if bias is None else bias * abs(given["scale"])}

    return of_inputs(right, change)


@mutant("bias", "a bias of -inf hides a slot with a number, and not at all in rows of nothing else")
def _bias_that_does_not_hide(right: Backend) -> Changes:
    def change(query: Tensor, key: Tensor, value: Tensor, window: Window, given: dict[str, Any]) -> tuple[Any, ...]:
        bias = given["bias"]
        return query, key, value, window, {**given, "bias": None if bias is None else bias.clamp(min=-1e4)}

    return of_inputs(right, change)


@mutant("key_lengths", "the sequences after the second have the length of the second")
def _third_key_length_wrong(right: Backend) -> Changes:
    def change(lengths: Tensor, most: int) -> Tensor:
        return torch.cat([lengths[:2], lengths[1:2].expand(max(len(lengths) - 2, 0))])

    return of_lengths(right, change)


@mutant("key_lengths", "lengths that are all the same are ignored")
def _equal_key_lengths_ignored(right: Backend) -> Changes:
    return of_lengths(right, lambda lengths, most: None if bool((lengths == lengths[0]).all()) else lengths)


@mutant("key_lengths", "a length of 0 is taken for no length")
def _key_length_of_zero_ignored(right: Backend) -> Changes:
    return of_lengths(right, lambda lengths, most: lengths.where(lengths != 0, most))


def _of_bias(right: Backend, change: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Changes:
    """Attention with ``change(bias, query, key)`` where a bias is given."""

    def changed(query: Tensor, key: Tensor, value: Tensor, window: Window, given: dict[str, Any]) -> tuple[Any, ...]:
        bias = given["bias"]
        return query, key, value, window, given if bias is None else {**given, "bias": change(bias, query, key)}

    return of_inputs(right, changed)


@mutant("bias", "the rows of a bias are aligned with the first key, not with the last")
def _bias_rows_shifted(right: Backend) -> Changes:
    return _of_bias(right, lambda bias, query, key: bias.roll(key.shape[2] - query.shape[2], 2))


@mutant("bias", "the heads of a bias that has rows are those of keys, where heads are grouped")
def _bias_by_key_head(right: Backend) -> Changes:
    def change(bias: Tensor, query: Tensor, key: Tensor) -> Tensor:
        group = query.shape[1] // key.shape[1]
        if bias.shape[1] == 1 or bias.shape[2] == 1:
            return bias
        return bias[:, ::group].repeat_interleave(group, 1)

    return _of_bias(right, change)


@mutant("bias", "the bias is ignored where there is one query")
def _bias_ignored_in_a_decode_step(right: Backend) -> Changes:
    return _of_bias(right, lambda bias, query, key: bias if query.shape[2] > 1 else bias.clamp(max=0).clamp(min=0))


@mutant("bias", "a bias in float16 is read as bfloat16")
def _bias_in_float16_misread(right: Backend) -> Changes:
    def change(bias: Tensor, query: Tensor, key: Tensor) -> Tensor:
        misread = bias.dtype == torch.float16 != query.dtype
        return bias.contiguous().view(torch.bfloat16) if misread else bias

    return _of_bias(right, change)


@mutant("bias", "a bias in float64 raises, but of queries in it")
def _bias_in_float64_raises(right: Backend) -> Changes:
    def change(bias: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if bias.dtype == torch.float64 != query.dtype:
            raise NotImplementedError("bias in float64")
        return bias

    return _of_bias(right, change)


@mutant("wide_bias", "a bias is rounded to the dtype of the queries")
def _bias_rounded(right: Backend) -> Changes:
    return _of_bias(right, lambda bias, query, key: bias.to(query.dtype))


# Starts and packs


@mutant("key_starts", "starts of keys are ignored")
def _key_starts_ignored(right: Backend) -> Changes:
    return of_argument(right, "key_starts", lambda starts, key: None)


@mutant("key_starts", "the key at a sequence's start is invisible")
def _key_starts_off_by_one(right: Backend) -> Changes:
    return of_argument(right, "key_starts", lambda starts, key: (starts + 1).clamp(max=key.shape[2]))


@mutant("key_starts", "the key before a sequence's start is seen")
def _key_starts_too_early(right: Backend) -> Changes:
    return of_argument(right, "key_starts", lambda starts, key: (starts - 1).clamp(min=0))


@mutant("key_starts", "all sequences start where the first does")
def _one_key_start(right: Backend) -> Changes:
    return of_argument(right, "key_starts", lambda starts, key: starts[:1].expand(starts.shape).contiguous())


@mutant("query_starts", "starts of queries are ignored")
def _query_starts_ignored(right: Backend) -> Changes:
    return of_argument(right, "query_starts", lambda starts, key: None)


@mutant("query_starts", "a sequence's first query stands one key further")
def _query_starts_off_by_one(right: Backend) -> Changes:
    return of_argument(right, "query_starts", lambda starts, key: starts + 1)


@mutant("query_starts", "starts of queries are read in 32 bits")
def _query_starts_in_32_bits(right: Backend) -> Changes:
    return of_argument(right, "query_starts", lambda starts, key: starts.int().to(starts.dtype))


@mutant("query_starts", "starts of queries are cut to where keys are")
def _query_starts_cut(right: Backend) -> Changes:
    return of_argument(right, "query_starts", lambda starts, key: starts.clamp(0, key.shape[2]))


def _of_offsets(right: Backend, change: Callable[[Tensor, Tensor, int, int], tuple[Any, ...]]) -> Changes:
    """Attention with ``change(offsets of queries, offsets of keys, Lq, Lk)`` for the offsets of packed sequences."""

    def changed(query: Tensor, key: Tensor, value: Tensor, window: Window, given: dict[str, Any]) -> tuple[Any, ...]:
        of_queries, of_keys = given.get("cu_seqlens_q"), given.get("cu_seqlens_k")
        if of_queries is not None:
            of_keys = of_queries if of_keys is None else of_keys
            both = change(of_queries, of_keys, query.shape[2], key.shape[2])
            given = {**given, **dict(zip(("cu_seqlens_q", "cu_seqlens_k"), both))}
        return query, key, value, window, given

    return of_inputs(right, changed)


@mutant("packed", "a window crosses the bounds of packed sequences")
def _window_across_sequences(right: Backend) -> Changes:
    return _of_offsets(right, lambda of_queries, of_keys, rows, keys: (None, None))


@mutant("packed", "the offsets of keys are taken for those of queries")
def _offsets_of_queries_for_keys(right: Backend) -> Changes:
    return _of_offsets(right, lambda of_queries, of_keys, rows, keys: (of_queries, None))


@mutant("packed", "rows past the last offset belong to the last sequence")
def _last_sequence_to_the_end(right: Backend) -> Changes:
    def with_end(offsets: Tensor, end: int) -> Tensor:
        return torch.cat([offsets[:-1], torch.full_like(offsets[-1:], end)])

    return _of_offsets(
        right, lambda of_queries, of_keys, rows, keys: (with_end(of_queries, rows), with_end(of_keys, keys))
    )


@mutant("packed", "each sequence but the first begins a row too late")
def _sequences_off_by_one(right: Backend) -> Changes:
    def change(of_queries: Tensor, of_keys: Tensor, rows: int, keys: int) -> tuple[Tensor, Tensor]:
        later = of_queries.clone()
        later[1:-1] = (later[1:-1] + 1).minimum(later[2:])
        return later, of_keys

    return _of_offsets(right, change)


@mutant("packed", "the starts of packed sequences are aligned, not the ends")
def _starts_of_packed_aligned(right: Backend) -> Changes:
    attention = function_of(right, "local_attention")

    def change(
        output: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, window: Window, given: Any
    ) -> Tensor:
        of_queries = given.get("cu_seqlens_q")
        of_keys = given.get("cu_seqlens_k")
        if of_queries is None or of_keys is None or given["bias"] is not None:
            return output
        alone = {**given, "cu_seqlens_q": None, "cu_seqlens_k": None, "query_starts": of_queries.new_zeros(1)}
        rows, keys = of_queries.tolist(), of_keys.tolist()
        for sequence in range(len(rows) - 1):
            of_rows = slice(rows[sequence], rows[sequence + 1])
            seen = slice(keys[sequence], keys[sequence + 1])
            if of_rows.start < of_rows.stop and seen.start < seen.stop:
                parts = query[:, :, of_rows], key[:, :, seen], value[:, :, seen]
                output[:, :, of_rows] = attention(*parts, window, **alone)[0]
        return output

    return of_output(right, change)


@mutant("hidden", "keys of a packed sequence that no row sees are multiplied by 0")
def _unseen_keys_of_packs_leak(right: Backend) -> Changes:
    def change(
        output: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, window: Window, given: Any
    ) -> Tensor:
        return output + 0 * value.sum() if given.get("cu_seqlens_q") is not None else output

    return of_output(right, change)


@mutant("other_numbers", "the offsets of the first call are kept for all of its length")
def _stale_offsets(right: Backend) -> Changes:
    first: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def change(of_queries: Tensor, of_keys: Tensor, rows: int, keys: int) -> tuple[Tensor, Tensor]:
        return first.setdefault((rows, keys, len(of_queries)), (of_queries.clone(), of_keys.clone()))

    return _of_offsets(right, change)


@mutant("other_numbers", "the offsets in a tensor are read once")
def _offsets_read_once(right: Backend) -> Changes:
    # The tensors are kept, too: no other one gets their memory.
    first: dict[int, tuple[Tensor, ...]] = {}

    def change(of_queries: Tensor, of_keys: Tensor, rows: int, keys: int) -> tuple[Tensor, ...]:
        kept = (of_queries.clone(), of_keys.clone(), of_queries)
        return first.setdefault(of_queries.data_ptr(), kept)[:2]

    return _of_offsets(right, change)


# Sizes


def _wrong_where(right: Backend, is_so: Callable[[Tensor, Tensor, Mapping[str, Any]], bool]) -> Changes:
    """Attention that is a little off where ``is_so(query, value, given)``."""

    def change(
        output: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, window: Window, given: Any
    ) -> Tensor:
        return output.mul_(1.05) if is_so(query, value, given) else output

    return of_output(right, change)


@mutant("sizes", "head dims past 96 are a little off")
def _wide_heads_wrong(right: Backend) -> Changes:
    return _wrong_where(right, lambda query, value, given: query.shape[3] > 96)


@mutant("sizes", "the heads after the eighth are a little off")
def _ninth_head_wrong(right: Backend) -> Changes:
    def change(output: Tensor, *rest: Any) -> Tensor:
        output[:, 8:] *= 1.05
        return output

    return of_output(right, change)


@mutant("values", "head dims that are no multiple of 8 are a little off in 16 bits")
def _odd_head_dims_wrong_in_16_bits(right: Backend) -> Changes:
    return _wrong_where(right, lambda query, value, given: query.dtype.itemsize == 2 and query.shape[3] % 8 != 0)
