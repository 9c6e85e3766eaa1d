"""How a window becomes blocks: the geometry, and no tensor in it.

All sequences of a call (one for each batch entry and key/value head) are laid end to end on one *line* of positions. Query
i and key j of a sequence lie so that slot c of the query at position x is the key at x - left + c, whatever the lengths:
their ends are aligned, as in ``Window``. The line is then cut into blocks of B rows, wherever a sequence may begin or end.
Block b owns the rows at b * B .. b * B + B - 1 and has S columns from b * B - before on: the column ranges overlap, each
begins B positions after the one before, so that all blocks are one strided batch. Slot c of row r is column
``r + diagonal + c``: in a dense result of pitch S the band has pitch S + 1.

    rows of a block     columns (S >= B + W - 1)
          r = 0         [ 0 1 2 3 . . . . ]
          r = 1         [ . 0 1 2 3 . . . ]         W = 4, diagonal = 0; numbers are slots
          r = 2         [ . . 0 1 2 3 . . ]

Where a block reaches over the end of a sequence it also multiplies rows of another one: our kernels never look at these
results of a dot product, and give them weight zero in an average.

Queries own the rows of scores, outputs and of the gradients of queries and weights. Keys own those of the gradients of
keys and values: the same geometry with the window mirrored, so that every gradient is a single product, accumulated in
fp32 and rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass

# Sizes that are leading dimensions are padded to this: 16 bytes of the narrowest dtype, as tensor cores like it.
ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class Line:
    """The sequences of a call, laid end to end.

    Attributes:
        sequences: how many there are.
        pitch: positions of a sequence.
        query_lead: where query 0 lies in its sequence's positions; before it are keys that the first queries see.
        key_lead: where key 0 lies; negative where the first keys are seen by no query, and have no position.
        left: positions before a query that it may see: ``window.left``, or less where no key is so far away.
        right: positions after it, likewise.
    """

    sequences: int
    pitch: int
    query_lead: int
    key_lead: int
    left: int
    right: int

    @property
    def length(self) -> int:
        """Positions of the whole line."""
        return self.sequences * self.pitch


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of a line.

    Attributes:
        rows: B, rows of a block.
        columns: S, columns of a block.
        before: how many columns of a block come before its first row.
        count: blocks that cover the line; the last one may reach over its end.
        inner: the range of those blocks whose rows and columns all lie on the line.
    """

    rows: int
    columns: int
    before: int
    count: int
    inner: tuple[int, int]


def lay(sequences: int, queries: int, keys: int, left: int, right: int) -> Line:
    """The line of ``sequences`` sequences of these lengths, under a window of this reach."""
    # No pair of positions is further apart than that.
    left, right = min(left, keys - 1), min(right, queries - 1)
    surplus = keys - queries
    lead = min(max(surplus, 0), left)
    return Line(sequences, lead + queries, lead, lead - surplus, left, right)


def cut(line: Line, rows: int, *, by_key: bool = False) -> Blocks:
    """Blocks of ``rows`` rows, which are queries, or keys."""
    before = line.right if by_key else line.left
    columns = -(-(rows + line.left + line.right) // ALIGNMENT) * ALIGNMENT
    begin = -(-before // rows)
    end = (line.length - max(columns - before, rows)) // rows + 1
    return Blocks(rows, columns, before, -(-line.length // rows), (begin, max(begin, end)))
