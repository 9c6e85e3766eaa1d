"""A backend in one file: the band's scores as W shifted products, one per slot of the window."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from attnreg import Backend, Capability, Window, hookimpl


def local_dot_product(query: Tensor, key: Tensor, window: Window, *, scale: float) -> Tensor:
    """Slot c of query i is key j = i - left + c: one shifted product a slot.

    It names neither ``bias`` nor ``key_lengths``: a call that gives one goes to another backend.
    """
    length = query.shape[2]
    positions = torch.arange(length, device=query.device)
    scores = []
    for offset in range(-window.left, window.right + 1):
        visible = (positions + offset >= 0) & (positions + offset < length)
        shifted = key[:, :, (positions + offset).clamp(0, length - 1)]
        scores.append((scale * (query * shifted).sum(-1)).where(visible, -torch.inf))
    return torch.stack(scores, dim=-1)


@hookimpl
def attnreg_backends() -> Iterable[Backend]:
    """Offer the one backend."""
    yield Backend(
        name="example",
        summary="one shifted product per slot",
        capability=Capability(
            dtypes={torch.float32, torch.float64},
            grouped_heads=False,
            unequal_lengths=False,
        ),
        local_dot_product=local_dot_product,
        differentiable=True,
    )
