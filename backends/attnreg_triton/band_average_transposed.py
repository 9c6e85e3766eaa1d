"""A band, transposed, times rows gives keys: ``out_j = scale * sum_i band[i, c] * x_i``, over the visible slots.

The gradients of the value, P^T dO, and of the key, dS^T Q. A program owns a tile of keys and sums over the rows that
see them, in every query head of their group; nothing is shared between programs, so no atomics are needed.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnreg import Window
from attnreg_triton.band import (
    in_window,
    load_band,
    load_bias,
    load_rows,
    locate_program,
    rows_of_keys,
    store_rows,
    visible_length,
)
from attnreg_triton.interpreter import dot, span
from attnreg_triton.launch import bias_strides, ceil_div, input_precision, launch, origin, padded, strides
from attnreg_triton.tiles import product_by_keys


def band_average_transposed(
    band: Tensor,
    rows: Tensor,
    window: Window,
    *,
    key_shape: tuple[int, ...],
    bias: Tensor | None = None,
    key_lengths: Tensor | None,
    scale: float = 1.0,
) -> Tensor:
    """(N, H, Lq, W), (N, H, Lq, D) -> ``key_shape`` (N, Hkv, Lk, D)."""
    batch, heads, len_q, head_dim = rows.shape
    _, kv_heads, len_k, _ = key_shape
    keys = torch.empty(key_shape, dtype=rows.dtype, device=rows.device)
    tiles = product_by_keys(rows.dtype, head_dim, window)
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
        PRECISION=input_precision(rows.dtype),
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
        "group",
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    bias_strides = (bias_stride_n, bias_stride_h, bias_stride_i)
    band_strides = (band_stride_n, band_stride_h, band_stride_i)
    n, _, h_kv, tile = locate_program(kv_heads, 1, key_tiles)
    j_tile = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    j = j_tile[:, None]
    j_end = tl.minimum((tile + 1) * BLOCK_N, visible_length(key_lengths, n, len_k))
    begin, end = rows_of_keys(tile * BLOCK_N, j_end, len_q, origin, width)

    acc = tl.zeros((BLOCK_N, BLOCK_DIM), tl.float32)
    for member in span(0, group, 1):
        h = h_kv * group + member
        for i_begin in span(begin, end, BLOCK_M):
            i_tile = i_begin + tl.arange(0, BLOCK_M)
            i = i_tile[None, :]
            visible = (j < j_end) & (i < end) & in_window(i, j, origin, width)
            if bias is not None:
                b = load_bias(bias, bias_strides, bias_stride_c, n, h, i, j, origin, visible)
                visible = b != float("-inf")
            w = load_band(band, band_strides, n, h, i, j, origin, visible)
            x = load_rows(rows, rows_strides, n, h, i_tile, i_tile < end, DIM, BLOCK_DIM)
            acc = dot(w, x, PRECISION, acc)
    store_rows(keys, keys_strides, n, h_kv, j_tile, j_tile < len_k, acc * scale, DIM, BLOCK_DIM)
