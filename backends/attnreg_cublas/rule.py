"""The block for a window, how fp32 is multiplied, and which copies are spared: rules of window and arithmetic.

Measured on an H200 and an H100, for head dims of 32 to 256 and all four products, see ``docs/window-curve.md``. A block wastes
the columns that its band does not reach, B - 1 of them a row, and the units waste what a small block leaves empty: those for
fp32 less than those for TF32 and 16 bit. The best block hardly depends on the head dim: the rule's takes 1.01 times its time
(geometric mean; 1.12 times at worst).
"""

from __future__ import annotations

import torch

SMALLEST_BLOCK, LARGEST_BLOCK = 16, 256

# The largest windows that blocks of 32 rows are for, where the units for fp32 multiply and where tensor cores do.
_NARROW, _NARROW_ON_TENSOR_CORES = 80, 48
# The largest window up to which the copies that a product of factors needs cost more than it saves.
_WITHOUT_FACTORS = 160

# Slots of edge rows for each position of the line, up to which they are worth the copies that they spare, where the rows are
# of scores and of an average. On an H100, for lines of 8,192 to 65,536 positions, scores still gain at 9 (3 %; a quarter at 3),
# averages at 0.8 (5 to 8 % in fp32) and no more at 3 (nothing in fp32, a fifth lost in bf16).
SCORE_EDGE_SLOTS, AVERAGE_EDGE_SLOTS = 9, 1


def block_rows(window_size: int, dtype: torch.dtype, tf32: bool, *, by_address: bool = False) -> int:
    """B, the rows of a block; ``by_address``: where cuBLAS is told where each one is."""
    if by_address and dtype != torch.float32:
        # Its kernels for blocks of 32 rows are slow there: on an H100, calls take up to 1.7 times as long as on one line, and
        # 1.05 to 1.3 times with 64 rows. Averages over windows up to 32 alone would be faster with 32 rows, by 4 to 9 %.
        return 64
    exact = dtype == torch.float32 and not tf32
    return 32 if window_size <= (_NARROW if exact else _NARROW_ON_TENSOR_CORES) else 64


def factors_pay(window_size: int) -> bool:
    """Whether fp32-accurate dot products are made of fp16 factors rather than multiplied as fp32."""
    return window_size > _WITHOUT_FACTORS


def parse_block(text: str) -> int:
    """The option ``block``."""
    rows = int(text) if text.isdecimal() else 0
    if rows % 8 or not SMALLEST_BLOCK <= rows <= LARGEST_BLOCK:
        raise ValueError(f"it takes a multiple of 8 from {SMALLEST_BLOCK} to {LARGEST_BLOCK}")
    return rows


def parse_workspace(text: str) -> int:
    """The option ``workspace``, in MiB."""
    if not text.isdecimal() or int(text) < 1:
        raise ValueError("it takes MiB, a whole number from 1 up")
    return int(text)
