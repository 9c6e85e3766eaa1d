"""Geometry of the band, and the loads and stores that all kernels share.

Key j is in slot c = j - i - origin of row i, with origin = Lk - Lq - left where nothing else is said of rows (see ``rows``).
A kernel works on tiles of BLOCK_M rows by BLOCK_N keys, through which the columns of a band run skewed. With row stride s the
element (i, c) lies at ``i * s + c = i * (s - 1) + (j - origin)``: the sum of a part by row and a part by key, so a skewed
tile is addressed as cheaply as a straight one.

Positions are 32-bit. Offsets are 64-bit, since a tensor may have more than 2**31 elements.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from attnreg_triton.interpreter import cast, span
from attnreg_triton.rows import bounds, keys_of_rows, slot_origin

# The largest finite number of fp32.
_LARGEST = tl.constexpr(3.4028234663852886e38)

# A position that no sequence has.
_NOWHERE = tl.constexpr(2**31 - 1)


@triton.jit
def locate_program(program, heads, group, tiles, INTERLEAVED: tl.constexpr):
    """(n, h, h_kv, tile) of a program in a grid of N * H * tiles.

    The query heads of a group vary fastest: programs that read the same keys run at the same time. So do those that read the
    same pages of memory: next vary the tiles, or the heads if they are INTERLEAVED.
    """
    kv_program = program // group
    kv_heads = heads // group
    if INTERLEAVED:
        n_tile = kv_program // kv_heads
        h_kv = kv_program - n_tile * kv_heads
        n = n_tile // tiles
        tile = n_tile - n * tiles
    else:
        kv_head = kv_program // tiles
        tile = kv_program - kv_head * tiles
        n = kv_head // kv_heads
        h_kv = kv_head - n * kv_heads
    h = h_kv * group + (program - kv_program * group)
    return n.to(tl.int64), h.to(tl.int64), h_kv.to(tl.int64), tile


@triton.jit
def in_window(i, j, origin, width):
    """Whether row i has a slot for key j."""
    column = j - i - origin
    return (column >= 0) & (column < width)


@triton.jit
def key_of_first_slot(place, n, i, valid, origin, width, len_q, len_k, GAPS: tl.constexpr):
    """The key of slot 0 of row i, less i: a number, as it is the same for all rows; or (M, 1) where there are GAPS."""
    if GAPS:
        offset = slot_origin(place, n, i, valid, origin, width, len_q, len_k)[:, None]
    elif place[3] is not None:
        offset = origin
    else:
        offset = slot_origin(place, n, i, valid, origin, width, len_q, len_k)
    return offset


@triton.jit
def visible_slots(place, n, i, i_begin, i_end, origin, width, len_q, len_k):
    """``(first, last)``: of the keys that row i has slots for it sees [first, last). Numbers, or (M, 1) of a packed call."""
    if place[3] is not None:
        first, last, _, _ = keys_of_rows(place, n, i, i_begin, i_end, origin, width, len_q, len_k)
        first = first[:, None]
        last = last[:, None]
    else:
        first, last = bounds(place, n, len_k)
        if place[1] is not None:
            last = tl.maximum(first, last)
    return first, last


@triton.jit
def all_visible(first, last, begin, width, len_k):
    """``(from, to)``: of keys in [from, to) each row sees all that it has slots for, from key ``begin`` on."""
    return tl.max(tl.where(first > begin, first, 0)), tl.min(tl.where(last < begin + width, last, len_k))


@triton.jit
def next_inside(position, first, last):
    """The least number from ``position`` on that is in one of the intervals [first, last); ``_NOWHERE`` if there is none."""
    ahead = (first < last) & (position < last)
    return tl.min(tl.where(ahead, tl.maximum(first, position), _NOWHERE))


@triton.jit
def steps_inside(first, last, STEP: tl.constexpr):
    """``(begin, steps)``: where a walk over the intervals [first, last) begins, and its number of steps.

    The next step begins at ``next_inside(position + STEP, first, last)``: whatever is in an interval is met once, and long gaps
    between intervals are not met at all.
    """
    begin = next_inside(-_NOWHERE, first, last)
    steps = 0
    position = begin
    while position < _NOWHERE:
        steps += 1
        position = next_inside(position + STEP, first, last)
    return begin, steps


@triton.jit
def used(table, position, length):
    """Which rows see some key, or which keys some row sees: those whose interval in ``table`` (2 or 3, length) is not empty."""
    first = tl.load(table + position, mask=position < length, other=0)
    return first < tl.load(table + length + position, mask=position < length, other=0)


@triton.jit
def band_pointers(band, band_strides, column_stride, n, h, i, j, origin):
    """Pointers to row i's slot for key j; ``i`` and ``j`` are tiles that vary along different axes."""
    rows = band + n * band_strides[0] + h * band_strides[1] + i.to(tl.int64) * (band_strides[2] - column_stride)
    return rows + (j - origin).to(tl.int64) * column_stride


