"""How a window becomes blocks: the geometry, and no tensor in it.

All sequences of a call (one for each batch entry and key/value head) are laid end to end on one *line* of positions, or those of
each head on one of their own: whichever lies so in memory. Query i and key j of a sequence lie so that slot c of the query at
position x is the key at x - left + c, whatever the lengths: their ends are aligned, as in ``Window``, or they begin together.
Where every sequence has a start of its own, its keys are moved along by that: queries lie alike everywhere. A line is then cut
into blocks of B rows, wherever a sequence may begin or end. Block b owns the B rows from first + b * B on and has S columns,
which begin ``before`` positions earlier: the column ranges overlap, each begins B positions after the one before, so that all
blocks of a line are one strided batch. Slot c of row r is column ``r + diagonal + c``: in a dense result of pitch S the band has
pitch S + 1.

    rows of a block     columns (S >= B + W - 1)
          r = 0         [ 0 1 2 3 . . . . ]
          r = 1         [ . 0 1 2 3 . . . ]         W = 4, diagonal = 0; numbers are slots
          r = 2         [ . . 0 1 2 3 . . ]

Where a block reaches over the end of a sequence it also multiplies rows of another one: our kernels never look at these
results of a dot product, and give them weight zero in an average. Blocks *within* the line do not reach over its own ends,
so that tensors which are the line are multiplied where they are; the *edge rows*, which no such block has, are computed as
they are defined, by our kernels. Blocks *covering* the line have all rows, and are multiplied from copies, zero outside.

Queries own the rows of scores, outputs and of the gradients of queries and weights. Keys own those of the gradients of
keys and values: the same geometry with the window mirrored, so that every gradient is a single product, accumulated in
fp32 and rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

# Sizes that are leading dimensions are padded to this: 16 bytes of the narrowest dtype, as tensor cores like it.
ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class Line:
    """The sequences of a call, laid end to end: one line of all, or one for each head, all alike.

    Attributes:
        lines: how many there are; their positions are numbered through.
        sequences: how many a line has.
        pitch: positions of a sequence.
        query_lead: where query 0 lies in its sequence's positions; before it are keys that the first queries see.
        key_lead: where key 0 lies, less the sequence's start if it has one; negative where the first keys are seen by no query,
            and have no position.
        left: positions before a query that it may see: ``window.left``, or less where no key is so far away.
        right: positions after it, likewise.
    """

    lines: int
    sequences: int
    pitch: int
    query_lead: int
    key_lead: int
    left: int
    right: int

    @property
    def width(self) -> int:
        """Slots of a band row that any sequence can fill."""
        return self.left + self.right + 1

    @property
    def length(self) -> int:
        """Positions of a line."""
        return self.sequences * self.pitch


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of a line.

    Attributes:
        line: what is cut.
        rows: B, rows of a block.
        columns: S, columns of a block.
        before: how many columns of a block come before its first row.
        count: how many blocks a line has.
        within: whether all rows and columns lie on the line; otherwise the blocks cover it, and reach over its ends.
    """

    line: Line
    rows: int
    columns: int
    before: int
    count: int
    within: bool

    @property
    def first(self) -> int:
        """The first row of block 0; within the line its columns begin at position 0."""
        return self.before if self.within else 0

    def row_spans(self, begin: int, end: int) -> Spans:
        """The rows of the blocks ``begin`` to ``end``."""
        return Spans(self.first + begin * self.rows, self.rows, self.rows, end - begin)

    def column_spans(self, begin: int, end: int) -> Spans:
        """Their columns."""
        return Spans(self.first + begin * self.rows - self.before, self.rows, self.columns, end - begin)


class Spans(NamedTuple):
    """``number`` ranges of ``height`` positions, which begin at ``first`` and every ``step`` positions after it."""

    first: int
    step: int
    height: int
    number: int

    @property
    def positions(self) -> int:
        """How many positions there are from the first to the last one."""
        return (self.number - 1) * self.step + self.height


def lay(lines: int, sequences: int, queries: int, keys: int, left: int, right: int, start: int | None) -> Line:
    """Lines of ``sequences`` sequences of these lengths each, under a window of this reach.

    Query 0 is at key ``start``: at 0, or so that the ends are aligned; None where it is anywhere.
    """
    if start is None:
        return Line(lines, sequences, left + queries + right, left, left, left, right)
    # No pair of positions is further apart than that.
    left, right = min(left, keys - 1), min(right, queries - 1)
    lead = min(max(start, 0), left)
    pitch = lead + max(queries, keys - start)
    return Line(lines, sequences, pitch, lead, lead - start, left, right)


def cut(line: Line, rows: int, *, by_key: bool = False, edge_slots: float = -1) -> Blocks:
    """Blocks of ``rows`` rows, which are queries, or keys: within the line where that spares copies.

    Args:
        line: what is cut.
        rows: B.
        by_key: whether the rows are keys.
        edge_slots: the most slots of edge rows for each position that pay; negative where no copy would be spared.
    """
    before = line.right if by_key else line.left
    columns = -(-(rows + line.left + line.right) // ALIGNMENT) * ALIGNMENT
    # Columns of the last one end where the line does, or fewer than B positions before.
    count = (line.length - columns) // rows + 1
    edge_rows = line.length - count * rows
    if count > 0 and edge_rows * line.width <= edge_slots * line.length:
        return Blocks(line, rows, columns, before, count, within=True)
    return Blocks(line, rows, columns, before, -(-line.length // rows), within=False)
