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

from attnreg import Problem, Window, empty_like
from attnreg_adapters.layout import in_order_of, lengths_first, unseeing_queries, unseen_keys

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
    # The library takes a window's right side of Lk or more for one of Lk, or for none: the first queries then see other keys.
    if problem.window.right >= problem.key_length and problem.query_length > problem.key_length + 1:
        return (
            f"the window's right side, {problem.window.right}, reaches past all {problem.key_length} keys, and there are "
            f"{problem.query_length} queries; it takes such a window with at most one query more than keys"
        )
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
    unseeing = unseeing_queries(problem.query_length, problem.key_length, problem.window)
    if unseeing:
        return f"the first {unseeing} queries see no key; it takes only calls in which every query sees one"
    return None


def local_attention(
    query: Tensor, key: Tensor, value: Tensor, window: Window, *, scale: float
) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp of each row as the library gives it."""
    given, scale, _ = positive_scale(query, scale)
    unseen = unseen_keys(query.size(2), key.size(2), window)
    given, key, value = (lengths_first(each) for each in (given, key[:, :, unseen:], value[:, :, unseen:]))
    output, log_sum_exp, *_ = torch.ops.aten._flash_attention_forward(
        given, key, value, *_common(given, key), False, scale=scale, **_sizes(window)
    )
    return in_order_of(query, output.transpose(1, 2)), log_sum_exp


def local_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    window: Window,
    *,
    scale: float,
    needs_grad: frozenset[str],
) -> dict[str, Tensor]:
    """The gradients of query, key and value: the library computes all three."""
    inputs = {"query": query, "key": key, "value": value}
    query, scale, factor = positive_scale(query, scale)
    unseen = unseen_keys(query.size(2), key.size(2), window)
    key, value = key[:, :, unseen:], value[:, :, unseen:]
    query, key, value, output, grad_output = (lengths_first(each) for each in (query, key, value, output, grad_output))
    # No dropout: its random state is not looked at.
    state = torch.empty(2, dtype=torch.uint64, device=query.device)
    with _deterministic():
        found = torch.ops.aten._flash_attention_backward(
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
    gradients = {}
    for (name, tensor), gradient in zip(inputs.items(), found):
        if name not in needs_grad:
            continue
        gradient = gradient.transpose(1, 2)
        if name == "query":
            gradients[name] = in_order_of(tensor, gradient if factor == 1 else gradient.mul_(factor))
        elif unseen:
            gradients[name] = gradient_of_all(tensor, unseen)
            gradients[name][:, :, unseen:] = gradient
        else:
            gradients[name] = in_order_of(tensor, gradient)
    return gradients


def gradient_of_all(tensor: Tensor, unseen: int) -> Tensor:
    """Room for the gradient of a key or value, zero for those that were left out of the call."""
    gradient = empty_like(tensor)
    if unseen:
        gradient[:, :, :unseen] = 0
    return gradient


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
