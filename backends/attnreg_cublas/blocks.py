"""How a window becomes blocks: the geometry, and no tensor in it.

One side of the product owns the *rows*, cut into blocks of B; the other side gives the *columns*. Row i of the rows
side belongs to block t = i // B, at r = i % B. Column s of block t is position ``t * B + first + s`` of the other side:
the column ranges overlap, each starts B positions after the one before, so that all blocks are one strided batch. Slot
c of row r is column ``r + diagonal + c``: in a dense result of pitch S the band has pitch S + 1.

    rows of block t     columns (S >= B + W - 1)
          r = 0         [ 0 1 2 3 . . . . ]
          r = 1         [ . 0 1 2 3 . . . ]         W = 4, diagonal = 0; numbers are slots
          r = 2         [ . . 0 1 2 3 . . ]

Queries own the rows of scores, outputs and of the gradients of queries and weights. Keys own those of the gradients of
keys and values: the same geometry with the window mirrored, so that every gradient is a single product, accumulated in
fp32 and rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass

# Sizes that are leading dimensions are padded to this: 16 bytes of the narrowest dtype, as tensor cores like it.
ALIGNMENT = 8
SMALLEST_BLOCK, LARGEST_BLOCK = 32, 128


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of one head.

    Attributes:
        rows: B, rows of a block.
        count: blocks of a head in the batch. The last ones may lie past the end of the rows: they only keep the
            distance between blocks the same from one head to the next, and their results are never read.
        columns: S, columns of a block.
        first: position on the columns side of column 0 of block 0; may be negative.
        diagonal: column of slot 0 in row 0 of a block; negative where slots fall outside every sequence.
    """

    rows: int
    count: int
    columns: int
    first: int
    diagonal: int

    @property
    def row_pitch(self) -> int:
        """Rows of a head on the rows side, padding included."""
        return self.count * self.rows

    @property
    def column_pitch(self) -> int:
        """Rows of a head on the columns side, padding included."""
        return self.count * self.column_stride

    @property
    def column_stride(self) -> int:
        """How far apart the columns of two blocks start."""
        return self.rows if self.count > 1 else self.columns

    @property
    def area(self) -> int:
        """Elements of a head's dense result."""
        return self.count * self.rows * self.columns


def plan(length: int, columns: int, left: int, right: int) -> Blocks:
    """The blocks for ``length`` rows that see ``-left .. right`` around their place among ``columns`` positions.

    Both are aligned at their ends, as in ``Window``. A block that covers the whole head is taken where it is no larger
    than the sum of the small ones, as it is for a window about as long as the sequence.
    """
    shift = columns - length - left  # what slot 0 of row 0 points to
    seen_first, seen_end = max(shift, 0), min(columns, shift + length + left + right)
    whole = Blocks(_pad(length), 1, _pad(seen_end - seen_first), seen_first, shift - seen_first)

    # Distances that no pair of positions has need no columns.
    near_left, near_right = min(left, columns - 1), min(right, length - 1)
    size = near_left + near_right + 1
    rows = block_rows(size)
    block_columns = _pad(rows + size - 1)
    blocks = -(-length // rows)
    count = blocks - 1 + -(-block_columns // rows)
    many = Blocks(rows, count, block_columns, columns - length - near_left, near_left - left)
    return whole if blocks == 1 or whole.area <= many.area else many


def block_rows(window_size: int) -> int:
    """B: the power of two from W up, so that at least half of what is multiplied is band, between 32 and 128."""
    return min(max(1 << (window_size - 1).bit_length(), SMALLEST_BLOCK), LARGEST_BLOCK)


def _pad(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
