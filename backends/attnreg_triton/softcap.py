"""Soft capping, ``softcap * tanh(s / softcap)``: the hyperbolic tangent to fp32's rounding, and a cheaper one for 16 bits.

Both take the reciprocals that they need from a reciprocal square root, which is one instruction on a GPU; a quotient is eight.

Fine: ``x + x^3 P(x^2)`` where |x| < 0.7, beyond ``1 - 2 / (1 + exp(2 |x|))`` with the sign of x. P minimises the largest relative
error (weighted least squares with the weights of Lawson's algorithm).

Coarse: ``x * P(x^2) * rsqrt(R(x^2))``, with x clamped to where tanh is almost 1, found by Gauss-Newton steps on the logarithm of
the quotient of both sides, weighted likewise. The degree of R is that of x^2 P^2, so that it tends to a constant, as tanh does.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

# Coefficients of the highest degree first.
# Fine: the largest relative error in fp32, over all x, is 1.5e-7, with the rsqrt of a GPU 2.6e-7; it is 2.1e-8 in
# the root mean square, 4e-8 where |x| > 2. (The largest of torch's own is 1.1e-7.)
SMALL = tl.constexpr(0.7)
POLYNOMIAL = tl.constexpr(
    (-0.005138663109391928, 0.02009197138249874, -0.05355885997414589, 0.1332911103963852, -0.3333319127559662)
)
# Coarse: the largest relative error is 4.0e-5, a sixth of what rounding a score to fp16 makes.
LIMIT = tl.constexpr(5.2)
NUMERATOR = tl.constexpr((0.11378597468137741, 0.9999605417251587))
RADICAND = tl.constexpr((0.012869726866483688, 0.23225747048854828, 0.893392026424408, 1.0))

_TWO_LOG2E = tl.constexpr(2 * 1.4426950408889634)

# A larger one would cap nothing that is not a weight of 0 or 1 anyway.
_LARGEST_SOFTCAP = 2.0**64
# What fp32 holds.
_LARGEST_RATIO = 3e38


def capping(scale: float, softcap: float | None) -> tuple[float, float]:
    """``(ratio, unit)``, fp32 numbers: a score is ``unit * tanh(ratio * q.k)``. ``(1, scale)`` without a softcap."""
    if softcap is None:
        return 1.0, scale
    softcap = min(softcap, _LARGEST_SOFTCAP)
    return max(-_LARGEST_RATIO, min(scale / softcap, _LARGEST_RATIO)), softcap


@triton.jit
def tanh(x, FINE: tl.constexpr):
    """The hyperbolic tangent of fp32 numbers; of NaN it is NaN. Fused on purpose, so that every kernel computes the same bits."""
    if FINE:
        square = x * x
        value = tl.fma(tl.fma(square, POLYNOMIAL[0], POLYNOMIAL[1]), square, POLYNOMIAL[2])
        value = tl.fma(tl.fma(value, square, POLYNOMIAL[3]), square, POLYNOMIAL[4])
        value = tl.fma(x * square, value, x)
        size = tl.abs(x)
        above = tl.exp2(size * _TWO_LOG2E) + 1.0
        large = tl.fma(tl.rsqrt(above * above), -2.0, 1.0)
        value = tl.where(size < SMALL, value, tl.where(x < 0.0, -large, large))
    else:
        x = tl.maximum(x, -LIMIT, propagate_nan=tl.PropagateNan.ALL)
        x = tl.minimum(x, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        square = x * x
        numerator = tl.fma(square, NUMERATOR[0], NUMERATOR[1])
        radicand = tl.fma(tl.fma(square, RADICAND[0], RADICAND[1]), square, RADICAND[2])
        value = x * numerator * tl.rsqrt(tl.fma(radicand, square, RADICAND[3]))
    return value
