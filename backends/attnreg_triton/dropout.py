"""Which weights of a tile are dropped: ``attnreg.dropout`` in kernels.

The generator makes four words at a time, those of four keys next to each other. So tiles of keys begin at a multiple of 4.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from attnreg.dropout import threshold


class Dropout(NamedTuple):
    """What kernels get about dropout.

    Attributes:
        seed: (1,), int64; None where nothing is dropped.
        threshold: a word below it drops its weight; the bits of a 32-bit number as a signed one, as Triton takes it in one type.
        factor: by which weights that are kept are multiplied.
    """

    seed: Tensor | None
    threshold: int
    factor: float


def dropping(dropout_p: float | None, seed: Tensor | None) -> Dropout:
    """What kernels have to know."""
    if not dropout_p:
        return Dropout(None, 0, 1.0)
    least = threshold(dropout_p)
    return Dropout(seed, least - 2**32 if least >= 2**31 else least, 1 / (1 - dropout_p))


@triton.jit
def seed_words(seed):
    """The generator's key: the low and the high word of the seed."""
    both = tl.load(seed)
    return (both & 0xFFFFFFFF).to(tl.uint32), ((both >> 32) & 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def group_begin(j):
    """The nearest key before j, or j itself, at which a tile may begin."""
    return j & -4


@triton.jit
def kept(words, threshold, n, h, i, j_begin, KEYS: tl.constexpr, KEYS_FIRST: tl.constexpr = False):
    """Which weights of rows ``i`` (M,) for ``KEYS`` keys from ``j_begin`` on, a multiple of 4, are kept.

    ``words`` are those of ``seed_words``. Returns (M, KEYS), or (KEYS, M) where KEYS_FIRST.
    """
    group = (tl.arange(0, KEYS // 4) + j_begin // 4).to(tl.uint32)
    rows = i.to(tl.uint32)
    if KEYS_FIRST:
        rows, group = rows[None, :], group[:, None]
    else:
        rows, group = rows[:, None], group[None, :]
    word_0, word_1, word_2, word_3 = _philox(words, n.to(tl.uint32), h.to(tl.uint32), rows, group)
    least = threshold.to(tl.uint32, bitcast=True)
    # Two keys to a number: so many are side by side in a thread's part of a product, to whose layout they go by shared memory.
    lower = tl.where(word_0 >= least, 1, 0) | tl.where(word_1 >= least, 2, 0)
    upper = tl.where(word_2 >= least, 1, 0) | tl.where(word_3 >= least, 2, 0)
    pairs = tl.join(lower, upper)
    bit = tl.arange(0, 2) + 1
    if KEYS_FIRST:
        pairs = tl.reshape(tl.permute(pairs, (0, 2, 1)), (KEYS // 2, i.shape[0]))
        keep = tl.reshape((pairs[:, None, :] & bit[None, :, None]) != 0, (KEYS, i.shape[0]))
    else:
        pairs = tl.reshape(pairs, (i.shape[0], KEYS // 2))
        keep = tl.reshape((pairs[:, :, None] & bit[None, None, :]) != 0, (i.shape[0], KEYS))
    return keep


@triton.jit
def _philox(words, a, b, c, d):
    """Philox-4x32-10 of counters (a, b, c, d), which broadcast."""
    key_0, key_1 = words
    for _ in tl.static_range(10):
        high_a, low_a = _product(a, 0xD2511F53)
        high_c, low_c = _product(c, 0xCD9E8D57)
        a, b, c, d = high_c ^ b ^ key_0, low_c, high_a ^ d ^ key_1, low_a
        key_0 += 0x9E3779B9
        key_1 += 0xBB67AE85
    return a, b, c, d


@triton.jit
def _product(word, multiplier: tl.constexpr):
    """The high and the low word of a product of two words, which a GPU computes in one instruction."""
    product = word.to(tl.uint64) * multiplier
    return (product >> 32).to(tl.uint32), (product & 0xFFFFFFFF).to(tl.uint32)
