"""The operands of one call: its tensors packed into blocks, and what comes back from the product unpacked.

Packing copies a side of the product into padded rows, zero where nothing may be seen; *gather* reads the band out of a
dense result, *scatter* writes a band into zeroed blocks. The kernels for these are in ``csrc/``. Packed tensors are
(N, Hkv, position, G, E): the G query heads of a key/value head lie side by side, so that a range of positions of all of
them is one matrix, and E is padded to 16 bytes.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from attnreg import Window
from attnreg_cublas.blocks import Blocks, plan
from attnreg_cublas.build import ops

# cuBLAS puts the batch on a grid dimension, in some of its kernels with a limit of 65535.
LARGEST_BATCH = 32768

_plan = lru_cache(maxsize=1024)(plan)


class Seen(NamedTuple):
    """The keys that make a row worth reading: ``reach .. reach + extent - 1`` from its own position."""

    reach: int
    extent: int


THE_KEY_ITSELF = Seen(0, 1)


class Operands:
    """Packs and unpacks the tensors of one call, whose query side has ``rows`` (N, H, Lq, .) and key side ``keys``."""

    def __init__(
        self, rows: Tensor, keys: Tensor, window: Window, bias: Tensor | None, key_lengths: Tensor | None
    ) -> None:
        self.batch, self.heads, self.queries, _ = rows.shape
        self.kv_heads, self.keys = keys.shape[1:3]
        self.group = self.heads // self.kv_heads
        self.window, self.bias, self.key_lengths = window, bias, key_lengths
        self.shift = self.keys - self.queries - window.left  # the key of slot 0 in row 0
        self.ops = ops()

    @cached_property
    def by_query(self) -> Blocks:
        """Blocks whose rows are queries and whose columns are keys."""
        return _plan(self.queries, self.keys, self.window.left, self.window.right)

    @cached_property
    def by_key(self) -> Blocks:
        """Blocks whose rows are keys and whose columns are the queries that see them."""
        return _plan(self.keys, self.queries, self.window.right, self.window.left)

    def query_rows(self, source: Tensor) -> Tensor:
        """Query or grad_output (N, H, Lq, E) -> (blocks, B * G, E)."""
        blocks = self.by_query
        packed = self._pack(source, blocks.row_pitch, 0, self._seen_by_queries)
        return packed.view(-1, blocks.rows * self.group, packed.size(-1))

    def query_columns(self, source: Tensor) -> Tensor:
        """Query or grad_output (N, H, Lq, E) -> overlapping (blocks, S * G, E)."""
        return self._overlapping(source, self.by_key, self._seen_by_queries)

    def key_columns(self, source: Tensor) -> Tensor:
        """Key or value (N, Hkv, Lk, E) -> overlapping (blocks, S, E)."""
        return self._overlapping(source, self.by_query, THE_KEY_ITSELF)

    def unpack_queries(self, product: Tensor, head_dim: int) -> Tensor:
        """(blocks, B * G, E padded) -> (N, H, Lq, E)."""
        rows = product.view(self.batch, self.kv_heads, self.by_query.row_pitch, self.group, -1)
        by_head = rows[:, :, : self.queries, :, :head_dim].transpose(2, 3)
        return by_head.reshape(self.batch, self.heads, self.queries, head_dim).contiguous()

    def unpack_keys(self, product: Tensor, head_dim: int) -> Tensor:
        """(blocks, B, E padded) -> (N, Hkv, Lk, E)."""
        rows = product.view(self.batch, self.kv_heads, self.by_key.row_pitch, -1)
        return rows[:, :, : self.keys, :head_dim].contiguous()

    def gather(self, product: Tensor, hidden: float) -> Tensor:
        """The band (N, H, Lq, W) of a dense product (blocks, B * G, S), plus bias; ``hidden`` at invisible slots."""
        blocks = self.by_query
        dense = product.view(self.batch, self.kv_heads, blocks.row_pitch, self.group, blocks.columns)
        band = product.new_empty(self.batch, self.heads, self.queries, self.window.size)
        self.ops.gather_band(
            dense, band, self.bias, self.key_lengths, self.keys, self.shift, blocks.rows, blocks.diagonal, hidden
        )
        return band

    def scatter(self, band: Tensor) -> Tensor:
        """A band (N, H, Lq, W) as dense blocks (blocks, B * G, S), zero at invisible slots."""
        blocks = self.by_query
        dense = band.new_empty(self.batch, self.kv_heads, blocks.row_pitch, self.group, blocks.columns)
        self.ops.scatter_band(
            band, dense, self.bias, self.key_lengths, self.keys, self.shift, blocks.rows, blocks.diagonal
        )
        return dense.view(-1, blocks.rows * self.group, blocks.columns)

    def scatter_by_key(self, band: Tensor) -> Tensor:
        """A band (N, H, Lq, W) as dense blocks (blocks, S * G, B), rows and columns swapped with those of `by_key`."""
        blocks = self.by_key
        dense = band.new_empty(self.batch, self.kv_heads, blocks.count, blocks.columns, self.group, blocks.rows)
        self.ops.scatter_band_by_key(
            band, dense, self.bias, self.key_lengths, self.keys, self.shift, blocks.first, blocks.diagonal
        )
        return dense.view(-1, blocks.columns * self.group, blocks.rows)

    def mask(self, band: Tensor) -> Tensor:
        """A band with zeros at invisible slots."""
        masked = torch.empty_like(band, memory_format=torch.contiguous_format)
        self.ops.mask_band(band, masked, self.bias, self.key_lengths, self.keys, self.shift)
        return masked

    @property
    def _seen_by_queries(self) -> Seen:
        return Seen(self.shift, self.window.size)

    def _overlapping(self, source: Tensor, blocks: Blocks, seen: Seen) -> Tensor:
        # The last, unread block of the last head reaches past its end: the slack keeps that within the allocation.
        slack = blocks.columns - blocks.column_stride
        packed = self._pack(source, blocks.column_pitch, blocks.first, seen, slack)
        group, head_dim = packed.shape[-2:]
        matrices = self.batch * self.kv_heads * blocks.count
        stride = blocks.column_stride * group * head_dim
        return packed.as_strided((matrices, blocks.columns * group, head_dim), (stride, head_dim, 1))

    def _pack(self, source: Tensor, pitch: int, first: int, seen: Seen, slack: int = 0) -> Tensor:
        group = source.size(1) // self.kv_heads
        per_16_bytes = 16 // source.element_size()
        head_dim = -(-source.size(3) // per_16_bytes) * per_16_bytes
        shape = (self.batch, self.kv_heads, pitch, group, head_dim)
        rows = self.batch * self.kv_heads * pitch
        packed = source.new_empty(rows + slack, group, head_dim)[:rows].view(shape)
        self.ops.pack(source, packed, self.key_lengths, self.keys, first, seen.reach, seen.extent)
        return packed


def product(left: Tensor, right: Tensor, scale: float = 1.0, heads: int = 1) -> Tensor:
    """``scale * left @ right`` for (blocks, m, k) and (blocks, k, n): summed in fp32, scaled, then rounded.

    Where k interleaves the query heads of a group, ``heads`` is their number: float32 then sums each head on its own
    first, as one sum over all of them would lose accuracy. The narrow dtypes would only be rounded more often.
    """
    result = left.new_empty(left.size(0), left.size(1), right.size(2))
    sums = heads if result.dtype == torch.float32 else 1
    for begin in range(0, result.size(0), LARGEST_BATCH):
        part = slice(begin, begin + LARGEST_BATCH)
        for head in range(sums):
            every = slice(head, None, sums)
            result[part].baddbmm_(left[part, :, every], right[part, every], beta=min(head, 1), alpha=scale)
    return result


def sum_to(band: Tensor, bias: Tensor) -> Tensor:
    """The gradient of a bias from that of its broadcast: summed to its shape, in fp32 or wider."""
    broadcast = [dim for dim in range(4) if bias.size(dim) == 1]
    if not broadcast:
        return band.to(bias.dtype)
    wide = torch.promote_types(torch.float32, bias.dtype)
    return band.sum(broadcast, keepdim=True, dtype=wide).to(bias.dtype)
