"""Where each row of a call stands and which keys it sees, by the sentence of the contract, sequence by sequence.

Row i of a sequence stands at key position ``p = start + i`` and sees key j iff
``max(p - left, low) <= j < min(p + right + 1, high)``; slot c of its window is key ``p - left + c``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from attnreg.window import Window

# Further away no position sees a key, however long a call: a position is cut to it, and 64 bits hold all sums.
_FAR = 2**61

# The arguments that say something of rows.
OF_ROWS = ("key_lengths", "key_starts", "query_starts", "cu_seqlens_q", "cu_seqlens_k")


@dataclass(frozen=True, eq=False)
class Placing:
    """The rows of a call, or of a part of one; tensors (N or 1, Lq) in int64.

    Attributes:
        window: the window.
        keys: how many keys there are.
        origin: the key that a row's slot 0 is.
        first: the first key that a row sees.
        last: the one after the last; none is seen where it is not beyond ``first``.
    """

    window: Window
    keys: int
    origin: Tensor
    first: Tensor
    last: Tensor

    @property
    def visible(self) -> Tensor:
        """(N or 1, 1, Lq, Lk): which keys a row sees."""
        key = torch.arange(self.keys, device=self.origin.device)
        return ((key >= self.first[..., None]) & (key < self.last[..., None]))[:, None]

    @property
    def slot_of_key(self) -> Tensor:
        """(N or 1, 1, Lq, Lk): the slot in which a row has each key; outside 0 to W - 1 where it has none."""
        return (torch.arange(self.keys, device=self.origin.device) - self.origin[..., None])[:, None]

    @property
    def key_of_slot(self) -> Tensor:
        """(N or 1, 1, Lq, W): the key of each slot; outside 0 to Lk - 1 where there is none."""
        return (self.origin[..., None] + torch.arange(self.window.size, device=self.origin.device))[:, None]

    def part(self, sequences: range, rows: range, keys: range) -> Placing:
        """That of a part of the call, whose keys are counted from the first of its own."""

        def cut(tensor: Tensor) -> Tensor:
            of_sequences = tensor if tensor.shape[0] == 1 else tensor[sequences.start : sequences.stop]
            return of_sequences[:, rows.start : rows.stop] - keys.start

        return Placing(
            self.window,
            len(keys),
            cut(self.origin),
            cut(self.first).clamp(min=0),
            cut(self.last).clamp(max=len(keys)),
        )


def placing(rows: int, keys: int, window: Window, given: Mapping[str, Any], device: torch.device) -> Placing:
    """The rows of a call, with the arguments that it gives by name; others than ``OF_ROWS`` say nothing of them."""
    numbers = {name: given[name].tolist() for name in OF_ROWS if given.get(name) is not None}
    batch = max((len(each) for name, each in numbers.items() if not name.startswith("cu_")), default=1)
    # Rows of no sequence see nothing, wherever they stand.
    origin, first, last = (torch.zeros(batch, rows, dtype=torch.int64) for _ in range(3))
    for n in range(batch):
        for of_sequence, start, low, high in _sequences(rows, keys, n, numbers):
            here = slice(of_sequence.start, of_sequence.stop)
            count = torch.arange(of_sequence.start, of_sequence.stop)
            origin[n, here] = _near(start - window.left) + count
            first[n, here] = origin[n, here].clamp(min=low)
            last[n, here] = (_near(start + window.right + 1) + count).clamp(max=high)
    return Placing(window, keys, origin.to(device), first.to(device), last.to(device))


def _sequences(rows: int, keys: int, n: int, numbers: Mapping[str, list[int]]) -> Iterator[tuple[range, int, int, int]]:
    """Rows, start, low and high of each sequence; what lies out of range, which nobody can check on a GPU, is clamped."""

    def within(number: int, most: int) -> int:
        return min(max(number, 0), most)

    if "cu_seqlens_q" not in numbers:
        start = numbers["query_starts"][n] if "query_starts" in numbers else keys - rows
        low = within(numbers["key_starts"][n], keys) if "key_starts" in numbers else 0
        yield range(rows), start, low, within(numbers["key_lengths"][n], keys) if "key_lengths" in numbers else keys
        return
    of_queries = numbers["cu_seqlens_q"]
    of_keys = numbers.get("cu_seqlens_k", of_queries)
    for (begin, end), (low, high) in zip(pairwise(of_queries), pairwise(of_keys)):
        begin, end, low, high = within(begin, rows), within(end, rows), within(low, keys), within(high, keys)
        yield range(begin, end), high - end, low, high


def _near(position: int) -> int:
    return min(max(position, -_FAR), _FAR)
