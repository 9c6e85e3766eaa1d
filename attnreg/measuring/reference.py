"""What is true, on strips of a sequence: the ops written down densely, for a few heads and the keys around a few rows.

A strip is made so large that the gradients of its inner keys are complete: it holds every query that sees one of them,
and every key that one of those queries sees. Memory is bounded by the strip, whatever the sequence's length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnreg.measuring.inputs import Inputs
from attnreg.measuring.task import AVERAGE, DOT, Task
from attnreg.window import Window

# The inner keys of a strip: a few tiles of any kernel.
STRIP_KEYS = 200


@dataclass(frozen=True)
class Strip:
    """A part of a task, in which gradients are complete for some keys.

    Attributes:
        batch: the sequence.
        kv_head: the key and value head; all query heads that read it belong to the strip.
        inner: the keys whose gradients are complete.
        rows: the queries; their outputs and gradients are complete.
        keys: the keys that any of the rows sees.
    """

    batch: int
    kv_head: int
    inner: range
    rows: range
    keys: range


def strips(task: Task) -> Iterator[Strip]:
    """Both ends and the middle of the first and of the last sequence, in their first and last head."""
    length = task.length
    middle = length // 2
    places = {(batch, head) for batch, head in ((0, 0), (task.batch - 1, task.kv_heads - 1))}
    for batch, kv_head in sorted(places):
        for start in dict.fromkeys((0, max(middle - STRIP_KEYS // 2, 0), max(length - STRIP_KEYS, 0))):
            inner = range(start, min(start + STRIP_KEYS, length))
            # Query i sees key j if -left <= j - i <= right.
            rows = _clipped(inner.start - task.window.right, inner.stop + task.window.left, length)
            keys = _clipped(rows.start - task.window.left, rows.stop + task.window.right, length)
            yield Strip(batch, kv_head, inner, rows, keys)


def inputs_of(task: Task, strip: Strip, inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The strip's own tensors: heads first, without the batch."""
    first, *others = inputs.tensors
    return Inputs(
        (
            _rows(task, strip, first).to(dtype),
            *(tensor[strip.batch, strip.kv_head, _slice(strip.keys)].to(dtype) for tensor in others),
        ),
        _rows(task, strip, inputs.upstream).to(dtype),
    )


def compute(task: Task, strip: Strip, part: Inputs) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output (G, rows, D or W) and the gradients of the strip's tensors, densely, in the dtype of ``part``.

    G is the number of query heads to a key head. A gradient of keys or values is complete for the inner keys only.
    """
    leaves = tuple(tensor.clone().requires_grad_() for tensor in part.tensors)
    band, visible = _band(strip, task.window, part.upstream.device)
    if task.op == DOT:
        query, key = leaves
        output = _scores(query @ key.mT, band, visible)
    elif task.op == AVERAGE:
        weights, value = leaves
        dense = weights.new_zeros((*weights.shape[:2], len(strip.keys)))
        output = dense.scatter_add(-1, band.expand(weights.shape), weights.where(visible, 0)) @ value
    else:
        query, key, value = leaves
        dense = (query @ key.mT) * task.head_dim**-0.5
        output = dense.masked_fill(_unseen(strip, task.window, dense.device), -torch.inf).softmax(-1) @ value
    gradients = torch.autograd.grad(output, leaves, part.upstream)
    return output.detach(), gradients


def parts_of(
    task: Task, strip: Strip, output: Tensor | None, gradients: tuple[Tensor, ...] | None
) -> dict[str, Tensor]:
    """The complete parts of a whole result by name: "output", and the gradient of each input by the input's name."""
    parts = {}
    if output is not None:
        parts["output"] = _rows(task, strip, output)
    if gradients is not None:
        first, *others = task.inputs
        parts[first] = _rows(task, strip, gradients[0])
        for name, gradient in zip(others, gradients[1:]):
            parts[name] = gradient[strip.batch, strip.kv_head, _slice(strip.inner)]
    return parts


def complete_parts(task: Task, strip: Strip, output: Tensor, gradients: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The same parts of the strip's own result, that of :func:`compute`."""
    first, *others = task.inputs
    start = strip.inner.start - strip.keys.start
    inner = slice(start, start + len(strip.inner))
    return {
        "output": output,
        first: gradients[0],
        **{name: gradient[inner] for name, gradient in zip(others, gradients[1:])},
    }


def _band(strip: Strip, window: Window, device: torch.device) -> tuple[Tensor, Tensor]:
    """The strip's key of each slot, clamped, and whether the slot has one: (rows, W) each."""
    rows = torch.arange(strip.rows.start, strip.rows.stop, device=device)[:, None]
    keys = rows + torch.arange(-window.left, window.right + 1, device=device)
    # A visible key is never outside the strip: keys outside of it are outside the sequence.
    visible = (keys >= strip.keys.start) & (keys < strip.keys.stop)
    return keys.clamp(strip.keys.start, strip.keys.stop - 1) - strip.keys.start, visible


def _scores(dense: Tensor, band: Tensor, visible: Tensor) -> Tensor:
    return dense.gather(-1, band.expand(*dense.shape[:-1], band.shape[-1])).masked_fill(~visible, -torch.inf)


def _unseen(strip: Strip, window: Window, device: torch.device) -> Tensor:
    rows = torch.arange(strip.rows.start, strip.rows.stop, device=device)[:, None]
    offset = torch.arange(strip.keys.start, strip.keys.stop, device=device) - rows
    return (offset < -window.left) | (offset > window.right)


def _rows(task: Task, strip: Strip, tensor: Tensor) -> Tensor:
    group = task.heads // task.kv_heads
    return tensor[strip.batch, strip.kv_head * group : (strip.kv_head + 1) * group, _slice(strip.rows)]


def _slice(positions: range) -> slice:
    return slice(positions.start, positions.stop)


def _clipped(start: int, stop: int, length: int) -> range:
    return range(max(start, 0), min(stop, length))
