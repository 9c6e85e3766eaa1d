"""The gradient of the bias: dS summed over the dimensions in which the bias broadcasts.

Kernels sum along rows or columns as far as one program sees them and write fp32 partial sums, so that for a bias of
one row or one column no (Lq, W) tensor appears; what is left is a plain sum over partials, in a fixed order.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnreg import empty_like
from attnreg_triton.band import key_of_first_slot, load_bias, locate_program, visible_slots, within
from attnreg_triton.interpreter import cast, span
from attnreg_triton.launch import bias_strides, ceil_div, launch, strides
from attnreg_triton.rows import Place
from attnreg_triton.tiles import BAND_SUM

Reduction = Literal["none", "row sums", "column sums"]


def reduction(bias: Tensor, gaps: bool = False) -> Reduction:
    """What a kernel writes for this bias: dS itself, its sum per row, or its sums per column and tile of rows.

    With gaps, where the slots of a tile do not run along its diagonals, ``store_column_sums`` cannot add them up.
    """
    if bias.shape[3] == 1:
        return "row sums"
    return "column sums" if bias.shape[2] == 1 and not gaps else "none"


def empty_partials(bias: Tensor, band_shape: tuple[int, int, int, int], row_tiles: int, gaps: bool = False) -> Tensor:
    """Where the kernel writes; the gradient itself if nothing remains to be summed."""
    if bias.shape == band_shape:
        return empty_like(bias)
    batch, heads, len_q, width = band_shape
    shapes = {"none": (len_q, width), "row sums": (len_q, 1), "column sums": (row_tiles, width)}
    rows, columns = shapes[reduction(bias, gaps)]
    return torch.empty((batch, heads, rows, columns), dtype=torch.float32, device=bias.device)


def reduce_partials(partials: Tensor, bias: Tensor) -> Tensor:
    """The partial sums summed to the bias' shape, in its dtype."""
    summed = [axis for axis in range(4) if bias.shape[axis] != partials.shape[axis]]
    if summed:
        partials = partials.sum(summed, keepdim=True)
    return partials.to(bias.dtype)


def band_sum(grad_scores: Tensor, place: Place, *, bias: Tensor, len_k: int) -> Tensor:
    """The gradient of the bias from dS given as a band."""
    batch, heads, len_q, width = grad_scores.shape
    tiles = BAND_SUM
    row_tiles = ceil_div(len_q, tiles.rows)
    partials = empty_partials(bias, (batch, heads, len_q, width), row_tiles)
    launch(
        _band_sum,
        batch * heads * row_tiles,
        tiles,
        grad_scores,
        bias,
        place.rows,
        partials,
        *strides(grad_scores),
        *bias_strides(bias),
        *strides(partials),
        heads,
        row_tiles,
        len_q,
        len_k,
        place.origin,
        width,
        GAPS=place.gaps,
        REDUCTION=reduction(bias),
        device=bias.device,
    )
    return reduce_partials(partials, bias)


