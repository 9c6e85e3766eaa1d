"""torch's scaled_dot_product_attention under a dense (L, L) mask: what is written where nothing local is at hand."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attnreg import Problem, Window
from attnreg.testing.inputs import Calls, Inputs, autograd_calls
from attnreg_benchmarks.contender import Contender
from attnreg_benchmarks.workloads import FUSED

MOST_POSITIONS = 4096


def _refuse(problem: Problem) -> str | None:
    if problem.key_length > MOST_POSITIONS:
        return f"L is {problem.key_length}; a dense mask is tried up to {MOST_POSITIONS}"
    return None


def _prepare(problem: Problem, inputs: Inputs) -> Calls:
    mask = band_mask(problem.key_length, problem.window, inputs.upstream.device)
    grouped = problem.heads != problem.kv_heads

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, mask, enable_gqa=grouped)

    return autograd_calls(attend, inputs)


@functools.lru_cache(maxsize=2)
def band_mask(length: int, window: Window, device: torch.device) -> Tensor:
    """(L, L), True where query i (row) sees key j."""
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones.tril(window.right).triu(-window.left)


DENSE = Contender("sdpa-dense", "peer", (FUSED,), _refuse, _prepare)
