"""Which error passes: at most twice that of the naive computation in the same dtype, plus one rounding step.

The 2-norm decides, and no single element may be off by four times as much. float32 need not be better than the 1e-6 that it
promises, or than TF32 where torch's setting allows it.

In float64 the naive computation is the truth itself, and says nothing of what rounding costs. There a few rounding steps pass;
of attention, as many as its scores are large. A score s is known to within a step of its own, eps * |s|, and that is the
relative error of exp(s): with scores of 200, the truth and a right result both keep 14 digits, not 16. A computation in
float32 is off by 2**29 times as much.

A softmax over one key is constant, and any ignores what is added to a whole row: some gradients vanish, as a difference of equal
terms. These may keep a few rounding steps of the call's largest gradient. A gradient that is a sum over all rows may keep a few
of what its terms would add up to if their signs were random: how far they cancel is luck.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from attnreg.precision import allow_tf32

# What counts as fp32-accurate even where the naive computation happens to be better, and as TF32-accurate: two factors of
# 11 bits.
FP32_ACCURATE, TF32_ACCURATE = 1e-6, 2**-10
# How many rounding steps of the largest gradient may be left where another one vanishes.
STEPS_OF_NOTHING = 8
# How many rounding steps a result in float64 may be off by, and how many for each 1 in the largest score: the truth has one of
# these, and the result another.
STEPS_OF_TRUTH, STEPS_OF_SCORES = 16, 2
# How many rounding steps of its terms a sum over rows may be off by, in a wide dtype and in one of 16 bits.
STEPS_OF_TERMS_WIDE, STEPS_OF_TERMS_NARROW = 8, 2
# The norms in which an error is measured, and how much of the budget each is given.
NORMS = ((2.0, 1.0), (math.inf, 4.0))


@dataclass(frozen=True)
class Budget:
    """The errors that pass, one for each of ``NORMS``.

    Attributes:
        sizes: what an error's norm is divided by.
        limits: the largest relative error that passes.
    """

    sizes: tuple[float, ...]
    limits: tuple[float, ...]

    def error(self, given: Tensor, true: Tensor) -> float:
        """The relative error in the 2-norm; infinite where ``true`` is not finite and ``given`` something else."""
        return self._errors(given, true)[0]

    def fault(self, given: Tensor, true: Tensor) -> str | None:
        """What is wrong with ``given``; None where it passes."""
        for (order, _), error, limit in zip(NORMS, self._errors(given, true), self.limits):
            if not error <= limit:
                what = "" if order == 2 else " of one element"
                return f"relative error{what} {error:.1e} exceeds {limit:.1e}"
        return None

    def _errors(self, given: Tensor, true: Tensor) -> list[float]:
        given = given.to(true.dtype)
        finite = true.isfinite()
        if not bool((given == true)[~finite].all()):
            return [math.inf] * len(NORMS)
        wrong = (given - true).where(finite, 0)
        found = []
        for (order, _), size in zip(NORMS, self.sizes):
            error = _norm(wrong, order)
            found.append(error / size if size else (0.0 if error == 0 else math.inf))
        return found


def budget(
    true: Tensor,
    naive: Tensor,
    dtype: torch.dtype,
    gradients: Iterable[Tensor] = (),
    *,
    largest_score: float = 0.0,
    terms: Tensor | None = None,
) -> Budget:
    """The budget of one result.

    Args:
        true: the truth, in float64.
        naive: what the naive computation makes of it in ``dtype``.
        dtype: that of the inputs and the result.
        gradients: where the result is a gradient, the true ones of the whole call.
        largest_score: of those that a softmax is taken of, in size; it counts in float64 alone.
        terms: where the result is a sum over rows, how large their terms are, as ``oracle.Truth`` has it.
    """
    step = torch.finfo(dtype).eps
    least = 0.0
    if dtype == torch.float32:
        least = TF32_ACCURATE if allow_tf32() else FP32_ACCURATE
    others = tuple(gradients)
    sizes, limits = [], []
    for order, factor in NORMS:
        size = _norm(_finite(true), order)
        largest = max((_norm(_finite(each), order) for each in others), default=0.0)
        wrong = _norm((naive.to(true.dtype) - true).where(true.isfinite(), 0), order)
        # The naive computation may overflow where the truth does not: that is no licence.
        limit = (2 * wrong if math.isfinite(wrong) else 0.0) + step * size
        if size < step * largest:
            size, limit = largest, max(limit, STEPS_OF_NOTHING * step * largest)
        limit = max(limit, least * size)
        if terms is not None:
            steps = STEPS_OF_TERMS_WIDE if dtype.itemsize > 2 else STEPS_OF_TERMS_NARROW
            limit = max(limit, steps * step * _norm(_finite(terms), order))
        if dtype == torch.float64:
            limit = max(limit, max(STEPS_OF_TRUTH, STEPS_OF_SCORES * largest_score) * step * max(size, largest))
        sizes.append(size)
        limits.append(factor * limit / size if size else 0.0)
    return Budget(tuple(sizes), tuple(limits))


def _norm(tensor: Tensor, order: float) -> float:
    return float(torch.linalg.vector_norm(tensor.double(), order)) if tensor.numel() else 0.0


def _finite(tensor: Tensor) -> Tensor:
    return tensor.where(tensor.isfinite(), 0)
