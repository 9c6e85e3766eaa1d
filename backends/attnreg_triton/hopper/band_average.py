"""``out_i = scale * sum_c band[i, c] y_j`` on Hopper: the kernel of ``attnreg_triton.band_average`` with whole rows read.

A chunk of 64 slots a row, seen straight, fills the upper half of one tile of 64 keys and the lower half of the next.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from attnreg_triton.band import all_visible, key_of_first_slot, visible_slots
from attnreg_triton.hopper.factors import allocate_factors, fp16_factors
from attnreg_triton.hopper.skew import BLOCK, allocate_views, chunk_layout, store_chunk
from attnreg_triton.hopper.tile import (
    advance,
    barriers,
    describe,
    fetch,
    finish_stores,
    hide,
    keep_rows,
    locate_program,
    matrix,
    product_layout,
    rows_layout,
    store_tile,
    synchronize,
)
from attnreg_triton.launch import ceil_div, interleaved, launch
from attnreg_triton.rows import Place, keys_of_rows
from attnreg_triton.tiles import hopper_band_average


def band_average(band: Tensor, keys: Tensor, rows: Tensor, place: Place, *, scale: float) -> None:
    """Fill ``rows``: (N, H, Lq, W), (N, Hkv, Lk, D) -> (N, H, Lq, D), of a call that ``serves_band_average`` accepts."""
    batch, heads, len_q, _ = band.shape
    _, kv_heads, len_k, _ = keys.shape
    tiles = hopper_band_average(keys.dtype)
    row_tiles = ceil_div(len_q, tiles.rows)
    launch(
        _band_average,
        batch * heads * row_tiles,
        tiles,
        describe(band, tiles.rows, columns=BLOCK.value),
        describe(keys, tiles.keys),
        place.rows,
        describe(rows, tiles.rows),
        kv_heads,
        heads // kv_heads,
        row_tiles,
        len_q,
        len_k,
        place.origin,
        place.width,
        scale,
        STAGES=tiles.num_stages,
        INTERLEAVED=interleaved(rows),
        device=keys.device,
    )


@gluon.jit
def _stage_weights(skewed, weights, j_begin, first, last, layout: gl.constexpr):
    """Put a chunk that begins at key ``j_begin`` into shared memory, with 0 for keys outside [first, last)."""
    # The first slot of the first row has the first key of all, the last slot of the last row the last one.
    if (j_begin < first) | (j_begin + 2 * BLOCK > last):
        begin = first - j_begin - gl.arange(0, BLOCK, gl.SliceLayout(1, layout))[:, None]
        c = gl.arange(0, BLOCK, gl.SliceLayout(0, layout))[None, :]
        store_chunk(skewed, gl.where((c >= begin) & (c < begin + (last - first)), weights, 0.0))
    else:
        store_chunk(skewed, weights)


@gluon.jit(do_not_specialize=["kv_heads", "row_tiles", "len_q", "len_k", "origin", "width", "scale"])
def _band_average(
    band,
    keys,
    place,
    rows,
    kv_heads,
    group,
    row_tiles,
    len_q,
    len_k,
    origin,
    width,
    scale,
    STAGES: gl.constexpr,
    INTERLEAVED: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
):
    gl.static_assert(BLOCK_M == BLOCK)
    gl.static_assert(BLOCK_N == BLOCK)
    WARPS: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = keys.dtype
    BLOCK_DIM: gl.constexpr = keys.block_type.shape[3]
    # fp32 is multiplied as three products of fp16.
    FACTORS: gl.constexpr = dtype == gl.float32
    factor: gl.constexpr = gl.float16 if FACTORS else dtype
    o_layout: gl.constexpr = product_layout(BLOCK_DIM, WARPS, factor)
    w_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    y_layout: gl.constexpr = rows_layout(BLOCK_DIM, WARPS, dtype)
    c_layout: gl.constexpr = chunk_layout(1)

    n, h, h_kv, tile = locate_program(kv_heads, group, row_tiles, INTERLEAVED)
    i_begin = tile * BLOCK
    j_origin = i_begin + key_of_first_slot(place, n, i_begin, True, origin, width, len_q, len_k, False)
    # These rows see some of keys [key_begin, key_end). No row at all sees one outside [used_from, used_to): it may be NaN.
    UNUSED: gl.constexpr = not (place[0] is None and place[1] is None and place[2] is None and place[3] is None)
    if place[3] is not None:
        i = i_begin + gl.arange(0, BLOCK, gl.SliceLayout(1, w_layout))
        i_end = gl.minimum(i_begin + BLOCK, len_q)
        first, last, key_begin, key_end = keys_of_rows(place, n, i, i_begin, i_end, origin, width, len_q, len_k)
        all_from, all_to = all_visible(first, last, i + origin, width, len_k)
        used_from, used_to = gl.load(place[3]), gl.load(place[3] + 2 * len_q - 1)
    else:
        key_begin, key_end = visible_slots(place, n, i_begin, i_begin, i_begin, origin, width, len_q, len_k)
        used_from, used_to = key_begin, key_end
        if place[2] is not None:
            used_to = gl.minimum(key_end, j_origin - i_begin + len_q - 1 + width)
    # Tile t of keys begins at that of slot 64 t of the first row. Tiles [begin, end) have visible keys, or one more that
    # comes before them: half of its chunk belongs to the next.
    begin = gl.maximum((key_begin - j_origin) // BLOCK - 1, 0)
    end = gl.minimum(key_end - j_origin, width + BLOCK - 1)
    end = gl.maximum((end + BLOCK - 1) // BLOCK, begin)
    j_begin = j_origin + begin * BLOCK

    w_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK, BLOCK], band.layout)
    y_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK, BLOCK_DIM], keys.layout)
    straight, skewed = allocate_views(dtype, 1)
    ready = barriers(STAGES)
    for slot in gl.static_range(STAGES):
        wanted = begin + slot < end
        mbarrier.expect(ready.index(slot), band.block_type.nbytes + keys.block_type.nbytes, pred=wanted)
        column = (begin + slot) * BLOCK
        fetch(band, n, h, i_begin, ready.index(slot), w_tiles.index(slot), wanted, column)
        fetch(keys, n, h_kv, j_begin + slot * BLOCK, ready.index(slot), y_tiles.index(slot), wanted)

    if FACTORS:
        y_hi, y_lo = allocate_factors(BLOCK_DIM)
    # What no chunk reaches, left of the skew and right of it, stays zero.
    nothing = gl.zeros([BLOCK, BLOCK], dtype, w_layout)
    straight.slice(0, BLOCK, 1).store(nothing)
    straight.slice(BLOCK, BLOCK, 1).store(nothing)
    rest = nothing
    acc = gl.zeros([BLOCK, BLOCK_DIM], gl.float32, o_layout)
    stage = 0
    phase = 0
    for step in range(begin, end):
        mbarrier.wait(ready.index(stage), phase)
        weights = matrix(w_tiles.index(stage)).load(c_layout)
        if FACTORS:
            y = matrix(y_tiles.index(stage)).load(y_layout)
            if UNUSED:
                key = j_begin + gl.arange(0, BLOCK, gl.SliceLayout(1, y_layout))[:, None]
                y = gl.where((key >= used_from) & (key < used_to), y, 0.0)
            hi, lo, down = fp16_factors(y)
            y_down = gl.convert_layout(down, gl.SliceLayout(0, w_layout))
            synchronize()
            y_hi.store(hi)
            y_lo.store(lo)
            fence_async_shared()
        else:
            synchronize()
            if UNUSED and (j_begin < used_from) | (j_begin + BLOCK > used_to):
                key = j_begin + gl.arange(0, BLOCK, gl.SliceLayout(1, y_layout))
                keep_rows((key >= used_from) & (key < used_to), y_tiles.index(stage), y_layout)
        if place[3] is not None:
            store_chunk(skewed, weights)
        else:
            _stage_weights(skewed, weights, j_begin, key_begin, key_end, c_layout)
        synchronize()
        # One of the two is zero: the tile's keys past each row's first slot in this chunk, and those before it.
        w = straight.slice(0, BLOCK, 1).load(w_layout) + rest
        rest = straight.slice(BLOCK, BLOCK, 1).load(w_layout)
        if place[3] is not None:
            w = hide(w, j_begin, first, last, all_from, all_to, 0.0, w_layout)
        if FACTORS:
            # Of four products of factors the one below fp32's last bit is left out, and the smallest is the first.
            w_hi, w_lo, w_down = fp16_factors(w * y_down[None, :])
            part = warpgroup_mma(w_lo, y_hi, gl.zeros_like(acc), use_acc=False, is_async=True)
            part = warpgroup_mma(w_hi, y_lo, part, is_async=True)
            part = warpgroup_mma(w_hi, y_hi, part, is_async=True)
        else:
            acc = warpgroup_mma(w, matrix(y_tiles.index(stage)), warpgroup_mma_init(acc), is_async=True)
            acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
            synchronize()
        wanted = step + STAGES < end
        mbarrier.expect(ready.index(stage), band.block_type.nbytes + keys.block_type.nbytes, pred=wanted)
        column = (step + STAGES) * BLOCK
        fetch(band, n, h, i_begin, ready.index(stage), w_tiles.index(stage), wanted, column)
        fetch(keys, n, h_kv, j_begin + STAGES * BLOCK, ready.index(stage), y_tiles.index(stage), wanted)
        if FACTORS:
            part = warpgroup_mma_wait(num_outstanding=0, deps=(part,))
            acc += part * gl.convert_layout(w_down, gl.SliceLayout(1, o_layout))[:, None]
        j_begin += BLOCK
        stage, phase = advance(stage, phase, STAGES)
    store_tile(rows, n, h, i_begin, acc * scale, y_tiles.index(0))
    finish_stores()
