"""Where rows stand, in Gluon: the intervals of ``attnreg_triton.rows``, whose tuple ``rows`` the kernels get."""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from attnreg_triton.hopper.tile import clear_rows_from, clear_rows_without
from attnreg_triton.rows import Place

# The widest window for which a program begins with all tiles that its window reaches, as if there were one sequence: what it
# computes beside its own sequences takes less time than to learn first where they end.
_NARROW = 256


def unused(place: Place) -> str | None:
    """Where rows or keys of a tile may be of no use to anybody, and NaN: None, only in the ``tail``, or in ``gaps`` too.

    It is a ``near tail`` where the tiles are those of the window, whatever sequences lie in them.
    """
    if place.gaps:
        return "gaps"
    if place.rows.by_row is not None and place.width <= _NARROW:
        return "near tail"
    limits = (place.rows.key_lengths, place.rows.query_starts, place.rows.by_row)
    return "tail" if any(limit is not None for limit in limits) else None


@gluon.jit
def _between(position, low, high):
    return gl.minimum(gl.maximum(position, low), high)


@gluon.jit
def _sum_between(position, distance, low, high):
    """``position + distance``, or the nearest number in low..high, where the sum itself might not fit 64 bits."""
    return (_between(position, low - distance, high - distance) + distance).to(gl.int32)


@gluon.jit
def _bounds(rows, n, len_k):
    """``(low, high)``: the keys of sequence n that are visible at all, 0 <= low, high <= Lk."""
    low = 0
    high = len_k
    if rows[0] is not None:
        high = _between(gl.load(rows[0] + n), 0, len_k).to(gl.int32)
    if rows[1] is not None:
        low = _between(gl.load(rows[1] + n), 0, len_k).to(gl.int32)
    return low, high


@gluon.jit
def _reach(rows, n, origin, width, len_q, len_k):
    """``(start, stop)``: row i has slots for keys [i + start, i + stop), both to 32 bits, exact wherever that matters."""
    if rows[2] is not None:
        position = gl.load(rows[2] + n).to(gl.int64)
        start = _sum_between(position, origin.to(gl.int64), -len_q, len_k)
        stop = _sum_between(position, origin.to(gl.int64) + width.to(gl.int64), -len_q, len_k)
    else:
        start = origin
        stop = origin + width
    return start, stop


@gluon.jit
def keys_of_rows(rows, n, i, i_begin, i_end, origin, width, len_q, len_k, UNUSED: gl.constexpr):
    """``(first, last, begin, end, all_from, all_to, used_to)``.

    Row i sees keys [first, last). Of rows [i_begin, i_end), some see keys of [begin, end), all see [all_from, all_to). Either
    may be empty, but begin <= end. Each of the keys from begin to ``used_to`` is seen by some row of the sequence, none behind
    them is; with gaps that is 0.
    """
    if rows[3] is not None:
        if UNUSED == "near tail":
            # In a pack of the same offsets for queries and keys, row i stands at key i. All programs load the same two numbers.
            used_to = gl.load(rows[3] + len_q + len_q - 1)
            begin = gl.maximum(i_begin + origin, gl.load(rows[3]))
            last_end = gl.minimum(i_end - 1 + origin + width, used_to)
        else:
            used_to = 0
            if UNUSED == "tail":
                used_to = gl.load(rows[3] + len_q + len_q - 1)
            begin = gl.load(rows[3] + i_begin)
            last_end = gl.load(rows[3] + len_q + i_end - 1)
        all_from = gl.load(rows[3] + i_end - 1)
        all_to = gl.load(rows[3] + len_q + i_begin)
        first = gl.load(rows[3] + i, mask=i < i_end, other=0)
        last = gl.load(rows[3] + len_q + i, mask=i < i_end, other=0)
        end = gl.maximum(last_end, begin)
    else:
        low, high = _bounds(rows, n, len_k)
        start, stop = _reach(rows, n, origin, width, len_q, len_k)
        first = gl.maximum(i + start, low)
        last = gl.minimum(i + stop, high)
        begin = gl.maximum(i_begin + start, low)
        end = gl.maximum(gl.minimum(i_end - 1 + stop, high), begin)
        all_from = gl.maximum(i_end - 1 + start, low)
        all_to = gl.minimum(i_begin + stop, high)
        used_to = gl.minimum(len_q - 1 + stop, high)
    return first, last, begin, end, all_from, all_to, used_to


@gluon.jit
def rows_of_keys(rows, n, j, j_begin, BLOCK: gl.constexpr, origin, width, len_q, len_k, UNUSED: gl.constexpr):
    """``(first, last, begin, end, all_from, all_to, used_to)``.

    Key j is seen by rows [first, last). Of keys [j_begin, j_begin + BLOCK), some are seen by rows [begin, end), all by
    [all_from, all_to). Either may be empty, but begin <= end. Each of the rows from begin to ``used_to`` sees some key of the
    sequence, and none after them does; with gaps that is 0.
    """
    if rows[4] is not None:
        j_end = gl.minimum(j_begin + BLOCK, len_k)
        if UNUSED == "near tail":
            used_to = gl.load(rows[4] + len_k + len_k - 1)
            begin = gl.maximum(j_begin - origin - width + 1, gl.load(rows[4]))
            last_end = gl.minimum(j_end - origin, used_to)
        else:
            used_to = 0
            if UNUSED == "tail":
                used_to = gl.load(rows[4] + len_k + len_k - 1)
            begin = gl.load(rows[4] + j_begin)
            last_end = gl.load(rows[4] + len_k + j_end - 1)
        all_from = gl.load(rows[4] + j_end - 1)
        all_to = gl.load(rows[4] + len_k + j_begin, mask=j_begin + BLOCK <= len_k, other=0)
        first = gl.load(rows[4] + j, mask=j < len_k, other=0)
        last = gl.load(rows[4] + len_k + j, mask=j < len_k, other=0)
        end = gl.maximum(last_end, begin)
    else:
        low, high = _bounds(rows, n, len_k)
        start, stop = _reach(rows, n, origin, width, len_q, len_k)
        j_end = gl.minimum(j_begin + BLOCK, high)
        visible = j < high
        all_visible = j_begin + BLOCK <= high
        j_low = j_begin
        if rows[1] is not None:
            visible = visible & (j >= low)
            all_visible = all_visible & (j_begin >= low)
            j_low = gl.maximum(j_begin, low)
        first = gl.maximum(j - stop + 1, 0)
        last = gl.where(visible, gl.minimum(j - start + 1, len_q), 0)
        begin = gl.maximum(j_low - stop + 1, 0)
        end = gl.where(j_low < high, gl.maximum(gl.minimum(j_end - start, len_q), begin), begin)
        all_from = gl.maximum(j_end - stop, 0)
        all_to = gl.where(all_visible, gl.minimum(j_begin - start + 1, len_q), 0)
        used_to = gl.minimum(high - start, len_q)
    return first, last, begin, end, all_from, all_to, used_to


@gluon.jit
def clear_unused(table, length, used_to, start, buffer, layout: gl.constexpr, UNUSED: gl.constexpr):
    """Set those rows of a tile fetched from ``start`` on that are of no use to anybody to zero: 0 * NaN would be NaN.

    They are those from ``used_to`` on, or with gaps those of which the ``table`` (2, length) has an empty interval.
    """
    if UNUSED == "gaps":
        clear_rows_without(table, length, start, buffer, layout)
    else:
        clear_rows_from(used_to - start, buffer, layout)
