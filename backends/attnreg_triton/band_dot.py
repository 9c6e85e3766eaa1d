"""Rows times keys gives a band: ``band[i, c] = scale * x_i . y_j + bias[i, c]``, with a fill where no key is visible.

The scores of a query (filled with -inf), and the gradient of the weights, dO . V (filled with 0).
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from attnreg import Window, empty_like
from attnreg_triton.band import (
    below,
    load_bias,
    load_clamped_rows,
    load_rows,
    locate_program,
    skewed_pointers,
    visible_length,
)
from attnreg_triton.hopper import service as hopper
from attnreg_triton.interpreter import cast, span
from attnreg_triton.launch import (
    bias_strides,
    ceil_div,
    interleaved,
    launch,
    long_offsets,
    lowest,
    origin,
    padded,
    strides,
)
from attnreg_triton.products import dot_precision, rows_by_keys
from attnreg_triton.tiles import dot_by_rows


def band_dot(
    rows: Tensor,
    keys: Tensor,
    window: Window,
    *,
    like: Tensor,
    bias: Tensor | None = None,
    key_lengths: Tensor | None,
    scale: float = 1.0,
    fill: float,
) -> Tensor:
    """(N, H, Lq, E), (N, Hkv, Lk, E) -> (N, H, Lq, W), in memory as ``like`` (N, H, Lq, any)."""
    batch, heads, len_q, head_dim = rows.shape
    _, kv_heads, len_k, _ = keys.shape
    band = empty_like(like, window.size)
    if hopper.serves_band_dot(rows, keys, band, window, bias=bias):
        from attnreg_triton.hopper import band_dot as on_hopper

        on_hopper.band_dot(rows, keys, band, window, key_lengths=key_lengths, scale=scale, fill=fill)
        return band
    tiles = dot_by_rows(rows.dtype, head_dim, window)
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
        LOWEST=lowest(band, fill),
        DIM=head_dim,
        BLOCK_DIM=padded(head_dim),
        PRECISION=dot_precision(rows.dtype, head_dim, window),
        LONG=long_offsets(band, tiles),
        INTERLEAVED=interleaved(rows),
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
    LOWEST: tl.constexpr,
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

    # Everything is counted from the first row, i_begin, and the key of its slot 0.
    j_origin = i_begin + origin
    length = visible_length(key_lengths, n, len_k)
    count = i_end - i_begin
    r = tl.arange(0, BLOCK_M)
    slots = tl.where(r < count, width, 0)[:, None]
    x = load_rows(rows, rows_strides, n, h, i_tile, i_tile < i_end, DIM, BLOCK_DIM)
    keys += n * keys_strides[0] + h_kv * keys_strides[1]
    band += n * band_stride_n + h * band_stride_h + i_begin.to(tl.int64) * band_stride_i
    for q_begin in span(0, count + width - 1, BLOCK_N):
        q = q_begin + tl.arange(0, BLOCK_N)
        j_begin = j_origin + q_begin
        y = load_clamped_rows(keys, keys_strides[2], j_origin + q, 0, len_k - 1, DIM, BLOCK_DIM)
        s = rows_by_keys(x, y, PRECISION) * scale
        # A visible slot is never -inf, which would hide it.
        s = tl.where(s < LOWEST, LOWEST, s)
        slot = below(q[None, :] - r[:, None], slots)
        if bias is not None:
            j = (j_origin + q)[None, :]
            b = load_bias(bias, bias_strides, bias_stride_c, n, h, i, j, origin, slot & (j >= 0) & (j < length))
            s = tl.where(b != float("-inf"), tl.where(s + b < LOWEST, LOWEST, s + b), FILL)
        elif (j_begin < 0) | (j_begin + BLOCK_N > length):
            s = tl.where(below(j_origin + q, length)[None, :], s, FILL)
        pointers = skewed_pointers(band, band_stride_i, r[:, None], q[None, :], LONG)
        tl.store(pointers, cast(s, band.dtype.element_ty), mask=slot)
