"""One call: its tensors laid on the line, multiplied block by block, and what comes back.

A side of a product is read in place where its tensor is the line already, or lines of one head each, and copied there otherwise
(*pack*), or copied as fp16 factors (*split*). *Gather* reads the band out of a dense result, *scatter* writes a band into zeroed
blocks, *mend* goes over the ends of sequences in an average; gather and mend also compute the edge rows. A product by position
whose rows are not in the order of the caller's tensors yet is copied there (*unpack*). These kernels are in ``csrc/cuda/``.
Lengths, starts and offsets only hide slots: blocks lie as without them. Keys that begin anywhere are copied to where they are
seen. Dense blocks are made a chunk at a time, in a bounded workspace. Read in place, a dot product is one product and one of
our kernels, an average scatters, multiplies and mends.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from attnreg import Window, allow_tf32, empty_like
from attnreg.memory import strides_like
from attnreg_cublas.blocks import Blocks, Spans, cut, lay
from attnreg_cublas.build import ops
from attnreg_cublas.given import Given
from attnreg_cublas.products import multiply, multiply_factors, sums_factors_in_fp32
from attnreg_cublas.rule import AVERAGE_EDGE_SLOTS, SCORE_EDGE_SLOTS, block_rows, factors_pay
from attnreg_cublas.sides import Side, as_heads, as_line, matrices, padded_width

# cuBLAS puts the batch on a grid dimension, in some of its kernels with a limit of 65535.
LARGEST_BATCH = 32768

_MEBIBYTE = 2**20

_lay = lru_cache(maxsize=1024)(lay)
_cut = lru_cache(maxsize=1024)(cut)


class Chunk(NamedTuple):
    """Blocks ``begin`` to ``end`` of each of some lines, and room for their dense elements, one line's after the other's."""

    line: int
    lines: int
    begin: int
    end: int
    dense: Tensor

    def by_line(self) -> Tensor:
        """The dense elements of the blocks of each line: (lines, blocks, ...)."""
        by_line: Tensor = self.dense.unflatten(0, (self.lines, -1))
        return by_line


class Room(NamedTuple):
    """Where a product by position goes.

    Attributes:
        blocks: those that are multiplied.
        rows: (lines, positions, heads, width).
        output: (N, heads, L, width), what becomes of it.
        is_output: whether the rows are those of the output.
    """

    blocks: Blocks
    rows: Tensor
    output: Tensor
    is_output: bool


class Call:
    """A call whose query side has ``rows`` (N, H, Lq, .) and whose key side has ``keys`` (N, Hkv, Lk, .).

    A result lies in memory as the tensor ``like``, which has its first three dimensions.
    """

    def __init__(
        self,
        rows: Tensor,
        keys: Tensor,
        window: Window,
        bias: Tensor | None,
        given: Given,
        block: int | None,
        workspace: int,
    ) -> None:
        self.batch, self.heads, self.queries, _ = rows.shape
        self.kv_heads, self.keys = keys.shape[1:3]
        self.group = self.heads // self.kv_heads
        self.window, self.bias = window, bias
        start = given.start(self.queries, self.keys)
        lengths = (self.queries, self.keys, window.left, window.right, start)
        self.line = _lay(1, self.batch * self.kv_heads, *lengths)
        self.lines_of_heads = _lay(self.kv_heads, self.batch, *lengths)
        self.block, self.block_of_heads = (
            block or block_rows(self.line.width, rows.dtype, allow_tf32(), by_address=by_address)
            for by_address in (False, True)
        )
        self.workspace = workspace * _MEBIBYTE
        self.ops = ops()
        self.given = given.for_kernels(self.queries, self.keys)
        # The first key of query 0, less the start of its sequence where each has its own.
        self.shift = (start or 0) - window.left
        # Where key 0 lies; in each sequence elsewhere if that is None.
        self.key_lead = None if start is None else self.line.key_lead

    def band(self, query: Tensor, key: Tensor, like: Tensor, *, scale: float, hidden: float) -> Tensor:
        """``scale * query . key + bias`` (N, H, Lq, W) in the visible slots, and ``hidden`` in the others."""
        rows, columns = self._queries(query), self._keys(key)
        exact = query.dtype == torch.float32 and not allow_tf32()
        factors = exact and factors_pay(self.line.width) and sums_factors_in_fp32()
        blocks = self._cut() if factors else self._cut(rows, columns, edge_slots=SCORE_EDGE_SLOTS)
        scales = (self._scales(query), self._scales(key)) if factors else None
        band = empty_like(like, self.window.size)
        visibility = self._visibility(blocks)
        for chunk in self._chunks(blocks, query, (blocks.rows * self.group, blocks.columns)):
            row_spans = blocks.row_spans(chunk.begin, chunk.end)
            column_spans = blocks.column_spans(chunk.begin, chunk.end)
            if scales is None:
                left = self._matrices(rows, blocks, chunk, row_spans)
                right = self._matrices(columns, blocks, chunk, column_spans)
                multiply(left, right.mT, chunk.by_line(), scale)
            else:
                left = self._split(rows, row_spans, scales[0])
                right = self._split(columns, column_spans, scales[1])
                multiply_factors(left[0], right[0].mT, chunk.dense)
            given = (query, key, chunk.dense, *(scales or (None, None)))
            self.ops.gather_band(*given, band, *visibility, chunk.line, chunk.begin, self.window.left, scale, hidden)
        return band

    def average(self, band: Tensor, source: Tensor, like: Tensor, *, scale: float = 1.0) -> Tensor:
        """``scale * sum over c of band[i, c] * source[key of c]`` (N, H, Lq, E), over the visible slots."""
        columns = self._keys(source)
        room = self._room(like, columns, self.group, self.line.query_lead)
        blocks, output = room.blocks, room.output
        visibility = self._visibility(blocks)
        for chunk in self._chunks(blocks, band, (blocks.rows, self.group, blocks.columns)):
            self.ops.scatter_band(band, chunk.dense, *visibility, chunk.line, chunk.begin, self.keys, self.window.left)
            seen = self._matrices(columns, blocks, chunk, blocks.column_spans(chunk.begin, chunk.end))
            into = _of_lines(room.rows, chunk, blocks.row_spans(chunk.begin, chunk.end))
            multiply(chunk.by_line().flatten(2, 3), seen, into, scale)
        if not room.is_output:
            self.ops.unpack(room.rows[0], output, self.given, self.line.pitch, self.line.query_lead, False)
        self.ops.mend_rows(band, source, output, *visibility, self.keys, self.window.left, scale)
        return output

    def average_by_key(self, band: Tensor, source: Tensor, like: Tensor, *, scale: float = 1.0) -> Tensor:
        """``scale * sum over the queries i that see key j of band[i, slot of j] * source[i]`` (N, Hkv, Lk, E)."""
        columns = self._queries(source, skip_unseen=True)
        room = self._room(like, columns, 1, self.key_lead, by_key=True)
        blocks, output = room.blocks, room.output
        visibility = self._visibility(blocks)
        for chunk in self._chunks(blocks, band, (blocks.columns, self.group, blocks.rows)):
            self.ops.scatter_band_by_key(
                band, chunk.dense, *visibility, chunk.line, chunk.begin, self.keys, self.window.left
            )
            seeing = self._matrices(columns, blocks, chunk, blocks.column_spans(chunk.begin, chunk.end))
            into = _of_lines(room.rows, chunk, blocks.row_spans(chunk.begin, chunk.end))
            multiply(chunk.by_line().flatten(2, 3).mT, seeing, into, scale, self.group)
        if not room.is_output:
            self.ops.unpack(room.rows[0], output, self.given, self.line.pitch, self.line.key_lead, True)
        self.ops.mend_rows_by_key(band, source, output, *visibility, self.keys, self.window.left, scale)
        return output

    def masked(self, band: Tensor, like: Tensor) -> Tensor:
        """A band with zeros at invisible slots."""
        masked = empty_like(like, dtype=band.dtype)
        self.ops.mask_band(band, masked, self.bias, self.given, self.keys, self.shift)
        return masked

    def _queries(self, source: Tensor, *, skip_unseen: bool = False) -> Side:
        # The first queries may see no key. Their weights are zero, but they may be NaN. Where anything is given, what such rows
        # have spoilt is mended; otherwise they are not read.
        skip = skip_unseen and not self.given and self.queries > self.keys
        return self._side(source, self.line.query_lead, not skip, of_keys=False)

    def _keys(self, source: Tensor) -> Side:
        return self._side(source, self.line.key_lead, self.key_lead is not None, of_keys=True)

    def _side(self, source: Tensor, lead: int, may_be_read_in_place: bool, *, of_keys: bool) -> Side:
        is_line = (source.size(1), source.size(2), lead) == (self.kv_heads, self.line.pitch, 0)
        if not (may_be_read_in_place and is_line):
            return Side(source, None, None, lead, of_keys)
        return Side(source, as_line(source), as_heads(source), lead, of_keys)

    def _cut(self, *sides: Side, edge_slots: float = -1) -> Blocks:
        """Blocks of scores: of whichever lines spare copies, or else covering one line."""
        one_line = any(side.line is not None for side in sides)
        if not one_line and any(side.heads is not None for side in sides):
            blocks = _cut(self.lines_of_heads, self.block_of_heads, edge_slots=edge_slots)
            if blocks.within:
                return blocks
        return _cut(self.line, self.block, edge_slots=edge_slots if one_line else -1)

    def _room(self, like: Tensor, columns: Side, heads: int, lead: int | None, *, by_key: bool = False) -> Room:
        """Room for an average of ``heads`` heads a position, and its blocks: in the output where it is one line or more.

        Row 0 is to lie at ``lead``; None if it lies elsewhere in each sequence.
        """
        width = columns.source.size(3)
        shape, row = (*like.shape[:3], width), padded_width(width, like.dtype)
        per_sequence = self.line.pitch * heads * row
        per_head = row if self.kv_heads == 1 else per_sequence if heads == 1 else None
        own, wanted = (self.kv_heads * per_sequence, per_head, heads * row), strides_like(like, width)
        is_line = lead is not None and lead >= 0
        is_line = is_line and all(size == 1 or ours == its for size, ours, its in zip(shape, own, wanted))
        output = None if is_line else empty_like(like, width)
        if output is not None and heads == 1 and (like.size(2), lead) == (self.line.pitch, 0):
            lines = as_heads(output)
            if lines is not None:
                blocks = _cut(self.lines_of_heads, self.block_of_heads, by_key=by_key, edge_slots=AVERAGE_EDGE_SLOTS)
                if blocks.within:
                    return Room(blocks, lines, output, True)
        edge_slots = AVERAGE_EDGE_SLOTS if columns.line is not None else -1
        blocks = _cut(self.line, self.block, by_key=by_key, edge_slots=edge_slots)
        # Blocks that cover the line reach over its end.
        rows = like.new_empty(1, max(self.line.length, blocks.count * blocks.rows), heads, row)
        if output is None:
            return Room(blocks, rows, rows.as_strided(shape, wanted, (lead or 0) * heads * row), True)
        return Room(blocks, rows, output, False)

    def _matrices(self, side: Side, blocks: Blocks, chunk: Chunk, spans: Spans) -> Tensor:
        """The rows, or the columns, of some blocks of each line: (lines, blocks, B * G, E) or (lines, blocks, S * G, E)."""
        by_head = blocks.line.lines > 1
        in_place = side.heads if by_head else side.line
        if in_place is not None and blocks.within:
            return _of_lines(in_place, chunk, spans)
        source, length = side.source, blocks.line.length
        packed = source.new_empty(
            (chunk.lines - 1) * length + spans.positions,
            source.size(1) // self.kv_heads,
            padded_width(source.size(3), source.dtype),
        )
        place = (by_head, self.line.pitch, chunk.line * length + spans.first, side.lead, side.of_keys)
        self.ops.pack(source, packed, self.given, self.keys, *place, self.shift, self.window.size)
        return matrices(packed, spans, spans.first, lines=chunk.lines, per_line=length * packed.stride(0))

    def _split(self, side: Side, spans: Spans, scales: Tensor) -> Tensor:
        """As ``_matrices``, in three fp16 factors a row; their scales are written to ``scales``."""
        source = side.source
        width = padded_width(source.size(3), torch.float16)
        factors = source.new_empty(spans.positions, scales.size(1), 3 * width, dtype=torch.float16)
        self.ops.split(source, factors, scales, self.given, self.line.pitch, spans.first, side.lead, side.of_keys)
        return matrices(factors, spans, spans.first)

    def _scales(self, source: Tensor) -> Tensor:
        return source.new_empty(self.line.length, source.size(1) // self.kv_heads)

    def _visibility(self, blocks: Blocks) -> tuple[Tensor | None, list[Tensor | None], list[int]]:
        """What the kernels know of visible slots, of line and blocks; the numbers as ``csrc/cuda/geometry.cuh`` orders them."""
        line = blocks.line
        on_line = (self.kv_heads, self.group, line.pitch, line.query_lead, line.key_lead)
        of_blocks = (blocks.rows, blocks.columns, blocks.before, blocks.first, blocks.count)
        return self.bias, self.given, [*on_line, *of_blocks, line.lines, line.sequences]

    def _chunks(self, blocks: Blocks, like: Tensor, shape: tuple[int, ...]) -> Iterator[Chunk]:
        """Ranges of blocks, of one line or all of several, and room for the dense elements of each block, which are of ``shape``.

        A chunk is what fits the workspace, one block at least; the room is the same one every time.
        """
        block_bytes = math.prod(shape) * like.element_size()
        fitting = min(max(self.workspace // block_bytes, 1), LARGEST_BATCH)
        lines, step = max(fitting // blocks.count, 1), min(fitting, blocks.count)
        lines = min(lines, blocks.line.lines)
        room = like.new_empty(lines * step, *shape)
        for line in range(0, blocks.line.lines, lines):
            of_lines = min(lines, blocks.line.lines - line)
            for begin in range(0, blocks.count, step):
                end = min(begin + step, blocks.count)
                yield Chunk(line, of_lines, begin, end, room[: of_lines * (end - begin)])


def _of_lines(rows: Tensor, chunk: Chunk, spans: Spans) -> Tensor:
    """Of rows (lines, positions, G, E) those of a chunk's lines, as ``matrices``."""
    return matrices(rows[chunk.line], spans, lines=chunk.lines, per_line=rows.stride(0))
