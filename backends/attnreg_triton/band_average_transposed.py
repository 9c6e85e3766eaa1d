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
    load_bias,
    load_clamped_rows,
    locate_program,
    rows_of_keys,
    skewed_pointers,
    store_rows,
    visible_length,
)
from attnreg_triton.interpreter import span
from attnreg_triton.launch import bias_strides, ceil_div, interleaved, launch, long_offsets, origin, padded, strides
from attnreg_triton.products import average_precision, weights_by_rows
from attnreg_triton.tiles import average_by_keys


def band_average_transposed(
    band: Tensor,
    rows: Tensor,
    window: Window,
    *,
    like: Tensor,
    bias: Tensor | None = None,
    key_lengths: Tensor | None,
    scale: float = 1.0,
) -> Tensor:
    """(N, H, Lq, W), (N, H, Lq, D) -> (N, Hkv, Lk, D), in memory as the keys ``like``."""
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
        key_lengths,
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
        origin(window, len_q, len_k),
        window.size,
        scale,
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
    key_lengths,
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
    j_end = tl.minimum(j_begin + BLOCK_N, visible_length(key_lengths, n, len_k))
    begin, end = rows_of_keys(j_begin, j_end, len_q, origin, width)

    k = tl.arange(0, BLOCK_N)
    slots = tl.where(j_begin + k < j_end, width, 0)[None, :]
    unfinished: tl.constexpr = True
    for CLEAR in tl.static_range(1 + (bias is not None)):
        if unfinished:
            acc = tl.zeros((BLOCK_N, BLOCK_DIM), tl.float32)
            for member in span(0, group, 1):
                h = h_kv * group + member
                x_rows = rows + n * rows_strides[0] + h * rows_strides[1]
                head_band = band + n * band_stride_n + h * band_stride_h
                for step in span(0, end - begin, BLOCK_M):
                    i_begin = begin + step
                    # Rows are counted from i_begin, slots from the one that the first key has there.
                    i_tile = i_begin + tl.arange(0, BLOCK_M)
                    r = tl.arange(0, BLOCK_M)
                    first_slot = j_begin - i_begin - origin
                    # A row past the end has none of the slots.
                    c = first_slot + k[None, :] - r[:, None]
                    visible = below(c, slots) & (i_tile < end)[:, None]
                    if bias is not None:
                        i, j = i_tile[:, None], (j_begin + k)[None, :]
                        b = load_bias(bias, bias_strides, bias_stride_c, n, h, i, j, origin, visible)
                        visible = b != float("-inf")
                    corner = head_band + i_begin.to(tl.int64) * band_stride_i + first_slot
                    w = tl.load(
                        skewed_pointers(corner, band_stride_i, r[:, None], k[None, :], LONG), mask=visible, other=0.0
                    )
                    x = load_clamped_rows(x_rows, rows_strides[2], i_tile, begin, end - 1, DIM, BLOCK_DIM)
                    if CLEAR:
                        x = clear_unseen(x, tl.trans(visible))
                    acc = weights_by_rows(tl.trans(w), x, acc, PRECISION)
        unfinished = not finite(acc)

    j_tile = j_begin + k
    store_rows(keys, keys_strides, n, h_kv, j_tile, j_tile < len_k, acc * scale, DIM, BLOCK_DIM)
