"""Sinks: a score per head that takes its share of the softmax, and has no key."""
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# The largest finite number of fp32.
_LARGEST = tl.constexpr(3.4028234663852886e38)


def empty_partials(batch: int, heads: int, row_tiles: int, device: torch.device) -> Tensor:
    """Where the programs of the rows write what they add to the gradient of their head's sink."""
    return torch.empty((batch, heads, row_tiles), dtype=torch.float32, device=device)


def reduce_partials(partials: Tensor, sinks: Tensor) -> Tensor:
    """The partial sums added up, in the sinks' dtype."""
    return partials.sum((0, 2)).to(sinks.dtype)


@triton.jit
def load_sink(sinks, h):
    """The sink of head h in fp32. As of a score, only -inf means that there is none."""
    sink = tl.load(sinks + h)
    if sink.dtype == tl.float64:
        sink = tl.where(sink == float("-inf"), sink, tl.minimum(tl.maximum(sink, -_LARGEST), _LARGEST))
    return sink.to(tl.float32)
