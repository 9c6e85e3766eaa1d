"""torch's FlexAttention, compiled, with a block mask for the window."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from attnreg import Window
from attnreg.measuring.inputs import Calls, Gradients, Inputs, autograd_calls
from attnreg.measuring.task import FUSED
from attnreg_benchmarks.contender import Contender
from attnreg_benchmarks.workloads import Workload

# create_block_mask looks at every pair of positions.
MOST_POSITIONS = 32768
# Each window and shape is a compilation of its own; after the default of 8, torch would give up compiling.
MOST_COMPILATIONS = 1000


def _refuse(workload: Workload, direction: str, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"the device is {device.type}; it is compiled for cuda"
    if workload.length > MOST_POSITIONS:
        return f"L is {workload.length}; its mask is made from all L x L pairs, tried up to {MOST_POSITIONS}"
    return None


def _prepare(workload: Workload, inputs: Inputs) -> Calls:
    mask = _block_mask(workload.window, workload.length, inputs.upstream.device)
    grouped = workload.heads != workload.kv_heads

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output: Tensor = _compiled()(query, key, value, block_mask=mask, enable_gqa=grouped)
        return output

    calls = autograd_calls(attend, inputs)

    def forward() -> Tensor:
        with _settings():
            return calls.forward()

    def make_backward() -> Callable[[], Gradients]:
        with _settings():
            backward = calls.make_backward()
            backward()  # compiles it, under the same settings
        return backward

    return Calls(forward, make_backward)


def _settings() -> ExitStack:
    """Compiled as often as needed; and no saved tensor is overwritten by a backward, which is run many times."""
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch

    stack = ExitStack()
    stack.enter_context(dynamo.patch(recompile_limit=MOST_COMPILATIONS))
    stack.enter_context(functorch.patch(donated_buffer=False))
    return stack


@functools.cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


@functools.lru_cache(maxsize=64)
def _block_mask(window: Window, length: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    left, right = window.left, window.right

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key - query >= -left) & (key - query <= right)

    return create_block_mask(visible, None, None, length, length, device=str(device))


FLEX = Contender("flex", "peer", (FUSED,), _refuse, _prepare)
