"""What a call gives of where its rows stand and which keys they may see, as ``csrc/cuda/keys.cuh`` gets it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnreg_cublas.build import ops


class Given(NamedTuple):
    """The arguments of a call that say something of its rows; None where it does not give one.

    Attributes:
        key_lengths, key_starts, query_starts: (N,), as the contract has them.
        cu_seqlens_q: (S + 1,), of packed queries and keys alike.
    """

    key_lengths: Tensor | None = None
    key_starts: Tensor | None = None
    query_starts: Tensor | None = None
    cu_seqlens_q: Tensor | None = None

    def start(self, queries: int, keys: int) -> int | None:
        """The key at which row 0 stands; None where each sequence has a start of its own."""
        if self.query_starts is not None:
            return None
        return keys - queries if self.cu_seqlens_q is None else 0

    def for_kernels(self, queries: int, keys: int) -> list[Tensor | None]:
        """The list that ops take: empty where nothing is given, so that they ask for nothing."""
        if all(tensor is None for tensor in self):
            return []
        offsets, table = self.cu_seqlens_q, None
        if offsets is not None:
            table = offsets.new_empty(2, queries, dtype=torch.int32)
            ops().bound_packed_rows(offsets, table, keys)
        return [self.key_lengths, self.key_starts, self.query_starts, table]
