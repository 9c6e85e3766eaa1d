"""The gradients of ``local_attention``, with the probabilities recomputed as ``P = exp(S - log_sum_exp)``.

With ``D = rowsum(dO * O)``, ``dP = dO V^T`` and ``dS = P * (dP - D)``:

    dQ = scale * dS K        dbias = dS        by programs that own a tile of rows; they also write D
    dK = scale * dS^T Q      dV = P^T dO       by programs that own a tile of keys, over the rows that see them

Each program recomputes the scores that it needs, and no two write the same element: no atomics, and the same bits each
time.

A bias can move the scores of a row so far (-1e4, or the most negative finite number, as masks have it) that their fp32
log-sum-exp has lost its last digits, or all of them. With a bias, P is therefore divided by its own row sum, and D taken
as rowsum(P * dP), which is the same: a bias that leaves a row one key makes dS a difference of equal numbers, to which
the rounding of a 16-bit O would be all there is.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnreg import Window
from attnreg_triton.attention import exponential, scores
from attnreg_triton.band import (
    fill_band,
    in_window,
    load_bias,
    load_rows,
    locate_program,
    rows_of_keys,
    store_band,
    store_rows,
    visible_length,
)
from attnreg_triton.bias_gradient import (
    clear_columns,
    empty_partials,
    reduce_partials,
    reduction,
    store_column_sums,
    store_columns,
)
from attnreg_triton.hopper import service as hopper
from attnreg_triton.interpreter import cast, span
from attnreg_triton.launch import bias_strides, ceil_div, clip_window, launch, origin, padded, strides
from attnreg_triton.products import attention_precision, rows_by_keys, weights_by_rows
from attnreg_triton.tiles import attention_backward_by_keys, attention_backward_by_rows

_LOG2E = tl.constexpr(1.4426950408889634)


def local_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    window: Window,
    *,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    scale: float,
    needs_grad: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dQ, dK, dV, dbias), None where it is not wanted."""
    needs_query, needs_key, needs_value, needs_bias = needs_grad
    needs_bias = needs_bias and bias is not None
    batch, heads, len_q, head_dim = query.shape
    _, kv_heads, len_k, value_dim = value.shape
    window = clip_window(window, bias, len_q, len_k)
    log_sum_exp = log_sum_exp.contiguous()
    if hopper.serves(grad_output, query, key, value, output, bias=bias, scale=scale):
        from attnreg_triton.hopper import attention_backward

        gradients = attention_backward.local_attention_backward(
            grad_output,
            query,
            key,
            value,
            output,
            log_sum_exp,
            window,
            key_lengths=key_lengths,
            scale=scale,
            needs_grad=(needs_query, needs_key, needs_value),
        )
        return (*gradients, None)

    def empty(shape: tuple[int, ...], wanted: bool, dtype: torch.dtype = query.dtype) -> Tensor | None:
        return torch.empty(shape, dtype=dtype, device=query.device) if wanted else None

    grad_query = empty(query.shape, needs_query)
    grad_key = empty(key.shape, needs_key)
    grad_value = empty(value.shape, needs_value)
    needs_scores = needs_query or needs_key or needs_bias
    row_dot = empty((batch, heads, len_q), needs_scores, torch.float32)
    row_rescale = empty((batch, heads, len_q), bias is not None, torch.float32)
    shape = (len_q, len_k, origin(window, len_q, len_k), window.size, scale)
    constants: dict[str, Any] = {
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_HEAD": padded(head_dim),
        "BLOCK_VALUE": padded(value_dim),
        "PRECISION": attention_precision(query.dtype),
        "device": query.device,
    }

    grad_bias = None
    if row_dot is not None or row_rescale is not None:
        tiles = attention_backward_by_rows(query.dtype, head_dim, value_dim, window, bias is not None)
        row_tiles = ceil_div(len_q, tiles.rows)
        if needs_bias and bias is not None:
            grad_bias = empty_partials(bias, (batch, heads, len_q, window.size), row_tiles)
        launch(
            _attention_backward_rows,
            batch * heads * row_tiles,
            tiles,
            grad_output,
            query,
            key,
            value,
            output,
            log_sum_exp,
            bias,
            key_lengths,
            row_dot,
            row_rescale,
            grad_query,
            grad_bias,
            strides(grad_output),
            strides(query),
            strides(key),
            strides(value),
            strides(output),
            *bias_strides(bias),
            strides(grad_query),
            *strides(grad_bias),
            heads,
            heads // kv_heads,
            row_tiles,
            *shape,
            REDUCTION=None if grad_bias is None or bias is None else reduction(bias),
            **constants,
        )
        if grad_bias is not None and bias is not None:
            grad_bias = reduce_partials(grad_bias, bias)
    if needs_key or needs_value:
        tiles = attention_backward_by_keys(query.dtype, head_dim, value_dim, window)
        key_tiles = ceil_div(len_k, tiles.keys)
        launch(
            _attention_backward_keys,
            batch * kv_heads * key_tiles,
            tiles,
            grad_output,
            query,
            key,
            value,
            log_sum_exp,
            row_dot,
            row_rescale,
            bias,
            key_lengths,
            grad_key,
            grad_value,
            strides(grad_output),
            strides(query),
            strides(key),
            strides(value),
            *bias_strides(bias),
            strides(grad_key),
            strides(grad_value),
            kv_heads,
            heads // kv_heads,
            key_tiles,
            *shape,
            **constants,
        )
    return grad_query, grad_key, grad_value, grad_bias


