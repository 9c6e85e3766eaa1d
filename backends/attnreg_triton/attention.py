"""``local_attention``: ``O = softmax(scale * Q K^T + bias) V`` in one pass over the keys that rows see.

The softmax is computed online: the maximum m of a row and the sum of its exponentials are carried along, and what was
accumulated under an older maximum is rescaled. The log-sum-exp ``m + log(sum)`` is kept for the backward. With a softcap the
scores are ``softcap * tanh(scale * Q K^T / softcap) + bias``. A sink is one more score of every row that sees a key, added last.
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
    key_of_first_slot,
    load_bias,
    load_rows,
    locate_program,
    nothing_left,
    store_rows,
)
from attnreg_triton.dropout import dropping, group_begin, kept, seed_words
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
    padded,
    strides,
)
from attnreg_triton.products import attention_precision, rows_by_keys, short_sum_precision, weights_by_rows
from attnreg_triton.rows import keys_of_rows, place, used_keys
from attnreg_triton.sinks import load_sink
from attnreg_triton.softcap import capping, tanh

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
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float | None = None,
    seed: Tensor | None = None,
    **rows: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The output (N, H, Lq, D) and the natural log-sum-exp of each row's visible scores, and its sink, (N, H, Lq)."""
    batch, heads, len_q, head_dim = query.shape
    _, kv_heads, len_k, value_dim = value.shape
    window = clip_window(window, bias, len_q, len_k, rows.get("query_starts"))
    here = place(len_q, len_k, window, by_key=False, **rows)
    sinks = None if sinks is None else sinks.contiguous()
    if hopper.serves(query, key, value, bias=bias, scale=scale, dropout_p=dropout_p or None):
        from attnreg_triton.hopper import attention

        return attention.local_attention(
            query, key, value, window, rows=here, scale=scale, softcap=softcap, sinks=sinks
        )
    ratio, unit = capping(scale, softcap)
    output = empty_like(query, value_dim)
    log_sum_exp = torch.empty((batch, heads, len_q), dtype=torch.float32, device=query.device)
    dropout = dropping(dropout_p, seed)
    tiles = tile_table.attention(query.dtype, head_dim, value_dim, window, dropout.seed is not None)
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
            here.rows,
            sinks,
            output,
            log_sum_exp,
            unfinished,
            *dropout,
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
            here.origin,
            here.width,
            unit,
            ratio,
            HEAD_DIM=head_dim,
            VALUE_DIM=value_dim,
            BLOCK_HEAD=padded(head_dim),
            BLOCK_VALUE=padded(value_dim),
            PRECISION=attention_precision(query.dtype),
            NEGATIVE=unit < 0,
            CAPPED=softcap is not None,
            GAPS=here.gaps,
            CLEAR=clear,
            CHUNK=chunk,
            INTERLEAVED=interleaved(query),
            device=query.device,
        )
    return output, log_sum_exp


@triton.jit(
    do_not_specialize=[
        "threshold",
        "factor",
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
        "ratio",
    ]
)
def _attention(
    query,
    key,
    value,
    bias,
    rows,
    sinks,
    output,
    log_sum_exp,
    unfinished,
    seed,
    threshold,
    factor,
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
    ratio,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    PRECISION: tl.constexpr,
    NEGATIVE: tl.constexpr,
    CAPPED: tl.constexpr,
    GAPS: tl.constexpr,
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
            first, last, begin, end = keys_of_rows(rows, n, i_tile, i_begin, i_end, origin, width, len_q, len_k)
            if HAS_BIAS:
                offset = key_of_first_slot(rows, n, i_tile, i_tile < i_end, origin, width, len_q, len_k, GAPS)
            used_from = None
            if seed is not None:
                words = seed_words(seed)
                used_from = begin
                begin = group_begin(begin)

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
                used = used_keys(rows, j_tile, used_from, end, len_k, GAPS)
                k = load_rows(key, key_strides, n, h_kv, j_tile, used, HEAD_DIM, BLOCK_HEAD)
                visible = (j >= first[:, None]) & (j < last[:, None])
                if HAS_BIAS:
                    b = load_bias(bias, bias_strides, bias_stride_c, n, h, i, j, offset, visible)
                    visible = b != float("-inf")
                s = rows_by_keys(q, k, short_sum_precision(PRECISION, HEAD_DIM))
                if CAPPED:
                    s = tanh(s * ratio, q.dtype == tl.float32)
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
                if seed is not None:
                    p = tl.where(kept(words, threshold, n, h, i_tile, j_begin, BLOCK_N), p, 0.0)
                v = load_rows(value, value_strides, n, h_kv, j_tile, used, VALUE_DIM, BLOCK_VALUE)
                if CLEAR:
                    v = clear_unseen(v, visible)
                acc = weights_by_rows(cast(p, v.dtype), v, acc * rescale[:, None], PRECISION)
            if HAS_BIAS and not CLEAR:
                tl.store(unfinished + program, tl.where(finite(acc), 0, 1))

            # A row without a visible key has a total of 0 and acc = 0: O = 0 and a log-sum-exp of -inf.
            empty = total == 0.0
            top = m * unit
            if sinks is not None:
                sink = load_sink(sinks, h)
                of_keys = tl.where(empty, 0.0, top)
                top = tl.maximum(of_keys, sink)
                rescale = tl.exp2((of_keys - top) * _LOG2E)
                total = tl.where(empty, 0.0, total * rescale + tl.exp2((sink - top) * _LOG2E))
                acc *= rescale[:, None]
            acc = acc / tl.where(empty, 1.0, total)[:, None]
            if seed is not None:
                acc *= factor
            store_rows(output, output_strides, n, h, i_tile, i_tile < i_end, acc, VALUE_DIM, BLOCK_VALUE)
            lse = tl.where(empty, float("-inf"), top + tl.log(total))
            tl.store(log_sum_exp + (n * heads + h) * len_q + i_tile, lse, mask=i_tile < i_end)
