"""A band, transposed, times rows gives keys: ``out_j = scale * sum_i band[i, c] * x_i``, over the visible slots.

The gradients of the value, P^T dO, and of the key, dS^T Q. A program owns a tile of keys and sums over the rows that
see them, in every query head of their group; nothing is shared between programs, so no atomics are needed.
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
from attnreg_triton.interpreter import span
from attnreg_triton.launch import bias_strides, ceil_div, interleaved, launch, long_offsets, padded, strides
from attnreg_triton.products import average_precision, weights_by_rows
from attnreg_triton.rows import Place, bounds, rows_of_keys
from attnreg_triton.tiles import average_by_keys


def band_average_transposed(
    band: Tensor,
    rows: Tensor,
    window: Window,
    place: Place,
    *,
    like: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """(N, H, Lq, W), (N, H, Lq, D) -> (N, Hkv, Lk, D), in memory as the keys ``like``; of a place that has ``by_key``."""
    batch, heads, len_q, head_dim = rows.shape
    _, kv_heads, len_k, _ = like.shape
    keys = empty_like(like)
    tiles = average_by_keys(rows.dtype, head_dim, window)
    key_tiles = ceil_div(len_k, tiles.keys)
    launch(
        _band_average_transposed,
        batch * kv_heads * key_tiles,
        tiles,
        band,
        rows,
        bias,
        place.rows,
        keys,
        *strides(band),
        strides(rows),
        *bias_strides(bias),
        strides(keys),
        kv_heads,
        heads // kv_heads,
        key_tiles,
        len_q,
        len_k,
        place.origin,
        place.width,
        scale,
        GAPS=place.gaps,
        DIM=head_dim,
        BLOCK_DIM=padded(head_dim),
        PRECISION=average_precision(rows.dtype, head_dim, window),
        LONG=long_offsets(band, tiles),
        INTERLEAVED=interleaved(keys),
        device=rows.device,
    )
    return keys


@triton.jit(
    do_not_specialize=[
        "band_stride_n",
        "band_stride_h",
        "band_stride_i",
        "bias_stride_n",
        "bias_stride_h",
        "bias_stride_i",
        "kv_heads",
        "key_tiles",
        "len_q",
        "len_k",
        "origin",
        "width",
        "scale",
    ]
)
def _band_average_transposed(
    band,
    rows,
    bias,
    place,
    keys,
    band_stride_n,
    band_stride_h,
    band_stride_i,
    rows_strides,
    bias_stride_n,
    bias_stride_h,
    bias_stride_i,
    bias_stride_c,
    keys_strides,
    kv_heads,
    group,
    key_tiles,
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
    n, _, h_kv, tile = locate_program(tl.program_id(0), kv_heads, 1, key_tiles, INTERLEAVED)
    j_begin = tile * BLOCK_N
    j_end = tl.minimum(j_begin + BLOCK_N, len_k)
    k = tl.arange(0, BLOCK_N)
    j_tile = j_begin + k
    first, last, begin, end = rows_of_keys(place, n, j_tile, j_begin, j_end, origin, width, len_q, len_k)

    if place[3] is None:
        low, high = bounds(place, n, len_k)
        has_slots = j_tile < tl.minimum(j_end, high)
        if place[1] is not None:
            has_slots = has_slots & (j_tile >= low)
        slots = tl.where(has_slots, width, 0)[None, :]
    step_end = end - begin
    if not GAPS:
        offset = key_of_first_slot(place, n, begin, True, origin, width, len_q, len_k, GAPS)
    else:
        # There may be rows between that see no key.
        start, steps = steps_inside(first, last, BLOCK_M)
        step_end = steps * BLOCK_M
    unfinished: tl.constexpr = True
    for CLEAR in tl.static_range(1 + (bias is not None)):
        if unfinished:
            acc = tl.zeros((BLOCK_N, BLOCK_DIM), tl.float32)
            for member in span(0, group, 1):
                h = h_kv * group + member
                x_rows = rows + n * rows_strides[0] + h * rows_strides[1]
                head_band = band + n * band_stride_n + h * band_stride_h
                if GAPS:
                    position = start
                for step in span(0, step_end, BLOCK_M):
                    i_begin = begin + step
                    if GAPS:
                        i_begin = position
                        position = next_inside(position + BLOCK_M, first, last)
                    # Rows are counted from i_begin, slots from the one that the first key has there, or in each row if there
                    # are gaps.
                    i_tile = i_begin + tl.arange(0, BLOCK_M)
                    r = tl.arange(0, BLOCK_M)
                    if GAPS:
                        offset = key_of_first_slot(place, n, i_tile, i_tile < len_q, origin, width, len_q, len_k, GAPS)
                    first_slot = j_begin - i_begin - offset
                    c = first_slot + k[None, :] - r[:, None]
                    if place[3] is not None:
                        visible = within(i_tile[:, None], first[None, :], last[None, :])
                        if GAPS:
                            # Nobody has checked that offsets ascend.
                            visible = visible & below(c, width)
                    else:
                        # A row past the end has none of the slots.
                        visible = below(c, slots) & (i_tile < end)[:, None]
                    if bias is not None:
                        b = load_bias(
                            bias, bias_strides, bias_stride_c, n, h, i_tile[:, None], j_tile[None, :], offset, visible
                        )
                        visible = b != float("-inf")
                    corner = head_band + i_begin.to(tl.int64) * band_stride_i + first_slot
                    w = tl.load(
                        skewed_pointers(corner, band_stride_i, r[:, None], k[None, :], LONG), mask=visible, other=0.0
                    )
                    if GAPS:
                        x = load_rows(x_rows, rows_strides, 0, 0, i_tile, used(place[3], i_tile, len_q), DIM, BLOCK_DIM)
                    else:
                        x = load_clamped_rows(x_rows, rows_strides[2], i_tile, begin, end - 1, DIM, BLOCK_DIM)
                    if CLEAR:
                        x = clear_unseen(x, tl.trans(visible))
                    acc = weights_by_rows(tl.trans(w), x, acc, PRECISION)
        unfinished = not finite(acc)

    store_rows(keys, keys_strides, n, h_kv, j_tile, j_tile < len_k, acc * scale, DIM, BLOCK_DIM)
