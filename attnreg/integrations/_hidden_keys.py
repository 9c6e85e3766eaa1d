"""Masks of keys as attnreg's arguments say them: bounds of a sequence's keys, and a bias where keys between them are hidden."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnreg import Window
from attnreg.ops import is_plain

__all__ = ["can_be_read", "rows_of"]


def can_be_read(tensor: Tensor) -> bool:
    """Whether the host can look at what a tensor holds: no accelerator has to be waited for, and nobody traces."""
    return not torch.compiler.is_compiling() and tensor.device.type == "cpu" and is_plain((tensor,))


def rows_of(
    hidden: Tensor,
    window: Window,
    query_length: int,
    dtype: torch.dtype,
    *,
    query_start: int = 0,
    holes: bool | None = None,
) -> dict[str, Tensor]:
    """The arguments of a call of attnreg that hide these keys.

    Args:
        hidden: (N, Lk), True where no query of a sequence may see a key.
        window: which keys a query sees otherwise.
        query_length: Lq.
        dtype: that of a bias.
        query_start: the key position at which the first query stands.
        holes: whether there may be hidden keys between others. None looks, which reads on the host. False promises that there is
            none: a broken promise is a RuntimeError, on an accelerator one that comes later.

    Returns:
        By name: ``key_starts`` and ``key_lengths``, (N,), or neither where a look found nothing hidden; and a ``bias``
        (N, 1, Lq, W) where there may be holes.
    """
    length = hidden.shape[1]
    if not length:
        return {}
    places = torch.arange(length, device=hidden.device)
    starts = places.masked_fill(hidden, length).amin(1)
    lengths = (places + 1).masked_fill(hidden, 0).amax(1)
    has_holes = (~hidden).sum(1) < lengths - starts
    if holes is None:
        hides, holes = torch.stack((hidden.any(), has_holes.any())).tolist()
        if not hides:
            return {}
    elif not holes:
        torch._assert_async(
            ~has_holes.any(), "hidden keys stand between others; it was said that they are at the ends alone"
        )
    bounds = {"key_starts": starts, "key_lengths": lengths}
    return {**bounds, "bias": _bias(hidden, window, query_length, query_start, dtype)} if holes else bounds


def _bias(hidden: Tensor, window: Window, query_length: int, query_start: int, dtype: torch.dtype) -> Tensor:
    """(N, 1, Lq, W): -inf where the key of a slot is hidden, and else 0."""
    before = max(window.left - query_start, 0)
    after = max(query_start + query_length + window.right - hidden.shape[1], 0)
    first = query_start - window.left + before
    # A view: row i's slots are `W` places from the first row's on.
    slots = pad(hidden, (before, after)).unfold(1, window.size, 1)[:, first : first + query_length]
    return torch.zeros(slots.shape, dtype=dtype, device=hidden.device).masked_fill_(slots, -torch.inf)[:, None]
