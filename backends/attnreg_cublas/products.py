"""The batched products, by cuBLAS as torch has it configured: torch's own of one line, those of several in one launch as well.

The matrices of one line are evenly spaced; where there are several, each is found by its address, see ``csrc/cuda/multiply.cuh``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnreg_cublas.build import ops


def multiply(left: Tensor, right: Tensor, result: Tensor, scale: float = 1.0, heads: int = 1) -> None:
    """``result = scale * left @ right``, (lines, blocks, m, k) and (lines, blocks, k, n): summed in fp32, scaled, then rounded.

    Where k interleaves the query heads of a group, ``heads`` is their number: float32 then sums each head on its own
    first, as one sum over all of them would lose accuracy. The narrow dtypes would only be rounded more often.
    """
    sums = heads if result.dtype == torch.float32 else 1
    for head in range(sums):
        every = slice(head, None, sums)
        factors = left[..., every], right[..., every, :]
        if result.size(0) == 1:
            result[0].baddbmm_(factors[0][0], factors[1][0], beta=min(head, 1), alpha=scale)
        else:
            addresses = result.new_empty(3, *result.shape[:2], dtype=torch.int64)
            ops().multiply(*factors, result, addresses, scale, min(head, 1))


def sums_factors_in_fp32() -> bool:
    """Whether cuBLAS sums products of fp16 in fp32: a setting of torch allows it to sum them in fp16."""
    return not torch.backends.cuda.matmul.allow_fp16_accumulation


def multiply_factors(left: Tensor, right: Tensor, result: Tensor) -> None:
    """``result = left @ right`` for fp16 (blocks, m, k) and (blocks, k, n), with a result in fp32 that is not rounded."""
    torch.bmm(left, right, out_dtype=torch.float32, out=result)
