"""The published design that attnreg began with, fast-transformers' local_product, re-created in PyTorch for its two products.

Queries are taken 64 at a time: one product of 64 rows by 64 + W - 1 columns, and one copy that keeps the band, one block after
the other. The original does that in two launches a block; this one needs four, as it also fills a dense block and copies
the product into it, so that the ends of a sequence need no kernel of their own. The backward does the same the other way
round; the original's gradient of the key is wrong for windows of two or more, this one is right. Source:
idiap/fast-transformers, ``local_product``, issue #51.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attnreg import Window
from attnreg.measuring.inputs import Calls, Inputs
from attnreg.measuring.task import AVERAGE, DOT
from attnreg_benchmarks.contender import Contender
from attnreg_benchmarks.workloads import Workload

BLOCK = 64


def _refuse(workload: Workload, direction: str, device: torch.device) -> str | None:
    if workload.heads != workload.kv_heads:
        return "it has no grouped heads"
    return None


def _blocks(length: int, window: Window) -> Iterator[tuple[slice, slice, int]]:
    """Of each block: its queries, the keys that they see, and the column of the first of these in the dense block."""
    for begin in range(0, length, BLOCK):
        end = min(begin + BLOCK, length)
        first, last = max(begin - window.left, 0), min(end + window.right, length)
        yield slice(begin, end), slice(first, last), first - (begin - window.left)


def _band(dense: Tensor, rows: int, window: Window) -> Tensor:
    """The band of a dense block (N, H, rows, columns): a view whose row pitch is one larger."""
    batch, head, row, _ = dense.stride()
    return dense.as_strided((*dense.shape[:2], rows, window.size), (batch, head, row + 1, 1))


def _dense(tensor: Tensor, rows: int, window: Window, fill: float) -> Tensor:
    return tensor.new_full((*tensor.shape[:2], rows, rows + window.size - 1), fill)


def dot_product(query: Tensor, key: Tensor, window: Window, fill: float = -torch.inf) -> Tensor:
    """(N, H, L, E), (N, H, L, E) -> (N, H, L, W), with ``fill`` where no key is."""
    band = query.new_empty(*query.shape[:3], window.size)
    for rows, keys, column in _blocks(query.shape[2], window):
        count = rows.stop - rows.start
        dense = _dense(query, count, window, fill)
        dense[..., column : column + keys.stop - keys.start] = query[:, :, rows] @ key[:, :, keys].mT
        band[:, :, rows] = _band(dense, count, window)
    return band


def average(weights: Tensor, value: Tensor, window: Window) -> Tensor:
    """(N, H, L, W), (N, H, L, E) -> (N, H, L, E)."""
    output = torch.empty_like(value)
    for rows, keys, column in _blocks(value.shape[2], window):
        count = rows.stop - rows.start
        dense = _dense(weights, count, window, 0.0)
        _band(dense, count, window).copy_(weights[:, :, rows])
        output[:, :, rows] = dense[..., column : column + keys.stop - keys.start] @ value[:, :, keys]
    return output


def average_by_key(weights: Tensor, source: Tensor, window: Window) -> Tensor:
    """The gradient of a value: (N, H, L, W), (N, H, L, E) -> (N, H, L, E)."""
    gradient = torch.zeros_like(source)
    for rows, keys, column in _blocks(source.shape[2], window):
        count = rows.stop - rows.start
        dense = _dense(weights, count, window, 0.0)
        _band(dense, count, window).copy_(weights[:, :, rows])
        gradient[:, :, keys] += dense[..., column : column + keys.stop - keys.start].mT @ source[:, :, rows]
    return gradient


def _prepare(workload: Workload, inputs: Inputs) -> Calls:
    (first, second), upstream, window = inputs.tensors, inputs.upstream, workload.window
    if workload.op == DOT:
        return Calls(
            lambda: dot_product(first, second, window),
            lambda: lambda: (average(upstream, second, window), average_by_key(upstream, first, window)),
        )
    return Calls(
        lambda: average(first, second, window),
        lambda: lambda: (dot_product(upstream, second, window, 0.0), average_by_key(first, upstream, window)),
    )


SEED = Contender("seed-design", "peer", (DOT, AVERAGE), _refuse, _prepare)
