"""Which calls the Hopper kernels serve, told without importing Gluon."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from attnreg import Window, allow_tf32
from attnreg_triton.availability import INTERPRETED
from attnreg_triton.rows import Place
from attnreg_triton.tiles import hopper_band_average_pays, hopper_band_dot_pays

# Beyond it the accumulators of the backward do not fit the registers.
LARGEST_HEAD_DIM = 128

# Offsets within 64 rows of a band are 32-bit.
_LARGEST_PITCH = 2**24

# The copy engine's unit for base addresses and strides.
_ALIGNMENT_BYTES = 16


def serves(*tensors: Tensor, bias: Tensor | None, scale: float, dropout_p: float | None = None) -> bool:
    """Whether the Hopper kernels can do this call: 16 bit, no bias, no dropout, tensors that the copy engine can read.

    ``tensors`` are all those that kernels read in tiles, (N, H, L, DIM) with a contiguous last dimension. The scale
    must be positive, as the maximum of a row is taken before scaling.
    """
    return (
        bias is None
        and dropout_p is None
        and scale > 0
        and tensors[0].dtype in (torch.float16, torch.bfloat16)
        and _on_hopper(tensors[0])
        and all(_has_tiles(tensor, LARGEST_HEAD_DIM) for tensor in tensors)
    )


def serves_band_dot(
    rows: Tensor, keys: Tensor, band: Tensor, window: Window, place: Place, *, bias: Tensor | None
) -> bool:
    """Whether the Hopper kernel can compute this band, a new tensor, and is the faster one."""
    return (
        bias is None
        and not place.gaps
        and _on_hopper(rows)
        and hopper_band_dot_pays(rows.dtype, window)
        and _skewed_views()
        and band.stride(2) < _LARGEST_PITCH
        and all(_has_tiles(tensor, LARGEST_HEAD_DIM) for tensor in (rows, keys))
    )


def serves_band_average(band: Tensor, keys: Tensor, window: Window, place: Place, *, bias: Tensor | None) -> bool:
    """Whether the Hopper kernel can compute this average, and is the faster one."""
    return (
        bias is None
        and not place.gaps
        and _on_hopper(keys)
        # Its fp32 products are never TF32 ones.
        and (keys.dtype != torch.float32 or not allow_tf32())
        and hopper_band_average_pays(keys.dtype, keys.shape[3], window)
        and _skewed_views()
        and _has_tiles(keys, LARGEST_HEAD_DIM)
        and _copyable(band)
    )


def _on_hopper(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda" and _is_hopper(tensor.device.index)


@functools.lru_cache
def _is_hopper(device: int) -> bool:
    return not INTERPRETED and torch.version.hip is None and torch.cuda.get_device_capability(device) == (9, 0)


@functools.lru_cache
def _skewed_views() -> bool:
    from attnreg_triton.hopper import skew

    return skew.AVAILABLE


def _has_tiles(tensor: Tensor, largest_dim: int) -> bool:
    """Whether the copy engine can read tiles of whole rows, and write such tiles of a new tensor of this shape."""
    unit = _ALIGNMENT_BYTES // tensor.element_size()
    return tensor.shape[3] <= largest_dim and tensor.shape[3] % unit == 0 and _copyable(tensor)


def _copyable(tensor: Tensor) -> bool:
    """Whether the copy engine can read this tensor."""
    unit = _ALIGNMENT_BYTES // tensor.element_size()
    *strides, last = tensor.stride()
    return (
        last == 1
        and tensor.numel() > 0
        and tensor.data_ptr() % _ALIGNMENT_BYTES == 0
        and all(stride % unit == 0 and stride > 0 for stride in strides)
    )