@triton.jit(
    do_not_specialize=[
        "band_stride_n",
        "band_stride_h",
        "band_stride_i",
        "bias_stride_n",
        "bias_stride_h",
        "bias_stride_i",
        "partials_stride_n",
        "partials_stride_h",
        "partials_stride_i",
        "heads",
        "row_tiles",
        "len_q",
        "len_k",
        "origin",
        "width",
    ]
)
def _band_sum(
    band,
    bias,
    place,
    partials,
    band_stride_n,
    band_stride_h,
    band_stride_i,
    bias_stride_n,
    bias_stride_h,
    bias_stride_i,
    bias_stride_c,
    partials_stride_n,
    partials_stride_h,
    partials_stride_i,
    heads,
    row_tiles,
    len_q,
    len_k,
    origin,
    width,
    GAPS: tl.constexpr,
    REDUCTION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    partials_strides = (partials_stride_n, partials_stride_h, partials_stride_i)
    bias_strides = (bias_stride_n, bias_stride_h, bias_stride_i)
    band_strides = (band_stride_n, band_stride_h, band_stride_i)
    n, h, _, tile = locate_program(tl.program_id(0), heads, 1, row_tiles, False)
    i_begin = tile * BLOCK_M
    i_end = tl.minimum(i_begin + BLOCK_M, len_q)
    i_tile = i_begin + tl.arange(0, BLOCK_M)
    i = i_tile[:, None]
    offset = key_of_first_slot(place, n, i_tile, i_tile < i_end, origin, width, len_q, len_k, GAPS)
    first, last = visible_slots(place, n, i_tile, i_begin, i_end, origin, width, len_q, len_k)
    partials += n * partials_strides[0] + h * partials_strides[1]
    row_sums = tl.zeros((BLOCK_M,), tl.float32)
    # Nothing is multiplied here, so tiles run straight along the columns.
    for c_begin in span(0, width, BLOCK_N):
        c_tile = c_begin + tl.arange(0, BLOCK_N)
        c = c_tile[None, :]
        j = i + offset + c
        slot = (i < len_q) & (c < width)
        visible = slot & within(j, first, last)
        b = load_bias(bias, bias_strides, bias_stride_c, n, h, i, j, offset, visible)
        pointers = band + n * band_strides[0] + h * band_strides[1] + i.to(tl.int64) * band_strides[2] + c
        ds = tl.load(pointers, mask=b != float("-inf"), other=0.0).to(tl.float32)
        if REDUCTION == "none":
            tl.store(
                partials + i.to(tl.int64) * partials_strides[2] + c, cast(ds, partials.dtype.element_ty), mask=slot
            )
        elif REDUCTION == "row sums":
            row_sums += tl.sum(ds, 1)
        else:
            sums = cast(tl.sum(ds, 0), partials.dtype.element_ty)
            tl.store(partials + tile.to(tl.int64) * partials_strides[2] + c_tile, sums, mask=c_tile < width)
    if REDUCTION == "row sums":
        sums = cast(row_sums, partials.dtype.element_ty)
        tl.store(partials + i_tile.to(tl.int64) * partials_strides[2], sums, mask=i_tile < len_q)


@triton.jit
def store_column_sums(
    partials, partials_strides, n, h, tile, ds, carry, column, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Add up a tile of dS, whose element (0, 0) is in ``column``, along its diagonals, each of which is a column.

    Diagonal t of a tile, the one that starts at its t-th key, leaves it at the right edge and goes on in the next tile,
    from where it counts as diagonal t - BLOCK_N. What the last tile left over is ``carry``: with it the BLOCK_N columns
    before ``column`` are complete. Returns what this tile leaves over. Needs BLOCK_M <= BLOCK_N.
    """
    a = tl.arange(0, BLOCK_M)[:, None]
    t = tl.arange(0, BLOCK_N)[None, :]
    diagonals = tl.gather(ds, (t + a) % BLOCK_N, 1)
    in_this_tile = t + a < BLOCK_N
    before = tl.sum(tl.where(in_this_tile, 0.0, diagonals), 0)
    store_columns(partials, partials_strides, n, h, tile, carry + before, column - BLOCK_N, 0, width, BLOCK_N)
    return tl.sum(tl.where(in_this_tile, diagonals, 0.0), 0)


@triton.jit
def store_columns(partials, partials_strides, n, h, tile, sums, column, c_begin, c_end, BLOCK_N: tl.constexpr):
    """Write the partial sums of columns ``column``, ``column`` + 1, ... as far as they lie in [c_begin, c_end)."""
    c = column + tl.arange(0, BLOCK_N)
    pointers = (
        partials + n * partials_strides[0] + h * partials_strides[1] + tile.to(tl.int64) * partials_strides[2] + c
    )
    tl.store(pointers, cast(sums, partials.dtype.element_ty), mask=(c >= c_begin) & (c < c_end))


@triton.jit
def clear_columns(partials, partials_strides, n, h, tile, c_begin, c_end, BLOCK_N: tl.constexpr):
    """Write 0 to the partial sums of columns [c_begin, c_end)."""
    zeros = tl.zeros((BLOCK_N,), tl.float32)
    for column in span(c_begin, c_end, BLOCK_N):
        store_columns(partials, partials_strides, n, h, tile, zeros, column, c_begin, c_end, BLOCK_N)


@triton.jit
def clear_slots_outside(partials, partials_strides, n, h, i, offset, begin, end, width, len_q, BLOCK_N: tl.constexpr):
    """Write 0 to the slots of rows ``i`` (M, 1) whose keys are not of [begin, end). Row i's slot c is key ``i + offset + c``."""
    pointers = partials + n * partials_strides[0] + h * partials_strides[1] + i.to(tl.int64) * partials_strides[2]
    for c_begin in span(0, width, BLOCK_N):
        c = c_begin + tl.arange(0, BLOCK_N)[None, :]
        j = i + offset + c
        outside = (j < begin) | (j >= end)
        tl.store(pointers + c, 0.0, mask=outside & (c < width) & (i < len_q))
