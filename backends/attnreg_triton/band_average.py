"""A band times keys gives rows: ``out_i = scale * sum_c band[i, c] * y_j``, over the visible slots.

The weighted average of the values, and the gradient of the query, dS . K, where slots that the bias hides are left out.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from attnreg import Window, empty_like
from attnreg_triton.band import (
    below,
    clear_unseen,
    finite,
    key_of_first_slot,
    load_bias,
    load_clamped_rows,
    load_rows,
    locate_program,
    next_inside,
    skewed_pointers,
    steps_inside,
    store_rows,
    used,
    within,
)
from attnreg_triton.hopper import service as hopper
from attnreg_triton.interpreter import span
from attnreg_triton.launch import bias_strides, ceil_div, interleaved, launch, long_offsets, padded, strides
from attnreg_triton.products import average_precision, weights_by_rows
from attnreg_triton.rows import Place, keys_of_rows
from attnreg_triton.tiles import average_by_rows


def band_average(
    band: Tensor,
    keys: Tensor,
    window: Window,
    place: Place,
    *,
    like: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """(N, H, Lq, W), (N, Hkv, Lk, D) -> (N, H, Lq, D), in memory as ``like`` (N, H, Lq, any)."""
    batch, heads, len_q, _ = band.shape
    _, kv_heads, len_k, head_dim = keys.shape
    rows = empty_like(like, head_dim)
    if hopper.serves_band_average(band, keys, window, place, bias=bias):
        from attnreg_triton.hopper import band_average as on_hopper

        on_hopper.band_average(band, keys, rows, place, scale=scale)
        return rows
    tiles = average_by_rows(keys.dtype, head_dim, window)
    row_tiles = ceil_div(len_q, tiles.rows)
    launch(
        _band_average,
        batch * heads * row_tiles,
        tiles,
        band,
        keys,
        bias,
        place.rows,
        rows,
        *strides(band),
        strides(keys),
        *bias_strides(bias),
        strides(rows),
        heads,
        heads // kv_heads,
        row_tiles,
        len_q,
        len_k,
        place.origin,
        place.width,
        scale,
        GAPS=place.gaps,
        DIM=head_dim,
        BLOCK_DIM=padded(head_dim),
        PRECISION=average_precision(keys.dtype, head_dim, window),
        LONG=long_offsets(band, tiles),
        INTERLEAVED=interleaved(rows),
        device=keys.device,
    )
    return rows


@triton.jit(
    do_not_specialize=[
        "band_stride_n",
        "band_stride_h",
        "band_stride_i",
        "bias_stride_n",
        "bias_stride_h",
        "bias_stride_i",
        "heads",
        "row_tiles",
        "len_q",
        "len_k",
        "origin",
        "width",
        "scale",
    ]
)
def _band_average(
    band,
    keys,
    bias,
    place,
    rows,
    band_stride_n,
    band_stride_h,
    band_stride_i,
    keys_strides,
    bias_stride_n,
    bias_stride_h,
    bias_stride_i,
    bias_stride_c,
    rows_strides,
    heads,
    group,
    row_tiles,
    len_q,
    len_k,
    origin,
    width,
    scale,
    GAPS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    LONG: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    bias_strides = (bias_stride_n, bias_stride_h, bias_stride_i)
    n, h, h_kv, tile = locate_program(tl.program_id(0), heads, group, row_tiles, INTERLEAVED)
    i_begin = tile * BLOCK_M
    i_end = tl.minimum(i_begin + BLOCK_M, len_q)
    i_tile = i_begin + tl.arange(0, BLOCK_M)
    i = i_tile[:, None]
    first, last, begin, end = keys_of_rows(place, n, i_tile, i_begin, i_end, origin, width, len_q, len_k)

    # Everything is counted from the first row, i_begin, and the key of its slot 0, or of each row's if there are gaps.
    offset = key_of_first_slot(place, n, i_tile, i_tile < i_end, origin, width, len_q, len_k, GAPS)
    j_origin = i_begin + offset
    r = tl.arange(0, BLOCK_M)
    slots = tl.where(i_tile < i_end, width, 0)[:, None]
    keys += n * keys_strides[0] + h_kv * keys_strides[1]
    band += n * band_stride_n + h * band_stride_h + i_begin.to(tl.int64) * band_stride_i
    step_begin, step_end = begin, end
    if GAPS:
        # There may be keys between that no row sees.
        start, steps = steps_inside(first, last, BLOCK_N)
        step_begin, step_end = 0, steps * BLOCK_N
    unfinished: tl.constexpr = True
    for CLEAR in tl.static_range(1 + (bias is not None)):
        if unfinished:
            acc = tl.zeros((BLOCK_M, BLOCK_DIM), tl.float32)
            if GAPS:
                position = start
            for step in span(step_begin, step_end, BLOCK_N):
                j_begin = step
                if GAPS:
                    j_begin = position
                    position = next_inside(position + BLOCK_N, first, last)
                j_tile = j_begin + tl.arange(0, BLOCK_N)
                j = j_tile[None, :]
                q = j - j_origin
                if place[3] is not None:
                    visible = within(j, first[:, None], last[:, None])
                else:
                    # A key past the end is in no row's slots.
                    visible = below(tl.where(j < end, q, -BLOCK_M) - r[:, None], slots)
                if bias is not None:
                    b = load_bias(bias, bias_strides, bias_stride_c, n, h, i, j, offset, visible)
                    visible = b != float("-inf")
                w = tl.load(skewed_pointers(band, band_stride_i, r[:, None], q, LONG), mask=visible, other=0.0)
                if GAPS:
                    y = load_rows(keys, keys_strides, 0, 0, j_tile, used(place[4], j_tile, len_k), DIM, BLOCK_DIM)
                else:
                    y = load_clamped_rows(keys, keys_strides[2], j_tile, begin, end - 1, DIM, BLOCK_DIM)
                if CLEAR:
                    y = clear_unseen(y, visible)
                acc = weights_by_rows(w, y, acc, PRECISION)
        unfinished = not finite(acc)

    store_rows(rows, rows_strides, n, h, i_tile, i_tile < i_end, acc * scale, DIM, BLOCK_DIM)
