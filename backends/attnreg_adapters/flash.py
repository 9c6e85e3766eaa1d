"""FlashAttention as torch carries it (``aten::_flash_attention_forward``), called with a window.

That is FlashAttention 2, or whatever ``torch.nn.attention.activate_flash_attention_impl`` has put in its place. It takes
(N, L, H, E) and aligns the ends of queries and keys, as attnreg does.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from attnreg import Problem, Window

# It loads 16 bytes at a time.
_ACCESS_BYTES = 16

# The library's backward needs more shared memory above this head dim than other GPUs have.
_MOST_ON_SMALL_GPUS, _LARGE_GPUS = 192, ((8, 0), (9, 0))

# Two threads that set torch's setting back in the wrong order would leave it changed.
_one_at_a_time = threading.Lock()


def unavailable() -> str | None:
    """Why it cannot run on this machine."""
    if not torch.cuda.is_available():
        return "torch has no CUDA device"
    if not torch.backends.cuda.is_flash_attention_available():
        return "this torch was built without FlashAttention"
    if torch.cuda.get_device_capability() < (8, 0):
        return "FlashAttention 2 needs compute capability 8.0"
    return None


def refuse(problem: Problem) -> str | None:
    """What the capability cannot say."""
    refused = refuse_shapes(problem)
    if refused is not None:
        return refused
    if problem.needs_grad and problem.head_dim > _MOST_ON_SMALL_GPUS:
        capability = torch.cuda.get_device_capability(problem.device)
        if capability not in _LARGE_GPUS:
            needed = " or ".join(f"{major}.{minor}" for major, minor in _LARGE_GPUS)
            here = "{}.{}".format(*capability)
            return f"gradients at E = {problem.head_dim} need compute capability {needed}; this is {here}"
    return None


def refuse_shapes(problem: Problem) -> str | None:
    """What no FlashAttention takes."""
    if problem.head_dim != problem.value_dim:
        return f"E = {problem.head_dim} and D = {problem.value_dim} differ; it takes equal head dims only"
    first_sees = problem.key_length - problem.query_length + problem.window.right
    if first_sees < 0:
        return f"the first {-first_sees} queries see no key; it takes only calls in which every query sees one"
    return None


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window,
    *,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp of each row as the library gives it."""
    query, scale, _ = positive_scale(query, scale)
    query, key, value = (lengths_first(each) for each in (query, key, value))
    output, log_sum_exp, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, *_common(query, key), False, scale=scale, **_sizes(window)
    )
    return output.transpose(1, 2).contiguous(), log_sum_exp


def local_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    window: Window,
    *,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    scale: float,
    needs_grad: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    """The gradients of query, key and value."""
    query, scale, factor = positive_scale(query, scale)
    query, key, value, output, grad_output = (lengths_first(each) for each in (query, key, value, output, grad_output))
    # No dropout: its random state is not looked at.
    state = torch.empty(2, dtype=torch.uint64, device=query.device)
    with _deterministic():
        gradients = torch.ops.aten._flash_attention_backward(
            grad_output,
            query,
            key,
            value,
            output,
            log_sum_exp,
            *_common(query, key),
            state,
            state,
            scale=scale,
            **_sizes(window),
        )
    grad_query, grad_key, grad_value = (
        gradient.transpose(1, 2).contiguous() if needed else None for gradient, needed in zip(gradients, needs_grad)
    )
    if grad_query is not None and factor != 1:
        grad_query = grad_query * factor
    return grad_query, grad_key, grad_value, None


def _common(query: Tensor, key: Tensor) -> tuple[Any, ...]:
    """Neither cumulative lengths nor dropout, and no causal mask beside the window."""
    return None, None, query.size(1), key.size(1), 0.0, False


def _sizes(window: Window) -> dict[str, int]:
    return {"window_size_left": window.left, "window_size_right": window.right}


def positive_scale(query: Tensor, scale: float) -> tuple[Tensor, float, int]:
    """A query and a scale above 0 that give the same scores, and the factor of the query: 1, -1 or 0.

    The library takes the largest ``query . key`` for the largest score.
    """
    if scale > 0:
        return query, scale, 1
    return (-query, -scale, -1) if scale < 0 else (query * 0, 1.0, 0)


def lengths_first(tensor: Tensor) -> Tensor:
    """A tensor (N, L, H, E) of a tensor (N, H, L, E), whose rows begin where it may load them."""
    unit = _ACCESS_BYTES // tensor.element_size()
    aligned = all(stride % unit == 0 for stride in tensor.stride()[:3]) and tensor.data_ptr() % _ACCESS_BYTES == 0
    return (tensor if aligned else tensor.contiguous()).transpose(1, 2)


@contextmanager
def _deterministic() -> Iterator[None]:
    """The same bits every time, as attnreg promises: its backward otherwise adds up dQ in whatever order blocks end.

    Torch has one setting for the whole process, and no argument; the backward of each device runs in a thread of its own.
    """
    settings: Any = torch.utils.deterministic
    with _one_at_a_time:
        mode, fill = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory
        settings.fill_uninitialized_memory = False
        torch.set_deterministic_debug_mode("error")
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode(mode)
            settings.fill_uninitialized_memory = fill
