"""Soft capping in Gluon: with it kernels compute with tangents ``tanh(ratio * q.k)`` in the place of products ``q.k``.

A score is ``unit`` times one or the other; ``ratio`` is None without a softcap. See ``attnreg_triton.softcap.capping``.
"""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

from __future__ import annotations

import struct

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Elements of a thread that take one branch together.
_PACK = 8
# tanh(x) / x by powers of x^2, lowest first, to 6e-7 where |x| < 0.6.
_SMALL = 0.6
_POWERS = (0.99999102, -0.33298974, 0.12974554, -0.03961127)
_TWO_LOG2E = 2 * 1.4426950408889634


def _bits(number: float) -> str:
    """A number of fp32 as PTX writes it."""
    return f"0f{struct.unpack('>I', struct.pack('>f', number))[0]:08X}"


def _tanh_in_ptx() -> str:
    """The hyperbolic tangent of ``_PACK`` numbers, to 1e-6: by powers where all of them are small, as most caps are chosen.

    Else it is ``1 - 2 / (exp(2 x) + 1)``, whose two special operations take as long as 16 others. A branch for a thread's own
    numbers needs no word with other threads.
    """
    c0, c1, c2, c3 = map(_bits, _POWERS)
    names = [(f"${place}", f"${place + _PACK}") for place in range(_PACK)]
    lines = ["{", ".reg .pred large;", ".reg .f32 most, other;", f"abs.f32 most, {names[0][1]};"]
    lines += [f"abs.f32 other, {x}; max.f32 most, most, other;" for _, x in names[1:]]
    lines += [f"setp.ge.f32 large, most, {_bits(_SMALL)};", "@large bra LARGE;"]
    for result, x in names:
        lines.append(f"mul.f32 most, {x}, {x}; fma.rn.f32 other, most, {c3}, {c2};")
        lines.append(f"fma.rn.f32 other, most, other, {c1}; fma.rn.f32 other, most, other, {c0};")
        lines.append(f"mul.f32 {result}, {x}, other;")
    lines += ["bra DONE;", "LARGE:"]
    for result, x in names:
        lines.append(f"mul.f32 other, {x}, {_bits(_TWO_LOG2E)}; ex2.approx.ftz.f32 other, other;")
        lines.append(f"add.f32 other, other, {_bits(1.0)}; rcp.approx.ftz.f32 other, other;")
        lines.append(f"fma.rn.f32 {result}, other, {_bits(-2.0)}, {_bits(1.0)};")
    return "\n".join([*lines, "DONE:", "}"])


_TANH = gl.constexpr(_tanh_in_ptx())
_OPERANDS = gl.constexpr(",".join(["=&r"] * _PACK + ["r"] * _PACK))
_ELEMENTS = gl.constexpr(_PACK)


@gluon.jit
def capped(s, ratio):
    """A tile of products, capped where there is a ratio."""
    if ratio is not None:
        s = gl.inline_asm_elementwise(_TANH, _OPERANDS, [s * ratio], dtype=gl.float32, is_pure=True, pack=_ELEMENTS)
    return s
