"""The gradients of ``local_attention``, with the probabilities recomputed from the log-sum-exp.

With ``D = rowsum(dO * O) - dL``, L the log-sum-exp, ``dP = dO V^T`` and ``dS = P * (dP - D)``:

    dQ = scale * dS K        dbias = dS        by programs that own a tile of rows
    dK = scale * dS^T Q      dV = P^T dO       by programs that own a tile of keys, over the rows that see them

A softcap multiplies dS by ``1 - tanh^2`` in dQ and dK. Dropout multiplies P in dV, and dP, by 0 or ``1 / (1 - p)``. A sink is a
key of every row that sees one, with a share of P and a dP of 0; its gradient is the sum of ``-share * D``.

Each program recomputes the scores that it needs, and no two write the same element: no atomics, and the same bits each
time.

In fp32 the log-sum-exp of large scores has lost the digits that P is made of. So ``P = exp(S - log_sum_exp)`` is divided by
its own row sum, which the programs of the rows find and write for those of the keys; hence both must compute the same bits
of S.

A row that one key dominates makes dP - D a difference of equal numbers. In 16 bits D is therefore the diagonal of ``dO O^T``,
which has the same bits as dP where O is that key's value. In fp32, and with dropout, where O is rounded after it is multiplied,
D is corrected to rowsum(P * dP), by ``rowsum(P * (dP - D))``: again exactly dP where P is 1. That sum is known only after dS,
unless a single step holds all keys of the rows. Programs in which it is more than a rounding error of dS run again in a second
launch, which goes through the rows twice; so does the first where it writes dbias, for which P must be divided at once.
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
    key_of_first_slot,
    load_bias,
    load_rows,
    locate_program,
    nothing_left,
    store_band,
    store_rows,
)
from attnreg_triton.bias_gradient import (
    clear_columns,
    clear_slots_outside,
    empty_partials,
    reduce_partials,
    reduction,
    store_column_sums,
    store_columns,
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
from attnreg_triton.products import (
    attention_precision,
    large_weights_by_rows,
    rows_by_keys,
    short_sum_precision,
    weights_by_rows,
)
from attnreg_triton.rows import keys_of_rows, place, rows_of_keys, used_keys
from attnreg_triton.sinks import empty_partials as empty_sink_partials
from attnreg_triton.sinks import load_sink
from attnreg_triton.sinks import reduce_partials as reduce_sink_partials
from attnreg_triton.softcap import capping, tanh
from attnreg_triton.tiles import attention_backward_by_keys, attention_backward_by_rows

_LOG2E = tl.constexpr(1.4426950408889634)

# How much of the sum of |dS| a correction of D may be before a row's dQ is computed anew: about what rounding P makes of it.
_TOLERANCE = {torch.bfloat16: 2**-6, torch.float16: 2**-8, torch.float32: 2**-20}
_TF32_TOLERANCE = 2**-10


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
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float | None = None,
    seed: Tensor | None = None,
    grad_log_sum_exp: Tensor | None = None,
    needs_grad: frozenset[str],
    **rows: Tensor | None,
) -> dict[str, Tensor]:
    """dQ, dK, dV, dbias and dsinks, those that are wanted."""
    batch, heads, len_q, head_dim = query.shape
    _, kv_heads, len_k, value_dim = value.shape
    window = clip_window(window, bias, len_q, len_k, rows.get("query_starts"))
    here = place(len_q, len_k, window, by_key=not needs_grad.isdisjoint({"key", "value"}), **rows)
    log_sum_exp = log_sum_exp.contiguous()
    sinks = None if sinks is None else sinks.contiguous()
    grad_log_sum_exp = None if grad_log_sum_exp is None else grad_log_sum_exp.contiguous()
    if hopper.serves(grad_output, query, key, value, output, bias=bias, scale=scale, dropout_p=dropout_p or None):
        from attnreg_triton.hopper import attention_backward

        return attention_backward.local_attention_backward(
            grad_output,
            query,
            key,
            value,
            output,
            log_sum_exp,
            window,
            rows=here,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            grad_log_sum_exp=grad_log_sum_exp,
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
    ratio, unit = capping(scale, softcap)
    dropout = dropping(dropout_p, seed)
    shape = (len_q, len_k, here.origin, here.width, unit, ratio)
    constants: dict[str, Any] = {
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_HEAD": padded(head_dim),
        "BLOCK_VALUE": padded(value_dim),
        "PRECISION": attention_precision(query.dtype),
        "CAPPED": softcap is not None,
        "GAPS": here.gaps,
        "device": query.device,
    }

    tiles = attention_backward_by_rows(query.dtype, head_dim, value_dim, window, bias is not None)
    row_tiles = ceil_div(len_q, tiles.rows)
    programs = batch * heads * row_tiles
    grad_bias = None
    if "bias" in needs_grad and bias is not None:
        grad_bias = empty_partials(bias, (batch, heads, len_q, window.size), row_tiles, here.gaps)
    grad_sinks = None
    if "sinks" in needs_grad and sinks is not None:
        grad_sinks = empty_sink_partials(batch, heads, row_tiles, query.device)
    corrected = query.dtype == torch.float32 or dropout.seed is not None
    most_keys = window.size + tiles.rows - 1 + (0 if dropout.seed is None else 3)
    one_step = most_keys <= tiles.keys and not here.gaps
    # With a bias because of what is hidden, else because of D. All that the first try writes but dQ is right.
    again = grad_query is not None and (bias is not None or (corrected and not one_step))
    tolerance = _TF32_TOLERANCE if query.dtype == torch.float32 and allow_tf32() else _TOLERANCE[query.dtype]
    unfinished = flags(programs, query.device) if again else None
    for second in (False, True) if again else (False,):
        chunk = CHUNK if second else 1
        written = (row_dot, row_rescale, grad_query, grad_bias, grad_sinks)
        if second:
            written = (None, None, grad_query, None, None)
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
            grad_log_sum_exp,
            bias,
            here.rows,
            sinks,
            *written,
            unfinished,
            *dropout,
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
            REDUCTION=None if written[3] is None or bias is None else reduction(bias, here.gaps),
            ONE_STEP=one_step,
            CORRECTED=corrected,
            TOLERANCE=tolerance,
            AGAIN=second,
            CHUNK=chunk,
            INTERLEAVED=interleaved(query),
            **constants,
        )
    if grad_bias is not None and bias is not None:
        gradients["bias"] = reduce_partials(grad_bias, bias)
    if grad_sinks is not None and sinks is not None:
        gradients["sinks"] = reduce_sink_partials(grad_sinks, sinks)
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
                here.rows,
                grad_key,
                grad_value,
                unfinished,
                *dropout,
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
def sink_share(sink, lse):
    """Of each row, the probability that its sink has, undivided by the row sum; 0 of a row that sees no key."""
    share = tl.exp2((sink - lse) * (_LOG2E * damping(lse)))
    return tl.where(lse == float("-inf"), 0.0, share)


@triton.jit
def probabilities(qk, b, lse, scale, HAS_BIAS: tl.constexpr):
    """``exp(scale * qk + b - lse)``, undivided by its row sum; ``lse`` has the shape of a row or a column of ``qk``.

    With a softcap ``qk`` is the tanh, and ``scale`` the softcap.

    Fused on purpose, not left to the compiler, so that every kernel computes the same bits. A bias must not be multiplied by
    log2(e) before the log-sum-exp is taken off: the most negative finite number, as many masks have it, would become -inf.
    """
    unit = _LOG2E * damping(lse)
    if HAS_BIAS:
        return tl.exp2((tl.fma(qk, scale, b) - lse) * unit)
    return tl.exp2(tl.fma(qk, scale * unit, -(lse * unit)))


@triton.jit(
    do_not_specialize=[
        "threshold",
        "factor",
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
        "ratio",
    ]
)
def _attention_backward_rows(
    grad_output,
    query,
    key,
    value,
    output,
    log_sum_exp,
    grad_log_sum_exp,
    bias,
    rows,
    sinks,
    row_dot,
    row_rescale,
    grad_query,
    grad_bias,
    grad_sinks,
    unfinished,
    seed,
    threshold,
    factor,
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
    ratio,
    REDUCTION: tl.constexpr,
    ONE_STEP: tl.constexpr,
    CORRECTED: tl.constexpr,
    TOLERANCE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    PRECISION: tl.constexpr,
    CAPPED: tl.constexpr,
    GAPS: tl.constexpr,
    AGAIN: tl.constexpr,
    CHUNK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    grad_bias_strides = (grad_bias_stride_n, grad_bias_stride_h, grad_bias_stride_i)
    bias_strides = (bias_stride_n, bias_stride_h, bias_stride_i)
    HAS_BIAS: tl.constexpr = bias is not None
    FP32: tl.constexpr = query.dtype.element_ty == tl.float32
    NEEDS_SCORES: tl.constexpr = grad_query is not None or grad_bias is not None
    NEEDS_DOT: tl.constexpr = NEEDS_SCORES or row_dot is not None or grad_sinks is not None
    # dbias is stored as it comes, and so needs the row sums and D before. In fp32 dQ has the same bits without it.
    DIVIDED: tl.constexpr = grad_bias is not None or (HAS_BIAS and FP32)
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
            first, last, begin, end = keys_of_rows(rows, n, i_tile, i_begin, i_end, origin, width, len_q, len_k)
            # A softmax over one key is constant: dQ = 0. It is not where the log-sum-exp has a gradient, or a sink its share.
            lone = last - first == 1
            if grad_log_sum_exp is not None or sinks is not None:
                lone = tl.zeros((BLOCK_M,), tl.int1)
            if HAS_BIAS:
                offset = key_of_first_slot(rows, n, i_tile, i_tile < i_end, origin, width, len_q, len_k, GAPS)
            if REDUCTION == "column sums" or (REDUCTION == "none" and not GAPS):
                # The slots of these rows belong to keys [slots_begin, slots_end), of which [begin, end) may be visible.
                slots_begin, slots_end = i_begin + offset, i_end - 1 + offset + width
                begin = tl.minimum(tl.maximum(begin, slots_begin), slots_end)
                end = tl.minimum(tl.maximum(end, begin), slots_end)
            used_from = None
            if seed is not None:
                words = seed_words(seed)
                used_from = begin
                begin = group_begin(begin)

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
                sees = lse != float("-inf")
                if grad_log_sum_exp is not None:
                    grad_lse = tl.load(grad_log_sum_exp + row, mask=sees, other=0.0)
                    d -= grad_lse
                if grad_log_sum_exp is not None or sinks is not None:
                    # A row that sees no key may have NaN in dO.
                    d = tl.where(sees, d, 0.0)
            total = tl.zeros((BLOCK_M,), tl.float32)
            if sinks is not None:
                share = sink_share(load_sink(sinks, h), lse)
                total = share
            rescale = total

            if TWICE:
                correction = tl.zeros((BLOCK_M,), tl.float32)
                for j_begin in span(begin, end, BLOCK_N):
                    j_tile = j_begin + tl.arange(0, BLOCK_N)
                    j = j_tile[None, :]
                    used = used_keys(rows, j_tile, used_from, end, len_k, GAPS)
                    k = load_rows(key, key_strides, n, h_kv, j_tile, used, HEAD_DIM, BLOCK_HEAD)
                    visible = (j >= first[:, None]) & (j < last[:, None])
                    b = 0.0
                    if HAS_BIAS:
                        b = load_bias(bias, bias_strides, bias_stride_c, n, h, i, j, offset, visible)
                        visible = b != float("-inf")
                    s = rows_by_keys(q, k, SCORE_PRECISION)
                    if CAPPED:
                        s = tanh(s * ratio, FP32)
                    p = probabilities(s, b, lse[:, None], scale, HAS_BIAS)
                    total += tl.sum(tl.where(visible, p, 0.0), 1)
                    if CORRECTED and NEEDS_DOT:
                        v = load_rows(value, value_strides, n, h_kv, j_tile, used, VALUE_DIM, BLOCK_VALUE)
                        dp = rows_by_keys(do, v, DP_PRECISION)
                        if seed is not None:
                            dp = tl.where(kept(words, threshold, n, h, i_tile, j_begin, BLOCK_N), dp * factor, 0.0)
                        correction += tl.sum(tl.where(visible, p * (dp - d[:, None]), 0.0), 1)
                rescale = tl.where(total > 0.0, 1.0 / total, 0.0)
                if CORRECTED and NEEDS_DOT:
                    if sinks is not None:
                        correction -= share * d
                    correction *= rescale
                    if grad_log_sum_exp is not None:
                        correction -= grad_lse
                    d += correction

            if NEEDS_SCORES:
                num_tiles = tl.cdiv(end - begin, BLOCK_N)
                if REDUCTION == "none":
                    computed = begin + num_tiles * BLOCK_N
                    if GAPS:
                        clear_slots_outside(
                            grad_bias, grad_bias_strides, n, h, i, offset, begin, computed, width, len_q, BLOCK_N
                        )
                    else:
                        fill_band(
                            grad_bias,
                            grad_bias_strides,
                            n,
                            h,
                            i,
                            slots_begin,
                            begin,
                            offset,
                            width,
                            len_q,
                            0.0,
                            BLOCK_N,
                        )
                        fill_band(
                            grad_bias,
                            grad_bias_strides,
                            n,
                            h,
                            i,
                            computed,
                            slots_end,
                            offset,
                            width,
                            len_q,
                            0.0,
                            BLOCK_N,
                        )
                row_sums = tl.zeros((BLOCK_M,), tl.float32)
                column_sums = tl.zeros((BLOCK_N,), tl.float32)
                dq = tl.zeros((BLOCK_M, BLOCK_HEAD), tl.float32)
                up = tl.full((BLOCK_M,), 1.0, tl.float32)
                correction = tl.zeros((BLOCK_M,), tl.float32)
                size = tl.zeros((BLOCK_M,), tl.float32)
                for j_begin in span(begin, end, BLOCK_N):
                    j_tile = j_begin + tl.arange(0, BLOCK_N)
                    j = j_tile[None, :]
                    used = used_keys(rows, j_tile, used_from, end, len_k, GAPS)
                    k = load_rows(key, key_strides, n, h_kv, j_tile, used, HEAD_DIM, BLOCK_HEAD)
                    v = load_rows(value, value_strides, n, h_kv, j_tile, used, VALUE_DIM, BLOCK_VALUE)
                    visible = (j >= first[:, None]) & (j < last[:, None])
                    b = 0.0
                    if HAS_BIAS:
                        b = load_bias(bias, bias_strides, bias_stride_c, n, h, i, j, offset, visible)
                        visible = b != float("-inf")
                    if AGAIN and HAS_BIAS:
                        k = clear_unseen(k, visible)
                    s = rows_by_keys(q, k, SCORE_PRECISION)
                    if CAPPED:
                        s = tanh(s * ratio, FP32)
                    p = probabilities(s, b, lse[:, None], scale, HAS_BIAS)
                    p = tl.where(visible, p, 0.0)
                    dp = rows_by_keys(do, v, DP_PRECISION)
                    if seed is not None:
                        dp = tl.where(kept(words, threshold, n, h, i_tile, j_begin, BLOCK_N), dp * factor, 0.0)
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
                            correction = tl.sum(ds, 1)
                            if sinks is not None:
                                correction -= share * d
                            correction *= rescale
                            if grad_log_sum_exp is not None:
                                correction -= grad_lse
                            d += correction
                            ds -= p * correction[:, None]
                    if DIVIDED:
                        ds *= rescale[:, None]
                    if grad_query is not None:
                        weights = ds
                        if CAPPED:
                            weights *= tl.fma(-s, s, 1.0)
                        dq, up = large_weights_by_rows(weights, k, dq, up, PRECISION)
                    if REDUCTION == "none":
                        store_band(grad_bias, grad_bias_strides, n, h, i, j, offset, width, len_q, ds)
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
                            j_begin - slots_begin,
                            width,
                            BLOCK_M,
                            BLOCK_N,
                        )
                rescale = tl.where(total > 0.0, 1.0 / total, 0.0)
                wrong = 0
                if ONCE:
                    if sinks is not None:
                        correction -= share * d
                        size += tl.abs(share * d)
                    if grad_log_sum_exp is not None:
                        correction -= grad_lse * total
                    d += correction * rescale
                    wrong = tl.max(tl.where((tl.abs(correction) > TOLERANCE * size) & ~lone, 1, 0))
                if HAS_BIAS:
                    wrong = tl.where(finite(dq), wrong, 1)
                if unfinished is not None and not AGAIN:
                    tl.store(unfinished + program, wrong)

                unit = scale * ratio / up
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
                    column = begin - slots_begin
                    column_end = column + num_tiles * BLOCK_N
                    clear_columns(grad_bias, grad_bias_strides, n, h, tile, 0, column - BLOCK_N, BLOCK_N)
                    store_columns(
                        grad_bias, grad_bias_strides, n, h, tile, column_sums, column_end - BLOCK_N, 0, width, BLOCK_N
                    )
                    clear_columns(grad_bias, grad_bias_strides, n, h, tile, column_end, width, BLOCK_N)
            if row_rescale is not None:
                tl.store(row_rescale + row, rescale, mask=i_tile < i_end)
            if grad_sinks is not None:
                lost = tl.where(total == 0.0, 0.0, share * rescale * d)
                tl.store(grad_sinks + (n * heads + h) * row_tiles + tile, -tl.sum(lost, 0))
            if row_dot is not None:
                tl.store(row_dot + row, d, mask=i_tile < i_end)


@triton.jit(
    do_not_specialize=[
        "threshold",
        "factor",
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
        "ratio",
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
    rows,
    grad_key,
    grad_value,
    unfinished,
    seed,
    threshold,
    factor,
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
    ratio,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    PRECISION: tl.constexpr,
    CAPPED: tl.constexpr,
    GAPS: tl.constexpr,
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
            j_begin = tile * BLOCK_N
            j_end = tl.minimum(j_begin + BLOCK_N, len_k)
            j_tile = j_begin + tl.arange(0, BLOCK_N)
            j = j_tile[:, None]
            first, last, begin, end = rows_of_keys(rows, n, j_tile, j_begin, j_end, origin, width, len_q, len_k)
            if seed is not None:
                words = seed_words(seed)

            # A key that no row sees may be NaN, which its own gradients must not be.
            seen = first < last
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
                    # A row that sees no key, as the bias hides all of them or in a gap, may have anything in Q and dO.
                    seeing = lse != float("-inf") if CLEAR or GAPS else i_tile < end
                    q = load_rows(query, query_strides, n, h, i_tile, seeing, HEAD_DIM, BLOCK_HEAD)
                    do = load_rows(grad_output, grad_output_strides, n, h, i_tile, seeing, VALUE_DIM, BLOCK_VALUE)
                    visible = (i >= first[:, None]) & (i < last[:, None])
                    b = 0.0
                    if HAS_BIAS:
                        offset = key_of_first_slot(rows, n, i_tile, i_tile < end, origin, width, len_q, len_k, GAPS)
                        if GAPS:
                            offset = tl.trans(offset)
                        b = load_bias(bias, bias_strides, bias_stride_c, n, h, i, j, offset, visible)
                        visible = b != float("-inf")
                    s = rows_by_keys(k, q, SCORE_PRECISION, TRANSPOSED=True)
                    if CAPPED:
                        s = tanh(s * ratio, q.dtype == tl.float32)
                    p = probabilities(s, b, lse[None, :], scale, HAS_BIAS)
                    p *= tl.load(row_rescale + row, mask=seeing, other=0.0)[None, :]
                    p = tl.where(visible, p, 0.0)
                    if seed is not None:
                        keep = kept(words, threshold, n, h, i_tile, j_begin, BLOCK_N, KEYS_FIRST=True)
                    if grad_value is not None:
                        weights = p
                        if seed is not None:
                            weights = tl.where(keep, p, 0.0)
                        dv = weights_by_rows(cast(weights, do.dtype), do, dv, PRECISION)
                    if grad_key is not None:
                        d = tl.load(row_dot + row, mask=seeing, other=0.0)
                        dp = rows_by_keys(v, do, DP_PRECISION, TRANSPOSED=True)
                        if seed is not None:
                            dp = tl.where(keep, dp * factor, 0.0)
                        ds = p * (dp - d[None, :])
                        if CAPPED:
                            ds *= tl.fma(-s, s, 1.0)
                        if CLEAR:
                            ds = tl.where(visible, ds, 0.0)
                        dk, up = large_weights_by_rows(ds, q, dk, up, PRECISION)
            if HAS_BIAS and not CLEAR:
                tl.store(unfinished + program, tl.where(finite(dk) & finite(dv), 0, 1))

            if grad_key is not None:
                dk *= (scale * ratio / up)[:, None]
                store_rows(grad_key, grad_key_strides, n, h_kv, j_tile, j_tile < len_k, dk, HEAD_DIM, BLOCK_HEAD)
            if grad_value is not None:
                if seed is not None:
                    dv *= factor
                store_rows(grad_value, grad_value_strides, n, h_kv, j_tile, j_tile < len_k, dv, VALUE_DIM, BLOCK_VALUE)
