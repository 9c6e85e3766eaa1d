"""FlashAttention 2 as torch carries it, with a window; unlike the backend ``flash``, its backward adds up in no fixed order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnreg import Problem
from attnreg.testing.inputs import Calls, Gradients, Inputs
from attnreg_benchmarks.contender import Contender
from attnreg_benchmarks.peers.refusals import not_half_on_cuda
from attnreg_benchmarks.workloads import FUSED


def _refuse(problem: Problem) -> str | None:
    reason = not_half_on_cuda(problem)
    if reason is not None:
        return reason
    if not torch.backends.cuda.is_flash_attention_available():
        return "torch was built without FlashAttention"
    if problem.head_dim > 256 or problem.head_dim % 8:
        return f"the head_dim is {problem.head_dim}; it takes multiples of 8 up to 256"
    return None


def _prepare(problem: Problem, inputs: Inputs) -> Calls:
    # It takes (N, L, H, E); a view with other strides is as good.
    query, key, value = (tensor.transpose(1, 2) for tensor in inputs.tensors.values())
    upstream = inputs.upstream.transpose(1, 2)
    # Neither cumulative lengths nor dropout; a window bounded on both sides is no causal mask to this kernel.
    common: tuple[Any, ...] = (None, None, problem.key_length, problem.key_length, 0.0, False)
    window = {"window_size_left": problem.window.left, "window_size_right": problem.window.right}

    def attend() -> Any:
        return torch.ops.aten._flash_attention_forward(query, key, value, *common, False, **window)

    def forward() -> Tensor:
        output: Tensor = attend()[0].transpose(1, 2)
        return output

    def make_backward() -> Callable[[], Gradients]:
        output, log_sum_exp, random_state, unused, _ = attend()

        def backward() -> Gradients:
            gradients = torch.ops.aten._flash_attention_backward(
                upstream, query, key, value, output, log_sum_exp, *common, random_state, unused, **window
            )
            return tuple(gradient.transpose(1, 2) for gradient in gradients)

        return backward

    return Calls(forward, make_backward)


FLASH2 = Contender("flash2-torch", "peer", (FUSED,), _refuse, _prepare)
