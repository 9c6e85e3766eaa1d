"""torch's FlexAttention on a CPU, compiled, with a block mask of the window. It has no backward there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnreg import Problem
from attnreg.testing.inputs import Calls, Inputs, autograd_calls
from attnreg_benchmarks.contender import Contender
from attnreg_benchmarks.peers.refusals import not_on_a_cpu
from attnreg_benchmarks.workloads import FUSED

# Shorter sequences have no block to leave out.
FEWEST_POSITIONS = 128


def flex(problem: Problem) -> Callable[..., Tensor]:
    """Attention of query, key and value; it is compiled for the shape at its first call, and its mask is made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length, window = problem.key_length, problem.window

    def visible(_: Tensor, __: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (key <= row + window.right) & (key >= row - window.left)

    mask = create_block_mask(visible, None, None, length, length, device=problem.device.type)
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    grouped = problem.heads != problem.kv_heads
    return lambda query, key, value: compiled(query, key, value, block_mask=mask, enable_gqa=grouped)


def _refuse(problem: Problem) -> str | None:
    reason = not_on_a_cpu(problem)
    if reason is not None:
        return reason
    if problem.needs_grad:
        return "it has no backward on a CPU"
    if problem.key_length < FEWEST_POSITIONS:
        return f"L is {problem.key_length}; it is tried from {FEWEST_POSITIONS} on"
    return None


def _prepare(problem: Problem, inputs: Inputs) -> Calls:
    return autograd_calls(flex(problem), inputs)


FLEX = Contender("flex-attention", "peer", (FUSED,), _refuse, _prepare)
