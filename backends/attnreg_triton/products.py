"""Products of tiles with fp32 accuracy on matrix units that have none.

Each factor is split in two numbers that the units multiply exactly, ``x = hi + lo``, and three of the four products are
added up, the small ones first; what is left out, ``lo * lo``, lies below fp32's last bit.

"3xtf32" splits in two TF32 numbers of 11 bits. The units add up with truncation, so it serves short sums; the sums of
several tiles are added up outside of them. "3xfp16" splits in two fp16 numbers, likewise of 11 bits, at twice the speed;
rows are scaled by a power of two first, so that their largest element is near the top of fp16's range, and smaller ones
keep the bits that count beside it.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attnreg import Window, allow_tf32
from attnreg_triton.interpreter import cast, dot
from attnreg_triton.tiles import NARROW_WINDOW, NARROWEST_WINDOW, narrow_product

# Beyond, the truncation of the sums shows: measured on an H200, 3xTF32 makes 0.5e-6 of 64 terms, 1.1e-6 of 128.
_LONGEST_TF32_SUM = 64


def dot_precision(dtype: torch.dtype, head_dim: int, window: Window) -> str:
    """How tiles of ``dtype`` are multiplied by ``rows_by_keys`` for a band, whose elements are sums over the head dim.

    Splitting costs 3xTF32 less, the products 3xfp16: the small tiles of narrow windows are mostly splitting.
    """
    return _precision(dtype, head_dim <= _LONGEST_TF32_SUM and window.size <= NARROW_WINDOW)


def hopper_dot_precision(dtype: torch.dtype, head_dim: int) -> str:
    """As ``dot_precision``, for ``hopper.band_dot``, where splitting in fp16 costs more than the products save."""
    return _precision(dtype, head_dim <= _LONGEST_TF32_SUM)


def average_precision(dtype: torch.dtype, dim: int, window: Window) -> str:
    """How tiles of ``dtype`` are multiplied by ``weights_by_rows`` for an average, a sum of at most W terms in each tile.

    As for ``dot_precision``; but the larger of the small tiles are mostly splitting only above a head dim of 64 (measured on an
    H100).
    """
    small_tiles = narrow_product(dim, window) is not None
    return _precision(dtype, small_tiles and (window.size <= NARROWEST_WINDOW or dim > 64))


def attention_precision(dtype: torch.dtype) -> str:
    """How tiles of ``dtype`` are multiplied in the fused attention."""
    return _precision(dtype, False)


def _precision(dtype: torch.dtype, splitting_counts: bool) -> str:
    if dtype != torch.float32 or allow_tf32():
        return "tf32"
    return "3xtf32" if splitting_counts else "3xfp16"


@triton.jit
def rows_by_keys(x, y, PRECISION: tl.constexpr):
    """``x y^T`` in fp32: (M, E), (N, E) -> (M, N)."""
    if PRECISION == "3xfp16":
        x_up, x_down = _powers(tl.max(tl.abs(x), 1))
        y_up, y_down = _powers(tl.max(tl.abs(y), 1))
        x_hi, x_lo = _fp16_parts(x * x_up[:, None])
        y_hi, y_lo = _fp16_parts(y * y_up[:, None])
        scaled = _three_products(x_hi, x_lo, tl.trans(y_hi), tl.trans(y_lo))
        product = scaled * x_down[:, None] * y_down[None, :]
    elif PRECISION == "3xtf32":
        x_hi, x_lo = _tf32_parts(x)
        y_hi, y_lo = _tf32_parts(y)
        product = _three_products(x_hi, x_lo, tl.trans(y_hi), tl.trans(y_lo))
    else:
        product = dot(x, tl.trans(y), PRECISION)
    return product


@triton.jit
def weights_by_rows(w, y, acc, PRECISION: tl.constexpr):
    """``w y + acc`` in fp32: (M, N), (N, E), (M, E) -> (M, E)."""
    if PRECISION == "3xfp16":
        y_up, y_down = _powers(tl.max(tl.abs(y), 1))
        w = w * y_down[None, :]
        w_up, w_down = _powers(tl.max(tl.abs(w), 1))
        w_hi, w_lo = _fp16_parts(w * w_up[:, None])
        y_hi, y_lo = _fp16_parts(y * y_up[:, None])
        acc += _three_products(w_hi, w_lo, y_hi, y_lo) * w_down[:, None]
    elif PRECISION == "3xtf32":
        w_hi, w_lo = _tf32_parts(w)
        y_hi, y_lo = _tf32_parts(y)
        acc += _three_products(w_hi, w_lo, y_hi, y_lo)
    else:
        acc = dot(w, y, PRECISION, acc)
    return acc


@triton.jit
def _three_products(a_hi, a_lo, b_hi, b_lo):
    acc = dot(a_lo, b_hi, "tf32")
    acc = dot(a_hi, b_lo, "tf32", acc)
    return dot(a_hi, b_hi, "tf32", acc)


@triton.jit
def _tf32_parts(x):
    """``hi + lo = x``, hi with the 11 bits that TF32 keeps."""
    hi = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return hi, x - hi


@triton.jit
def _fp16_parts(x):
    """``hi + lo = x`` but for what is less than 2^-22 of it, or less than 2^-25; |x| < 2^15."""
    hi = cast(x, tl.float16)
    return hi, cast(x - hi.to(tl.float32), tl.float16)


@triton.jit
def _powers(largest):
    """The power of two that brings ``largest`` to [2^14, 2^15), and its inverse, by their exponents' bits."""
    exponent = tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) & 0xFF, 20)
    up = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    down = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
    return up, down
