"""FlashAttention as torch carries it (``aten::_flash_attention_forward``), called with a window.

That is FlashAttention 2, or whatever ``torch.nn.attention.activate_flash_attention_impl`` has put in its place. It takes
(N, L, H, E) and aligns the ends of queries and keys, as attnreg does, of packed calls within each sequence.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from attnreg import Problem, Window, empty_like
from attnreg_adapters.layout import in_order_of, layout_of, unseeing_queries
from attnreg_adapters.packed import Sequences, refuse_packed, sequences_about
from attnreg_adapters.sinks import beside_sinks, gradient_of_sinks

# The library's backward needs more shared memory above this head dim than other GPUs have.
_MOST_ON_SMALL_GPUS, _LARGE_GPUS = 192, ((8, 0), (9, 0))

# Those of the largest GPUs, about.
_MANY_MULTIPROCESSORS = 160

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
    if problem.gives("cu_seqlens_q") is not None:
        return refuse_packed(problem)
    unseeing = unseeing_queries(problem.query_length, problem.key_length, problem.window)
    if unseeing:
        return f"the first {unseeing} queries see no key; it takes only calls in which every query sees one"
    return None


def workspace(problem: Problem) -> int:
    """The library adds up dQ in float32, in as many parts as fill the GPU, each sequence to whole blocks."""
    if not problem.needs_grad:
        return 0
    # A packed call has a batch of 1.
    sequences = sequences_about(problem) or max(problem.batch, 1)
    parts = math.ceil(_MANY_MULTIPROCESSORS / (sequences * max(problem.heads, 1)))
    rows = problem.batch * problem.query_length + 128 * sequences
    return 4 * parts * rows * problem.heads * problem.head_dim


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window,
    *,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp of each row."""
    given, scale, _ = positive_scale(query, scale)
    layout = layout_of(query, key, window, cu_seqlens_q, cu_seqlens_k)
    given, key, value = layout.theirs(given), layout.theirs(layout.cut(key)), layout.theirs(layout.cut(value))
    output, log_sum_exp, *_ = torch.ops.aten._flash_attention_forward(
        given, key, value, *_common(layout.sequences, given, key), False, scale=scale, **_sizes(window)
    )
    output = layout.ours(output)
    if layout.sequences is not None:
        # Where the library has no key it writes an output of 0, and inf.
        sees = layout.sequences.rows_that_see(query.size(2))[:, 0]
        log_sum_exp = log_sum_exp.where(sees, -math.inf)[None]
    if sinks is not None:
        share, log_sum_exp = beside_sinks(log_sum_exp, sinks)
        output.mul_(share[..., None])
    return in_order_of(query, output), log_sum_exp


def local_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    window: Window,
    *,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    sinks: Tensor | None,
    needs_grad: frozenset[str],
) -> dict[str, Tensor]:
    """The gradients of query, key and value: the library computes all three.

    It has the weights from the log-sum-exp, and ``D`` from the output: both are those beside the sinks, and so are its results.
    """
    gradients = {}
    if sinks is not None and "sinks" in needs_grad:
        gradients["sinks"] = gradient_of_sinks(grad_output, output, log_sum_exp, sinks)
    inputs = {"query": query, "key": key, "value": value}
    query, scale, factor = positive_scale(query, scale)
    layout = layout_of(query, key, window, cu_seqlens_q, cu_seqlens_k)
    query, output, grad_output = (layout.theirs(each) for each in (query, output, grad_output))
    key, value = layout.theirs(layout.cut(key)), layout.theirs(layout.cut(value))
    # No dropout: its random state is not looked at.
    state = torch.empty(2, dtype=torch.uint64, device=query.device)
    with _deterministic():
        found = torch.ops.aten._flash_attention_backward(
            grad_output,
            query,
            key,
            value,
            output,
            layout.of_rows(log_sum_exp),
            *_common(layout.sequences, query, key),
            state,
            state,
            scale=scale,
            **_sizes(window),
        )
    unseen = layout.unseen
    for (name, tensor), gradient in zip(inputs.items(), found):
        if name not in needs_grad:
            continue
        gradient = layout.ours(gradient)
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


def _common(sequences: Sequences | None, query: Tensor, key: Tensor) -> tuple[Any, ...]:
    """The offsets of sequences, bounds of their lengths, no dropout, and no causal mask beside the window.

    Who knows the longest sequence has read the offsets: the bound is the whole pack. The grid has blocks of that many rows for
    each sequence, and those past its end stop at once. For one row alone the library has another kernel, without offsets.
    """
    if sequences is None:
        return None, None, query.size(1), key.size(1), 0.0, False
    return sequences.of_queries, sequences.of_keys, max(query.size(0), 2), key.size(0), 0.0, False


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
