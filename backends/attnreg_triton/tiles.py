"""How many rows and keys a program works on, and with how many warps: the one place to tune.

Every entry fits into the 99 KiB of shared memory that the smaller GPUs have. fp32 needs smaller tiles: it is twice as
wide, and its accurate product splits each factor in two, in registers: mostly it wants one stage and four warps. (Measured on
an H100, average, E = 128, W = 64: a second stage makes a tile of 32 by 32 take 1.8 times as long, eight warps one of 32 by 64
1.3 times.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from attnreg import Window


@dataclass(frozen=True, slots=True)
class Tiles:
    """A tile of the band, rows by keys; a program owns one of the two extents and loops along the other.

    ``max_registers`` is what a thread gets on an NVIDIA GPU, where the compiler would take more than pays.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int = 2
    max_registers: int | None = None


# For head dims up to 64, 128 and 256: of fp16 and bf16, of fp32, and of attention in fp32 for the narrowest windows. The
# 16-bit entries of attention up to 128 were measured on an H200 (N=4, H=16, L=8192, causal windows 16 to 1024), all others
# on an H100 (N*H=64, L=4096, windows of attention 8 to 1024, of products 64 to 512).
_DIMS = (64, 128, 256)
_DOT = (
    (Tiles(64, 64, 4), Tiles(64, 64, 4), Tiles(64, 32, 4)),
    (Tiles(64, 64, 4, num_stages=1), Tiles(64, 32, 4, num_stages=1), Tiles(32, 64, 8, num_stages=1)),
)
_AVERAGE = (
    (Tiles(64, 64, 4), Tiles(64, 64, 4), Tiles(64, 32, 4)),
    (Tiles(64, 64, 4, num_stages=1), Tiles(64, 32, 4, num_stages=1), Tiles(32, 32, 4, num_stages=1)),
)
# Windows for which one step of 32 or 64 keys holds what 16 or 32 rows see: the fewer the rows, the fewer products fall
# outside the band. (And 64 rows with the larger of these see 96 keys: three steps of 32, but two of 64.)
NARROWEST_WINDOW, NARROW_WINDOW = 17, 33
_NARROW_PRODUCT = {
    NARROWEST_WINDOW: (
        Tiles(16, 32, 1, num_stages=1),
        Tiles(16, 32, 2, num_stages=1),
        Tiles(16, 32, 4, num_stages=1),
    ),
    NARROW_WINDOW: (Tiles(32, 64, 2, num_stages=1), Tiles(32, 64, 4, num_stages=1)),
}
_ATTENTION = (
    (Tiles(64, 64, 4, num_stages=3), Tiles(64, 32, 4, num_stages=3), Tiles(64, 32, 4)),
    (Tiles(64, 32, 4), Tiles(64, 32, 4, num_stages=1), Tiles(32, 16, 4, num_stages=1)),
    (Tiles(64, 32, 4), Tiles(64, 32, 4, num_stages=1), Tiles(16, 32, 4, num_stages=1)),
)
_BACKWARD_ROWS = (
    (Tiles(64, 64, 4), Tiles(64, 64, 4), Tiles(64, 32, 4, num_stages=1)),
    # Three programs to a multiprocessor.
    (Tiles(64, 32, 4, num_stages=1, max_registers=168), Tiles(64, 32, 4, num_stages=1), Tiles(16, 16, 4, num_stages=1)),
    (
        Tiles(16, 32, 2, num_stages=1, max_registers=168),
        Tiles(16, 32, 4, num_stages=1, max_registers=168),
        Tiles(16, 16, 4, num_stages=1),
    ),
)
_BACKWARD_KEYS = (
    (Tiles(32, 64, 4, num_stages=1), Tiles(32, 64, 4, num_stages=1), Tiles(32, 32, 4)),
    (Tiles(32, 64, 4, num_stages=1), Tiles(32, 32, 4, num_stages=1), Tiles(16, 16, 4, num_stages=1)),
    (Tiles(32, 16, 2, num_stages=1), Tiles(32, 16, 4, num_stages=1), Tiles(16, 16, 4, num_stages=1)),
)

# A band that is only added up.
BAND_SUM = Tiles(32, 64, 4)


def dot_by_rows(dtype: torch.dtype, head_dim: int, window: Window) -> Tiles:
    """For ``band_dot``, whose programs own rows."""
    return narrow_product(head_dim, window) or _entry(_DOT, dtype, head_dim)


def average_by_rows(dtype: torch.dtype, dim: int, window: Window) -> Tiles:
    """For ``band_average``, whose programs own rows."""
    return narrow_product(dim, window) or _entry(_AVERAGE, dtype, dim)


def narrow_product(dim: int, window: Window) -> Tiles | None:
    """The tiles of its own that a narrow window has in the products; None where it is too wide for that."""
    for largest, by_dim in _NARROW_PRODUCT.items():
        if window.size <= largest and dim <= _DIMS[len(by_dim) - 1]:
            return by_dim[_class(dim)]
    return None


def average_by_keys(dtype: torch.dtype, dim: int, window: Window) -> Tiles:
    """For ``band_average_transposed``, whose programs own keys."""
    tiles = average_by_rows(dtype, dim, window)
    return replace(tiles, rows=tiles.keys, keys=tiles.rows)


