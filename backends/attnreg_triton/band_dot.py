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
    all_visible,
    below,
    key_of_first_slot,
    load_bias,
    load_clamped_rows,
    load_rows,
    locate_program,
    next_inside,
    skewed_pointers,
    steps_inside,
    visible_slots,
    within,
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
    padded,
    strides,
)
from attnreg_triton.products import dot_precision, rows_by_keys
from attnreg_triton.rows import Place
from attnreg_triton.tiles import dot_by_rows


def band_dot(
    rows: Tensor,
    keys: Tensor,
    window: Window,
    place: Place,
    *,
    like: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    fill: float,
) -> Tensor:
    """(N, H, Lq, E), (N, Hkv, Lk, E) -> (N, H, Lq, W), in memory as ``like`` (N, H, Lq, any)."""
    batch, heads, len_q, head_dim = rows.shape
    _, kv_heads, len_k, _ = keys.shape
    band = empty_like(like, window.size)
    if hopper.serves_band_dot(rows, keys, band, window, place, bias=bias):
        from attnreg_triton.hopper import band_dot as on_hopper

        on_hopper.band_dot(rows, keys, band, place, scale=scale, fill=fill)
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
        place.rows,
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
        place.origin,
        place.width,
        scale,
        FILL=fill,
        LOWEST=lowest(band, fill),
        GAPS=place.gaps,
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
    place,
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

    # Everything is counted from the first row, i_begin, and the key of its slot 0, or of each row's if there are gaps.
    offset = key_of_first_slot(place, n, i_tile, i_tile < i_end, origin, width, len_q, len_k, GAPS)
    j_origin = i_begin + offset
    first, last = visible_slots(place, n, i_tile, i_begin, i_end, origin, width, len_q, len_k)
    if place[3] is not None:
        all_from, all_to = all_visible(first, last, i + offset, width, len_k)
    else:
        all_from, all_to = first, last
    count = i_end - i_begin
    r = tl.arange(0, BLOCK_M)
    slots = tl.where(r < count, width, 0)[:, None]
    x = load_rows(rows, rows_strides, n, h, i_tile, i_tile < i_end, DIM, BLOCK_DIM)
    keys += n * keys_strides[0] + h_kv * keys_strides[1]
    band += n * band_stride_n + h * band_stride_h + i_begin.to(tl.int64) * band_stride_i
    q_end = count + width - 1
    position = 0
    if GAPS:
        # The keys of some row's slots are not all of those between the first and the last.
        begin = i + offset
        end = tl.where(i < i_end, begin + width, begin)
        position, steps = steps_inside(begin, end, BLOCK_N)
        q_end = steps * BLOCK_N
    for q_begin in span(0, q_end, BLOCK_N):
        k = tl.arange(0, BLOCK_N)
        if GAPS:
            j_begin = position
            j_tile = j_begin + k
            q = j_tile[None, :] - j_origin
            position = next_inside(position + BLOCK_N, begin, end)
        else:
            j_begin = j_origin + q_begin
            j_tile = j_origin + (q_begin + k)
            q = (q_begin + k)[None, :]
        j = j_tile[None, :]
        y = load_clamped_rows(keys, keys_strides[2], j_tile, 0, len_k - 1, DIM, BLOCK_DIM)
        s = rows_by_keys(x, y, PRECISION) * scale
        # A visible slot is never -inf, which would hide it.
        s = tl.where(s < LOWEST, LOWEST, s)
        slot = below(q - r[:, None], slots)
        if bias is not None:
            visible = slot & within(j, first, last)
            b = load_bias(bias, bias_strides, bias_stride_c, n, h, i, j, offset, visible)
            s = tl.where(b != float("-inf"), tl.where(s + b < LOWEST, LOWEST, s + b), FILL)
        elif (j_begin < all_from) | (j_begin + BLOCK_N > all_to):
            s = tl.where(within(j, first, last), s, FILL)
        pointers = skewed_pointers(band, band_stride_i, r[:, None], q, LONG)
        tl.store(pointers, cast(s, band.dtype.element_ty), mask=slot)
