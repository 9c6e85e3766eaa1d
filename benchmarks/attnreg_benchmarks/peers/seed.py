"""The published design that attnreg began with, fast-transformers' local_product, re-created in PyTorch for its two products.

Queries are taken 64 at a time: one product of 64 rows by 64 + W - 1 columns, and one copy that keeps the band, one block after
the other, in two launches a block as in the original. The ends of a sequence have no kernel of their own here: the dense
block is filled before the first block, and again before those that lack keys at the end. The backward does the same the
other way round; the original's gradient of the key is wrong for windows of two or more, this one is right. Source:
idiap/fast-transformers, ``local_product``, issue #51.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attnreg import Problem, Window
from attnreg.testing.inputs import Calls, Inputs
from attnreg_benchmarks.contender import Contender
from attnreg_benchmarks.workloads import AVERAGE, DOT

BLOCK = 64


def _refuse(problem: Problem) -> str | None:
    if problem.heads != problem.kv_heads:
        return "it has no grouped heads"
    return None


def _blocks(length: int, window: Window) -> Iterator[tuple[slice, slice, slice]]:
    """Of each block: its queries, the keys that they see, and the columns of these in the dense block."""
    for begin in range(0, length, BLOCK):
        end = min(begin + BLOCK, length)
        first, last = max(begin - window.left, 0), min(end + window.right, length)
        column = first - (begin - window.left)
        yield slice(begin, end), slice(first, last), slice(column, column + last - first)


def _band(dense: Tensor, rows: slice, window: Window) -> Tensor:
    """The band of a dense block (N * H, BLOCK, columns), as many rows as it has: a view whose row pitch is one larger."""
    head, row, _ = dense.stride()
    return dense.as_strided((dense.shape[0], rows.stop - rows.start, window.size), (head, row + 1, 1))


def _dense(tensor: Tensor, window: Window, fill: float) -> Tensor:
    """Room for a dense block of each head: one after the other is made in it."""
    return tensor.new_full((tensor.shape[0] * tensor.shape[1], BLOCK, BLOCK + window.size - 1), fill)


def dot_product(query: Tensor, key: Tensor, window: Window, fill: float = -torch.inf) -> Tensor:
    """(N, H, L, E), (N, H, L, E) -> (N, H, L, W), with ``fill`` where no key is."""
    band = query.new_empty(*query.shape[:3], window.size)
    dense = _dense(query, window, fill)
    by_head, q, k = band.flatten(0, 1), query.flatten(0, 1), key.flatten(0, 1)
    for rows, keys, columns in _blocks(query.shape[2], window):
        count = rows.stop - rows.start
        # The columns that a block lacks at the beginning no block before had; at the end they had them.
        if columns.stop < count + window.size - 1:
            dense.fill_(fill)
        torch.bmm(q[:, rows], k[:, keys].mT, out=dense[:, :count, columns])
        by_head[:, rows] = _band(dense, rows, window)
    return band


def average(weights: Tensor, value: Tensor, window: Window) -> Tensor:
    """(N, H, L, W), (N, H, L, E) -> (N, H, L, E)."""
    output = torch.empty_like(value)
    dense = _dense(weights, window, 0.0)
    by_head, w, v = output.flatten(0, 1), weights.flatten(0, 1), value.flatten(0, 1)
    for rows, keys, columns in _blocks(value.shape[2], window):
        # Every block overwrites the band of the one before, and the rest stays zero.
        _band(dense, rows, window).copy_(w[:, rows])
        torch.bmm(dense[:, : rows.stop - rows.start, columns], v[:, keys], out=by_head[:, rows])
    return output


def average_by_key(weights: Tensor, source: Tensor, window: Window) -> Tensor:
    """The gradient of a value: (N, H, L, W), (N, H, L, E) -> (N, H, L, E)."""
    gradient = torch.zeros_like(source)
    dense = _dense(weights, window, 0.0)
    by_head, w, s = gradient.flatten(0, 1), weights.flatten(0, 1), source.flatten(0, 1)
    for rows, keys, columns in _blocks(source.shape[2], window):
        _band(dense, rows, window).copy_(w[:, rows])
        by_head[:, keys].baddbmm_(dense[:, : rows.stop - rows.start, columns].mT, s[:, rows])
    return gradient


def _prepare(problem: Problem, inputs: Inputs) -> Calls:
    (first, second), upstream, window = inputs.tensors.values(), inputs.upstream, problem.window
    if problem.op == DOT:
        return Calls(
            lambda: dot_product(first, second, window),
            lambda: lambda: (average(upstream, second, window), average_by_key(upstream, first, window)),
        )
    return Calls(
        lambda: average(first, second, window),
        lambda: lambda: (dot_product(upstream, second, window, 0.0), average_by_key(first, upstream, window)),
    )


SEED = Contender("seed-design", "peer", (DOT, AVERAGE), _refuse, _prepare)
