"""The sides of a product on the line: tensors read in place, or copied there."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnreg_cublas.blocks import Spans

_ACCESS_BYTES = 16


class Side(NamedTuple):
    """One side of a product: a tensor, and where its rows lie on the line.

    Attributes:
        source: (N, G * Hkv, L, E), for the G heads of a sequence.
        line: the same by position, (1, positions, 1, E), where it can be read in place as one line.
        heads: the same, (H, positions, 1, E), where it can be read as a line for each head.
        lead: where row 0 of a sequence lies, less the sequence's start if it has one and the row is a key.
        of_keys: whether the rows are keys.
    """

    source: Tensor
    line: Tensor | None
    heads: Tensor | None
    lead: int
    of_keys: bool


def matrices(rows: Tensor, spans: Spans, origin: int = 0, *, lines: int = 1, per_line: int = 0) -> Tensor:
    """(lines, number, height * G, E) of rows by position, (positions, G, E), of which the first one lies at ``origin``.

    The rows are those of the first line; each begins ``per_line`` elements after the one before.
    """
    per_position, per_row, _ = rows.stride()
    shape = (lines, spans.number, spans.height * rows.size(1), rows.size(2))
    start = rows.storage_offset() + (spans.first - origin) * per_position
    return rows.as_strided(shape, (per_line, spans.step * per_position, per_row, 1), start)


def as_line(tensor: Tensor) -> Tensor | None:
    """A tensor (N, H, L, E) as the line that it is, (1, N * H * L, 1, E): if it is one, and cuBLAS likes where its rows begin."""
    batch, heads, length, width = tensor.shape
    pitch = tensor.stride(2)
    even = (heads == 1 or tensor.stride(1) == length * pitch) and (
        batch == 1 or tensor.stride(0) == heads * length * pitch
    )
    if not (even and _rows_fit(tensor)):
        return None
    return tensor.as_strided((1, batch * heads * length, 1, width), (0, pitch, pitch, 1), tensor.storage_offset())


def as_heads(tensor: Tensor) -> Tensor | None:
    """A tensor (N, H, L, E) as a line for each of several heads, (H, N * L, 1, E), likewise: so lies (N, L, H, E)."""
    batch, heads, length, width = tensor.shape
    head, pitch = tensor.stride()[1:3]
    even = heads > 1 and (batch == 1 or tensor.stride(0) == length * pitch)
    if not (even and _rows_fit(tensor) and head % _unit(tensor.dtype) == 0):
        return None
    return tensor.as_strided((heads, batch * length, 1, width), (head, pitch, pitch, 1), tensor.storage_offset())


def _rows_fit(tensor: Tensor) -> bool:
    unit, pitch = _unit(tensor.dtype), tensor.stride(2)
    aligned = tensor.size(3) % unit == 0 and pitch % unit == 0 and tensor.data_ptr() % _ACCESS_BYTES == 0
    return aligned and pitch >= tensor.size(3)


def _unit(dtype: torch.dtype) -> int:
    return _ACCESS_BYTES // dtype.itemsize


def padded_width(width: int, dtype: torch.dtype) -> int:
    """The width of a copied row: up to 16 bytes."""
    unit = _unit(dtype)
    return -(-width // unit) * unit
