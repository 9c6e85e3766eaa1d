"""How kernels are launched, and the arguments that all of them take in the same form."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from attnreg import Window
from attnreg_triton.tiles import Tiles

Strides = tuple[int, int, int]

# For how many programs of a first launch one of the second looks whether they are to run again.
CHUNK = 16


def launch(kernel: Any, programs: int, tiles: Tiles, *args: Any, device: torch.device, **constants: Any) -> None:
    """Start ``programs`` instances of ``kernel`` on the current stream of ``device``, whichever device is current.

    The grid has one dimension, the only one that may exceed 65535.
    """
    if tiles.max_registers is not None and device.type == "cuda" and torch.version.hip is None:
        constants["maxnreg"] = tiles.max_registers
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        kernel[(programs,)](
            *args,
            **constants,
            BLOCK_M=tiles.rows,
            BLOCK_N=tiles.keys,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )


def strides(tensor: Tensor | None) -> Strides:
    """The strides of all dimensions but the last, which is contiguous.

    Kernels take those of query, key, value and the like as a tuple, whose members Triton specialises on divisibility by
    16, for wide loads. Those of a band, which change with the window, they take one by one and unspecialised.
    """
    if tensor is None:
        return (0, 0, 0)
    batch, head, row, _ = tensor.stride()
    return batch, head, row


def bias_strides(bias: Tensor | None) -> tuple[int, int, int, int]:
    """The strides of a bias in (N, H, Lq, W), 0 where it broadcasts."""
    if bias is None:
        return (0, 0, 0, 0)
    batch, head, row, column = (0 if size == 1 else stride for size, stride in zip(bias.shape, bias.stride()))
    return batch, head, row, column


def flags(programs: int, device: torch.device) -> Tensor:
    """Where the programs of a first launch tell those of a second one which of them are to run again."""
    return torch.empty(programs, dtype=torch.int32, device=device)


def interleaved(tensor: Tensor) -> bool:
    """Whether the heads of a position are next to each other in memory, as in (N, L, H, E)."""
    return tensor.shape[1] > 1 and tensor.stride(1) < tensor.stride(2)


def lowest(band: Tensor, fill: float) -> float:
    """The least value that a slot of a band may have which ``fill`` does not hide."""
    return torch.finfo(band.dtype).min if fill == -math.inf else -math.inf


def long_offsets(band: Tensor, tiles: Tiles) -> bool:
    """Whether the offsets within a tile of a band need 64 bits."""
    return band.stride(2) * tiles.rows + band.shape[3] + tiles.keys >= 2**31


def origin(window: Window, query_length: int, key_length: int) -> int:
    """The key position of slot 0 of row 0: slot c of row i is key ``i + origin + c``."""
    return key_length - query_length - window.left


def clip_window(
    window: Window, bias: Tensor | None, query_length: int, key_length: int, query_starts: Tensor | None
) -> Window:
    """A window with the same keys that reaches no further than the sequences, so that positions fit 32 bits.

    Only where no tensor has a column per slot, and where rows stand within reach of the keys.
    """
    if query_starts is not None or (bias is not None and bias.shape[3] != 1):
        return window
    reach = query_length + key_length
    return Window(min(window.left, reach), min(window.right, reach))


def padded(head_dim: int) -> int:
    """The extent of a tile that holds ``head_dim``: a power of two, at least the 16 that ``tl.dot`` asks for."""
    return max(16, 1 << (head_dim - 1).bit_length())


def ceil_div(count: int, size: int) -> int:
    """How many tiles of ``size`` cover ``count``."""
    return -(-count // size)