@triton.jit
def load_bias(bias, bias_strides, column_stride, n, h, i, j, origin, visible):
    """The bias of a tile in fp32, -inf in invisible slots."""
    pointers = band_pointers(bias, bias_strides, column_stride, n, h, i, j, origin)
    b = tl.load(pointers, mask=visible, other=float("-inf"))
    if b.dtype == tl.float64:
        # What fp32 has no number for hides nothing: only -inf does.
        b = tl.where(b == float("-inf"), b, tl.minimum(tl.maximum(b, -_LARGEST), _LARGEST))
    return b.to(tl.float32)


@triton.jit
def clear_unseen(tile, visible):
    """``tile`` (M, E) with those of its rows set to zero that are in no way ``visible`` (any, M).

    The bias may hide a key from every row, or every key from a row, and what is hidden may be NaN: 0 * NaN is NaN. Clearing
    costs up to nearly half a kernel's time. So kernels do without at first, and only if their sums are not ``finite`` they
    make a second try: a weight of 0 makes 0 of any finite number, and NaN of any other, which stays in the sum. Attention does
    so in a second launch, since two tries in one kernel take it the registers that others would run in.
    """
    seen = tl.max(visible.to(tl.int32), 0) > 0
    return tl.where(seen[:, None], tile, 0.0)


@triton.jit
def finite(tile):
    """Whether ``tile`` has neither NaN nor infinities."""
    return tl.max(tl.where(tl.abs(tile) <= _LARGEST, 0, 1)) == 0


@triton.jit
def nothing_left(unfinished, programs, CHUNK: tl.constexpr):
    """Whether a first launch has finished all the programs that one of a second launch looks after."""
    program = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    return tl.max(tl.load(unfinished + program, mask=program < programs, other=0)) == 0


@triton.jit
def store_band(band, band_strides, n, h, i, j, origin, width, len_q, values):
    """Write those values of a tile that are slots of the band, inside the sequence or not."""
    slot = in_window(i, j, origin, width) & (i < len_q)
    tl.store(band_pointers(band, band_strides, 1, n, h, i, j, origin), cast(values, band.dtype.element_ty), mask=slot)


@triton.jit
def fill_band(
    band, band_strides, n, h, i, j_begin, j_end, origin, width, len_q, VALUE: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Write VALUE to the slots of rows ``i`` for keys [j_begin, j_end), which may lie outside the sequence."""
    for j_tile in span(j_begin, j_end, BLOCK_N):
        j = j_tile + tl.arange(0, BLOCK_N)[None, :]
        slot = in_window(i, j, origin, width) & (i < len_q) & (j < j_end)
        tl.store(band_pointers(band, band_strides, 1, n, h, i, j, origin), VALUE, mask=slot)


@triton.jit
def row_pointers(tensor, tensor_strides, n, h, position, BLOCK: tl.constexpr):
    """Pointers to the rows of (N, H, L, DIM) at ``position``."""
    rows = tensor + n * tensor_strides[0] + h * tensor_strides[1] + position.to(tl.int64)[:, None] * tensor_strides[2]
    return rows + tl.arange(0, BLOCK)[None, :]


@triton.jit
def row_mask(valid, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Which elements of a padded tile exist."""
    mask = valid[:, None]
    if DIM != BLOCK:
        mask = mask & (tl.arange(0, BLOCK)[None, :] < DIM)
    return mask


@triton.jit
def load_rows(tensor, tensor_strides, n, h, position, valid, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """The rows of (N, H, L, DIM) at ``position``, padded with zeros to BLOCK; rows that are not valid are zeros."""
    pointers = row_pointers(tensor, tensor_strides, n, h, position, BLOCK)
    return tl.load(pointers, mask=row_mask(valid, DIM, BLOCK), other=0.0)


@triton.jit
def store_rows(tensor, tensor_strides, n, h, position, valid, values, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Write the valid rows of a padded tile."""
    pointers = row_pointers(tensor, tensor_strides, n, h, position, BLOCK)
    tl.store(pointers, cast(values, tensor.dtype.element_ty), mask=row_mask(valid, DIM, BLOCK))


@triton.jit
def below(position, limit):
    """``0 <= position < limit`` in one comparison; ``limit`` is not negative."""
    return position.to(tl.uint32, bitcast=True) < limit


@triton.jit
def within(position, first, last):
    """``first <= position < last``, where first <= last."""
    return below(position - first, last - first)


@triton.jit
def load_clamped_rows(tensor, stride, position, first, last, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """The rows of (L, DIM) at ``position``, padded with zeros to BLOCK; one outside [first, last] is the nearest inside.

    That costs less than masking them, where what comes of them is not used.
    """
    position = tl.minimum(tl.maximum(position, first), last)
    pointers = tensor + position.to(tl.int64)[:, None] * stride + tl.arange(0, BLOCK)[None, :]
    if DIM == BLOCK:
        return tl.load(pointers)
    return tl.load(pointers, mask=(tl.arange(0, BLOCK) < DIM)[None, :], other=0.0)


@triton.jit
def skewed_pointers(band, pitch, i, j, LONG: tl.constexpr):
    """Pointers to row i's slot j - i of a band whose rows are ``pitch`` apart; offsets are 64-bit if LONG.

    ``band`` points to slot 0 of row 0, with i and j counted from there, so that a tile's offsets fit 32 bits.
    """
    if LONG:
        i = i.to(tl.int64)
    return band + i * (pitch - 1) + j
