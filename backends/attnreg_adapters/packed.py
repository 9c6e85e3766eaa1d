"""Packed calls, brought to the libraries' varlen entries.

Those take offsets of sequences, follow each other without gaps, and write what belongs to a sequence alone. Here a call's offsets
are made into ones that hold all of it: rows that see no key stand in sequences without keys, keys that no row sees in sequences
without rows. A library then reads neither together with anything else, and writes zeros for both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnreg import Problem, Window

# Sequences are blocks of the grid in a dimension that has no more.
_MOST_SEQUENCES = 2**16 - 1
# How long a sequence is taken for, where memory is estimated.
_TYPICAL_LENGTH = 256
# The libraries count rows and keys of a pack in 32 bits.
_MOST_ROWS = 2**31 - 1
# What stands at either end of the offsets: rows, and keys.
_AT_ENDS = 4


@dataclass(frozen=True)
class Sequences:
    """Sequences that hold all rows and all keys of a pack; those with both see each other wholly.

    Attributes:
        of_queries: where each begins among the rows, and where the last ends; int32.
        of_keys: the same among the keys.
    """

    of_queries: Tensor
    of_keys: Tensor

    def rows_that_see(self, query_length: int) -> Tensor:
        """Of each row whether it sees a key, (Lq, 1)."""
        return _in_others(self.of_queries, self.of_keys, query_length)

    def keys_that_are_seen(self, key_length: int) -> Tensor:
        """Of each key whether a row sees it, (Lk, 1)."""
        return _in_others(self.of_keys, self.of_queries, key_length)


def _in_others(own: Tensor, others: Tensor, length: int) -> Tensor:
    sequence = torch.searchsorted(own, torch.arange(length, dtype=own.dtype, device=own.device), right=True) - 1
    return (others.diff() > 0)[sequence, None]


def sequences_of(
    query_length: int, key_length: int, window: Window, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None
) -> Sequences:
    """The sequences of a packed call. Nothing is read on the host.

    Raises:
        ValueError: there are more sequences than the libraries take.
    """
    sequences = (cu_seqlens_q.shape[0] - 1) * (1 if cu_seqlens_k is None else 2) + _AT_ENDS
    if sequences > _MOST_SEQUENCES:
        raise ValueError(
            f"cu_seqlens_q: {sequences} sequences have to be told apart; the library takes {_MOST_SEQUENCES}"
        )
    of_queries = cu_seqlens_q.long().clamp(0, query_length)
    if cu_seqlens_k is None:
        # Every row sees its own key.
        of_keys = of_queries.clamp(max=key_length)
    else:
        of_keys = cu_seqlens_k.long().clamp(0, key_length)
        # Ends are aligned: a sequence has rows before its keys' windows, or keys before its rows' windows, never both.
        more_rows = of_queries.diff() - of_keys.diff()
        first_row = of_queries[:-1] + (more_rows - min(window.right, query_length)).clamp(min=0)
        first_key = of_keys[:-1] + (-more_rows - min(window.left, key_length)).clamp(min=0)
        of_queries = _between(of_queries, first_row)
        of_keys = _between(of_keys, first_key)
    return Sequences(
        _to_ends(of_queries, query_length, (0, of_queries[0]), (query_length, query_length)),
        _to_ends(of_keys, key_length, (0, 0), (of_keys[-1], key_length)),
    )


def _between(offsets: Tensor, firsts: Tensor) -> Tensor:
    """Offsets, and after each but the last what its sequence is divided at."""
    return torch.cat((torch.stack((offsets[:-1], firsts), 1).flatten(), offsets[-1:]))


def _to_ends(offsets: Tensor, length: int, before: tuple[int, int | Tensor], after: tuple[int | Tensor, int]) -> Tensor:
    """Offsets from 0 to the end; of each number two a side, that rows and keys there have sequences of their own."""
    whole = offsets.new_empty(offsets.size(0) + _AT_ENDS, dtype=torch.int32)
    for place, number in zip((0, 1, -2, -1), (*before, *after)):
        if isinstance(number, Tensor):
            whole[place].copy_(number)
        else:
            whole[place].fill_(number)
    whole[2:-2].copy_(offsets)
    return whole


def sequences_about(problem: Problem) -> int:
    """About how many sequences the library is told of, which a problem does not say; 0 where the call is not packed."""
    if problem.gives("cu_seqlens_q") is None:
        return 0
    sequences = problem.query_length // _TYPICAL_LENGTH + 1
    return sequences * (1 if problem.gives("cu_seqlens_k") is None else 2) + _AT_ENDS


def refuse_packed(problem: Problem) -> str | None:
    """What of a packed call no varlen entry takes."""
    longest = max(problem.query_length, problem.key_length)
    if longest > _MOST_ROWS:
        return f"a length is {longest}; packed, it counts to {_MOST_ROWS}"
    return None
