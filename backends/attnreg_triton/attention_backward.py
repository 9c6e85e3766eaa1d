"""The gradients of ``local_attention``, with the probabilities recomputed from the log-sum-exp.

With ``D = rowsum(dO * O)``, ``dP = dO V^T`` and ``dS = P * (dP - D)``:

    dQ = scale * dS K        dbias = dS        by programs that own a tile of rows
    dK = scale * dS^T Q      dV = P^T dO       by programs that own a tile of keys, over the rows that see them

Each program recomputes the scores that it needs, and no two write the same element: no atomics, and the same bits each
time.

In fp32 the log-sum-exp of large scores has lost the digits that P is made of. So ``P = exp(S - log_sum_exp)`` is divided by
its own row sum, which the programs of the rows find and write for those of the keys; hence both must compute the same bits
of S.

A row that one key dominates makes dP - D a difference of equal numbers. In 16 bits D is therefore the diagonal of ``dO O^T``,
which has the same bits as dP where O is that key's value. In fp32 D is corrected to rowsum(P * dP), by ``rowsum(P * (dP - D))``:
again exactly dP where P is 1. That sum is known only after dS, unless a single step holds all keys of the rows. Programs in which
it is more than a rounding error of dS run again in a second launch, which goes through the rows twice; so does the first where
it writes dbias, for which P must be divided at once.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnreg import Window, allow_tf32, empty_like
from attnreg_triton.band import (
    clear_unseen,
    fill_band,
    finite,
    in_window,
    load_bias,
    load_rows,
    locate_program,
    nothing_left,
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
from attnreg_triton.products import (
    attention_precision,
    large_weights_by_rows,
    rows_by_keys,
    short_sum_precision,
    weights_by_rows,
)
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
    needs_grad: frozenset[str],
) -> dict[str, Tensor]:
    """dQ, dK, dV and dbias, those that are wanted."""
    batch, heads, len_q, head_dim = query.shape
    _, kv_heads, len_k, value_dim = value.shape
    window = clip_window(window, bias, len_q, len_k)
    log_sum_exp = log_sum_exp.contiguous()
    if hopper.serves(grad_output, query, key, value, output, bias=bias, scale=scale):
        from attnreg_triton.hopper import attention_backward

        return attention_backward.local_attention_backward(
            grad_output,
            query,
            key,
            value,
            output,
            log_sum_exp,
            window,
            key_lengths=key_lengths,
            scale=scale,
            needs_grad=needs_grad,
        )

    tensors = {"query": query, "key": key, "value": value}
    gradients = {name: empty_like(tensor) for name, tensor in tensors.items() if name in needs_grad}
    grad_query, grad_key, grad_value = (gradients.get(name) for name in tensors)
    # For the programs of the keys: D, and what P is to be multiplied by.
    row_dot, row_rescale = (
        torch.empty((batch, heads, len_q), dtype=torch.float32, device=query.device) if wanted else None
        for wanted in (grad_key is not None, grad_key is not None or grad_value is not None)
    )
    shape = (len_q, len_k, origin(window, len_q, len_k), window.size, scale)
    constants: dict[str, Any] = {
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_HEAD": padded(head_dim),
        "BLOCK_VALUE": padded(value_dim),
        "PRECISION": attention_precision(query.dtype),
        "device": query.device,
    }

    tiles = attention_backward_by_rows(query.dtype, head_dim, value_dim, window, bias is not None)
    row_tiles = ceil_div(len_q, tiles.rows)
    programs = batch * heads * row_tiles
    grad_bias = None
    if "bias" in needs_grad and bias is not None:
        grad_bias = empty_partials(bias, (batch, heads, len_q, window.size), row_tiles)
    one_step = window.size + tiles.rows - 1 <= tiles.keys
    # With a bias because of what is hidden, in fp32 because of D. All that the first try writes but dQ is right.
    again = grad_query is not None and (bias is not None or (query.dtype == torch.float32 and not one_step))
    unfinished = flags(programs, query.device) if again else None
    for second in (False, True) if again else (False,):
        chunk = CHUNK if second else 1
        written = (None, None, grad_query, None) if second else (row_dot, row_rescale, grad_query, grad_bias)
        launch(
            _attention_backward_rows,
            ceil_div(programs, chunk),
            tiles,
            grad_output,
            query,
            key,
            value,
            output,
            log_sum_exp,
            bias,
            key_lengths,
            *written,
            unfinished,
            programs,
            strides(grad_output),
            strides(query),
            strides(key),
            strides(value),
            strides(output),
            *bias_strides(bias),
            strides(grad_query),
            *strides(written[3]),
            heads,
            heads // kv_heads,
            row_tiles,
            *shape,
            REDUCTION=None if written[3] is None or bias is None else reduction(bias),
            ONE_STEP=one_step,
            TOLERANCE=2**-10 if allow_tf32() else 2**-20,
            AGAIN=second,
            CHUNK=chunk,
            INTERLEAVED=interleaved(query),
            **constants,
        )
    if grad_bias is not None and bias is not None:
        gradients["bias"] = reduce_partials(grad_bias, bias)
    if row_rescale is not None:
        tiles = attention_backward_by_keys(query.dtype, head_dim, value_dim, window)
        key_tiles = ceil_div(len_k, tiles.keys)
        programs = batch * kv_heads * key_tiles
        unfinished = None if bias is None else flags(programs, query.device)
        for clear in (False,) if bias is None else (False, True):
            chunk = CHUNK if clear else 1
            launch(
                _attention_backward_keys,
                ceil_div(programs, chunk),
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
                unfinished,
                programs,
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
                CLEAR=clear,
                CHUNK=chunk,
                INTERLEAVED=interleaved(key),
                **constants,
            )
    return gradients


@triton.jit
def damping(lse):
    """A power of two by which to multiply the exponents of a row.

    It is below 1 only where a log-sum-exp is so large that its last digit stands for 16 or more. Scores that differ at all
    then differ by that much, so that P is 0 or 1 all the same; but undamped, what rounding leaves of the maximum's own
    exponent would overflow.
    """
    exponent = (lse.to(tl.int32, bitcast=True) >> 23) & 0xFF
    return ((281 - tl.maximum(exponent, 154)) << 23).to(tl.float32, bitcast=True)


@triton.jit
def probabilities(qk, b, lse, scale, HAS_BIAS: tl.constexpr):
    """``exp(scale * qk + b - lse)``, undivided by its row sum; ``lse`` has the shape of a row or a column of ``qk``.

    Fused on purpose, not left to the compiler, so that every kernel computes the same bits. A bias must not be multiplied by
    log2(e) before the log-sum-exp is taken off: the most negative finite number, as many masks have it, would become -inf.
    """
    unit = _LOG2E * damping(lse)
    if HAS_BIAS:
        return tl.exp2((tl.fma(qk, scale, b) - lse) * unit)
    return tl.exp2(tl.fma(qk, scale * unit, -(lse * unit)))


@triton.jit(
    do_not_specialize=[
        "programs",
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
    unfinished,
    programs,
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
    ONE_STEP: tl.constexpr,
    TOLERANCE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    PRECISION: tl.constexpr,
    AGAIN: tl.constexpr,
    CHUNK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    grad_bias_strides = (grad_bias_stride_n, grad_bias_stride_h, grad_bias_stride_i)
    bias_strides = (bias_stride_n, bias_stride_h, bias_stride_i)
    HAS_BIAS: tl.constexpr = bias is not None
    CORRECTED: tl.constexpr = query.dtype.element_ty == tl.float32
    NEEDS_SCORES: tl.constexpr = grad_query is not None or grad_bias is not None
    NEEDS_DOT: tl.constexpr = NEEDS_SCORES or row_dot is not None
    # dbias is stored as it comes, and so needs the row sums and D before. In fp32 dQ has the same bits without it.
    DIVIDED: tl.constexpr = grad_bias is not None or (HAS_BIAS and CORRECTED)
    TWICE: tl.constexpr = not NEEDS_SCORES or (not ONE_STEP and (DIVIDED or (CORRECTED and AGAIN)))
    ONCE: tl.constexpr = CORRECTED and not ONE_STEP and not TWICE
    SCORE_PRECISION: tl.constexpr = short_sum_precision(PRECISION, HEAD_DIM)
    DP_PRECISION: tl.constexpr = short_sum_precision(PRECISION, VALUE_DIM)
    if AGAIN and nothing_left(unfinished, programs, CHUNK):
        return
    for number in span(0, CHUNK, 1):
        program = tl.program_id(0) * CHUNK + number
        wanted = True
        if AGAIN:
            wanted = tl.load(unfinished + program, mask=program < programs, other=0) != 0
        if wanted:
            n, h, h_kv, tile = locate_program(program, heads, group, row_tiles, INTERLEAVED)
            i_begin = tile * BLOCK_M
            i_end = tl.minimum(i_begin + BLOCK_M, len_q)
            i_tile = i_begin + tl.arange(0, BLOCK_M)
            i = i_tile[:, None]
            row = (n * heads + h) * len_q + i_tile
            # A softmax over one key is constant: dQ = 0.
            lone = tl.minimum(i_tile + origin + width, len_k) - tl.maximum(i_tile + origin, 0) == 1

            # The slots of these rows belong to keys [first, last), of which [begin, end) may be visible.
            first, last = i_begin + origin, i_end + origin + width - 1
            begin = tl.minimum(tl.maximum(first, 0), last)
            end = tl.minimum(tl.maximum(visible_length(key_lengths, n, len_k), begin), last)

            q = load_rows(query, query_strides, n, h, i_tile, i_tile < i_end, HEAD_DIM, BLOCK_HEAD)
            lse = tl.load(log_sum_exp + row, mask=i_tile < i_end, other=float("-inf"))
            if NEEDS_DOT:
                do = load_rows(grad_output, grad_output_strides, n, h, i_tile, i_tile < i_end, VALUE_DIM, BLOCK_VALUE)
                o = load_rows(output, output_strides, n, h, i_tile, i_tile < i_end, VALUE_DIM, BLOCK_VALUE)
                if CORRECTED:
                    d = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
                else:
                    r = tl.arange(0, BLOCK_M)
                    d = tl.sum(tl.where(r[:, None] == r[None, :], rows_by_keys(do, o, PRECISION), 0.0), 1)
            total = tl.zeros((BLOCK_M,), tl.float32)
            rescale = total

            if TWICE:
                correction = total
                for j_begin in span(begin, end, BLOCK_N):
                    j_tile = j_begin + tl.arange(0, BLOCK_N)
                    j = j_tile[None, :]
                    k = load_rows(key, key_strides, n, h_kv, j_tile, j_tile < end, HEAD_DIM, BLOCK_HEAD)
                    visible = (j < end) & in_window(i, j, origin, width) & (i < i_end)
                    b = 0.0
                    if HAS_BIAS:
                        b = load_bias(bias, bias_strides, bias_stride_c, n, h, i, j, origin, visible)
                        visible = b != float("-inf")
                    p = probabilities(rows_by_keys(q, k, SCORE_PRECISION), b, lse[:, None], scale, HAS_BIAS)
                    total += tl.sum(tl.where(visible, p, 0.0), 1)
                    if CORRECTED and NEEDS_DOT:
                        v = load_rows(value, value_strides, n, h_kv, j_tile, j_tile < end, VALUE_DIM, BLOCK_VALUE)
                        dp = rows_by_keys(do, v, DP_PRECISION)
                        correction += tl.sum(tl.where(visible, p * (dp - d[:, None]), 0.0), 1)
                rescale = tl.where(total > 0.0, 1.0 / total, 0.0)
                if CORRECTED and NEEDS_DOT:
                    d += correction * rescale

            if NEEDS_SCORES:
                num_tiles = tl.cdiv(end - begin, BLOCK_N)
                if REDUCTION == "none":
                    computed = begin + num_tiles * BLOCK_N
                    fill_band(grad_bias, grad_bias_strides, n, h, i, first, begin, origin, width, len_q, 0.0, BLOCK_N)
                    fill_band(grad_bias, grad_bias_strides, n, h, i, computed, last, origin, width, len_q, 0.0, BLOCK_N)
                row_sums = tl.zeros((BLOCK_M,), tl.float32)
                column_sums = tl.zeros((BLOCK_N,), tl.float32)
                dq = tl.zeros((BLOCK_M, BLOCK_HEAD), tl.float32)
                up = tl.full((BLOCK_M,), 1.0, tl.float32)
                correction = tl.zeros((BLOCK_M,), tl.float32)
                size = tl.zeros((BLOCK_M,), tl.float32)
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
                    if AGAIN and HAS_BIAS:
                        k = clear_unseen(k, visible)
                    p = probabilities(rows_by_keys(q, k, SCORE_PRECISION), b, lse[:, None], scale, HAS_BIAS)
                    p = tl.where(visible, p, 0.0)
                    dp = rows_by_keys(do, v, DP_PRECISION)
                    ds = p * (dp - d[:, None])
                    if HAS_BIAS:
                        ds = tl.where(visible, ds, 0.0)
                    if not TWICE:
                        total += tl.sum(p, 1)
                    if ONCE:
                        correction += tl.sum(ds, 1)
                        size += tl.sum(tl.abs(ds), 1)
                    elif ONE_STEP:
                        rescale = tl.where(total > 0.0, 1.0 / total, 0.0)
                        if CORRECTED:
                            correction = tl.sum(ds, 1) * rescale
                            d += correction
                            ds -= p * correction[:, None]
                    if DIVIDED:
                        ds *= rescale[:, None]
                    if grad_query is not None:
                        dq, up = large_weights_by_rows(ds, k, dq, up, PRECISION)
                    if REDUCTION == "none":
                        store_band(grad_bias, grad_bias_strides, n, h, i, j, origin, width, len_q, ds)
                    elif REDUCTION == "row sums":
                        row_sums += tl.sum(ds, 1)
                    elif REDUCTION == "column sums":
                        column_sums = store_column_sums(
                            grad_bias,
                            grad_bias_strides,
                            n,
                            h,
                            tile,
                            ds,
                            column_sums,
                            j_begin - first,
                            width,
                            BLOCK_M,
                            BLOCK_N,
                        )
                rescale = tl.where(total > 0.0, 1.0 / total, 0.0)
                wrong = 0
                if ONCE:
                    d += correction * rescale
                    wrong = tl.max(tl.where((tl.abs(correction) > TOLERANCE * size) & ~lone, 1, 0))
                if HAS_BIAS:
                    wrong = tl.where(finite(dq), wrong, 1)
                if unfinished is not None and not AGAIN:
                    tl.store(unfinished + program, wrong)

                unit = scale / up
                if not DIVIDED:
                    unit *= rescale
                if grad_query is not None:
                    # A row that sees no key may have NaN in dO, and then in dQ too.
                    dq = tl.where(total[:, None] == 0.0, 0.0, dq * tl.where(lone, 0.0, unit)[:, None])
                    store_rows(grad_query, grad_query_strides, n, h, i_tile, i_tile < i_end, dq, HEAD_DIM, BLOCK_HEAD)
                if REDUCTION == "row sums":
                    pointers = (
                        grad_bias
                        + n * grad_bias_stride_n
                        + h * grad_bias_stride_h
                        + i_tile.to(tl.int64) * grad_bias_stride_i
                    )
                    tl.store(pointers, cast(row_sums, grad_bias.dtype.element_ty), mask=i_tile < i_end)
                if REDUCTION == "column sums":
                    # The tiles started in columns ``column``, ``column`` + BLOCK_N, ... up to ``column_end``.
                    column = begin - first
                    column_end = column + num_tiles * BLOCK_N
                    clear_columns(grad_bias, grad_bias_strides, n, h, tile, 0, column - BLOCK_N, BLOCK_N)
                    store_columns(
                        grad_bias, grad_bias_strides, n, h, tile, column_sums, column_end - BLOCK_N, 0, width, BLOCK_N
                    )
                    clear_columns(grad_bias, grad_bias_strides, n, h, tile, column_end, width, BLOCK_N)
            if row_rescale is not None:
                tl.store(row_rescale + row, rescale, mask=i_tile < i_end)
            if row_dot is not None:
                tl.store(row_dot + row, d, mask=i_tile < i_end)


@triton.jit(
    do_not_specialize=[
        "programs",
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
    unfinished,
    programs,
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
    CLEAR: tl.constexpr,
    CHUNK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    bias_strides = (bias_stride_n, bias_stride_h, bias_stride_i)
    # Everything is transposed here, keys by rows: then P^T and dS^T are the left factors as they come.
    HAS_BIAS: tl.constexpr = bias is not None
    SCORE_PRECISION: tl.constexpr = short_sum_precision(PRECISION, HEAD_DIM)
    DP_PRECISION: tl.constexpr = short_sum_precision(PRECISION, VALUE_DIM)
    if CLEAR and nothing_left(unfinished, programs, CHUNK):
        return
    for number in span(0, CHUNK, 1):
        program = tl.program_id(0) * CHUNK + number
        wanted = True
        if CLEAR:
            wanted = tl.load(unfinished + program, mask=program < programs, other=0) != 0
        if wanted:
            n, _, h_kv, tile = locate_program(program, kv_heads, 1, key_tiles, INTERLEAVED)
            j_tile = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            j = j_tile[:, None]
            j_end = tl.minimum((tile + 1) * BLOCK_N, visible_length(key_lengths, n, len_k))
            begin, end = rows_of_keys(tile * BLOCK_N, j_end, len_q, origin, width)

            # A key that no row has a slot for may be NaN, which its own gradients must not be.
            seen = (j_tile < j_end) & (j_tile >= origin) & (j_tile < len_q + origin + width - 1)
            k = load_rows(key, key_strides, n, h_kv, j_tile, seen, HEAD_DIM, BLOCK_HEAD)
            v = load_rows(value, value_strides, n, h_kv, j_tile, seen, VALUE_DIM, BLOCK_VALUE)
            dk = tl.zeros((BLOCK_N, BLOCK_HEAD), tl.float32)
            up = tl.full((BLOCK_N,), 1.0, tl.float32)
            dv = tl.zeros((BLOCK_N, BLOCK_VALUE), tl.float32)
            for member in span(0, group, 1):
                h = h_kv * group + member
                for i_begin in span(begin, end, BLOCK_M):
                    i_tile = i_begin + tl.arange(0, BLOCK_M)
                    i = i_tile[None, :]
                    row = (n * kv_heads * group + h) * len_q + i_tile
                    lse = tl.load(log_sum_exp + row, mask=i_tile < end, other=float("-inf"))
                    # A row from which the bias hides every key may have anything in Q and dO.
                    seeing = lse != float("-inf") if CLEAR else i_tile < end
                    q = load_rows(query, query_strides, n, h, i_tile, seeing, HEAD_DIM, BLOCK_HEAD)
                    do = load_rows(grad_output, grad_output_strides, n, h, i_tile, seeing, VALUE_DIM, BLOCK_VALUE)
                    visible = (j < j_end) & (i < end) & in_window(i, j, origin, width)
                    b = 0.0
                    if HAS_BIAS:
                        b = load_bias(bias, bias_strides, bias_stride_c, n, h, i, j, origin, visible)
                        visible = b != float("-inf")
                    p = probabilities(
                        rows_by_keys(k, q, SCORE_PRECISION, TRANSPOSED=True), b, lse[None, :], scale, HAS_BIAS
                    )
                    p *= tl.load(row_rescale + row, mask=seeing, other=0.0)[None, :]
                    p = tl.where(visible, p, 0.0)
                    if grad_value is not None:
                        dv = weights_by_rows(cast(p, do.dtype), do, dv, PRECISION)
                    if grad_key is not None:
                        d = tl.load(row_dot + row, mask=seeing, other=0.0)
                        dp = rows_by_keys(v, do, DP_PRECISION, TRANSPOSED=True)
                        ds = p * (dp - d[None, :])
                        if CLEAR:
                            ds = tl.where(visible, ds, 0.0)
                        dk, up = large_weights_by_rows(ds, q, dk, up, PRECISION)
            if HAS_BIAS and not CLEAR:
                tl.store(unfinished + program, tl.where(finite(dk) & finite(dv), 0, 1))

            if grad_key is not None:
                dk *= (scale / up)[:, None]
                store_rows(grad_key, grad_key_strides, n, h_kv, j_tile, j_tile < len_k, dk, HEAD_DIM, BLOCK_HEAD)
            if grad_value is not None:
                store_rows(grad_value, grad_value_strides, n, h_kv, j_tile, j_tile < len_k, dv, VALUE_DIM, BLOCK_VALUE)