@triton.jit(
    do_not_specialize=[
        "bias_stride_n",
        "bias_stride_h",
        "bias_stride_i",
        "grad_bias_stride_n",
        "grad_bias_stride_h",
        "grad_bias_stride_i",
        "heads",
        "group",
        "row_tiles",
        "len_q",
        "len_k",
        "origin",
        "width",
        "scale",
    ]
)
def _attention_backward_rows(
    grad_output,
    query,
    key,
    value,
    output,
    log_sum_exp,
    bias,
    key_lengths,
    row_dot,
    row_rescale,
    grad_query,
    grad_bias,
    grad_output_strides,
    query_strides,
    key_strides,
    value_strides,
    output_strides,
    bias_stride_n,
    bias_stride_h,
    bias_stride_i,
    bias_stride_c,
    grad_query_strides,
    grad_bias_stride_n,
    grad_bias_stride_h,
    grad_bias_stride_i,
    heads,
    group,
    row_tiles,
    len_q,
    len_k,
    origin,
    width,
    scale,
    REDUCTION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    grad_bias_strides = (grad_bias_stride_n, grad_bias_stride_h, grad_bias_stride_i)
    bias_strides = (bias_stride_n, bias_stride_h, bias_stride_i)
    HAS_BIAS: tl.constexpr = bias is not None
    n, h, h_kv, tile = locate_program(heads, group, row_tiles)
    i_begin = tile * BLOCK_M
    i_end = tl.minimum(i_begin + BLOCK_M, len_q)
    i_tile = i_begin + tl.arange(0, BLOCK_M)
    i = i_tile[:, None]
    row = (n * heads + h) * len_q + i_tile

    # The slots of these rows belong to keys [first, last), of which [begin, end) may be visible.
    first, last = i_begin + origin, i_end + origin + width - 1
    begin = tl.minimum(tl.maximum(first, 0), last)
    end = tl.minimum(tl.maximum(visible_length(key_lengths, n, len_k), begin), last)

    q = load_rows(query, query_strides, n, h, i_tile, i_tile < i_end, HEAD_DIM, BLOCK_HEAD)
    lse = tl.load(log_sum_exp + row, mask=i_tile < i_end, other=float("-inf"))
    if row_dot is not None:
        do = load_rows(grad_output, grad_output_strides, n, h, i_tile, i_tile < i_end, VALUE_DIM, BLOCK_VALUE)
    if HAS_BIAS:
        total = tl.zeros((BLOCK_M,), tl.float32)
        d = tl.zeros((BLOCK_M,), tl.float32)
        for j_begin in span(begin, end, BLOCK_N):
            j_tile = j_begin + tl.arange(0, BLOCK_N)
            j = j_tile[None, :]
            k = load_rows(key, key_strides, n, h_kv, j_tile, j_tile < end, HEAD_DIM, BLOCK_HEAD)
            visible = (j < end) & in_window(i, j, origin, width) & (i < i_end)
            b = load_bias(bias, bias_strides, bias_stride_c, n, h, i, j, origin, visible)
            s = scores(rows_by_keys(q, k, PRECISION), scale, b, HAS_BIAS)
            p = exponential(s - lse[:, None], HAS_BIAS)
            total += tl.sum(tl.where(b != float("-inf"), p, 0.0), 1)
            if row_dot is not None:
                v = load_rows(value, value_strides, n, h_kv, j_tile, j_tile < end, VALUE_DIM, BLOCK_VALUE)
                dp = rows_by_keys(do, v, PRECISION)
                d += tl.sum(tl.where(b != float("-inf"), p * dp, 0.0), 1)
        rescale = tl.where(total > 0.0, 1.0 / total, 0.0)
        tl.store(row_rescale + row, rescale, mask=i_tile < i_end)
        d *= rescale
    else:
        lse *= _LOG2E
        if row_dot is not None:
            o = load_rows(output, output_strides, n, h, i_tile, i_tile < i_end, VALUE_DIM, BLOCK_VALUE)
            d = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    if row_dot is not None:
        tl.store(row_dot + row, d, mask=i_tile < i_end)

    if grad_query is not None or grad_bias is not None:
        num_tiles = tl.cdiv(end - begin, BLOCK_N)
        if REDUCTION == "none":
            computed = begin + num_tiles * BLOCK_N
            fill_band(grad_bias, grad_bias_strides, n, h, i, first, begin, origin, width, len_q, 0.0, BLOCK_N)
            fill_band(grad_bias, grad_bias_strides, n, h, i, computed, last, origin, width, len_q, 0.0, BLOCK_N)
        row_sums = tl.zeros((BLOCK_M,), tl.float32)
        column_sums = tl.zeros((BLOCK_N,), tl.float32)

        dq = tl.zeros((BLOCK_M, BLOCK_HEAD), tl.float32)
        for j_begin in span(begin, end, BLOCK_N):
            j_tile = j_begin + tl.arange(0, BLOCK_N)
            j = j_tile[None, :]
            k = load_rows(key, key_strides, n, h_kv, j_tile, j_tile < end, HEAD_DIM, BLOCK_HEAD)
            v = load_rows(value, value_strides, n, h_kv, j_tile, j_tile < end, VALUE_DIM, BLOCK_VALUE)
            visible = (j < end) & in_window(i, j, origin, width) & (i < i_end)
            b = 0.0
            if HAS_BIAS:
                b = load_bias(bias, bias_strides, bias_stride_c, n, h, i, j, origin, visible)
                visible = b != float("-inf")
            s = scores(rows_by_keys(q, k, PRECISION), scale, b, HAS_BIAS)
            p = exponential(s - lse[:, None], HAS_BIAS)
            if HAS_BIAS:
                p *= rescale[:, None]
            dp = rows_by_keys(do, v, PRECISION)
            ds = tl.where(visible, p * (dp - d[:, None]), 0.0)
            if grad_query is not None:
                dq = weights_by_rows(cast(ds, k.dtype), k, dq, PRECISION)
            if REDUCTION == "none":
                store_band(grad_bias, grad_bias_strides, n, h, i, j, origin, width, len_q, ds)
            elif REDUCTION == "row sums":
                row_sums += tl.sum(ds, 1)
            elif REDUCTION == "column sums":
                column_sums = store_column_sums(
                    grad_bias, grad_bias_strides, n, h, tile, ds, column_sums, j_begin - first, width, BLOCK_M, BLOCK_N
                )

        if grad_query is not None:
            store_rows(grad_query, grad_query_strides, n, h, i_tile, i_tile < i_end, dq * scale, HEAD_DIM, BLOCK_HEAD)
        if REDUCTION == "row sums":
            tl.store(grad_bias + row, row_sums, mask=i_tile < i_end)
        if REDUCTION == "column sums":
            # The tiles started in columns ``column``, ``column`` + BLOCK_N, ... up to ``column_end``.
            column = begin - first
            column_end = column + num_tiles * BLOCK_N
            clear_columns(grad_bias, grad_bias_strides, n, h, tile, 0, column - BLOCK_N, BLOCK_N)
            store_columns(
                grad_bias, grad_bias_strides, n, h, tile, column_sums, column_end - BLOCK_N, 0, width, BLOCK_N
            )
            clear_columns(grad_bias, grad_bias_strides, n, h, tile, column_end, width, BLOCK_N)


@triton.jit(
    do_not_specialize=[
        "bias_stride_n",
        "bias_stride_h",
        "bias_stride_i",
        "kv_heads",
        "group",
        "key_tiles",
        "len_q",
        "len_k",
        "origin",
        "width",
        "scale",
    ]
)
def _attention_backward_keys(
    grad_output,
    query,
    key,
    value,
    log_sum_exp,
    row_dot,
    row_rescale,
    bias,
    key_lengths,
    grad_key,
    grad_value,
    grad_output_strides,
    query_strides,
    key_strides,
    value_strides,
    bias_stride_n,
    bias_stride_h,
    bias_stride_i,
    bias_stride_c,
    grad_key_strides,
    grad_value_strides,
    kv_heads,
    group,
    key_tiles,
    len_q,
    len_k,
    origin,
    width,
    scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    bias_strides = (bias_stride_n, bias_stride_h, bias_stride_i)
    # Everything is transposed here, keys by rows: then P^T and dS^T are the left factors as they come.
    HAS_BIAS: tl.constexpr = bias is not None
    n, _, h_kv, tile = locate_program(kv_heads, 1, key_tiles)
    j_tile = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    j = j_tile[:, None]
    j_end = tl.minimum((tile + 1) * BLOCK_N, visible_length(key_lengths, n, len_k))
    begin, end = rows_of_keys(tile * BLOCK_N, j_end, len_q, origin, width)

    k = load_rows(key, key_strides, n, h_kv, j_tile, j_tile < j_end, HEAD_DIM, BLOCK_HEAD)
    v = load_rows(value, value_strides, n, h_kv, j_tile, j_tile < j_end, VALUE_DIM, BLOCK_VALUE)
    dk = tl.zeros((BLOCK_N, BLOCK_HEAD), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_VALUE), tl.float32)
    for member in span(0, group, 1):
        h = h_kv * group + member
        for i_begin in span(begin, end, BLOCK_M):
            i_tile = i_begin + tl.arange(0, BLOCK_M)
            i = i_tile[None, :]
            row = (n * kv_heads * group + h) * len_q + i_tile
            lse = tl.load(log_sum_exp + row, mask=i_tile < end, other=float("-inf"))
            seeing = i_tile < end
            if HAS_BIAS:
                # A row from which the bias hides every key may have anything in dO.
                seeing = lse != float("-inf")
            else:
                lse *= _LOG2E
            q = load_rows(query, query_strides, n, h, i_tile, seeing, HEAD_DIM, BLOCK_HEAD)
            do = load_rows(grad_output, grad_output_strides, n, h, i_tile, seeing, VALUE_DIM, BLOCK_VALUE)
            visible = (j < j_end) & (i < end) & in_window(i, j, origin, width)
            b = 0.0
            if HAS_BIAS:
                b = load_bias(bias, bias_strides, bias_stride_c, n, h, i, j, origin, visible)
                visible = b != float("-inf")
            s = scores(rows_by_keys(k, q, PRECISION), scale, b, HAS_BIAS)
            p = exponential(s - lse[None, :], HAS_BIAS)
            if HAS_BIAS:
                p *= tl.load(row_rescale + row, mask=seeing, other=0.0)[None, :]
            p = tl.where(visible, p, 0.0)
            if grad_value is not None:
                dv = weights_by_rows(cast(p, do.dtype), do, dv, PRECISION)
            if grad_key is not None:
                d = tl.load(row_dot + row, mask=seeing, other=0.0)
                dp = rows_by_keys(v, do, PRECISION)
                ds = p * (dp - d[None, :])
                dk = weights_by_rows(cast(ds, q.dtype), q, dk, PRECISION)

    if grad_key is not None:
        store_rows(grad_key, grad_key_strides, n, h_kv, j_tile, j_tile < len_k, dk * scale, HEAD_DIM, BLOCK_HEAD)
    if grad_value is not None:
        store_rows(grad_value, grad_value_strides, n, h_kv, j_tile, j_tile < len_k, dv, VALUE_DIM, BLOCK_VALUE)
