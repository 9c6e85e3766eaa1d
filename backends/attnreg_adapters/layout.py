"""How a call reaches a library, and its results the caller: copied only where they lie in memory as one side cannot have them."""

from __future__ import annotations

from torch import Tensor

from attnreg import Window, empty_like
from attnreg.memory import strides_like

# The libraries load 16 bytes at a time.
_ACCESS_BYTES = 16


def lengths_first(tensor: Tensor) -> Tensor:
    """A tensor (N, L, H, E) of a tensor (N, H, L, E), whose rows begin where a library may load them."""
    unit = _ACCESS_BYTES // tensor.element_size()
    even = all(size == 1 or stride % unit == 0 for size, stride in zip(tensor.shape[:3], tensor.stride()))
    aligned = even and tensor.data_ptr() % _ACCESS_BYTES == 0
    return (tensor if aligned else empty_like(tensor).copy_(tensor)).transpose(1, 2)


def in_order_of(tensor: Tensor, result: Tensor) -> Tensor:
    """A library's result (N, H, L, D) in the memory order of the tensor that it belongs to; itself where it lies so."""
    wanted = strides_like(tensor, result.size(-1))
    if all(size == 1 or own == its for size, own, its in zip(result.shape, result.stride(), wanted)):
        return result
    return empty_like(tensor, result.size(-1)).copy_(result)


def unseen_keys(queries: int, keys: int, window: Window) -> int:
    """How many keys come before every window.

    A library reads whole tiles, and gives these keys weight 0: they are left out of its call, since they may be NaN.
    """
    return max(keys - queries - window.left, 0)


def unseeing_queries(queries: int, keys: int, window: Window) -> int:
    """How many queries come before the first that sees a key."""
    return max(queries - keys - window.right, 0)
