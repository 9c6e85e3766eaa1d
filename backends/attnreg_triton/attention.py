"""``local_attention``: ``O = softmax(scale * Q K^T + bias) V`` in one pass over the keys in each window.

The softmax is computed online: the maximum m of a row and the sum of its exponentials are carried along, and what was
accumulated under an older maximum is rescaled. The log-sum-exp ``m + log(sum)`` is kept for the backward.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnreg import Window, empty_like
from attnreg_triton import tiles as tile_table
from attnreg_triton.band import (
    clear_unseen,
    finite,
    in_window,
    keys_of_rows,
    load_bias,
    load_rows,
    locate_program,
    nothing_left,
    store_rows,
    visible_length,
)
from attnreg_triton.hopper import service as hopper
from attnreg_triton.interpreter import cast, span
from attnreg_triton.launch import (
    CHUNK,
    bias_strides,
    ceil_div,
    clip_window,
    flags,
    interleaved,
    launch,
    origin,
    padded,
    strides,
)
from attnreg_triton.products import attention_precision, rows_by_keys, short_sum_precision, weights_by_rows

_LOG2E = tl.constexpr(1.4426950408889634)
# Instead of 0: small enough to make any difference of scores nothing, but -inf - x stays -inf.
_NO_SCALE = tl.constexpr(1e-37)


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window,
    *,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output (N, H, Lq, D) and the natural log-sum-exp of each row's visible scores (N, H, Lq)."""
    batch, heads, len_q, head_dim = query.shape
    _, kv_heads, len_k, value_dim = value.shape
    window = clip_window(window, bias, len_q, len_k)
    if hopper.serves(query, key, value, bias=bias, scale=scale):
        from attnreg_triton.hopper import attention

        return attention.local_attention(query, key, value, window, key_lengths=key_lengths, scale=scale)
    output = empty_like(query, value_dim)
    log_sum_exp = torch.empty((batch, heads, len_q), dtype=torch.float32, device=query.device)
    tiles = tile_table.attention(query.dtype, head_dim, value_dim, window)
    row_tiles = ceil_div(len_q, tiles.rows)
    programs = batch * heads * row_tiles
    unfinished = None if bias is None else flags(programs, query.device)
    for clear in (False,) if bias is None else (False, True):
        chunk = CHUNK if clear else 1
        launch(
            _attention,
            ceil_div(programs, chunk),
            tiles,
            query,
            key,
            value,
            bias,
            key_lengths,
            output,
            log_sum_exp,
            unfinished,
            programs,
            strides(query),
            strides(key),
            strides(value),
            *bias_strides(bias),
            strides(output),
            heads,
            heads // kv_heads,
            row_tiles,
            len_q,
            len_k,
            origin(window, len_q, len_k),
            window.size,
            scale,
            HEAD_DIM=head_dim,
            VALUE_DIM=value_dim,
            BLOCK_HEAD=padded(head_dim),
            BLOCK_VALUE=padded(value_dim),
            PRECISION=attention_precision(query.dtype),
            NEGATIVE=scale < 0,
            CLEAR=clear,
            CHUNK=chunk,
            INTERLEAVED=interleaved(query),
            device=query.device,
        )
    return output, log_sum_exp


@triton.jit(
    do_not_specialize=[
        "programs",
        "bias_stride_n",
        "bias_stride_h",
        "bias_stride_i",
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
def _attention(
    query,
    key,
    value,
    bias,
    key_lengths,
    output,
    log_sum_exp,
    unfinished,
    programs,
    query_strides,
    key_strides,
    value_strides,
    bias_stride_n,
    bias_stride_h,
    bias_stride_i,
    bias_stride_c,
    output_strides,
    heads,
    group,
    row_tiles,
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
    NEGATIVE: tl.constexpr,
    CLEAR: tl.constexpr,
    CHUNK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    bias_strides = (bias_stride_n, bias_stride_h, bias_stride_i)
    HAS_BIAS: tl.constexpr = bias is not None
    if CLEAR and nothing_left(unfinished, programs, CHUNK):
        return
    for number in span(0, CHUNK, 1):
        program = tl.program_id(0) * CHUNK + number
        wanted = True
        if CLEAR:
            wanted = tl.load(unfinished + program, mask=program < programs, other=0) != 0
        if wanted:
            n, h, h_kv, tile = locate_program(program, heads, group, row_tiles, INTERLEAVED)
            i_begin = tile * BLOCK_M
            i_end = tl.minimum(i_begin + BLOCK_M, len_q)
            i_tile = i_begin + tl.arange(0, BLOCK_M)
            i = i_tile[:, None]
            begin, end = keys_of_rows(i_begin, i_end, visible_length(key_lengths, n, len_k), origin, width)

            q = load_rows(query, query_strides, n, h, i_tile, i_tile < i_end, HEAD_DIM, BLOCK_HEAD)
            # The scores are ``unit * s``, and ``exp(unit * x) = 2^(step * x)``. Without a bias they are scaled only after the
            # maximum is taken off: a difference of products keeps digits that a product of the scale loses.
            if HAS_BIAS:
                unit = 1.0
                step = _LOG2E
            else:
                if NEGATIVE:
                    q = cast(-q.to(tl.float32), q.dtype)
                unit = tl.abs(scale)
                step = tl.maximum(unit * _LOG2E, _NO_SCALE)
            m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            total = tl.zeros((BLOCK_M,), tl.float32)
            acc = tl.zeros((BLOCK_M, BLOCK_VALUE), tl.float32)
            for j_begin in span(begin, end, BLOCK_N):
                j_tile = j_begin + tl.arange(0, BLOCK_N)
                j = j_tile[None, :]
                k = load_rows(key, key_strides, n, h_kv, j_tile, j_tile < end, HEAD_DIM, BLOCK_HEAD)
                visible = (j < end) & in_window(i, j, origin, width)
                if HAS_BIAS:
                    b = load_bias(bias, bias_strides, bias_stride_c, n, h, i, j, origin, visible & (i < i_end))
                    visible = b != float("-inf")
                s = rows_by_keys(q, k, short_sum_precision(PRECISION, HEAD_DIM))
                if HAS_BIAS:
                    s = tl.fma(s, scale, b)
                s = tl.where(visible, s, float("-inf"))

                # While a row has seen no visible key its maximum is -inf, and -inf - -inf would be NaN.
                m_new = tl.maximum(m, tl.max(s, 1))
                shift = tl.where(m_new == float("-inf"), 0.0, m_new)
                p = tl.exp2((s - shift[:, None]) * step)
                rescale = tl.exp2((m - shift) * step)
                m = m_new
                total = total * rescale + tl.sum(p, 1)
                v = load_rows(value, value_strides, n, h_kv, j_tile, j_tile < end, VALUE_DIM, BLOCK_VALUE)
                if CLEAR:
                    v = clear_unseen(v, visible)
                acc = weights_by_rows(cast(p, v.dtype), v, acc * rescale[:, None], PRECISION)
            if HAS_BIAS and not CLEAR:
                tl.store(unfinished + program, tl.where(finite(acc), 0, 1))

            # A row without a visible key has a total of 0 and acc = 0: O = 0 and a log-sum-exp of -inf.
            acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
            store_rows(output, output_strides, n, h, i_tile, i_tile < i_end, acc, VALUE_DIM, BLOCK_VALUE)
            lse = tl.where(total == 0.0, float("-inf"), m * unit + tl.log(total))
            tl.store(log_sum_exp + (n * heads + h) * len_q + i_tile, lse, mask=i_tile < i_end)
