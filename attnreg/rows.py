"""Where rows stand among the keys, and which keys they may see: the one rule, for backends made of torch operations.

Row i of sequence n stands at key position ``p = start + i`` and sees key j iff
``max(p - left, low) <= j < min(p + right + 1, high)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnreg.window import Window

# Beyond what a window, of less than 2**62 on each side, and any sequence reach together.
FARTHEST = 2**62 + 2**60


@dataclass(frozen=True)
class Rows:
    """Of each row its start, and the bounds of the keys that it may see: int64, each broadcasts to (N, Lq)."""

    start: Tensor
    low: Tensor
    high: Tensor

    def position(self, query_length: int) -> Tensor:
        """The key position at which each row stands, broadcasting to (N, Lq)."""
        return self.start + torch.arange(query_length, device=self.start.device)

    def seen(self, query_length: int, window: Window) -> tuple[Tensor, Tensor]:
        """``(first, last)``: each row sees keys [first, last), none where that is reversed; broadcasting to (N, Lq)."""
        position = self.position(query_length)
        # 64 bits might not hold the sums of a position far before the first key, or far past the last one, which sees as much.
        first = position.maximum(self.low) - window.left
        last = position.minimum(self.high) + window.right + 1
        return first.maximum(self.low), last.minimum(self.high)


def rows_of(
    query_length: int,
    key_length: int,
    device: torch.device,
    *,
    key_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    query_starts: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Rows:
    """The rows of a call, by the arguments that say something of them.

    Args:
        query_length: Lq.
        key_length: Lk.
        device: where to make what was not given.
        key_lengths: (N,), integers, or None.
        key_starts: likewise.
        query_starts: likewise.
        cu_seqlens_q: (S + 1,), integers, of a packed call, or None.
        cu_seqlens_k: likewise; None means ``cu_seqlens_q``.

    What a GPU's tensors hold is unchecked: it is clamped to what exists.
    """
    if cu_seqlens_q is not None:
        of_queries = cu_seqlens_q.long().clamp(0, query_length)
        of_keys = (cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k).long().clamp(0, key_length)
        # A row before the first offset, or past the last, is of a sequence without keys, at one end of the offsets.
        end = torch.searchsorted(of_queries, torch.arange(query_length, device=device), right=True)
        begin = (end - 1).clamp_min(0)
        end = end.clamp_max(of_queries.shape[0] - 1)
        low, high = of_keys[begin], of_keys[end]
        return Rows((high - of_queries[end])[None], low[None], high[None])
    start = _column(query_starts, key_length - query_length, device)
    if query_starts is not None:
        # Further away no window reaches a key; but with a row's number added it could leave 64 bits.
        start = start.clamp(-FARTHEST, FARTHEST)
    low = _column(key_starts, 0, device).clamp(0, key_length)
    return Rows(start, low, _column(key_lengths, key_length, device).clamp(0, key_length))


def _column(given: Tensor | None, otherwise: int, device: torch.device) -> Tensor:
    """(N, 1), or (1, 1)."""
    if given is None:
        return torch.full((1, 1), otherwise, device=device)
    return given.long()[:, None]
