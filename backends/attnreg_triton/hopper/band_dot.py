"""``band[i, c] = scale * x_i . y_j`` on Hopper: the kernel of ``attnreg_triton.band_dot`` with whole rows written.

The products of 64 rows with tiles of 64 keys are put side by side, two at a time, and read skewed as 64 slots a row.
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
    warpgroup_mma_wait,
)

from attnreg_triton.band import all_visible, key_of_first_slot, visible_slots
from attnreg_triton.hopper.factors import fp16_factors, tf32_rest
from attnreg_triton.hopper.skew import (
    BLOCK,
    allocate_views,
    chunk_layout,
    in_vectors,
    load_chunk,
    reuse,
    reuse_for_factors,
    vector_width,
)
from attnreg_triton.hopper.tile import (
    advance,
    barriers,
    describe,
    fetch,
    hide,
    locate_program,
    matrix,
    product_layout,
    rows_layout,
    synchronize,
)
from attnreg_triton.launch import ceil_div, interleaved, launch, lowest
from attnreg_triton.products import hopper_dot_precision
from attnreg_triton.rows import Place, keys_of_rows
from attnreg_triton.tiles import hopper_band_dot


def band_dot(rows: Tensor, keys: Tensor, band: Tensor, place: Place, *, scale: float, fill: float) -> None:
    """Fill ``band``: (N, H, Lq, E), (N, Hkv, Lk, E) -> (N, H, Lq, W), of a call that ``serves_band_dot`` accepts."""
    batch, heads, len_q, head_dim = rows.shape
    _, kv_heads, len_k, _ = keys.shape
    tiles = hopper_band_dot(rows.dtype, head_dim)
    row_tiles = ceil_div(len_q, tiles.rows)
    vector = vector_width(band)
    launch(
        _band_dot,
        batch * heads * row_tiles,
        tiles,
        describe(rows, tiles.rows),
        describe(keys, tiles.keys),
        place.rows,
        band,
        *in_vectors(band, vector),
        kv_heads,
        heads // kv_heads,
        row_tiles,
        len_q,
        len_k,
        place.origin,
        scale,
        FILL=fill,
        LOWEST=lowest(band, fill),
        VECTOR=vector,
        PRECISION=hopper_dot_precision(rows.dtype, head_dim),
        STAGES=tiles.num_stages,
        INTERLEAVED=interleaved(rows),
        device=rows.device,
    )


@gluon.jit(
    do_not_specialize=[
        "band_stride_n",
        "band_stride_h",
        "band_stride_i",
        "width",
        "kv_heads",
        "row_tiles",
        "len_q",
        "len_k",
        "origin",
        "scale",
    ]
)
def _band_dot(
    rows,
    keys,
    place,
    band,
    band_stride_n,
    band_stride_h,
    band_stride_i,
    width,
    kv_heads,
    group,
    row_tiles,
    len_q,
    len_k,
    origin,
    scale,
    FILL: gl.constexpr,
    LOWEST: gl.constexpr,
    VECTOR: gl.constexpr,
    PRECISION: gl.constexpr,
    STAGES: gl.constexpr,
    INTERLEAVED: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
):
    gl.static_assert(BLOCK_M == BLOCK)
    gl.static_assert(BLOCK_N == BLOCK)
    WARPS: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = rows.dtype
    BLOCK_DIM: gl.constexpr = rows.block_type.shape[3]
    # What the units multiply.
    factor: gl.constexpr = gl.float16 if PRECISION == "3xfp16" else dtype
    s_layout: gl.constexpr = product_layout(BLOCK, WARPS, factor)
    x_layout: gl.constexpr = gl.DotOperandLayout(0, s_layout, 32 // factor.primitive_bitwidth)
    y_layout: gl.constexpr = rows_layout(BLOCK_DIM, WARPS, dtype)
    c_layout: gl.constexpr = chunk_layout(VECTOR)

    n, h, h_kv, tile = locate_program(kv_heads, group, row_tiles, INTERLEAVED)
    i_begin = tile * BLOCK
    width *= VECTOR
    j_begin = i_begin + key_of_first_slot(place, n, i_begin, True, origin, width, len_q, len_k, False)
    chunks = (width + BLOCK - 1) // BLOCK

    y_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK, BLOCK_DIM], keys.layout)
    straight, skewed = allocate_views(dtype, VECTOR)
    # The factors of the rows stay in registers. Those of a tile of keys have been used when its products are staged, and
    # take the same memory.
    if PRECISION == "3xfp16":
        x_tile = reuse(skewed, y_tiles.index(0))
        y_hi, y_lo = reuse_for_factors(skewed, BLOCK_DIM)
        x_hi = gl.zeros([BLOCK, BLOCK_DIM], factor, x_layout)
        x_lo = x_hi
        x_down = gl.zeros([BLOCK], gl.float32, gl.SliceLayout(1, s_layout))
    else:
        x_tile = gl.allocate_shared_memory(dtype, rows.block_type.shape, rows.layout)
        if PRECISION == "3xtf32":
            y_rest = matrix(reuse(skewed, y_tiles.index(0)))
            x_rest = gl.zeros([BLOCK, BLOCK_DIM], dtype, x_layout)
    ready = barriers(STAGES)
    for slot in gl.static_range(STAGES):
        wanted = slot <= chunks
        if slot == 0:
            mbarrier.expect(ready.index(0), rows.block_type.nbytes + keys.block_type.nbytes)
            fetch(rows, n, h, i_begin, ready.index(0), x_tile)
        else:
            mbarrier.expect(ready.index(slot), keys.block_type.nbytes, pred=wanted)
        fetch(keys, n, h_kv, j_begin + slot * BLOCK, ready.index(slot), y_tiles.index(slot), wanted)

    r = gl.arange(0, BLOCK, gl.SliceLayout(1, c_layout))
    c = gl.arange(0, BLOCK, gl.SliceLayout(0, c_layout))
    # A row past the last has no slots.
    slots = gl.where(i_begin + r < len_q, width, 0)[:, None]
    band += (n.to(gl.int64) * band_stride_n + h.to(gl.int64) * band_stride_h) * VECTOR
    band += i_begin.to(gl.int64) * band_stride_i * VECTOR
    offsets = r[:, None] * (band_stride_i * VECTOR) + c[None, :]
    key = gl.arange(0, BLOCK, gl.SliceLayout(0, s_layout))
    if place[3] is not None:
        i = i_begin + gl.arange(0, BLOCK, gl.SliceLayout(1, s_layout))
        i_end = gl.minimum(i_begin + BLOCK, len_q)
        first, last, _, _ = keys_of_rows(place, n, i, i_begin, i_end, origin, width, len_q, len_k)
        all_from, all_to = all_visible(first, last, i + origin, width, len_k)
    else:
        first, last = visible_slots(place, n, i_begin, i_begin, i_begin, origin, width, len_q, len_k)

    x = matrix(x_tile)
    empty = gl.zeros([BLOCK, BLOCK], gl.float32, s_layout)
    before = gl.zeros([BLOCK, BLOCK], dtype, s_layout)
    stage = 0
    phase = 0
    for step in range(chunks + 1):
        mbarrier.wait(ready.index(stage), phase)
        y = matrix(y_tiles.index(stage))
        # Of four products of factors the one below fp32's last bit is left out, and the smallest is the first.
        if PRECISION == "3xfp16":
            if step == 0:
                hi, lo, down = fp16_factors(x.load(y_layout))
                x_hi = gl.convert_layout(hi, x_layout)
                x_lo = gl.convert_layout(lo, x_layout)
                x_down = gl.convert_layout(down, gl.SliceLayout(1, s_layout)) * scale
            hi, lo, down = fp16_factors(y.load(y_layout))
            y_down = gl.convert_layout(down, gl.SliceLayout(0, s_layout))
            synchronize()
            y_hi.store(hi)
            y_lo.store(lo)
            fence_async_shared()
            synchronize()
            s = warpgroup_mma(x_lo, y_hi.permute((1, 0)), empty, use_acc=False, is_async=True)
            s = warpgroup_mma(x_hi, y_lo.permute((1, 0)), s, is_async=True)
            s = warpgroup_mma(x_hi, y_hi.permute((1, 0)), s, is_async=True)
            s = warpgroup_mma_wait(num_outstanding=0, deps=(s,)) * x_down[:, None] * y_down[None, :]
        elif PRECISION == "3xtf32":
            if step == 0:
                x_rest = tf32_rest(x.load(x_layout))
            synchronize()
            y_rest.store(tf32_rest(y.load(y_layout)))
            fence_async_shared()
            synchronize()
            s = warpgroup_mma(x_rest, y.permute((1, 0)), empty, use_acc=False, is_async=True)
            s = warpgroup_mma(x, y_rest.permute((1, 0)), s, is_async=True)
            s = warpgroup_mma(x, y.permute((1, 0)), s, is_async=True)
            s = warpgroup_mma_wait(num_outstanding=0, deps=(s,)) * scale
        else:
            s = warpgroup_mma(x, y.permute((1, 0)), empty, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(num_outstanding=0, deps=(s,)) * scale
        # A visible slot is never -inf, which would hide it.
        s = gl.where(s < LOWEST, LOWEST, s)
        if place[3] is not None:
            s = hide(s, j_begin, first, last, all_from, all_to, FILL, s_layout)
        elif (j_begin < first) | (j_begin + BLOCK > last):
            s = gl.where(((j_begin + key >= first) & (j_begin + key < last))[None, :], s, FILL)
        now = s.to(dtype)
        synchronize()
        wanted = step + STAGES <= chunks
        mbarrier.expect(ready.index(stage), keys.block_type.nbytes, pred=wanted)
        fetch(keys, n, h_kv, j_begin + STAGES * BLOCK, ready.index(stage), y_tiles.index(stage), wanted)
        if step > 0:
            straight.slice(0, BLOCK, 1).store(before)
            straight.slice(BLOCK, BLOCK, 1).store(now)
            synchronize()
            gl.store(band + offsets, load_chunk(skewed), mask=(step - 1) * BLOCK + c[None, :] < slots)
            band += BLOCK
        before = now
        j_begin += BLOCK
        stage, phase = advance(stage, phase, STAGES)