def attention(dtype: torch.dtype, head_dim: int, value_dim: int, window: Window, has_dropout: bool = False) -> Tiles:
    """For the fused attention, whose programs own rows."""
    tiles = _fit(_attention_entry(_ATTENTION, dtype, max(head_dim, value_dim), window), window)
    if has_dropout and dtype != torch.float32 and max(head_dim, value_dim) <= 128:
        # Three programs to a multiprocessor, as without; the generator's words would take the registers of one.
        tiles = replace(tiles, max_registers=168)
    return tiles


def attention_backward_by_rows(
    dtype: torch.dtype, head_dim: int, value_dim: int, window: Window, has_bias: bool
) -> Tiles:
    """For the gradients of query and bias.

    With a bias never more rows than keys, which ``bias_gradient.store_column_sums`` relies on.
    """
    tiles = _attention_entry(_BACKWARD_ROWS, dtype, max(head_dim, value_dim), window)
    return replace(tiles, rows=min(tiles.rows, 32)) if has_bias else tiles


def attention_backward_by_keys(dtype: torch.dtype, head_dim: int, value_dim: int, window: Window) -> Tiles:
    """For the gradients of key and value."""
    return _attention_entry(_BACKWARD_KEYS, dtype, max(head_dim, value_dim), window)


def _entry(table: tuple[tuple[Tiles, ...], ...], dtype: torch.dtype, dim: int) -> Tiles:
    return table[dtype == torch.float32][_class(dim)]


def _attention_entry(table: tuple[tuple[Tiles, ...], ...], dtype: torch.dtype, dim: int, window: Window) -> Tiles:
    if dtype == torch.float32 and window.size <= NARROWEST_WINDOW:
        return table[-1][_class(dim)]
    return _entry(table, dtype, dim)


def _class(dim: int) -> int:
    return next(index for index, limit in enumerate(_DIMS) if dim <= limit)


def _fit(tiles: Tiles, window: Window) -> Tiles:
    return replace(tiles, keys=32, num_stages=2) if window.size <= NARROW_WINDOW and tiles.keys > 32 else tiles


# The Hopper kernels; measured on an H200 as above, and with grouped heads and symmetric windows. Narrow windows want small
# steps, so that few hidden keys are computed; wide ones as many programs to a multiprocessor as registers allow.
_HOPPER_PIPELINED = 192


def hopper_attention(head_dim: int, value_dim: int, window: Window) -> Tiles:
    """For the fused attention on Hopper, whose programs own rows."""
    if window.size > _HOPPER_PIPELINED:
        return Tiles(64, 64, 4, num_stages=1)
    if window.size <= NARROW_WINDOW:
        return Tiles(64, 32, 4, num_stages=3)
    return Tiles(64, 64 if max(head_dim, value_dim) <= 64 else 32, 4, num_stages=2)


def hopper_attention_backward_by_rows(head_dim: int, value_dim: int, window: Window) -> Tiles:
    """For the gradient of the query on Hopper. At least two stages, as a step's tiles are free only in the next."""
    if window.size <= NARROW_WINDOW:
        return Tiles(64, 32, 4, num_stages=3)
    # Three programs to a multiprocessor, where their tiles let so many in.
    return Tiles(64, 64, 4, num_stages=2, max_registers=168 if max(head_dim, value_dim) <= 64 else None)


def hopper_attention_backward_by_keys(window: Window) -> Tiles:
    """For the gradients of key and value on Hopper."""
    return Tiles(32 if window.size <= NARROW_WINDOW else 64, 64, 4, num_stages=2)


# Narrower windows fill too little of a tile of 64 keys; the kernels for every GPU are then as fast or faster.
_HOPPER_BAND_DOT_FROM = {torch.float16: 18, torch.bfloat16: 18, torch.float32: 34}
_HOPPER_BAND_AVERAGE_FROM = {torch.float16: 80, torch.bfloat16: 80, torch.float32: 34}

# Beyond it three fp16 products do not fit the registers.
_LARGEST_FP32_AVERAGE_DIM = 64


def hopper_band_dot_pays(dtype: torch.dtype, window: Window) -> bool:
    """Whether ``hopper.band_dot`` is faster than ``band_dot``'s own kernel."""
    return window.size >= _HOPPER_BAND_DOT_FROM[dtype]


def hopper_band_average_pays(dtype: torch.dtype, dim: int, window: Window) -> bool:
    """Whether ``hopper.band_average`` is faster than ``band_average``'s own kernel."""
    fits = dtype != torch.float32 or dim <= _LARGEST_FP32_AVERAGE_DIM
    return fits and window.size >= _HOPPER_BAND_AVERAGE_FROM[dtype]


# 64 by 64 is what the skewed view of a tile is made for. Two programs to a multiprocessor are worth more than a second stage.
def hopper_band_dot(dtype: torch.dtype, dim: int) -> Tiles:
    """For ``hopper.band_dot``."""
    return Tiles(64, 64, 4, num_stages=1 if dtype == torch.float32 and dim > 64 else 2)


def hopper_band_average(dtype: torch.dtype) -> Tiles:
    """For ``hopper.band_average``."""
    return Tiles(64, 64, 4, num_stages=1 if dtype == torch.float32 else 2)
