"""The gradients of ``local_attention`` on Hopper: the two kernels of ``attnreg_triton.attention_backward``.

Rows first: ``D = rowsum(dO * O)`` and ``dQ = scale * dS K``; then keys: ``dV = P^T dO`` and ``dK = scale * dS^T Q``,
with ``P = exp(S - log-sum-exp)`` computed anew in both and ``dS = P * (dP - D)``, ``dP = dO V^T``. No program writes what another
does, so there are no atomics and no accumulator in memory.

The incoming gradient dL of the log-sum-exp L has its part in dS too: as if D were D - dL. With a softcap, S is ``softcap * u``,
u a tanh, and dS is passed on times 1 - u^2. A sink is a key of its own score and of value 0: P of it is its share
``exp(sink - L)`` of a row, and its gradient the sum of ``share * (dL - D)`` over rows.

Where the log-sum-exp is large it has lost digits of P, which is then divided by its row sum. O, too, is then not the very value
of a key that dominates its row, but a rounding step beside it, which large queries and keys make much of; so D is corrected
to rowsum(P * dP), by ``rowsum(P * (dP - D))``. And in fp16 dS may be too large. All of that is rare and costs a multiple of the
time. So programs do without at first, and those that meet it run again: once for the sums, and once with them.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from attnreg import Window, empty_like
from attnreg_triton import tiles as tile_table
from attnreg_triton.hopper.factors import fp16_shrinkage
from attnreg_triton.hopper.rows import clear_unused, keys_of_rows, rows_of_keys, unused
from attnreg_triton.hopper.softcap import capped
from attnreg_triton.hopper.tile import (
    advance,
    barriers,
    describe,
    fetch,
    finish_stores,
    hide,
    load_sink,
    locate_program,
    matrix,
    product_layout,
    rows_layout,
    store_tile,
    synchronize,
)
from attnreg_triton.launch import ceil_div, interleaved, launch
from attnreg_triton.rows import Place
from attnreg_triton.sinks import empty_partials, reduce_partials
from attnreg_triton.softcap import capping

_LOG2E = gl.constexpr(1.4426950408889634)
# Below it, P is as good as a log-sum-exp in fp32 makes it: to 2^-14, a quarter of a rounding step of fp16.
_LARGE = gl.constexpr(256.0)
# A tangent of which P is 0, and the square finite.
_HIDDEN = gl.constexpr(-(2.0**60))
_LEAST_UNIT = 2.0**-40


def local_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    window: Window,
    *,
    rows: Place,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    grad_log_sum_exp: Tensor | None = None,
    needs_grad: frozenset[str],
) -> dict[str, Tensor]:
    """dQ, dK, dV and those of the sinks, as far as wanted, of a call that ``serves`` accepts.

    ``rows`` has the table ``by_key`` where gradients of keys are wanted or there may be gaps.
    """
    batch, heads, len_q, _ = query.shape
    _, kv_heads, len_k, _ = key.shape
    tensors = {"query": query, "key": key, "value": value}
    gradients = {name: empty_like(tensor) for name, tensor in tensors.items() if name in needs_grad}
    grad_query, grad_key, grad_value = (gradients.get(name) for name in tensors)
    # For the programs of the keys: -log2(e) times the log-sum-exp beside D, and what P is to be multiplied by.
    row_pairs = torch.empty((batch, heads, len_q, 2), dtype=torch.float32, device=query.device)
    row_rescale = torch.empty((batch, heads, len_q), dtype=torch.float32, device=query.device)
    ratio, unit = capping(scale, softcap)
    # Scores within a softcap as small make no difference, but they have to be told from hidden ones.
    unit = unit if softcap is None else max(unit, _LEAST_UNIT)
    sizes = (len_q, len_k, rows.origin, rows.width, scale, None if softcap is None else ratio, unit)

    tiles = tile_table.hopper_attention_backward_by_rows(query.shape[3], value.shape[3], window)
    row_tiles = ceil_div(len_q, tiles.rows)
    sink_parts = None
    if sinks is not None and "sinks" in needs_grad:
        sink_parts = empty_partials(batch, heads, row_tiles, query.device)
    launch(
        _attention_backward_rows,
        batch * heads * row_tiles,
        tiles,
        describe(grad_output, tiles.rows),
        describe(query, tiles.rows),
        describe(key, tiles.keys),
        describe(value, tiles.keys),
        describe(output, tiles.rows),
        log_sum_exp,
        grad_log_sum_exp,
        rows.rows,
        sinks,
        row_pairs,
        row_rescale,
        sink_parts,
        None if grad_query is None else describe(grad_query, tiles.rows),
        kv_heads,
        heads // kv_heads,
        row_tiles,
        *sizes,
        UNUSED=unused(rows),
        STAGES=tiles.num_stages,
        INTERLEAVED=interleaved(query),
        device=query.device,
    )
    if sinks is not None and sink_parts is not None:
        gradients["sinks"] = reduce_partials(sink_parts, sinks)
    if grad_key is not None or grad_value is not None:
        tiles = tile_table.hopper_attention_backward_by_keys(window)
        key_tiles = ceil_div(len_k, tiles.keys)
        launch(
            _attention_backward_keys,
            batch * kv_heads * key_tiles,
            tiles,
            describe(grad_output, tiles.rows),
            describe(query, tiles.rows),
            describe(key, tiles.keys),
            describe(value, tiles.keys),
            log_sum_exp,
            row_pairs,
            row_rescale,
            rows.rows,
            None if grad_key is None else describe(grad_key, tiles.keys),
            None if grad_value is None else describe(grad_value, tiles.keys),
            kv_heads,
            heads // kv_heads,
            key_tiles,
            *sizes,
            UNUSED=unused(rows),
            STAGES=tiles.num_stages,
            INTERLEAVED=interleaved(key),
            device=query.device,
        )
    return gradients


@gluon.jit
def _exponents(lse, unit):
    """``(factor, shift)`` of rows, by which ``P = 2^(factor * s - shift)`` of a score ``unit * s``.

    Both are log2(e) times unit and log-sum-exp, and damped as in ``attnreg_triton.attention_backward.damping``.
    """
    exponent = (lse.to(gl.int32, bitcast=True) >> 23) & 0xFF
    damping = ((281 - gl.maximum(exponent, 154)) << 23).to(gl.float32, bitcast=True) * _LOG2E
    return unit * damping, lse * damping


@gluon.jit
def _sink_share(sinks, h, lse):
    """``exp(sink - log-sum-exp)`` of rows, 0 of those that see no key."""
    share = gl.zeros_like(lse)
    if sinks is not None:
        factor, shift = _exponents(lse, load_sink(sinks, h))
        share = gl.where(lse == float("-inf"), 0.0, gl.exp2(factor - shift))
    return share


@gluon.jit
def _all_finite(x, valid):
    """Whether those rows of ``x`` that are ``valid`` have neither NaN nor infinities."""
    wrong = gl.where(valid[:, None] & ~(gl.abs(x) < float("inf")), 1, 0)
    return gl.max(gl.max(wrong, 1), 0) == 0


@gluon.jit
def _fetch_keys(key, value, n, h_kv, begin, steps, ready, first_ready, k_tiles, v_tiles, STAGES: gl.constexpr):
    """Start copying the keys and values of the first steps, announced by ``STAGES`` barriers from ``first_ready`` on."""
    STEP_BYTES: gl.constexpr = key.block_type.nbytes + value.block_type.nbytes
    BLOCK_N: gl.constexpr = key.block_type.shape[2]
    for slot in gl.static_range(STAGES):
        wanted = slot < steps
        bar = ready.index(first_ready + slot)
        mbarrier.expect(bar, STEP_BYTES, pred=wanted)
        fetch(key, n, h_kv, begin + slot * BLOCK_N, bar, k_tiles.index(slot), wanted)
        fetch(value, n, h_kv, begin + slot * BLOCK_N, bar, v_tiles.index(slot), wanted)


@gluon.jit
def _query_gradient(
    key,
    value,
    rows,
    place,
    interval,
    lse,
    d,
    share,
    ratio,
    unit,
    ready,
    first_ready,
    tiles,
    UNUSED: gl.constexpr,
    STAGES: gl.constexpr,
    CAREFUL: gl.constexpr,
    SUMS: gl.constexpr = False,
):
    """``(up * dS K, total, up)`` with P undivided by its row sums ``total``, after ``_fetch_keys``.

    CAREFUL computes what is 1 otherwise: ``total``, which is off where the log-sum-exp is large, and ``up``, that brings dS
    into fp16's range. SUMS computes ``(0, total, rowsum(dS))`` alone. Both sums include a sink, of which P is ``share``.
    """
    n, h_kv, begin, steps, used_to, len_k = place
    first, last, all_from, all_to = interval
    q_tile, do_tile, k_tiles, v_tiles = tiles
    WARPS: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = key.dtype
    BLOCK_M: gl.constexpr = q_tile.shape[2]
    BLOCK_N: gl.constexpr = key.block_type.shape[2]
    BLOCK_HEAD: gl.constexpr = key.block_type.shape[3]
    BLOCK_VALUE: gl.constexpr = value.block_type.shape[3]
    SHRINK: gl.constexpr = CAREFUL and not SUMS and dtype == gl.float16
    s_layout: gl.constexpr = product_layout(BLOCK_N, WARPS, dtype)
    q_layout: gl.constexpr = product_layout(BLOCK_HEAD, WARPS, dtype)
    ds_layout: gl.constexpr = gl.DotOperandLayout(0, q_layout, 2)
    k_layout: gl.constexpr = rows_layout(BLOCK_HEAD, WARPS, dtype)
    v_layout: gl.constexpr = rows_layout(BLOCK_VALUE, WARPS, dtype)
    STEP_BYTES: gl.constexpr = key.block_type.nbytes + value.block_type.nbytes

    if CAREFUL:
        factor, shift = _exponents(lse, unit)
        factor = factor[:, None]
        total = share
    else:
        factor, shift = unit * _LOG2E, lse * _LOG2E
        total = gl.where(lse == float("-inf"), 0.0, 1.0)
    up = -share * d if SUMS else gl.full([BLOCK_M], 1.0, gl.float32, gl.SliceLayout(1, s_layout))
    dq = gl.zeros([BLOCK_M, BLOCK_HEAD], gl.float32, q_layout)
    if not (SHRINK or SUMS):
        dq = warpgroup_mma_init(dq)
    empty = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, s_layout)
    j_begin = begin
    stage = 0
    phase = 0
    for step in range(steps):
        mbarrier.wait(ready.index(first_ready + stage), phase)
        if UNUSED is not None:
            clear_unused(rows[4], len_k, used_to, j_begin, k_tiles.index(stage), k_layout, UNUSED)
            clear_unused(rows[4], len_k, used_to, j_begin, v_tiles.index(stage), v_layout, UNUSED)
        k = matrix(k_tiles.index(stage))
        v = matrix(v_tiles.index(stage))
        s = warpgroup_mma(matrix(q_tile), k.permute((1, 0)), empty, use_acc=False, is_async=True)
        dp = warpgroup_mma(matrix(do_tile), v.permute((1, 0)), empty, use_acc=False, is_async=True)
        if SHRINK or SUMS:
            s = warpgroup_mma_wait(num_outstanding=1, deps=(s,))
        else:
            s, dq = warpgroup_mma_wait(num_outstanding=1, deps=(s, dq))
        # The tiles of the step before are free now.
        before = gl.where(stage == 0, STAGES - 1, stage - 1)
        ahead = step + STAGES - 1
        wanted = (step > 0) & (ahead < steps)
        bar = ready.index(first_ready + before)
        mbarrier.expect(bar, STEP_BYTES, pred=wanted)
        fetch(key, n, h_kv, begin + ahead * BLOCK_N, bar, k_tiles.index(before), wanted)
        fetch(value, n, h_kv, begin + ahead * BLOCK_N, bar, v_tiles.index(before), wanted)

        s = capped(s, ratio)
        p = gl.exp2(gl.fma(s, factor, -shift[:, None]))
        p = hide(p, j_begin, first, last, all_from, all_to, 0.0, s_layout)
        if CAREFUL:
            total += gl.sum(p, 1)
        if ratio is not None and not SUMS:
            p *= 1.0 - s * s
        dp = warpgroup_mma_wait(num_outstanding=0, deps=(dp,))
        ds = p * (dp - d[:, None])
        if SHRINK:
            up_before = up
            up = fp16_shrinkage(ds, up)
            ds *= up[:, None]
            dq = warpgroup_mma_init(dq * gl.convert_layout(up / up_before, gl.SliceLayout(1, q_layout))[:, None])
        if SUMS:
            up += gl.sum(ds, 1)
        else:
            dq = warpgroup_mma(gl.convert_layout(ds.to(dtype), ds_layout), k, dq, is_async=True)
        if SHRINK:
            # An accumulator in flight that is also multiplied would make ptxas run every product by itself (C7514).
            dq = warpgroup_mma_wait(num_outstanding=0, deps=(dq,))
        j_begin += BLOCK_N
        stage, phase = advance(stage, phase, STAGES)
    if not (SHRINK or SUMS):
        dq = warpgroup_mma_wait(num_outstanding=0, deps=(dq,))
    return dq, total, up


@gluon.jit(do_not_specialize=["kv_heads", "row_tiles", "len_q", "len_k", "origin", "width", "scale", "unit"])
def _attention_backward_rows(
    grad_output,
    query,
    key,
    value,
    output,
    log_sum_exp,
    grad_log_sum_exp,
    rows,
    sinks,
    row_pairs,
    row_rescale,
    sink_parts,
    grad_query,
    kv_heads,
    group,
    row_tiles,
    len_q,
    len_k,
    origin,
    width,
    scale,
    ratio,
    unit,
    UNUSED: gl.constexpr,
    STAGES: gl.constexpr,
    INTERLEAVED: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
):
    WARPS: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = query.dtype
    BLOCK_HEAD: gl.constexpr = key.block_type.shape[3]
    BLOCK_VALUE: gl.constexpr = value.block_type.shape[3]
    s_layout: gl.constexpr = product_layout(BLOCK_N, WARPS, dtype)
    q_layout: gl.constexpr = product_layout(BLOCK_HEAD, WARPS, dtype)
    d_layout: gl.constexpr = product_layout(BLOCK_M, WARPS, dtype)

    q_tile = gl.allocate_shared_memory(dtype, query.block_type.shape, query.layout)
    do_tile = gl.allocate_shared_memory(dtype, grad_output.block_type.shape, grad_output.layout)
    o_tile = gl.allocate_shared_memory(dtype, output.block_type.shape, output.layout)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_HEAD], key.layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_VALUE], value.layout)
    rows_ready = barriers(1).index(0)
    ready = barriers(STAGES)
    again = barriers(2 * STAGES)
    n, h, h_kv, tile = locate_program(kv_heads, group, row_tiles, INTERLEAVED)
    i_begin = tile * BLOCK_M
    mbarrier.expect(rows_ready, query.block_type.nbytes + grad_output.block_type.nbytes + output.block_type.nbytes)
    fetch(grad_output, n, h, i_begin, rows_ready, do_tile)
    fetch(output, n, h, i_begin, rows_ready, o_tile)
    fetch(query, n, h, i_begin, rows_ready, q_tile)

    i_end = gl.minimum(i_begin + BLOCK_M, len_q)
    i = i_begin + gl.arange(0, BLOCK_M, gl.SliceLayout(1, s_layout))
    first, last, begin, end, all_from, all_to, used_to = keys_of_rows(
        rows, n, i, i_begin, i_end, origin, width, len_q, len_k, UNUSED
    )
    steps = (end - begin + BLOCK_N - 1) // BLOCK_N
    _fetch_keys(key, value, n, h_kv, begin, steps, ready, 0, k_tiles, v_tiles, STAGES)

    row = (n * kv_heads * group + h).to(gl.int64) * len_q + i
    lse = gl.load(log_sum_exp + row, mask=i < i_end, other=float("-inf"))
    # D = diagonal(dO O^T), with the same bits as dP where O is the value of the one key that dominates its row.
    mbarrier.wait(rows_ready, 0)
    products = gl.zeros([BLOCK_M, BLOCK_M], gl.float32, d_layout)
    o = matrix(o_tile).permute((1, 0))
    products = warpgroup_mma(matrix(do_tile), o, products, use_acc=False, is_async=True)
    products = warpgroup_mma_wait(num_outstanding=0, deps=(products,))
    r = gl.arange(0, BLOCK_M, gl.SliceLayout(1, d_layout))[:, None]
    c = gl.arange(0, BLOCK_M, gl.SliceLayout(0, d_layout))[None, :]
    d = gl.convert_layout(gl.sum(gl.where(r == c, products, 0.0), 1), gl.SliceLayout(1, s_layout))

    sees = lse != float("-inf")
    large = sees & ~(gl.abs(lse) < _LARGE)
    grad_lse = gl.zeros_like(lse)
    if grad_log_sum_exp is not None:
        grad_lse = gl.load(grad_log_sum_exp + row, mask=i < i_end, other=0.0)
    share = _sink_share(sinks, h, lse)
    # A row that sees no key may have NaN in dO.
    gl.store(row_pairs + 2 * row, gl.where(large, float("nan"), gl.where(sees, lse * -_LOG2E, 0.0)), mask=i < i_end)
    gl.store(row_pairs + 2 * row + 1, gl.where(sees, d - grad_lse, 0.0), mask=i < i_end)

    place = (n, h_kv, begin, steps, used_to, len_k)
    interval = (first, last, all_from, all_to)
    tiles = (q_tile, do_tile, k_tiles, v_tiles)
    dq, total, up = _query_gradient(
        key,
        value,
        rows,
        place,
        interval,
        lse,
        d - grad_lse,
        share,
        ratio,
        unit,
        ready,
        0,
        tiles,
        UNUSED,
        STAGES,
        False,
    )
    careful = gl.max(gl.where(large, 1, 0), 0) > 0
    if dtype == gl.float16:
        careful = careful | ~_all_finite(dq, gl.convert_layout(sees, gl.SliceLayout(1, q_layout)))
    if careful:
        _fetch_keys(key, value, n, h_kv, begin, steps, again, 0, k_tiles, v_tiles, STAGES)
        _, total, surplus = _query_gradient(
            key,
            value,
            rows,
            place,
            interval,
            lse,
            d,
            share,
            ratio,
            unit,
            again,
            0,
            tiles,
            UNUSED,
            STAGES,
            True,
            True,
        )
        d += gl.where(total > 0.0, surplus / total, 0.0)
        gl.store(row_pairs + 2 * row + 1, gl.where(sees, d - grad_lse, 0.0), mask=i < i_end)
        # The tiles are free to be written once all warps have read them.
        synchronize()
        _fetch_keys(key, value, n, h_kv, begin, steps, again, STAGES, k_tiles, v_tiles, STAGES)
        dq, total, up = _query_gradient(
            key,
            value,
            rows,
            place,
            interval,
            lse,
            d - grad_lse,
            share,
            ratio,
            unit,
            again,
            STAGES,
            tiles,
            UNUSED,
            STAGES,
            True,
        )

    gl.store(row_rescale + row, 1.0 / total, mask=i < i_end)
    if sink_parts is not None:
        part = gl.sum(gl.where(sees, share / total * (grad_lse - d), 0.0), 0)
        gl.store(sink_parts + (n * kv_heads * group + h) * row_tiles + tile, part)
    if grad_query is not None:
        # P was left undivided. A row that sees no key may have NaN in dO, and then in dQ too.
        factor = gl.where(total == 0.0, 0.0, scale / (total * up))
        factor = gl.convert_layout(factor, gl.SliceLayout(1, q_layout))[:, None]
        store_tile(grad_query, n, h, i_begin, gl.where(factor == 0.0, 0.0, dq * factor), q_tile)
        finish_stores()


@gluon.jit
def _next_rows(h, i, begin, end, BLOCK: gl.constexpr):
    """The tile of rows after this one: the next of [begin, end), after the last the first of the next head."""
    i += BLOCK
    return gl.where(i >= end, h + 1, h), gl.where(i >= end, begin, i)


@gluon.jit
def _key_gradients(
    grad_output,
    query,
    log_sum_exp,
    row_pairs,
    row_rescale,
    rows,
    place,
    interval,
    len_q,
    ratio,
    unit,
    keys_ready,
    ready,
    tiles,
    UNUSED: gl.constexpr,
    STAGES: gl.constexpr,
    CAREFUL: gl.constexpr,
):
    """``(up * dS^T Q, P^T dO, up)``.

    ``row_pairs`` has NaN for rows whose P is to be divided by its row sum. CAREFUL does so, and computes ``up``, 1 otherwise,
    that brings dS^T into fp16's range.
    """
    n, h_begin, row_base, begin, end, steps, used_to = place
    first, last, all_from, all_to = interval
    k_tile, v_tile, q_tiles, do_tiles = tiles
    WARPS: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = query.dtype
    BLOCK_N: gl.constexpr = k_tile.shape[2]
    BLOCK_M: gl.constexpr = query.block_type.shape[2]
    BLOCK_HEAD: gl.constexpr = query.block_type.shape[3]
    BLOCK_VALUE: gl.constexpr = grad_output.block_type.shape[3]
    SHRINK: gl.constexpr = CAREFUL and dtype == gl.float16
    s_layout: gl.constexpr = product_layout(BLOCK_M, WARPS, dtype)
    k_layout: gl.constexpr = product_layout(BLOCK_HEAD, WARPS, dtype)
    v_layout: gl.constexpr = product_layout(BLOCK_VALUE, WARPS, dtype)
    # CAREFUL asks of all rows of a step, which each warp then holds.
    pair_layout: gl.constexpr = gl.BlockedLayout([1, 2], [32, 1], [1, WARPS] if CAREFUL else [WARPS, 1], [1, 0])
    column_layout: gl.constexpr = gl.SliceLayout(0, s_layout)
    STEP_BYTES: gl.constexpr = query.block_type.nbytes + grad_output.block_type.nbytes

    row = gl.arange(0, BLOCK_M, gl.SliceLayout(1, pair_layout))[:, None]
    member = row * 2 + gl.arange(0, 2, gl.SliceLayout(0, pair_layout))[None, :]
    pairs = row_pairs + 2 * row_base
    pair_next = gl.load(pairs + 2 * begin + member, mask=(begin + row < end) & (steps > 0), other=0.0)
    h_ahead = h_begin
    i_ahead = begin
    for slot in gl.static_range(STAGES):
        wanted = slot < steps
        mbarrier.expect(ready.index(slot), STEP_BYTES, pred=wanted)
        fetch(query, n, h_ahead, i_ahead, ready.index(slot), q_tiles.index(slot), wanted)
        fetch(grad_output, n, h_ahead, i_ahead, ready.index(slot), do_tiles.index(slot), wanted)
        h_ahead, i_ahead = _next_rows(h_ahead, i_ahead, begin, end, BLOCK_M)

    dk = warpgroup_mma_init(gl.zeros([BLOCK_N, BLOCK_HEAD], gl.float32, k_layout))
    dv = warpgroup_mma_init(gl.zeros([BLOCK_N, BLOCK_VALUE], gl.float32, v_layout))
    empty = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, s_layout)
    up = gl.full([BLOCK_N], 1.0, gl.float32, gl.SliceLayout(1, s_layout))
    i_begin = begin
    stage = 0
    phase = 0
    mbarrier.wait(keys_ready, 0)
    for step in range(steps):
        shift, d = gl.split(pair_next)
        large = gl.max(gl.where(shift == shift, 0, 1), 0)
        shift = gl.convert_layout(shift, column_layout)
        d = gl.convert_layout(d, column_layout)[None, :]
        mbarrier.wait(ready.index(stage), phase)
        if UNUSED is not None:
            q_rows: gl.constexpr = rows_layout(BLOCK_HEAD, WARPS, dtype)
            do_rows: gl.constexpr = rows_layout(BLOCK_VALUE, WARPS, dtype)
            clear_unused(rows[3], len_q, used_to, i_begin, q_tiles.index(stage), q_rows, UNUSED)
            clear_unused(rows[3], len_q, used_to, i_begin, do_tiles.index(stage), do_rows, UNUSED)
        q = matrix(q_tiles.index(stage))
        do = matrix(do_tiles.index(stage))
        s = warpgroup_mma(matrix(k_tile), q.permute((1, 0)), empty, use_acc=False, is_async=True)
        dp = warpgroup_mma(matrix(v_tile), do.permute((1, 0)), empty, use_acc=False, is_async=True)
        column = row_base + i_begin + gl.arange(0, BLOCK_M, column_layout)
        here = i_begin + gl.arange(0, BLOCK_M, column_layout) < end
        i_next = i_begin + BLOCK_M
        if i_next >= end:
            i_next = begin
            pairs += 2 * len_q
            if CAREFUL:
                row_base += len_q
        pair_next = gl.load(pairs + 2 * i_next + member, mask=(i_next + row < end) & (step + 1 < steps), other=0.0)

        s = capped(warpgroup_mma_wait(num_outstanding=1, deps=(s,)), ratio)
        if ratio is not None:
            # Not P later, beside which the tangents would be kept through branches, in registers that are not there.
            s = hide(s, i_begin, first, last, all_from, all_to, _HIDDEN, s_layout)
        if CAREFUL and large > 0:
            exponents = gl.load(log_sum_exp + column, mask=here, other=float("inf"))
            rescale = gl.load(row_rescale + column, mask=here, other=0.0)
            if ratio is not None:
                # Rows that see no key.
                rescale = gl.where(exponents == float("-inf"), 0.0, rescale)
                exponents = gl.where(exponents == float("-inf"), float("inf"), exponents)
            factor, shift = _exponents(exponents, unit)
            p = gl.exp2(gl.fma(s, factor[None, :], -shift[None, :])) * rescale[None, :]
        else:
            p = gl.exp2(gl.fma(s, unit * _LOG2E, shift[None, :]))
        if ratio is None:
            p = hide(p, i_begin, first, last, all_from, all_to, 0.0, s_layout)
        p_left = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, v_layout, 2))
        if ratio is not None:
            p *= 1.0 - s * s
        dp = warpgroup_mma_wait(num_outstanding=0, deps=(dp,))
        dv = warpgroup_mma(p_left, do, dv, is_async=True)
        ds = p * (dp - d)
        if SHRINK:
            up_before = up
            up = fp16_shrinkage(ds, up)
            ds *= up[:, None]
            dk = warpgroup_mma_wait(num_outstanding=1, deps=(dk,))
            dk = warpgroup_mma_init(dk * gl.convert_layout(up / up_before, gl.SliceLayout(1, k_layout))[:, None])
        dk = warpgroup_mma(gl.convert_layout(ds.to(dtype), gl.DotOperandLayout(0, k_layout, 2)), q, dk, is_async=True)
        # Two accumulators in flight across steps would make ptxas run every product by itself (C7515).
        dk, dv = warpgroup_mma_wait(num_outstanding=0, deps=(dk, dv))
        dk = warpgroup_mma_init(dk)
        dv = warpgroup_mma_init(dv)

        wanted = step + STAGES < steps
        mbarrier.expect(ready.index(stage), STEP_BYTES, pred=wanted)
        fetch(query, n, h_ahead, i_ahead, ready.index(stage), q_tiles.index(stage), wanted)
        fetch(grad_output, n, h_ahead, i_ahead, ready.index(stage), do_tiles.index(stage), wanted)
        h_ahead, i_ahead = _next_rows(h_ahead, i_ahead, begin, end, BLOCK_M)
        i_begin = i_next
        stage, phase = advance(stage, phase, STAGES)
    dk, dv = warpgroup_mma_wait(num_outstanding=0, deps=(dk, dv))
    return dk, dv, up


@gluon.jit(do_not_specialize=["kv_heads", "key_tiles", "len_q", "len_k", "origin", "width", "scale", "unit"])
def _attention_backward_keys(
    grad_output,
    query,
    key,
    value,
    log_sum_exp,
    row_pairs,
    row_rescale,
    rows,
    grad_key,
    grad_value,
    kv_heads,
    group,
    key_tiles,
    len_q,
    len_k,
    origin,
    width,
    scale,
    ratio,
    unit,
    UNUSED: gl.constexpr,
    STAGES: gl.constexpr,
    INTERLEAVED: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
):
    # Everything is transposed here, keys by rows: then P^T and dS^T are the left factors as they come.
    WARPS: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = query.dtype
    BLOCK_HEAD: gl.constexpr = key.block_type.shape[3]
    BLOCK_VALUE: gl.constexpr = value.block_type.shape[3]
    s_layout: gl.constexpr = product_layout(BLOCK_M, WARPS, dtype)
    k_layout: gl.constexpr = product_layout(BLOCK_HEAD, WARPS, dtype)

    n, _, h_kv, tile = locate_program(kv_heads, 1, key_tiles, INTERLEAVED)
    j_begin = tile * BLOCK_N
    j = j_begin + gl.arange(0, BLOCK_N, gl.SliceLayout(1, s_layout))
    # One place for both would cost a plain call 3 % at a head dim of 128.
    NOTHING_TO_LOAD: gl.constexpr = rows[0] is None and rows[1] is None and rows[2] is None and rows[4] is None
    if NOTHING_TO_LOAD:
        first, last, begin, end, all_from, all_to, used_to = rows_of_keys(
            rows, n, j, j_begin, BLOCK_N, origin, width, len_q, len_k, UNUSED
        )

    k_tile = gl.allocate_shared_memory(dtype, key.block_type.shape, key.layout)
    v_tile = gl.allocate_shared_memory(dtype, value.block_type.shape, value.layout)
    q_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, BLOCK_HEAD], query.layout)
    do_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, BLOCK_VALUE], grad_output.layout)
    keys_ready = barriers(1).index(0)
    ready = barriers(STAGES)
    again = barriers(STAGES)
    mbarrier.expect(keys_ready, key.block_type.nbytes + value.block_type.nbytes)
    fetch(key, n, h_kv, j_begin, keys_ready, k_tile)
    fetch(value, n, h_kv, j_begin, keys_ready, v_tile)

    if not NOTHING_TO_LOAD:
        # Keys and values are under way while the program learns which rows see them.
        first, last, begin, end, all_from, all_to, used_to = rows_of_keys(
            rows, n, j, j_begin, BLOCK_N, origin, width, len_q, len_k, UNUSED
        )
    # The rows of every head of the group, one head after the other.
    steps = (end - begin + BLOCK_M - 1) // BLOCK_M * group
    h_begin = h_kv * group
    row_base = (n * kv_heads * group + h_begin).to(gl.int64) * len_q
    place = (n, h_begin, row_base, begin, end, steps, used_to)
    interval = (first, last, all_from, all_to)
    tiles = (k_tile, v_tile, q_tiles, do_tiles)
    # Two loops take registers that larger accumulators need.
    OPTIMISTIC: gl.constexpr = BLOCK_HEAD <= 64 and BLOCK_VALUE <= 64
    dk, dv, up = _key_gradients(
        grad_output,
        query,
        log_sum_exp,
        row_pairs,
        row_rescale,
        rows,
        place,
        interval,
        len_q,
        ratio,
        unit,
        keys_ready,
        ready,
        tiles,
        UNUSED,
        STAGES,
        not OPTIMISTIC,
    )
    # Rows whose P is to be divided have left NaN, and dS beyond fp16 infinities. A key that no row sees may be NaN itself.
    if OPTIMISTIC and not _all_finite(dk, gl.convert_layout(first < last, gl.SliceLayout(1, k_layout))):
        dk, dv, up = _key_gradients(
            grad_output,
            query,
            log_sum_exp,
            row_pairs,
            row_rescale,
            rows,
            place,
            interval,
            len_q,
            ratio,
            unit,
            keys_ready,
            again,
            tiles,
            UNUSED,
            STAGES,
            True,
        )

    if grad_key is not None:
        # A key that no row sees may be NaN, and its value, and then dK too.
        factor = gl.convert_layout(gl.where(first < last, scale / up, 0.0), gl.SliceLayout(1, k_layout))[:, None]
        store_tile(grad_key, n, h_kv, j_begin, gl.where(factor == 0.0, 0.0, dk * factor), k_tile)
    if grad_value is not None:
        store_tile(grad_value, n, h_kv, j_begin, dv, v_tile)
    finish_stores()
