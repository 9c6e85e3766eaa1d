"""Blocks whose keys lie wherever their rows stand: nothing of where is known on the host.

Each block gathers its keys, and each key gathers what the blocks have for it: nothing is scattered, and sums have one order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnreg import Window, empty_like
from attnreg.rows import Rows
from attnreg_torch.blocks import Blocks, Whole, block_rows
from attnreg_torch.products import operand
from attnreg_torch.rows import Given

# Rows of packed sequences that are shorter than a block have their own; smaller ones are not worth a matrix product.
FEWEST_ROWS = 8


@dataclass(frozen=True)
class Placed(Blocks):
    """Blocks of one sequence each, the first key of each where it happens to be.

    Attributes:
        begins: the position of each block's first key, (N or 1, blocks).
        steps: of each key, how far it lies behind block 0, if the blocks of its sequence are B keys apart, (N or 1, Lk).
        first_block, end_block: the blocks of its sequence, for each key, or for all.
    """

    begins: Tensor
    steps: Tensor
    first_block: Tensor | int
    end_block: Tensor | int

    def first_keys(self, device: torch.device) -> Tensor:
        """The position of each block's first key, (N or 1, blocks)."""
        return self.begins

    def split_keys(self, tensor: Tensor, unseen: Tensor | None) -> Tensor:
        """(N, Hkv, Lk, X) -> (N, Hkv, blocks, P, X), operands of products; ``unseen`` keys are 0."""
        positions = self.begins[..., None] + torch.arange(self.keys, device=tensor.device)
        n, h = self._indices(tensor.device)
        found = operand(tensor)[n[..., None], h[..., None], positions.clamp_(0, self.key_length - 1)[:, None]]
        return found if unseen is None else torch.where(unseen, 0.0, found)

    def join_keys(self, blocks: Tensor, like: Tensor) -> Tensor:
        """(N, Hkv, blocks, P, X) -> (N, Hkv, Lk, X) of the dtype of ``like``, in memory as ``like``."""
        n, h = self._indices(blocks.device)
        last = torch.div(self.steps, self.rows, rounding_mode="floor")
        joined = empty_like(like)
        sums: Tensor | None = None
        for back in range(-(-self.keys // self.rows)):
            block = last - back
            column = self.steps - block * self.rows
            sees = (block >= self.first_block) & (block < self.end_block) & (column < self.keys)
            block, column = block.clamp_(0, self.count - 1), column.clamp_max_(self.keys - 1)
            piece = blocks[n, h, block[:, None], column[:, None]].masked_fill_(~sees[:, None, :, None], 0.0)
            sums = piece if sums is None else sums.add_(piece)
        assert sums is not None
        return joined.copy_(sums)

    def _indices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Of all sequences and key heads, (N, 1, 1) and (Hkv, 1)."""
        return (
            torch.arange(self.batch, device=device)[:, None, None],
            torch.arange(self.kv_heads, device=device)[:, None],
        )


@dataclass(frozen=True)
class Packed(Placed):
    """Blocks of packed sequences: none has rows of two.

    Attributes:
        row: which row it is, for each row of the blocks.
        is_padding: for each row of the blocks, whether it is none, (blocks * B, 1).
        block: the block of each row.
        row_of_block: and its place there.
    """

    row: Tensor
    is_padding: Tensor
    block: Tensor
    row_of_block: Tensor

    @property
    def padded(self) -> bool:
        """Whether blocks may have more rows than the sequences."""
        return True

    @property
    def as_they_lie(self) -> bool:
        """Nobody knows."""
        return False

    def spread(self, tensor: Tensor, padding: float) -> Tensor:
        """(·, ·, Lq, X) -> (·, ·, blocks * B, X)."""
        return tensor.index_select(2, self.row).masked_fill_(self.is_padding, padding)

    def write_rows(self, blocks: Tensor, joined: Tensor) -> None:
        """(N, Hkv, blocks, G, B, X) into a tensor (N, H, Lq, X)."""
        found = blocks[:, :, self.block, :, self.row_of_block].permute(1, 2, 3, 0, 4)
        joined.unflatten(1, (self.kv_heads, self.group)).copy_(found)


def lay(
    rows_like: Tensor, keys_like: Tensor, window: Window, given: Given, place: Rows | None, by_slot: bool
) -> Blocks:
    """Cut up (N, H, Lq, ·) against (N, Hkv, Lk, ·).

    Args:
        rows_like: a tensor of the first shape.
        keys_like: one of the second.
        window: the window.
        given: the arguments of rows.
        place: what they say, where there are any.
        by_slot: whether a tensor has a column for each slot.
    """
    batch, heads, query_length, _ = rows_like.shape
    kv_heads, key_length = keys_like.shape[1:3]
    sizes = (batch, kv_heads, heads // kv_heads, query_length, key_length)
    rows = min(block_rows(window), query_length)
    if not by_slot and rows + window.size - 1 >= key_length:
        # A block would see all keys: so may all rows in one, however far the window reaches.
        return Whole(*sizes, rows=query_length, count=1, keys=key_length, slots=key_length, first_key=0)
    if "cu_seqlens_k" in given:
        return _of_packed(sizes, window, rows, given["cu_seqlens_q"], given["cu_seqlens_k"])
    count, keys = -(-query_length // rows), rows + window.size - 1
    if place is not None and "query_starts" in given:
        begins = place.start - window.left + rows * torch.arange(count, device=keys_like.device)
        steps = torch.arange(key_length, device=keys_like.device) - begins[:, :1]
        return Placed(*sizes, rows, count, keys, window.size, 0, begins, steps, first_block=0, end_block=count)
    start = 0 if "cu_seqlens_q" in given else key_length - query_length
    return Blocks(*sizes, rows, count, keys, slots=window.size, first_key=start - window.left)


def _of_packed(
    sizes: tuple[int, int, int, int, int], window: Window, rows: int, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> Packed:
    *_, query_length, key_length = sizes
    device = cu_seqlens_q.device
    # Rows before the first offset, and past the last, are those of sequences without keys.
    of_queries = pad(pad(cu_seqlens_q.long().clamp(0, query_length), (1, 0)), (0, 1), value=query_length)
    of_keys = cu_seqlens_k.long().clamp(0, key_length)
    of_keys = torch.cat([of_keys[:1], of_keys, of_keys[-1:]])
    sequences = of_queries.shape[0] - 1
    mean = -(-query_length // sequences)
    rows = min(rows, max(1 << (mean - 1).bit_length(), FEWEST_ROWS))
    # Each sequence that has any rows wastes less than a block.
    count = (query_length + min(sequences, query_length) * (rows - 1)) // rows

    # Of each sequence.
    first_row, end_row = of_queries[:-1], of_queries[1:]
    blocks = ((end_row - first_row).clamp_min(0) + (rows - 1)) // rows
    end_block = blocks.cumsum(0)
    first_block = end_block - blocks
    begin = of_keys[1:] - end_row + first_row - window.left

    # Of each block; those past the last that is needed have no rows.
    block = torch.arange(count, device=device)
    sequence = torch.searchsorted(end_block, block, right=True).clamp_max_(sequences - 1)
    rows_before = (block - first_block[sequence]) * rows
    row = (first_row[sequence] + rows_before)[:, None] + torch.arange(rows, device=device)
    is_padding = row >= end_row[sequence, None]
    begins = (begin[sequence] + rows_before)[None]

    # Of each row and each key.
    i, j = torch.arange(query_length, device=device), torch.arange(key_length, device=device)
    of_row = _sequence_of(i, of_queries)
    place = (first_block[of_row] * rows + i - first_row[of_row]).clamp_(0, count * rows - 1)
    of_key = _sequence_of(j, of_keys)
    return Packed(
        *sizes,
        rows=rows,
        count=count,
        keys=rows + window.size - 1,
        slots=window.size,
        first_key=0,
        begins=begins,
        steps=(first_block[of_key] * rows + j - begin[of_key])[None],
        first_block=first_block[of_key],
        end_block=end_block[of_key],
        row=row.flatten().clamp_(0, query_length - 1),
        is_padding=is_padding.view(-1, 1),
        block=place // rows,
        row_of_block=place % rows,
    )


def _sequence_of(position: Tensor, offsets: Tensor) -> Tensor:
    """Which sequence each position lies in; the first or the last one where it lies in none."""
    return (torch.searchsorted(offsets, position, right=True) - 1).clamp_(0, offsets.shape[0] - 2)
