"""Which calls the Hopper kernels serve, told without importing Gluon."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from attnreg_triton.availability import INTERPRETED

# Beyond it the accumulators of the backward do not fit the registers.
LARGEST_HEAD_DIM = 128

# The copy engine's unit for base addresses and strides.
_ALIGNMENT_BYTES = 16


def serves(*tensors: Tensor, bias: Tensor | None, scale: float) -> bool:
    """Whether the Hopper kernels can do this call: 16 bit, no bias, tensors that the copy engine can read.

    ``tensors`` are all those that kernels read in tiles, (N, H, L, DIM) with a contiguous last dimension. The scale
    must be positive, as the maximum of a row is taken before scaling.
    """
    first = tensors[0]
    return (
        bias is None
        and scale > 0
        and first.dtype in (torch.float16, torch.bfloat16)
        and first.device.type == "cuda"
        and _is_hopper(first.device.index)
        and all(_copyable(tensor) for tensor in tensors)
    )


@functools.lru_cache
def _is_hopper(device: int) -> bool:
    return not INTERPRETED and torch.version.hip is None and torch.cuda.get_device_capability(device) == (9, 0)


def _copyable(tensor: Tensor) -> bool:
    unit = _ALIGNMENT_BYTES // tensor.element_size()
    *strides, last = tensor.stride()
    return (
        last == 1
        and tensor.numel() > 0
        and tensor.shape[3] <= LARGEST_HEAD_DIM
        and tensor.shape[3] % unit == 0
        and tensor.data_ptr() % _ALIGNMENT_BYTES == 0
        and all(stride % unit == 0 and stride > 0 for stride in strides)
    )
