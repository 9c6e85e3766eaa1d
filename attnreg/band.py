"""From a dense mask to a band."""

from __future__ import annotations

import torch
from torch import Tensor

from attnreg.problem import check_window
from attnreg.window import Window


def band_from_dense(mask: Tensor, window: Window, *, dtype: torch.dtype | None = None) -> Tensor:
    """The band of a dense mask: what ``local_dot_product`` and ``local_attention`` take as ``bias``.

    Column ``c`` of row ``i`` is ``mask[..., i, i + (Lk - Lq) - window.left + c]``; slots outside the sequence are -inf. Nothing
    larger than the result is built.

    Args:
        mask: (..., Lq, Lk), either additive (a floating-point dtype) or boolean, where True means visible, as in torch's
            ``scaled_dot_product_attention``.
        window: which keys a query sees.
        dtype: the result's floating-point dtype; None means that of an additive mask, torch's default for a boolean one.

    Returns:
        An additive mask (..., Lq, W), with W = ``window.size``; of a boolean one, 0 where visible and -inf where not.

    Raises:
        TypeError, ValueError: the mask is no boolean or floating-point tensor of at least two dimensions, the window is no
            Window, or the dtype is no floating-point dtype.
    """
    check_window(window)
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a torch.Tensor, got {type(mask).__name__}")
    if mask.dtype is not torch.bool and not mask.dtype.is_floating_point:
        raise TypeError(f"mask must be boolean (True means visible) or floating-point (additive), got {mask.dtype}")
    if mask.dim() < 2:
        raise ValueError(f"mask must have at least two dimensions, (..., Lq, Lk); got shape {tuple(mask.shape)}")
    if dtype is None:
        dtype = torch.get_default_dtype() if mask.dtype is torch.bool else mask.dtype
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point dtype, got {dtype}")

    query_length, key_length = mask.shape[-2:]
    if key_length > 0 and (torch.compiler.is_compiling() or torch.SymInt in map(type, mask.shape)):
        return _in_a_graph(mask, window, dtype)
    band = torch.full((*mask.shape[:-1], window.size), -torch.inf, dtype=dtype, device=mask.device)
    # Slot c of every row lies on one diagonal of the mask, j - i = offset: a view, copied into one column.
    first_offset = key_length - query_length - window.left
    for column in range(window.size):
        offset = first_offset + column
        if not -query_length < offset < key_length:
            continue
        diagonal = mask.diagonal(offset, dim1=-2, dim2=-1)
        first_row = max(-offset, 0)
        rows = band[..., first_row : first_row + diagonal.shape[-1], column]
        if mask.dtype is torch.bool:
            rows.masked_fill_(diagonal, 0.0)
        else:
            rows.copy_(diagonal)
    return band


def _in_a_graph(mask: Tensor, window: Window, dtype: torch.dtype) -> Tensor:
    """The band by one reading of all slots: which columns there are would be a question to lengths that a graph leaves open."""
    query_length, key_length = mask.shape[-2:]
    rows = torch.arange(query_length, device=mask.device)[:, None] + (key_length - query_length - window.left)
    keys = rows + torch.arange(window.size, device=mask.device)
    found = mask.gather(-1, keys.clamp(0, key_length - 1).expand(*mask.shape[:-1], window.size))
    exists = (keys >= 0) & (keys < key_length)
    hidden = torch.full((), -torch.inf, dtype=dtype, device=mask.device)
    if mask.dtype is torch.bool:
        return torch.where(exists & found, 0.0, hidden)
    return torch.where(exists, found.to(dtype), hidden)
