"""How results lie in memory: as the tensors that they belong to.

Models keep (N, L, H, E) and hand over a transpose, or slices of packed projections. A result in another order would cost each
of their layers a copy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def empty_like(tensor: Tensor, last_dim: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """A new tensor with the shape and the order in memory of ``tensor``, without gaps.

    Args:
        tensor: of any strides; where its last dimension is not contiguous, the result is contiguous as a whole.
        last_dim: the size of the last dimension; None for that of ``tensor``.
        dtype: None for that of ``tensor``.

    Returns:
        A tensor that is not initialised, its last dimension contiguous. Where ``tensor`` is dense and the shape its own, so are
        the strides; else dimensions follow each other as in ``tensor``, those of stride 0 where they stand in the shape.
    """
    shape = (*tensor.shape[:-1], tensor.shape[-1] if last_dim is None else last_dim)
    return torch.empty_strided(
        shape, strides_like(tensor, shape[-1]), dtype=tensor.dtype if dtype is None else dtype, device=tensor.device
    )


def laid_out(result: Tensor, strides: Sequence[Any]) -> Tensor:
    """``result``, dense, with these strides; nothing is written into, which autograd would keep and vmap cannot do."""
    order, back = _order(strides)
    found = result.permute(order).contiguous().permute(back)
    return found if found.stride() == strides else found.as_strided(found.shape, strides)


def with_gradient_laid_out(tensor: Tensor) -> Tensor:
    """``tensor``, whose gradient will lie in memory as itself: it takes the way back through rows that lie in that order."""
    if tensor.dim() < 2:
        return tensor
    order, back = _order(strides_like(tensor))
    in_order = tensor.permute(order)
    return in_order.flatten(0, 2).view(in_order.shape).permute(back)


def _order(strides: Sequence[Any]) -> tuple[list[int], list[int]]:
    """The dimensions as they follow each other in memory, outermost first; and the way back."""
    order = sorted(range(len(strides)), key=lambda dimension: strides[dimension], reverse=True)
    return order, [order.index(dimension) for dimension in range(len(strides))]


def strides_like(tensor: Tensor, last_dim: Any = None) -> tuple[Any, ...]:
    """The strides of ``empty_like(tensor, last_dim)``; symbolic where the sizes are."""
    if not tensor.dim():
        return ()
    shape, strides = tensor.shape, tensor.stride()
    last_dim = shape[-1] if last_dim is None else last_dim
    try:
        return _strides(shape, strides, last_dim)
    except TypeError:  # symbolic sizes have no hash
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return _strides.__wrapped__(shape, strides, last_dim, statically_known_true)


@functools.lru_cache(maxsize=4096)
def _strides(
    shape: Sequence[Any], strides: Sequence[Any], last_dim: Any, is_so: Callable[[Any], bool] = bool
) -> tuple[Any, ...]:
    """``strides_like`` by numbers; ``is_so`` says of symbolic ones what holds for all of them, where others would be excluded.

    What is found is written as products of sizes, also for strides that a trace writes otherwise, as behind a flattening, and
    could not prove to be the same.
    """
    outer = list(range(len(shape) - 1))
    if is_so(strides[-1] == 1) or is_so(shape[-1] == 1):
        # By insertion, as torch orders the results of its own operations: a stride of 0 says nothing of its place.
        for index in range(1, len(outer)):
            place = index
            for before in range(index - 1, -1, -1):
                theirs, own = strides[outer[before]], strides[outer[place]]
                if is_so(theirs == 0) or is_so(own == 0) or (is_so(theirs == own) and is_so(shape[outer[before]] == 1)):
                    continue
                if theirs >= own:
                    break
                outer[before], outer[place] = outer[place], outer[before]
                place = before
    found: list[Any] = [1] * len(shape)
    step = last_dim
    for dimension in reversed(outer):
        found[dimension] = step
        step = step * shape[dimension]
    if is_so(last_dim == shape[-1]):
        are_one = [is_so(size == 1) for size in shape]
        if all(is_one or is_so(own == wanted) for is_one, own, wanted in zip(are_one, strides, found)):
            return tuple(own if is_one else wanted for is_one, own, wanted in zip(are_one, strides, found))
    return tuple(found)
