"""How a call reaches a library, and its results the caller: copied only where they lie in memory as one side cannot have them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attnreg import Window, empty_like
from attnreg.memory import strides_like
from attnreg_adapters.packed import Sequences, sequences_of

# The libraries load 16 bytes at a time.
_ACCESS_BYTES = 16


@dataclass(frozen=True)
class Layout:
    """How tensors of a call look to the FlashAttentions: (N, L, H, E), or (T, H, E) for their varlen entries.

    Attributes:
        unseen: how many keys come before every window; these are left out.
        sequences: those of a packed call, of which no key is left out; None for one that is not packed.
    """

    unseen: int
    sequences: Sequences | None

    def theirs(self, tensor: Tensor) -> Tensor:
        """A tensor for the library to read."""
        tensor = lengths_first(tensor)
        return tensor if self.sequences is None else tensor[0]

    def cut(self, tensor: Tensor) -> Tensor:
        """A key or a value, or the gradient of one, without the keys that are left out."""
        return tensor[:, :, self.unseen :] if self.unseen else tensor

    def written(self, tensor: Tensor) -> Tensor:
        """A tensor of ours, for the library to write into as it is."""
        return tensor.transpose(1, 2) if self.sequences is None else tensor[0].transpose(0, 1)

    def ours(self, result: Tensor) -> Tensor:
        """A result of the library as (N, H, L, D)."""
        return result.transpose(1, 2) if self.sequences is None else result.transpose(0, 1)[None]

    def of_rows(self, statistic: Tensor | None) -> Tensor | None:
        """A statistic of rows (N, H, Lq) as the library has it."""
        return statistic if self.sequences is None or statistic is None else statistic[0]


def layout_of(
    query: Tensor, key: Tensor, window: Window, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> Layout:
    """The layout of a call."""
    queries, keys = query.size(2), key.size(2)
    if cu_seqlens_q is None:
        return Layout(unseen_keys(queries, keys, window), None)
    return Layout(0, sequences_of(queries, keys, window, cu_seqlens_q, cu_seqlens_k))


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
