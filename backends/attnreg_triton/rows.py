"""Where rows stand, and the interval of keys that each sees.

Row i of sequence n stands at key position ``p = start + i``. It has a slot for the keys from its *origin* ``p - left`` on, W of
them, and sees those of [first, last): ``first = max(p - left, low)`` and ``last = min(p + right + 1, high)``, where low and high
are 0 and Lk, or what ``key_starts`` and ``key_lengths`` say.

Kernels get one tuple ``rows`` of what a call gives. Where that is numbers of sequences, each program loads those of its own.
In a packed call every row has a sequence of its own to ask, so that two tables are made before, by one small launch: ``by_row``
(3, Lq) has first, last and origin of each row, ``by_key`` (2, Lk) the rows [first, last) that see each key. First and last never
decrease along a pack, also where an interval is empty. Nothing is read on the host.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnreg import Window
from attnreg_triton.launch import ceil_div, launch
from attnreg_triton.tiles import Tiles

# Positions a program of the tables looks after.
_POSITIONS = Tiles(256, 256, 4, num_stages=1)


class Rows(NamedTuple):
    """What kernels get about rows, None where a call does not give it.

    Attributes:
        key_lengths, key_starts, query_starts: (N,), as the contract has them.
        by_row: (3, Lq), of a packed call, int32.
        by_key: (2, Lk), likewise, for kernels that own keys.
    """

    key_lengths: Tensor | None = None
    key_starts: Tensor | None = None
    query_starts: Tensor | None = None
    by_row: Tensor | None = None
    by_key: Tensor | None = None


class Place(NamedTuple):
    """Rows and what their kernels are to be told of the window.

    Attributes:
        rows: the tuple.
        origin: of row 0, the key of slot 0; where ``query_starts`` are given, less the start; in a packed call without gaps,
            where a row stands at its own key, all the same.
        width: W.
        gaps: whether there may be keys that no row sees, or rows that see no key, between others that do.
    """

    rows: Rows
    origin: int
    width: int
    gaps: bool


def place(
    len_q: int,
    len_k: int,
    window: Window,
    *,
    key_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    query_starts: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    by_key: bool = False,
) -> Place:
    """What kernels have to know; of a packed call, the tables, ``by_key`` where it is asked for or there are gaps."""
    origin = len_k - len_q - window.left if query_starts is None and cu_seqlens_q is None else -window.left
    if cu_seqlens_q is None:
        return Place(Rows(key_lengths, key_starts, query_starts), origin, window.size, False)
    gaps = cu_seqlens_k is not None and cu_seqlens_k is not cu_seqlens_q
    of_keys = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    # The same offsets stay the same when they are clamped.
    most_q, most_k = (len_q, len_k) if gaps else (min(len_q, len_k),) * 2
    by_key = by_key or gaps
    sequences = cu_seqlens_q.shape[0] - 1
    rows_table = torch.empty((3, len_q), dtype=torch.int32, device=cu_seqlens_q.device)
    keys_table = torch.empty((2, len_k), dtype=torch.int32, device=cu_seqlens_q.device) if by_key else None
    launch(
        _tables,
        ceil_div(max(len_q, len_k if by_key else 0), _POSITIONS.rows),
        _POSITIONS,
        cu_seqlens_q,
        of_keys,
        rows_table,
        keys_table,
        sequences,
        len_q,
        len_k,
        most_q,
        most_k,
        window.left,
        window.right,
        STEPS=max(sequences + 1, 1).bit_length(),
        device=cu_seqlens_q.device,
    )
    rows = Rows(by_row=rows_table, by_key=keys_table)
    return Place(rows, origin, window.size, gaps)


@triton.jit
def _offset(offsets, index, length):
    """An offset, clamped to 0..length: on a GPU nobody has checked it."""
    return tl.minimum(tl.maximum(tl.load(offsets + index), 0), length).to(tl.int64)


@triton.jit
def _sequence(offsets, count, position, STEPS: tl.constexpr):
    """The last of the offsets that is at most ``position``, by halving; -1 where there is none."""
    low = tl.zeros_like(position)
    high = low + count
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        halving = low < high
        is_at_most = tl.load(offsets + middle, mask=halving, other=0) <= position
        low = tl.where(halving & is_at_most, middle + 1, low)
        high = tl.where(halving & ~is_at_most, middle, high)
    return low - 1


@triton.jit
def _between(position, low, high):
    return tl.minimum(tl.maximum(position, low), high)


@triton.jit(do_not_specialize=["sequences", "len_q", "len_k", "most_q", "most_k", "left", "right"])
def _tables(
    of_queries,
    of_keys,
    by_row,
    by_key,
    sequences,
    len_q,
    len_k,
    most_q,
    most_k,
    left,
    right,
    STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    # A position past the last offset, or before the first, is at the end of a sequence of no rows and keys.
    i = position
    found = _sequence(of_queries, sequences + 1, i, STEPS)
    begin, end = _between(found, 0, sequences), _between(found + 1, 0, sequences)
    low, high = _offset(of_keys, begin, most_k), _offset(of_keys, end, most_k)
    origin = i + high - _offset(of_queries, end, most_q) - left
    pointers = by_row + i
    is_row = i < len_q
    tl.store(pointers, _between(origin, low, high).to(tl.int32), mask=is_row)
    tl.store(pointers + len_q, _between(origin + left + right + 1, low, high).to(tl.int32), mask=is_row)
    tl.store(pointers + 2 * len_q, origin.to(tl.int32), mask=is_row)
    if by_key is not None:
        j = position
        found = _sequence(of_keys, sequences + 1, j, STEPS)
        begin, end = _between(found, 0, sequences), _between(found + 1, 0, sequences)
        low, high = _offset(of_queries, begin, most_q), _offset(of_queries, end, most_q)
        last = j + left + 1 - (_offset(of_keys, end, most_k) - high)
        pointers = by_key + j
        is_key = j < len_k
        tl.store(pointers, _between(last - left - right - 1, low, high).to(tl.int32), mask=is_key)
        tl.store(pointers + len_k, _between(last, low, high).to(tl.int32), mask=is_key)


@triton.jit
def _sum_between(position, distance, low, high):
    """``position + distance``, or the nearest number in low..high, where the sum itself might not fit 64 bits."""
    return (_between(position, low - distance, high - distance) + distance).to(tl.int32)


@triton.jit
def bounds(rows, n, len_k):
    """``(low, high)``: the keys of sequence n that are visible at all, 0 <= low, high <= Lk."""
    low = 0
    high = len_k
    if rows[0] is not None:
        high = _between(tl.load(rows[0] + n), 0, len_k).to(tl.int32)
    if rows[1] is not None:
        low = _between(tl.load(rows[1] + n), 0, len_k).to(tl.int32)
    return low, high


@triton.jit
def reach(rows, n, origin, width, len_q, len_k):
    """``(start, stop)``: row i has slots for keys [i + start, i + stop), both to 32 bits, exact wherever that matters."""
    if rows[2] is not None:
        position = tl.load(rows[2] + n).to(tl.int64)
        start = _sum_between(position, origin.to(tl.int64), -len_q, len_k)
        stop = _sum_between(position, origin.to(tl.int64) + width, -len_q, len_k)
    else:
        start = origin
        stop = origin + width
    return start, stop


@triton.jit
def slot_origin(rows, n, i, valid, origin, width, len_q, len_k):
    """The key of slot 0 of each row: a number per row (of a packed call), or else what is to be added to i."""
    if rows[3] is not None:
        found = tl.load(rows[3] + 2 * len_q + i, mask=valid, other=0) - i
    elif rows[2] is not None:
        found = _sum_between(tl.load(rows[2] + n).to(tl.int64), origin.to(tl.int64), -len_q - width, len_k)
    else:
        found = origin
    return found


@triton.jit
def keys_of_rows(rows, n, i, i_begin, i_end, origin, width, len_q, len_k):
    """``(first, last, begin, end)``: row i sees keys [first, last); of rows [i_begin, i_end), [begin, end) are seen by some.

    Rows past ``i_end`` see nothing. Never reversed, if empty.
    """
    if rows[3] is not None:
        pointers = rows[3] + i
        first = tl.load(pointers, mask=i < i_end, other=0)
        last = tl.load(pointers + len_q, mask=i < i_end, other=0)
        begin = tl.load(rows[3] + i_begin)
        end = tl.load(rows[3] + len_q + i_end - 1)
    else:
        low, high = bounds(rows, n, len_k)
        start, stop = reach(rows, n, origin, width, len_q, len_k)
        first = tl.maximum(i + start, low)
        last = tl.where(i < i_end, tl.minimum(i + stop, high), 0)
        begin = tl.maximum(i_begin + start, low)
        end = tl.minimum(i_end - 1 + stop, high)
    return first, last, begin, tl.maximum(begin, end)


@triton.jit
def rows_of_keys(rows, n, j, j_begin, j_end, origin, width, len_q, len_k):
    """``(first, last, begin, end)``: key j is seen by rows [first, last); of keys [j_begin, j_end), [begin, end) see some.

    Keys past ``j_end`` are seen by none. Never reversed, if empty.
    """
    if rows[4] is not None:
        pointers = rows[4] + j
        first = tl.load(pointers, mask=j < j_end, other=0)
        last = tl.load(pointers + len_k, mask=j < j_end, other=0)
        begin = tl.load(rows[4] + j_begin)
        end = tl.load(rows[4] + len_k + j_end - 1)
    else:
        low, high = bounds(rows, n, len_k)
        start, stop = reach(rows, n, origin, width, len_q, len_k)
        j_end = tl.minimum(j_end, high)
        j_begin = tl.maximum(j_begin, low)
        first = tl.maximum(j - stop + 1, 0)
        last = tl.where((j >= low) & (j < j_end), tl.minimum(j - start + 1, len_q), 0)
        begin = tl.maximum(j_begin - stop + 1, 0)
        end = tl.where(j_begin < j_end, tl.minimum(j_end - start, len_q), 0)
    return first, last, begin, tl.maximum(begin, end)


@triton.jit
def used_keys(rows, j, begin, end, len_k, GAPS: tl.constexpr):
    """Which of keys [begin, end) are seen by some row at all: with GAPS there may be others between them, with NaN.

    ``begin`` is None where all of j are past it.
    """
    used = j < end
    if begin is not None:
        used = used & (j >= begin)
    if GAPS:
        pointers = rows[4] + j
        first = tl.load(pointers, mask=used, other=0)
        used = used & (first < tl.load(pointers + len_k, mask=used, other=0))
    return used
