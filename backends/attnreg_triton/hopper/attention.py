"""``O = softmax(scale * Q K^T) V`` on Hopper: the kernel of ``attnreg_triton.attention``, software-pipelined.

While the softmax of one tile of keys is computed, the product of the tile before with V is under way.
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
from attnreg_triton.hopper.rows import clear_unused, keys_of_rows, unused
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
)
from attnreg_triton.launch import ceil_div, interleaved, launch
from attnreg_triton.rows import Place
from attnreg_triton.softcap import capping

_LOG2E = gl.constexpr(1.4426950408889634)
_LN2 = gl.constexpr(0.6931471805599453)
# An exponent of which rounding takes at most 8, and whose last digit stands for 16 or more.
_LARGE = gl.constexpr(2.0**28)


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window,
    *,
    rows: Place,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The output (N, H, Lq, D) and the natural log-sum-exp (N, H, Lq) of a call that ``serves`` accepts.

    ``rows`` has the table ``by_key`` where there may be gaps.
    """
    batch, heads, len_q, head_dim = query.shape
    _, kv_heads, len_k, value_dim = value.shape
    output = empty_like(query, value_dim)
    log_sum_exp = torch.empty((batch, heads, len_q), dtype=torch.float32, device=query.device)
    tiles = tile_table.hopper_attention(head_dim, value_dim, window)
    row_tiles = ceil_div(len_q, tiles.rows)
    ratio, unit = capping(scale, softcap)
    launch(
        _attention,
        batch * heads * row_tiles,
        tiles,
        describe(query, tiles.rows),
        describe(key, tiles.keys),
        describe(value, tiles.keys),
        rows.rows,
        sinks,
        describe(output, tiles.rows),
        log_sum_exp,
        kv_heads,
        heads // kv_heads,
        row_tiles,
        len_q,
        len_k,
        rows.origin,
        rows.width,
        None if softcap is None else ratio,
        unit,
        UNUSED=unused(rows),
        STAGES=tiles.num_stages,
        INTERLEAVED=interleaved(query),
        device=query.device,
    )
    return output, log_sum_exp


