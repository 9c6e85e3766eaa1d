"""Which weights dropout drops, written down once more: what backends compute is compared with this, and not with itself.

Philox-4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011), with products of 64 bits that wrap.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WORD = 2**32 - 1


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of random numbers for each counter, in int64, as are the words of the counter; these broadcast."""
    first, second, third, fourth = torch.broadcast_tensors(*counter)
    low, high = key
    for _ in range(10):
        # Bits 32 to 63 and 0 to 31; the sign of a product that wraps is lost with the rest.
        of_first, of_third = first * 0xD2511F53, third * 0xCD9E8D57
        first, second, third, fourth = (
            (of_third >> 32 & _WORD) ^ second ^ low,
            of_third & _WORD,
            (of_first >> 32 & _WORD) ^ fourth ^ high,
            of_first & _WORD,
        )
        low, high = (low + 0x9E3779B9) & _WORD, (high + 0xBB67AE85) & _WORD
    return first, second, third, fourth


def kept(seed: int, dropout_p: float, sequences: range, heads: range, rows: range, keys: range) -> Tensor:
    """(N, H, Lq, Lk): which weights stay, of these sequences, query heads, rows and keys of a call; on the CPU."""
    groups = range(keys.start // 4, -(-keys.stop // 4))
    n, h, i, group = (torch.arange(each.start, each.stop) for each in (sequences, heads, rows, groups))
    counter = n[:, None, None, None], h[:, None, None], i[:, None], group
    words = torch.stack(philox(counter, (seed & _WORD, seed >> 32 & _WORD)), -1).flatten(-2)
    first = keys.start - 4 * groups.start
    return words[..., first : first + len(keys)] >= math.floor(dropout_p * 2**32)
