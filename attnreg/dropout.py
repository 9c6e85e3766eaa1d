"""Which weights are dropped: a generator that every backend computes alike, so that nothing has to be stored.

Philox-4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011): four 32-bit words from a counter of four
words and a key of two.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF
_SEEDS = (-(2**63), 2**63 - 1)


def threshold(dropout_p: float) -> int:
    """A word below it drops its weight: ``floor(dropout_p * 2^32)``."""
    return int(dropout_p * 2**32)


def blank_seed(device: torch.device) -> Tensor:
    """A seed (1,), int64, that is still to be drawn."""
    return torch.empty(1, dtype=torch.int64, device=device)


def draw_seed(device: torch.device) -> Tensor:
    """A seed (1,), int64, from torch's generator of ``device``."""
    return torch.randint(*_SEEDS, (1,), dtype=torch.int64, device=device)


def fill_seed(seed: Tensor) -> None:
    """Draw a blank seed, as :func:`draw_seed` does."""
    seed.random_(*_SEEDS)


def words(seed: Tensor, n: Tensor, h: Tensor, i: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words of counter ``(n, h, i, group)``: those of keys ``4 * group`` to ``4 * group + 3``.

    Args:
        seed: int64, one element; its low and its high word are the key.
        n: the sequence, int64, broadcasting with what follows.
        h: the query head.
        i: the row.
        group: the key // 4.

    Returns:
        int64, from 0 to 2^32 - 1, of the broadcast shape.
    """
    a, b, c, d = n, h, i, group
    key = [seed & _WORD, (seed >> 32) & _WORD]
    for number in range(_ROUNDS):
        if number:
            key = [(word + increment) & _WORD for word, increment in zip(key, _INCREMENTS)]
        high_a, low_a = _product(a, _MULTIPLIERS[0])
        high_c, low_c = _product(c, _MULTIPLIERS[1])
        a, b, c, d = high_c ^ b ^ key[0], low_c, high_a ^ d ^ key[1], low_a
    a, b, c, d = torch.broadcast_tensors(a, b, c, d)
    return a, b, c, d


def _product(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """The high and the low word of a product of two words, of which 64 bits with a sign hold no more than the half."""
    upper, lower = word * (multiplier >> 16), word * (multiplier & 0xFFFF)
    middle = upper + (lower >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (lower & 0xFFFF)


def kept(seed: Tensor, dropout_p: float, n: Tensor, h: Tensor, i: Tensor, begin: Tensor, size: int) -> Tensor:
    """Whether weights are kept, of ``size`` keys side by side from ``begin`` on.

    Args:
        seed: int64, one element.
        dropout_p: the share that is dropped, in [0, 1).
        n: the sequence, int64, broadcasting with what follows.
        h: the query head.
        i: the row.
        begin: the first key; where it is negative, there are no keys up to 0.
        size: how many keys.

    Returns:
        bool, of the broadcast shape and ``size``.
    """
    groups = (begin >> 2).unsqueeze(-1) + torch.arange((size + 6) // 4, device=seed.device)
    found = words(seed, n.unsqueeze(-1), h.unsqueeze(-1), i.unsqueeze(-1), groups)
    of_groups = torch.stack([word >= threshold(dropout_p) for word in found], -1).flatten(-2)
    columns = (begin & 3).unsqueeze(-1) + torch.arange(size, device=seed.device)
    return of_groups.gather(-1, columns.expand(*of_groups.shape[:-1], size))
