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
    keys_of_rows,
    load_bias,
    load_clamped_rows,
    locate_program,
    skewed_pointers,
    store_rows,
    visible_length,
)
from attnreg_triton.hopper import service as hopper
from attnreg_triton.interpreter import span
from attnreg_triton.launch import bias_strides, ceil_div, interleaved, launch, long_offsets, origin, padded, strides
from attnreg_triton.products import average_precision, weights_by_rows
from attnreg_triton.tiles import average_by_rows


def band_average(
    band: Tensor,
    keys: Tensor,
    window: Window,
    *,
    like: Tensor,
    bias: Tensor | None = None,
    key_lengths: Tensor | None,
    scale: float = 1.0,
) -> Tensor:
    """(N, H, Lq, W), (N, Hkv, Lk, D) -> (N, H, Lq, D), in memory as ``like`` (N, H, Lq, any)."""
    batch, heads, len_q, _ = band.shape
    _, kv_heads, len_k, head_dim = keys.shape
    rows = empty_like(like, head_dim)
    if hopper.serves_band_average(band, keys, window, bias=bias):
        from attnreg_triton.hopper import band_average as on_hopper

        on_hopper.band_average(band, keys, rows, window, key_lengths=key_lengths, scale=scale)
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
        key_lengths,
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
        origin(window, len_q, len_k),
        window.size,
        scale,
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
    key_lengths,
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
    begin, end = keys_of_rows(i_begin, i_end, visible_length(key_lengths, n, len_k), origin, width)

    # Everything is counted from the first row, i_begin, and the key of its slot 0.
    j_origin = i_begin + origin
    r = tl.arange(0, BLOCK_M)
    slots = tl.where(i_tile < i_end, width, 0)[:, None]
    keys += n * keys_strides[0] + h_kv * keys_strides[1]
    band += n * band_stride_n + h * band_stride_h + i_begin.to(tl.int64) * band_stride_i
    unfinished: tl.constexpr = True
    for CLEAR in tl.static_range(1 + (bias is not None)):
        if unfinished:
            acc = tl.zeros((BLOCK_M, BLOCK_DIM), tl.float32)
            for j_begin in span(begin, end, BLOCK_N):
                j_tile = j_begin + tl.arange(0, BLOCK_N)
                q = j_tile - j_origin
                # A key past the end is in no row's slots.
                visible = below(tl.where(j_tile < end, q, -BLOCK_M)[None, :] - r[:, None], slots)
                if bias is not None:
                    b = load_bias(bias, bias_strides, bias_stride_c, n, h, i, j_tile[None, :], origin, visible)
                    visible = b != float("-inf")
                w = tl.load(skewed_pointers(band, band_stride_i, r[:, None], q[None, :], LONG), mask=visible, other=0.0)
                y = load_clamped_rows(keys, keys_strides[2], j_tile, begin, end - 1, DIM, BLOCK_DIM)
                if CLEAR:
                    y = clear_unseen(y, visible)
                acc = weights_by_rows(w, y, acc, PRECISION)
        unfinished = not finite(acc)

    store_rows(rows, rows_strides, n, h, i_tile, i_tile < i_end, acc * scale, DIM, BLOCK_DIM)