@gluon.jit
def _softmax_step(s, m, total, unit):
    """``(P, rescale, m, total)`` after the scores ``s`` (undone of their ``unit``, here times log2(e); of masked keys -inf).

    P = 2^(unit * s - m) with m = max(unit * s), rounded; what was accumulated under the older maximum is to be multiplied by
    ``rescale``. What rounding takes from m, all exponents of a row gain: the damping keeps that small where scores are so large
    that those that differ at all differ by more. ``total`` has the sums of a row's columns modulo 8, which are one thread's.
    """
    m_new = gl.maximum(m, gl.max(s, 1) * unit)
    # While a row has seen no visible key its maximum is -inf, and -inf - -inf would be NaN.
    shift = gl.where(m_new == float("-inf"), 0.0, m_new)
    root = gl.rsqrt(gl.abs(shift) * (1.0 / _LARGE))
    damping = gl.minimum(root * root, 1.0)
    p = gl.exp2(gl.fma(s, (unit * damping)[:, None], -(shift * damping)[:, None]))
    rescale = gl.exp2(m - shift)
    sums = gl.sum(gl.reshape(p, [p.shape[0], p.shape[1] // 8, 8]), 1)
    sums = gl.convert_layout(sums, total.type.layout, assert_trivial=True)
    return p, rescale, m_new, total * rescale[:, None] + sums


@gluon.jit
def _with_sink(sink, m, total):
    """``(m, total, what O is to be multiplied by)`` with ``2^sink`` added to the sums of rows that see a key."""
    sees = total != 0.0
    m_new = gl.maximum(m, sink)
    rescale = gl.where(sees, gl.exp2(m - m_new), 0.0)
    total = gl.where(sees, total * rescale + gl.exp2(sink - m_new), 0.0)
    return m_new, total, gl.where(sees, rescale / total, 0.0)


@gluon.jit(do_not_specialize=["kv_heads", "row_tiles", "len_q", "len_k", "origin", "width", "unit"])
def _attention(
    query,
    key,
    value,
    rows,
    sinks,
    output,
    log_sum_exp,
    kv_heads,
    group,
    row_tiles,
    len_q,
    len_k,
    origin,
    width,
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
    o_layout: gl.constexpr = product_layout(BLOCK_VALUE, WARPS, dtype)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    v_layout: gl.constexpr = rows_layout(BLOCK_VALUE, WARPS, dtype)

    q_tile = gl.allocate_shared_memory(dtype, query.block_type.shape, query.layout)
    o_tile = q_tile
    if BLOCK_HEAD != BLOCK_VALUE:
        o_tile = gl.allocate_shared_memory(dtype, output.block_type.shape, output.layout)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_HEAD], key.layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_VALUE], value.layout)
    k_ready = barriers(STAGES)
    v_ready = barriers(STAGES)
    n, h, h_kv, tile = locate_program(kv_heads, group, row_tiles, INTERLEAVED)
    i_begin = tile * BLOCK_M
    # The query is under way while the program learns which keys its rows see.
    mbarrier.expect(k_ready.index(0), query.block_type.nbytes + key.block_type.nbytes)
    fetch(query, n, h, i_begin, k_ready.index(0), q_tile)

    i_end = gl.minimum(i_begin + BLOCK_M, len_q)
    i = i_begin + gl.arange(0, BLOCK_M, gl.SliceLayout(1, s_layout))
    first, last, begin, end, all_from, all_to, used_to = keys_of_rows(
        rows, n, i, i_begin, i_end, origin, width, len_q, len_k, UNUSED
    )
    # One step at least, for the pipeline to start with; where no key is visible all of it is hidden.
    steps = gl.maximum((end - begin + BLOCK_N - 1) // BLOCK_N, 1)
    for slot in gl.static_range(STAGES):
        wanted = slot < steps
        if slot > 0:
            mbarrier.expect(k_ready.index(slot), key.block_type.nbytes, pred=wanted)
        fetch(key, n, h_kv, begin + slot * BLOCK_N, k_ready.index(slot), k_tiles.index(slot), wanted)
        mbarrier.expect(v_ready.index(slot), value.block_type.nbytes, pred=wanted)
        fetch(value, n, h_kv, begin + slot * BLOCK_N, v_ready.index(slot), v_tiles.index(slot), wanted)
    if sinks is not None:
        sink = load_sink(sinks, h) * _LOG2E

    unit2 = unit * _LOG2E
    m = gl.full([BLOCK_M], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
    total = gl.zeros([BLOCK_M, 8], gl.float32, s_layout)
    acc = warpgroup_mma_init(gl.zeros([BLOCK_M, BLOCK_VALUE], gl.float32, o_layout))
    empty = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, s_layout)

    mbarrier.wait(k_ready.index(0), 0)
    s = warpgroup_mma(matrix(q_tile), matrix(k_tiles.index(0)).permute((1, 0)), empty, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(num_outstanding=0, deps=(s,))
    wanted = steps > STAGES
    mbarrier.expect(k_ready.index(0), key.block_type.nbytes, pred=wanted)
    fetch(key, n, h_kv, begin + STAGES * BLOCK_N, k_ready.index(0), k_tiles.index(0), wanted)
    s = hide(capped(s, ratio), begin, first, last, all_from, all_to, float("-inf"), s_layout)
    p, _, m, total = _softmax_step(s, m, total, unit2)
    p = gl.convert_layout(p.to(dtype), p_layout)

    j_begin = begin
    before = 0
    phase_before = 0
    stage = 1 % STAGES
    phase = 1 // STAGES
    for step in range(1, steps):
        # A tail begins in the last step.
        if UNUSED == "gaps":
            mbarrier.wait(v_ready.index(before), phase_before)
            clear_unused(rows[4], len_k, used_to, j_begin, v_tiles.index(before), v_layout, UNUSED)
        j_begin += BLOCK_N
        # S = Q K^T of this tile, and after it acc += P V of the tile before, which runs on during the softmax.
        mbarrier.wait(k_ready.index(stage), phase)
        k = matrix(k_tiles.index(stage)).permute((1, 0))
        s = warpgroup_mma(matrix(q_tile), k, empty, use_acc=False, is_async=True)
        mbarrier.wait(v_ready.index(before), phase_before)
        acc = warpgroup_mma(p, matrix(v_tiles.index(before)), acc, is_async=True)
        s = warpgroup_mma_wait(num_outstanding=1, deps=(s,))
        wanted = step + STAGES < steps
        mbarrier.expect(k_ready.index(stage), key.block_type.nbytes, pred=wanted)
        fetch(key, n, h_kv, j_begin + STAGES * BLOCK_N, k_ready.index(stage), k_tiles.index(stage), wanted)

        s = hide(capped(s, ratio), j_begin, first, last, all_from, all_to, float("-inf"), s_layout)
        p, rescale, m, total = _softmax_step(s, m, total, unit2)

        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        wanted = step - 1 + STAGES < steps
        mbarrier.expect(v_ready.index(before), value.block_type.nbytes, pred=wanted)
        fetch(value, n, h_kv, j_begin + (STAGES - 1) * BLOCK_N, v_ready.index(before), v_tiles.index(before), wanted)
        acc = warpgroup_mma_init(acc * gl.convert_layout(rescale, gl.SliceLayout(1, o_layout))[:, None])
        p = gl.convert_layout(p.to(dtype), p_layout)
        before = stage
        phase_before = phase
        stage, phase = advance(stage, phase, STAGES)

    mbarrier.wait(v_ready.index(before), phase_before)
    if UNUSED is not None:
        clear_unused(rows[4], len_k, used_to, j_begin, v_tiles.index(before), v_layout, UNUSED)
    acc = warpgroup_mma(p, matrix(v_tiles.index(before)), acc, is_async=True)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))

    total = gl.sum(total, 1)
    # A row without a visible key has a total of 0 and acc = 0: O = 0 and a log-sum-exp of -inf.
    inverse = 1.0 / gl.where(total == 0.0, 1.0, total)
    if sinks is not None:
        m, total, inverse = _with_sink(sink, m, total)
    acc = acc * gl.convert_layout(inverse, gl.SliceLayout(1, o_layout))[:, None]
    store_tile(output, n, h, i_begin, acc, o_tile)
    row = (n * kv_heads * group + h).to(gl.int64) * len_q + i
    gl.store(log_sum_exp + row, (m + gl.log2(total)) * _LN2, mask=i < i_end)
    finish_stores()
