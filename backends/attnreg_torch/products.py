"""Matrix products of batches of blocks: made and summed in the accumulator's dtype, at least float32."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

# How many terms of q . k (or dO . v) are summed up in one go. A matrix product adds them one after the other, so that its error
# grows with their number. Softmax takes the error of a score, not its relative error: large scores need small ones.
TERMS = 128
TERMS_FOR_SOFTMAX = 32

# Multiplications up to which products for a softmax are made in float64: their time is that of the calls, and few numbers do
# not average their errors.
FEW_MULTIPLICATIONS = 2**16


def product(left: Tensor, right: Tensor, scale: float, most_terms: int | None = None) -> Tensor:
    """``scale left right`` for batches of matrices, in the accumulator's dtype; ``most_terms`` are summed up in one go."""
    if left.dtype != right.dtype:
        left, right = left.to(accumulator(left)), right.to(accumulator(right))
    dtype = accumulator(left)
    if abs(scale) > torch.finfo(dtype).max:
        scale = math.copysign(math.inf, scale)
    parts: Iterable[tuple[Tensor, Tensor]] = [(left, right)]
    if most_terms is not None and left.shape[2] > most_terms:
        parts = zip(left.split(most_terms, 2), right.split(most_terms, 1))
    sums = left.new_empty((left.shape[0], left.shape[1], right.shape[2]), dtype=dtype)
    beta = 0.0
    for part in parts:
        if left.dtype == dtype:
            sums.baddbmm_(*part, beta=beta, alpha=scale)
        else:
            torch.baddbmm(sums, *part, beta=beta, alpha=scale, out_dtype=dtype, out=sums)
        beta = 1.0
    return sums


def operand(tensor: Tensor) -> Tensor:
    """What goes into a matrix product: 16 bit as it is where torch's products sum it up in float32, else in float32."""
    return tensor.float() if tensor.dtype.itemsize < 4 and tensor.device.type != "cuda" else tensor


def accumulator(tensor: Tensor) -> torch.dtype:
    """The dtype in which products of ``tensor`` are summed."""
    return torch.float32 if tensor.dtype.itemsize < 4 else tensor.dtype
