"""The block for a window, and how fp32 is multiplied: one rule of (window, dtype)."""

from __future__ import annotations

SMALLEST_BLOCK, LARGEST_BLOCK = 16, 256


def block_rows(window_size: int) -> int:
    """B, the rows of a block."""
    return 32 if window_size <= 32 else 64


def factors_pay(window_size: int) -> bool:
    """Whether fp32-accurate dot products are made of fp16 factors rather than multiplied as fp32."""
    return window_size > 80


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
