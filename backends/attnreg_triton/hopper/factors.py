"""The factors that ``attnreg_triton.products`` multiplies for fp32 accuracy, in Gluon."""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def tf32_rest(x):
    """What the units leave of fp32 ``x``, of which they take the 11 bits of a TF32 number as they are."""
    return x - (x.to(gl.int32, bitcast=True) & -8192).to(gl.float32, bitcast=True)


@gluon.jit
def fp16_shrinkage(x, before):
    """``before``, or the smaller power of two that brings the largest element of a row of fp32 ``x`` under 2^15."""
    exponent = gl.maximum((gl.max(gl.abs(x), 1).to(gl.int32, bitcast=True) >> 23) & 0xFF, 20)
    return gl.minimum(before, ((268 - exponent) << 23).to(gl.float32, bitcast=True))


@gluon.jit
def fp16_factors(x):
    """``(hi, lo, down)``: the fp32 rows are ``(hi + lo) * down[:, None]``, with hi and lo in fp16.

    ``down`` is a power of two that brings the largest element of a row to [2^14, 2^15).
    """
    exponent = gl.maximum((gl.max(gl.abs(x), 1).to(gl.int32, bitcast=True) >> 23) & 0xFF, 20)
    x *= ((268 - exponent) << 23).to(gl.float32, bitcast=True)[:, None]
    hi = x.to(gl.float16)
    return hi, (x - hi.to(gl.float32)).to(gl.float16), ((exponent - 14) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def allocate_factors(DIM: gl.constexpr):
    """Two tiles of 64 rows by DIM in fp16."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, DIM], gl.float16)
    tiles = gl.allocate_shared_memory(gl.float16, [2, 64, DIM], layout)
    return tiles.index(0), tiles.index(1)
