"""One call: its tensors laid on the line, multiplied block by block, and what comes back.

A side of a product is read in place where its tensor is the line already, and copied there otherwise (*pack*), or copied as
fp16 factors (*split*). *Gather* reads the band out of a dense result, *scatter* writes a band into zeroed blocks, *mend* goes
over the ends of sequences in an average; gather and mend also compute the edge rows. The kernels for these are in ``csrc/``.
Dense blocks are made a chunk at a time, in a bounded workspace. Read in place, a dot product is one product and one of our
kernels, an average scatters, multiplies and mends.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from attnreg import Window, allow_tf32
from attnreg_cublas.blocks import Blocks, Spans, cut, lay
from attnreg_cublas.build import ops
from attnreg_cublas.products import multiply, multiply_factors, sums_factors_in_fp32
from attnreg_cublas.rule import AVERAGE_EDGE_SLOTS, SCORE_EDGE_SLOTS, block_rows, factors_pay
from attnreg_cublas.sides import Side, in_place, matrices, padded_width

# cuBLAS puts the batch on a grid dimension, in some of its kernels with a limit of 65535.
LARGEST_BATCH = 32768

_MEBIBYTE = 2**20

_lay = lru_cache(maxsize=1024)(lay)
_cut = lru_cache(maxsize=1024)(cut)


class Call:
    """A call whose query side has ``rows`` (N, H, Lq, .) and whose key side has ``keys`` (N, Hkv, Lk, .)."""

    def __init__(
        self,
        rows: Tensor,
        keys: Tensor,
        window: Window,
        bias: Tensor | None,
        key_lengths: Tensor | None,
        block: int | None,
        workspace: int,
    ) -> None:
        self.batch, self.heads, self.queries, _ = rows.shape
        self.kv_heads, self.keys = keys.shape[1:3]
        self.group = self.heads // self.kv_heads
        self.window, self.bias, self.key_lengths = window, bias, key_lengths
        self.line = _lay(self.batch * self.kv_heads, self.queries, self.keys, window.left, window.right)
        self.block = block or block_rows(self.line.width, rows.dtype, allow_tf32())
        self.workspace = workspace * _MEBIBYTE
        self.ops = ops()

    def band(self, query: Tensor, key: Tensor, *, scale: float, hidden: float) -> Tensor:
        """``scale * query . key + bias`` (N, H, Lq, W) in the visible slots, and ``hidden`` in the others."""
        rows, columns = self._queries(query), self._keys(key)
        exact = query.dtype == torch.float32 and not allow_tf32()
        factors = exact and factors_pay(self.line.width) and sums_factors_in_fp32()
        blocks = self._cut() if factors else self._cut(rows, columns, edge_slots=SCORE_EDGE_SLOTS)
        scales = (self._scales(query), self._scales(key)) if factors else None
        band = query.new_empty(self.batch, self.heads, self.queries, self.window.size)
        visibility = self._visibility(blocks)
        for begin, end, dense in self._chunks(blocks, query, (blocks.rows * self.group, blocks.columns)):
            row_spans, column_spans = blocks.row_spans(begin, end), blocks.column_spans(begin, end)
            if scales is None:
                left, right = self._matrices(rows, blocks, row_spans), self._matrices(columns, blocks, column_spans)
                multiply(left, right.mT, dense, scale)
            else:
                left = self._split(rows, row_spans, scales[0], of_keys=False)
                right = self._split(columns, column_spans, scales[1], of_keys=True)
                multiply_factors(left, right.mT, dense)
            given = (query, key, dense, *(scales or (None, None)))
            self.ops.gather_band(*given, band, *visibility, begin, self.window.left, scale, hidden)
        return band

    def average(self, band: Tensor, source: Tensor, *, scale: float = 1.0) -> Tensor:
        """``scale * sum over c of band[i, c] * source[key of c]`` (N, H, Lq, E), over the visible slots."""
        columns = self._keys(source, skip_unseen=True)
        blocks = self._cut(columns, edge_slots=AVERAGE_EDGE_SLOTS)
        result = self._result(band, source, blocks, self.group)
        for begin, end, dense in self._chunks(blocks, band, (blocks.rows, self.group, blocks.columns)):
            self.ops.scatter_band(band, dense, *self._visibility(blocks), begin, self.keys, self.window.left)
            seen = self._matrices(columns, blocks, blocks.column_spans(begin, end))
            multiply(dense.flatten(1, 2), seen, matrices(result, blocks.row_spans(begin, end)), scale)
        output = self._from_line(result, source.size(3), self.line.query_lead, self.queries)
        self.ops.mend_rows(band, source, output, *self._visibility(blocks), self.keys, self.window.left, scale)
        return output

    def average_by_key(self, band: Tensor, source: Tensor, *, scale: float = 1.0) -> Tensor:
        """``scale * sum over the queries i that see key j of band[i, slot of j] * source[i]`` (N, Hkv, Lk, E)."""
        columns = self._queries(source, skip_unseen=True)
        blocks = self._cut(columns, by_key=True, edge_slots=AVERAGE_EDGE_SLOTS)
        result = self._result(band, source, blocks, 1)
        for begin, end, dense in self._chunks(blocks, band, (blocks.columns, self.group, blocks.rows)):
            self.ops.scatter_band_by_key(band, dense, *self._visibility(blocks), begin, self.keys, self.window.left)
            seeing = self._matrices(columns, blocks, blocks.column_spans(begin, end))
            into = matrices(result, blocks.row_spans(begin, end))
            multiply(dense.flatten(1, 2).mT, seeing, into, scale, self.group)
        output = self._from_line(result, source.size(3), self.line.key_lead, self.keys)
        self.ops.mend_rows_by_key(band, source, output, *self._visibility(blocks), self.keys, self.window.left, scale)
        return output

    def masked(self, band: Tensor) -> Tensor:
        """A band with zeros at invisible slots."""
        masked = torch.empty_like(band, memory_format=torch.contiguous_format)
        self.ops.mask_band(band, masked, self.bias, self.key_lengths, self.keys, self.window.left)
        return masked

    def _queries(self, source: Tensor, *, skip_unseen: bool = False) -> Side:
        # A query is worth reading for the keys that it sees: from which one on, counted from its own position, how many.
        seen = (self.keys - self.queries - self.window.left, self.window.size)
        skip = skip_unseen and (self.key_lengths is not None or self.queries > self.keys)
        return self._side(source, self.line.query_lead, seen, skip)

    def _keys(self, source: Tensor, *, skip_unseen: bool = False) -> Side:
        return self._side(source, self.line.key_lead, (0, 1), skip_unseen and self.key_lengths is not None)

    def _side(self, source: Tensor, lead: int, seen: tuple[int, int], skip: bool) -> Side:
        """A side that may be read in place, but where rows are to be skipped: their weights are zero, but they may be NaN."""
        is_line = (source.size(1), source.size(2), lead) == (self.kv_heads, self.line.pitch, 0)
        return Side(source, in_place(source) if is_line and not skip else None, lead, seen)

    def _cut(self, *sides: Side, by_key: bool = False, edge_slots: float = -1) -> Blocks:
        spared = any(side.line is not None for side in sides)
        return _cut(self.line, self.block, by_key=by_key, edge_slots=edge_slots if spared else -1)

    def _matrices(self, side: Side, blocks: Blocks, spans: Spans) -> Tensor:
        """The rows, or the columns, of some blocks: (blocks, B * G, E) or (blocks, S * G, E)."""
        if side.line is not None and blocks.within:
            return matrices(side.line, spans)
        source = side.source
        packed = source.new_empty(
            spans.positions, source.size(1) // self.kv_heads, padded_width(source.size(3), source.dtype)
        )
        self.ops.pack(source, packed, self.key_lengths, self.keys, self.line.pitch, spans.first, side.lead, *side.seen)
        return matrices(packed, spans, spans.first)

    def _split(self, side: Side, spans: Spans, scales: Tensor, *, of_keys: bool) -> Tensor:
        """As ``_matrices``, in three fp16 factors a row; their scales are written to ``scales``."""
        source = side.source
        width = padded_width(source.size(3), torch.float16)
        factors = source.new_empty(spans.positions, scales.size(1), 3 * width, dtype=torch.float16)
        self.ops.split(source, factors, scales, self.line.pitch, spans.first, side.lead, of_keys)
        return matrices(factors, spans, spans.first)

    def _scales(self, source: Tensor) -> Tensor:
        return source.new_empty(self.line.length, source.size(1) // self.kv_heads)

    def _result(self, band: Tensor, source: Tensor, blocks: Blocks, heads: int) -> Tensor:
        """Room for a product by position: (positions, heads, width), of the line and of all rows of blocks."""
        positions = max(self.line.length, blocks.count * blocks.rows)
        return band.new_empty(positions, heads, padded_width(source.size(3), source.dtype))

    def _from_line(self, result: Tensor, width: int, lead: int, length: int) -> Tensor:
        """The rows of a result (N, H, length, width); those that have no position are zero."""
        heads = result.size(1)
        line = result[: self.line.length].view(self.batch, self.kv_heads, self.line.pitch, heads, -1)
        rows = line[:, :, max(lead, 0) : lead + length, :, :width].transpose(2, 3)
        rows = rows.reshape(self.batch, self.kv_heads * heads, -1, width)
        if lead < 0:
            unseen = rows.new_zeros(self.batch, self.kv_heads * heads, -lead, width)
            return torch.cat((unseen, rows), 2)
        return rows.contiguous()

    def _visibility(self, blocks: Blocks) -> tuple[Tensor | None, Tensor | None, list[int]]:
        """What the kernels know of visible slots, of line and blocks; the numbers as ``csrc/geometry.cuh`` orders them."""
        line = self.line
        on_line = (self.kv_heads, self.group, line.pitch, line.query_lead, line.key_lead)
        numbers = [*on_line, blocks.rows, blocks.columns, blocks.before, blocks.first, blocks.count]
        return self.bias, self.key_lengths, numbers

    def _chunks(self, blocks: Blocks, like: Tensor, shape: tuple[int, ...]) -> Iterator[tuple[int, int, Tensor]]:
        """Ranges of blocks, and room for the dense elements of each block, which are of ``shape``.

        A range is what fits the workspace, one block at least; the room is the same one every time.
        """
        block_bytes = math.prod(shape) * like.element_size()
        step = min(max(self.workspace // block_bytes, 1), LARGEST_BATCH, blocks.count)
        room = like.new_empty(step, *shape)
        for begin in range(0, blocks.count, step):
            end = min(begin + step, blocks.count)
            yield begin, end, room[: end - begin]
