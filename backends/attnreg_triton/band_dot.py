"""Rows times keys gives a band: ``band[i, c] = scale * x_i . y_j + bias[i, c]``, with a fill where no key is visible.

The scores of a query (filled with -inf), and the gradient of the weights, dO . V (filled with 0).
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnreg import Window
from attnreg_triton.band import (
    fill_band,
    in_window,
    load_bias,
    load_rows,
    locate_program,
    store_band,
    visible_length,
)
from attnreg_triton.interpreter import dot, span
from attnreg_triton.launch import bias_strides, ceil_div, input_precision, launch, origin, padded, strides
from attnreg_triton.tiles import product_by_rows


def band_dot(
    rows: Tensor,
    keys: Tensor,
    window: Window,
    *,
    bias: Tensor | None = None,
    key_lengths: Tensor | None,
    scale: float = 1.0,
    fill: float,
) -> Tensor:
    """(N, H, Lq, E), (N, Hkv, Lk, E) -> (N, H, Lq, W)."""
    batch, heads, len_q, head_dim = rows.shape
    _, kv_heads, len_k, _ = keys.shape
    band = torch.empty((batch, heads, len_q, window.size), dtype=rows.dtype, device=rows.device)
    tiles = product_by_rows(rows.dtype, head_dim, window)
    row_tiles = ceil_div(len_q, tiles.rows)
    launch(
        _band_dot,
        batch * heads * row_tiles,
        tiles,
        rows,
        keys,
        bias,
        key_lengths,
        band,
        strides(rows),
        strides(keys),
        *bias_strides(bias),
        *strides(band),
        heads,
        heads // kv_heads,
        row_tiles,
        len_q,
        len_k,
        origin(window, len_q, len_k),
        window.size,
        scale,
        FILL=fill,
        DIM=head_dim,
        BLOCK_DIM=padded(head_dim),
        PRECISION=input_precision(rows.dtype),
        device=rows.device,
    )
    return band


@triton.jit(
    do_not_specialize=[
        "bias_stride_n",
        "bias_stride_h",
        "bias_stride_i",
        "band_stride_n",
        "band_stride_h",
        "band_stride_i",
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
def _band_dot(
    rows,
    keys,
    bias,
    key_lengths,
    band,
    rows_strides,
    keys_strides,
    bias_stride_n,
    bias_stride_h,
    bias_stride_i,
    bias_stride_c,
    band_stride_n,
    band_stride_h,
    band_stride_i,
    heads,
    group,
    row_tiles,
    len_q,
    len_k,
    origin,
    width,
    scale,
    FILL: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    band_strides = (band_stride_n, band_stride_h, band_stride_i)
    bias_strides = (bias_stride_n, bias_stride_h, bias_stride_i)
    n, h, h_kv, tile = locate_program(heads, group, row_tiles)
    i_begin = tile * BLOCK_M
    i_end = tl.minimum(i_begin + BLOCK_M, len_q)
    i_tile = i_begin + tl.arange(0, BLOCK_M)
    i = i_tile[:, None]

    # The slots of these rows belong to keys [first, last); products are needed for [begin, end) of them.
    first, last = i_begin + origin, i_end + origin + width - 1
    begin = tl.minimum(tl.maximum(first, 0), last)
    end = tl.minimum(tl.maximum(visible_length(key_lengths, n, len_k), begin), last)
    computed = begin + tl.cdiv(end - begin, BLOCK_N) * BLOCK_N
    fill_band(band, band_strides, n, h, i, first, begin, origin, width, len_q, FILL, BLOCK_N)
    fill_band(band, band_strides, n, h, i, computed, last, origin, width, len_q, FILL, BLOCK_N)

    x = load_rows(rows, rows_strides, n, h, i_tile, i_tile < i_end, DIM, BLOCK_DIM)
    for j_begin in span(begin, end, BLOCK_N):
        j_tile = j_begin + tl.arange(0, BLOCK_N)
        j = j_tile[None, :]
        y = load_rows(keys, keys_strides, n, h_kv, j_tile, j_tile < end, DIM, BLOCK_DIM)
        s = dot(x, tl.trans(y), PRECISION) * scale
        visible = j < end
        if bias is not None:
            within = visible & in_window(i, j, origin, width) & (i < i_end)
            b = load_bias(bias, bias_strides, bias_stride_c, n, h, i, j, origin, within)
            visible = b != float("-inf")
            s += b
        s = tl.where(visible, s, FILL)
        store_band(band, band_strides, n, h, i, j, origin, width, len_q, s)
