"""One call: its tensors laid on the line, multiplied block by block, and what comes back.

A side of a product is read in place where its tensor is the line already, and copied there otherwise (*pack*), or copied as
fp16 factors (*split*). *Gather* reads the band out of a dense result, *scatter* writes a band into zeroed blocks; the kernels
for these are in ``csrc/``. Dense blocks are made a chunk at a time, in a bounded workspace.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from attnreg import Window, allow_tf32
from attnreg_cublas.blocks import Blocks, cut, lay
from attnreg_cublas.build import ops
from attnreg_cublas.products import multiply, multiply_factors
from attnreg_cublas.rule import block_rows, factors_pay
from attnreg_cublas.sides import Side, in_place, padded_width

# cuBLAS puts the batch on a grid dimension, in some of its kernels with a limit of 65535.
LARGEST_BATCH = 32768

# Rows of blocks that leave the line are computed one by one. Where they are more than this part of all, a padded copy is
# made instead, on which no block leaves the line.
LARGEST_EDGE = 1 / 8

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
        self.width = self.line.left + self.line.right + 1
        self.block = block or block_rows(self.width)
        self.workspace = workspace * _MEBIBYTE
        self.ops = ops()

    def band(self, query: Tensor, key: Tensor, *, scale: float, hidden: float) -> Tensor:
        """``scale * query . key + bias`` (N, H, Lq, W) in the visible slots, and ``hidden`` in the others."""
        line, blocks = self.line, _cut(self.line, self.block)
        band = query.new_empty(self.batch, self.heads, self.queries, self.window.size)
        row_scales = key_scales = None
        rows, columns = in_place(query), in_place(key)
        if query.dtype == torch.float32 and not allow_tf32() and factors_pay(self.width):
            inner = (0, blocks.count)
            rows, row_scales = self._split(query, line.query_lead, 0, blocks.count * blocks.rows, of_keys=False)
            columns, key_scales = self._split(key, line.key_lead, blocks.before, _reach(blocks), of_keys=True)
        elif rows is not None and columns is not None and self._is_line(blocks):
            inner = blocks.inner
        else:
            inner = (0, blocks.count)
            rows = self._pack(query, line.query_lead, 0, blocks.count * blocks.rows, *self._seen_by_queries)
            columns = self._pack(key, line.key_lead, blocks.before, _reach(blocks), 0, 1)
        numbers = self._geometry(blocks, inner)
        for begin, end in self._chunks(blocks, inner, query.element_size()):
            dense = query.new_empty(end - begin, blocks.rows * self.group, blocks.columns)
            left = _rows(rows, blocks, begin, end)
            right = _columns(columns, blocks, begin, end).mT
            if row_scales is None:
                multiply(left, right, dense, scale)
            else:
                multiply_factors(left, right, dense)
            first = 0 if begin == inner[0] else begin * blocks.rows
            last = line.length if end == inner[1] else end * blocks.rows
            self.ops.gather_band(
                dense,
                query,
                key,
                row_scales,
                key_scales,
                band,
                self.bias,
                self.key_lengths,
                numbers,
                begin,
                first,
                last - first,
                self.window.left,
                scale,
                hidden,
            )
        return band

    def average(self, band: Tensor, source: Tensor, *, scale: float = 1.0) -> Tensor:
        """``scale * sum over c of band[i, c] * source[key of c]`` (N, H, Lq, E), over the visible slots."""
        line, blocks = self.line, _cut(self.line, self.block)
        inner, columns = self._columns_of(source, blocks, line.key_lead, 0, 1)
        numbers = self._geometry(blocks, inner)
        result = self._result(band, source, blocks)
        for begin, end in self._chunks(blocks, inner, band.element_size()):
            dense = band.new_empty(end - begin, blocks.rows, self.group, blocks.columns)
            self.ops.scatter_band(band, dense, self.bias, self.key_lengths, numbers, begin, self.keys, self.window.left)
            into = _rows(result, blocks, begin, end)
            multiply(dense.flatten(1, 2), _columns(columns, blocks, begin, end), into, scale)
        output = self._from_line(result, source.size(3), line.query_lead, self.queries)
        self.ops.average_rows(
            band, source, output, self.bias, self.key_lengths, numbers, self.keys, self.window.left, scale
        )
        return output

    def average_by_key(self, band: Tensor, source: Tensor, *, scale: float = 1.0) -> Tensor:
        """``scale * sum over the queries i that see key j of band[i, slot of j] * source[i]`` (N, Hkv, Lk, E)."""
        line, blocks = self.line, _cut(self.line, self.block, by_key=True)
        inner, columns = self._columns_of(source, blocks, line.query_lead, *self._seen_by_queries)
        numbers = self._geometry(blocks, inner)
        result = self._result(band, source, blocks, heads=1)
        for begin, end in self._chunks(blocks, inner, band.element_size()):
            dense = band.new_empty(end - begin, blocks.columns, self.group, blocks.rows)
            self.ops.scatter_band_by_key(
                band, dense, self.bias, self.key_lengths, numbers, begin, self.keys, self.window.left
            )
            into = _rows(result, blocks, begin, end)
            multiply(dense.flatten(1, 2).mT, _columns(columns, blocks, begin, end), into, scale, self.group)
        output = self._from_line(result, source.size(3), line.key_lead, self.keys)
        self.ops.average_rows_by_key(
            band, source, output, self.bias, self.key_lengths, numbers, self.keys, self.window.left, scale
        )
        return output

    def masked(self, band: Tensor) -> Tensor:
        """A band with zeros at invisible slots."""
        masked = torch.empty_like(band, memory_format=torch.contiguous_format)
        self.ops.mask_band(band, masked, self.bias, self.key_lengths, self.keys, self.window.left)
        return masked

    @property
    def _seen_by_queries(self) -> tuple[int, int]:
        """The keys that make a query worth reading: from which one on, counted from its own position, and how many."""
        return self.keys - self.queries - self.window.left, self.window.size

    def _is_line(self, blocks: Blocks) -> bool:
        """Whether tensors without gaps are the line, and few of its blocks leave it."""
        begin, end = blocks.inner
        edge = self.line.length - (end - begin) * blocks.rows
        return self.queries == self.keys and self.group == 1 and edge <= LARGEST_EDGE * self.line.length

    def _columns_of(
        self, source: Tensor, blocks: Blocks, lead: int, reach: int, extent: int
    ) -> tuple[tuple[int, int], Side]:
        """The blocks to multiply, and their columns."""
        # Weights are zero past a key length, but what lies there may be NaN.
        side = in_place(source) if self.key_lengths is None and self._is_line(blocks) else None
        if side is not None:
            return blocks.inner, side
        return (0, blocks.count), self._pack(source, lead, blocks.before, _reach(blocks), reach, extent)

    def _pack(self, source: Tensor, lead: int, origin: int, positions: int, reach: int, extent: int) -> Side:
        group = source.size(1) // self.kv_heads
        width = padded_width(source.size(3), source.dtype)
        packed = source.new_empty(positions, group, width)
        self.ops.pack(source, packed, self.key_lengths, self.keys, self.line.pitch, -origin, lead, reach, extent)
        return Side(packed, origin)

    def _split(self, source: Tensor, lead: int, origin: int, positions: int, *, of_keys: bool) -> tuple[Side, Tensor]:
        group = source.size(1) // self.kv_heads
        width = padded_width(source.size(3), torch.float16)
        factors = source.new_empty(positions, group, 3 * width, dtype=torch.float16)
        scales = source.new_empty(self.line.length, group)
        self.ops.split(source, factors, scales, self.line.pitch, -origin, lead, of_keys)
        return Side(factors, origin), scales

    def _result(self, band: Tensor, source: Tensor, blocks: Blocks, heads: int | None = None) -> Side:
        width = padded_width(source.size(3), source.dtype)
        return Side(band.new_empty(blocks.count * blocks.rows, heads or self.group, width), 0)

    def _from_line(self, result: Side, width: int, lead: int, length: int) -> Tensor:
        """The rows of a result (N, H, length, width); those that have no position are zero."""
        heads = result.rows.size(1)
        line = result.rows[: self.line.length].view(self.batch, self.kv_heads, self.line.pitch, heads, -1)
        begin = max(lead, 0)
        rows = line[:, :, begin : lead + length, :, :width].transpose(2, 3)
        rows = rows.reshape(self.batch, self.kv_heads * heads, -1, width)
        if lead < 0:
            unseen = rows.new_zeros(self.batch, self.kv_heads * heads, -lead, width)
            return torch.cat((unseen, rows), 2)
        return rows.contiguous()

    def _geometry(self, blocks: Blocks, inner: tuple[int, int]) -> list[int]:
        """What the kernels know of line and blocks, in the order of ``Geometry`` in ``csrc/geometry.cuh``."""
        line = self.line
        on_line = (self.kv_heads, self.group, line.pitch, line.query_lead, line.key_lead)
        return [*on_line, blocks.rows, blocks.columns, blocks.before, *inner]

    def _chunks(self, blocks: Blocks, inner: tuple[int, int], element_size: int) -> Iterator[tuple[int, int]]:
        """Ranges of blocks whose dense elements fit the workspace, one block at least."""
        block_bytes = blocks.rows * self.group * blocks.columns * element_size
        step = min(max(self.workspace // block_bytes, 1), LARGEST_BATCH)
        for begin in range(inner[0], inner[1], step):
            yield begin, min(begin + step, inner[1])


def _reach(blocks: Blocks) -> int:
    """The positions from the first column of the first block to the last one of the last."""
    return (blocks.count - 1) * blocks.rows + blocks.columns


def _rows(side: Side, blocks: Blocks, begin: int, end: int) -> Tensor:
    return side.matrices(begin * blocks.rows, blocks.rows, blocks.rows, end - begin)


def _columns(side: Side, blocks: Blocks, begin: int, end: int) -> Tensor:
    return side.matrices(begin * blocks.rows - blocks.before, blocks.rows, blocks.columns, end - begin)
