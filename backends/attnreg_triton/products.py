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
# Up to it, the error of a sum of split products is more than twice that of fp32's own.
_SHORTEST_SPLIT_SUM = 4


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


# So many terms the units may add up by themselves: they cut off what does not fit, and a longer sum shows it (measured on an
# H100: at 256 terms, gradients were off by 3 to 5 times what fp32 itself makes of them, at 128 by less than twice). At 256,
# sections cost nothing; at 128 they would make attention take 2.3 to 2.6 times as long.
_LONGEST_SUM = tl.constexpr(128)
# How long the sections of a longer sum are.
_SECTION = tl.constexpr(64)


@triton.constexpr_function
def short_sum_precision(precision, terms):
    """How to multiply where an element is a sum of ``terms`` products: in fp32 itself if they are so few that splitting shows."""
    return "ieee" if precision == "3xfp16" and terms <= _SHORTEST_SPLIT_SUM else precision


@triton.jit
def rows_by_keys(x, y, PRECISION: tl.constexpr, TRANSPOSED: tl.constexpr = False):
    """``x y^T`` in fp32: (M, E), (N, E) -> (M, N).

    TRANSPOSED says that x has the keys and y the rows: products are then added up in such an order that both ways give the
    same bits.
    """
    if PRECISION == "3xfp16":
        x_up, x_down = _powers(tl.max(tl.abs(x), 1))
        y_up, y_down = _powers(tl.max(tl.abs(y), 1))
        x_hi, x_lo = _fp16_parts(x * x_up[:, None])
        y_hi, y_lo = _fp16_parts(y * y_up[:, None])
        if x.shape[1] > _LONGEST_SUM:
            scaled = _three_products_in_sections(x_hi, x_lo, y_hi, y_lo, TRANSPOSED)
        else:
            scaled = _three_products(x_hi, x_lo, tl.trans(y_hi), tl.trans(y_lo), TRANSPOSED)
        product = scaled * x_down[:, None] * y_down[None, :]
    elif PRECISION == "3xtf32":
        x_hi, x_lo = _tf32_parts(x)
        y_hi, y_lo = _tf32_parts(y)
        product = _three_products(x_hi, x_lo, tl.trans(y_hi), tl.trans(y_lo), TRANSPOSED)
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
def large_weights_by_rows(w, y, acc, up, PRECISION: tl.constexpr):
    """``weights_by_rows`` for weights of any size: ``acc`` is the sum times ``up`` (M,), and both are returned anew.

    ``up`` begins as 1 and becomes a smaller power of two where weights exceed what fp16 holds; other dtypes hold them all.
    """
    if y.dtype == tl.float16:
        fitting, _ = _powers(tl.max(tl.abs(w), 1))
        before = up
        up = tl.minimum(up, fitting)
        w *= up[:, None]
        acc *= (up / before)[:, None]
    return weights_by_rows(cast(w, y.dtype), y, acc, PRECISION), up


@triton.jit
def _three_products(a_hi, a_lo, b_hi, b_lo, SECOND_FIRST: tl.constexpr = False):
    if SECOND_FIRST:
        acc = dot(a_hi, b_lo, "tf32")
        acc = dot(a_lo, b_hi, "tf32", acc)
    else:
        acc = dot(a_lo, b_hi, "tf32")
        acc = dot(a_hi, b_lo, "tf32", acc)
    return dot(a_hi, b_hi, "tf32", acc)


@triton.jit
def _three_products_in_sections(x_hi, x_lo, y_hi, y_lo, SECOND_FIRST: tl.constexpr):
    """``_three_products`` of (M, E) and (N, E), with the sums of ``_SECTION`` terms added up outside the units."""
    x_hi, x_lo, y_hi, y_lo = _sections(x_hi), _sections(x_lo), _sections(y_hi), _sections(y_lo)
    product = _three_products(x_hi, x_lo, tl.trans(y_hi, (0, 2, 1)), tl.trans(y_lo, (0, 2, 1)), SECOND_FIRST)
    # In pairs: the order of two terms does not matter, so every kernel gets the same bits.
    if product.shape[0] == 4:
        product = tl.sum(tl.reshape(product, (2, 2, product.shape[1], product.shape[2])), 0)
    return tl.sum(product, 0)


@triton.jit
def _sections(x):
    """(M, E) -> (sections, M, ``_SECTION``)."""
    sections: tl.constexpr = x.shape[1] // _SECTION
    return tl.permute(tl.reshape(x, (x.shape[0], sections, _SECTION)), (1, 0, 2))


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
