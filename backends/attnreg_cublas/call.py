"""One call: its tensors laid on the line, multiplied block by block, and what comes back.

A side of a product is read in place where its tensor is the line already, and copied there otherwise (*pack*), or copied as
fp16 factors (*split*). *Gather* reads the band out of a dense result, *scatter* writes a band into zeroed blocks; the kernels
for these are in ``csrc/``. Dense blocks are made a chunk at a time, in a bounded workspace.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from attnreg import Window, allow_tf32
from attnreg_cublas.blocks import Blocks, cut, lay
from attnreg_cublas.build import ops
from attnreg_cublas.products import multiply, multiply_factors, sums_factors_in_fp32
from attnreg_cublas.rule import block_rows, factors_pay
from attnreg_cublas.sides import Side, in_place, padded_width

# cuBLAS puts the batch on a grid dimension, in some of its kernels with a limit of 65535.
LARGEST_BATCH = 32768

# Blocks that leave the line are multiplied from small copies. Where they are more than this part of all, everything is copied.
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
        self.block = block or block_rows(self.width, rows.dtype, allow_tf32())
        self.workspace = workspace * _MEBIBYTE
        self.ops = ops()

    def band(self, query: Tensor, key: Tensor, *, scale: float, hidden: float) -> Tensor:
        """``scale * query . key + bias`` (N, H, Lq, W) in the visible slots, and ``hidden`` in the others."""
        blocks = _cut(self.line, self.block)
        band = query.new_empty(self.batch, self.heads, self.queries, self.window.size)
        rows, columns = self._queries(query, blocks), self._keys(key, blocks)
        scales: tuple[Tensor | None, Tensor | None] = (None, None)
        exact = query.dtype == torch.float32 and not allow_tf32()
        if exact and factors_pay(self.width) and sums_factors_in_fp32():
            scales = (self._scales(query), self._scales(key))
        for begin, end, dense in self._chunks(blocks, query, (blocks.rows * self.group, blocks.columns)):
            if scales[0] is not None and scales[1] is not None:
                left = self._split(rows, begin, end, scales[0], of_keys=False)
                right = self._split(columns, begin, end, scales[1], of_keys=True)
                multiply_factors(left, right.mT, dense)
            else:
                for first, last in _parts(begin, end, rows, columns):
                    left, right = self._matrices(rows, first, last), self._matrices(columns, first, last)
                    multiply(left, right.mT, dense[first - begin : last - begin], scale)
            visibility = self._visibility(blocks)
            self.ops.gather_band(dense, *scales, band, *visibility, begin, self.keys, self.window.left, scale, hidden)
        return band

    def average(self, band: Tensor, source: Tensor, *, scale: float = 1.0) -> Tensor:
        """``scale * sum over c of band[i, c] * source[key of c]`` (N, H, Lq, E), over the visible slots."""
        blocks = _cut(self.line, self.block)
        columns = self._keys(source, blocks, skip_unseen=True)
        result = self._result(band, source, blocks, self.group)
        for begin, end, dense in self._chunks(blocks, band, (blocks.rows, self.group, blocks.columns)):
            self.ops.scatter_band(band, dense, *self._visibility(blocks), begin, self.keys, self.window.left)
            self._multiply(dense.flatten(1, 2), columns, result, begin, end, scale)
        output = self._from_line(result, source.size(3), self.line.query_lead, self.queries)
        self.ops.mend_rows(band, source, output, *self._visibility(blocks), self.keys, self.window.left, scale)
        return output

    def average_by_key(self, band: Tensor, source: Tensor, *, scale: float = 1.0) -> Tensor:
        """``scale * sum over the queries i that see key j of band[i, slot of j] * source[i]`` (N, Hkv, Lk, E)."""
        blocks = _cut(self.line, self.block, by_key=True)
        columns = self._queries(source, blocks, of_columns=True, skip_unseen=True)
        result = self._result(band, source, blocks, 1)
        for begin, end, dense in self._chunks(blocks, band, (blocks.columns, self.group, blocks.rows)):
            self.ops.scatter_band_by_key(band, dense, *self._visibility(blocks), begin, self.keys, self.window.left)
            self._multiply(dense.flatten(1, 2).mT, columns, result, begin, end, scale, self.group)
        output = self._from_line(result, source.size(3), self.line.key_lead, self.keys)
        self.ops.mend_rows_by_key(band, source, output, *self._visibility(blocks), self.keys, self.window.left, scale)
        return output

    def masked(self, band: Tensor) -> Tensor:
        """A band with zeros at invisible slots."""
        masked = torch.empty_like(band, memory_format=torch.contiguous_format)
        self.ops.mask_band(band, masked, self.bias, self.key_lengths, self.keys, self.window.left)
        return masked

    def _queries(
        self, source: Tensor, blocks: Blocks, *, of_columns: bool = False, skip_unseen: bool = False
    ) -> _Operand:
        # A query is worth reading for the keys that it sees: from which one on, counted from its own position, how many.
        seen = (self.keys - self.queries - self.window.left, self.window.size)
        return self._operand(source, blocks, self.line.query_lead, seen, of_columns, skip_unseen)

    def _keys(self, source: Tensor, blocks: Blocks, *, skip_unseen: bool = False) -> _Operand:
        return self._operand(source, blocks, self.line.key_lead, (0, 1), True, skip_unseen)

    def _operand(
        self,
        source: Tensor,
        blocks: Blocks,
        lead: int,
        seen: tuple[int, int],
        of_columns: bool,
        skip_unseen: bool,
    ) -> _Operand:
        edge = blocks.count - (blocks.inner[1] - blocks.inner[0])
        is_line = self.queries == self.keys and self.group == 1 and edge <= LARGEST_EDGE * blocks.count
        # Weights are zero past a key length, but what lies there may be NaN.
        readable = is_line and not (skip_unseen and self.key_lengths is not None)
        return _Operand(source, in_place(source) if readable else None, blocks, lead, seen, of_columns)

    def _matrices(self, operand: _Operand, begin: int, end: int) -> Tensor:
        """The rows, or the columns, of these blocks: (blocks, B * G, E) or (blocks, S * G, E)."""
        if operand.is_in_place(begin, end):
            assert operand.line is not None
            return operand.matrices(operand.line, begin, end)
        source = operand.source
        group = source.size(1) // self.kv_heads
        first, positions = operand.positions(begin, end)
        packed = source.new_empty(positions, group, padded_width(source.size(3), source.dtype))
        self.ops.pack(source, packed, self.key_lengths, self.keys, self.line.pitch, first, operand.lead, *operand.seen)
        return operand.matrices(Side(packed, -first), begin, end)

    def _multiply(
        self, weights: Tensor, columns: _Operand, result: Tensor, begin: int, end: int, scale: float, heads: int = 1
    ) -> None:
        """Write ``scale * weights @ columns`` for these blocks, of which ``weights`` are all, to their rows of ``result``."""
        rows = columns.blocks.rows
        for first, last in _parts(begin, end, columns):
            into = result[first * rows : last * rows].view(last - first, weights.size(1), -1)
            multiply(weights[first - begin : last - begin], self._matrices(columns, first, last), into, scale, heads)

    def _split(self, operand: _Operand, begin: int, end: int, scales: Tensor, *, of_keys: bool) -> Tensor:
        """As ``_matrices``, in three fp16 factors a row; their scales are written to ``scales``."""
        source = operand.source
        first, positions = operand.positions(begin, end)
        width = padded_width(source.size(3), torch.float16)
        factors = source.new_empty(positions, scales.size(1), 3 * width, dtype=torch.float16)
        self.ops.split(source, factors, scales, self.line.pitch, first, operand.lead, of_keys)
        return operand.matrices(Side(factors, -first), begin, end)

    def _scales(self, source: Tensor) -> Tensor:
        return source.new_empty(self.line.length, source.size(1) // self.kv_heads)

    def _result(self, band: Tensor, source: Tensor, blocks: Blocks, heads: int) -> Tensor:
        """Room for a product by position: (positions, heads, width)."""
        return band.new_empty(blocks.count * blocks.rows, heads, padded_width(source.size(3), source.dtype))

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
        return self.bias, self.key_lengths, [*on_line, blocks.rows, blocks.columns, blocks.before]

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


class _Operand(NamedTuple):
    """One side of a product: a tensor, and where its rows lie on the line.

    Attributes:
        source: (N, H or Hkv, L, E).
        line: the same as the line that it is, where it can be read in place.
        blocks: the blocks that it is cut into.
        lead: where row 0 of a sequence lies.
        seen: the keys that make a row worth reading, see ``csrc/pack.cuh``.
        of_columns: whether it gives the columns of the blocks, or their rows.
    """

    source: Tensor
    line: Side | None
    blocks: Blocks
    lead: int
    seen: tuple[int, int]
    of_columns: bool

    def is_in_place(self, begin: int, end: int) -> bool:
        """Whether all of these blocks can be read where they are."""
        return self.line is not None and self.blocks.inner[0] <= begin and end <= self.blocks.inner[1]

    def positions(self, begin: int, end: int) -> tuple[int, int]:
        """The first position that these blocks read, and how many from there on."""
        first = begin * self.blocks.rows - (self.blocks.before if self.of_columns else 0)
        return first, (end - begin - 1) * self.blocks.rows + self._height

    def matrices(self, side: Side, begin: int, end: int) -> Tensor:
        """The matrices of these blocks in ``side``."""
        return side.matrices(self.positions(begin, end)[0], self.blocks.rows, self._height, end - begin)

    @property
    def _height(self) -> int:
        return self.blocks.columns if self.of_columns else self.blocks.rows


def _parts(begin: int, end: int, *operands: _Operand) -> Iterator[tuple[int, int]]:
    """A range of blocks, parted where some of the operands can be read in place and where they have to be copied."""
    cuts = {begin, end}
    if any(operand.line is not None for operand in operands):
        cuts |= {min(max(cut, begin), end) for cut in operands[0].blocks.inner}
    yield from pairwise(sorted(cuts))
