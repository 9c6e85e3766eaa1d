"""What kernels have to write differently for Triton's interpreter, under the same names for both.

Compiled, ``span`` is ``tl.range``, ``dot`` is ``tl.dot`` and ``cast`` is ``Tensor.to``.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from attnreg_triton.availability import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


def _interpreted_span(begin: Any, end: Any, step: Any) -> range:
    """The interpreter's numbers are arrays of one element, which NumPy 2.4 and later refuse as bounds of a range."""
    return range(
        *(bound.handle.data.item() if isinstance(bound, tl.tensor) else int(bound) for bound in (begin, end, step))
    )


span: Any = _interpreted_span if INTERPRETED else tl.range


@triton.jit
def dot(a, b, PRECISION: tl.constexpr, acc=None):
    """``a @ b + acc``, accumulated in fp32."""
    if _INTERPRETED:
        # The interpreter's tl.dot would multiply the bit patterns of bf16, and its fp32 sums would depend on the tile's shape in
        # their last bits, as those of the matrix units do not.
        product = tl.dot(a.to(tl.float64), b.to(tl.float64))
        return (product if acc is None else product + acc).to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """fp32 ``x`` rounded to the nearest number of ``dtype``."""
    if _INTERPRETED and dtype == tl.bfloat16:
        # The interpreter would truncate: round to nearest even here, so that nothing is left to cut off.
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(dtype)
