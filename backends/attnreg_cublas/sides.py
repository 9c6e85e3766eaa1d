"""The sides of a product on the line: tensors read in place, or copied there."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_ACCESS_BYTES = 16


class Side(NamedTuple):
    """Rows by position: (positions, G, E) for the G heads of a sequence, with position 0 at index ``origin``."""

    rows: Tensor
    origin: int

    def matrices(self, first: int, step: int, height: int, count: int) -> Tensor:
        """``count`` matrices (height * G, E), which begin at position ``first`` and every ``step`` positions after it."""
        per_position, per_row, _ = self.rows.stride()
        shape = (count, height * self.rows.size(1), self.rows.size(2))
        start = self.rows.storage_offset() + (first + self.origin) * per_position
        return self.rows.as_strided(shape, (step * per_position, per_row, 1), start)


def in_place(tensor: Tensor) -> Side | None:
    """A tensor (N, H, L, E) as the line that it is, if it is one, and its rows begin where cuBLAS likes it."""
    batch, heads, length, width = tensor.shape
    pitch = tensor.stride(2)
    even = (tensor.size(1) == 1 or tensor.stride(1) == length * pitch) and (
        batch == 1 or tensor.stride(0) == heads * length * pitch
    )
    unit = _ACCESS_BYTES // tensor.element_size()
    aligned = width % unit == 0 and pitch % unit == 0 and tensor.data_ptr() % _ACCESS_BYTES == 0
    if not (even and aligned and pitch >= width):
        return None
    line = tensor.as_strided((batch * heads * length, 1, width), (pitch, pitch, 1), tensor.storage_offset())
    return Side(line, 0)


def padded_width(width: int, dtype: torch.dtype) -> int:
    """The width of a copied row: up to 16 bytes."""
    unit = _ACCESS_BYTES // dtype.itemsize
    return -(-width // unit) * unit
