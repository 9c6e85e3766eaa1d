"""The batched products: torch's own, so that cuBLAS is chosen, configured and synchronised as everywhere in torch."""

from __future__ import annotations

import torch
from torch import Tensor


def multiply(left: Tensor, right: Tensor, result: Tensor, scale: float = 1.0, heads: int = 1) -> None:
    """``result = scale * left @ right`` for (blocks, m, k) and (blocks, k, n): summed in fp32, scaled, then rounded.

    Where k interleaves the query heads of a group, ``heads`` is their number: float32 then sums each head on its own
    first, as one sum over all of them would lose accuracy. The narrow dtypes would only be rounded more often.
    """
    sums = heads if result.dtype == torch.float32 else 1
    for head in range(sums):
        every = slice(head, None, sums)
        result.baddbmm_(left[:, :, every], right[:, every], beta=min(head, 1), alpha=scale)


def sums_factors_in_fp32() -> bool:
    """Whether cuBLAS sums products of fp16 in fp32: a setting of torch allows it to sum them in fp16."""
    return not torch.backends.cuda.matmul.allow_fp16_accumulation


def multiply_factors(left: Tensor, right: Tensor, result: Tensor) -> None:
    """``result = left @ right`` for fp16 (blocks, m, k) and (blocks, k, n), with a result in fp32 that is not rounded."""
    torch.bmm(left, right, out_dtype=torch.float32, out=result)
