"""FlashAttention 4 (the distribution flash-attn-4), where it is installed, called with a window."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnreg import Problem, Window, empty_like
from attnreg_adapters.flash import gradient_of_all, positive_scale, refuse_shapes
from attnreg_adapters.layout import layout_of
from attnreg_adapters.packed import Sequences, sequences_about

DISTRIBUTION = "flash-attn-4"

# Where it has been seen to be right: release 4.0.0b36 against float32, at all head dims, random windows and lengths; but for the
# gradients that `refuse` names, of the query and with grouped heads also of key and value.
_CAPABILITY = (9, 0)


def unavailable() -> str | None:
    """Why it cannot run on this machine, where its library is installed."""
    if not torch.cuda.is_available():
        return "torch has no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability != _CAPABILITY:
        return "it was tested on compute capability 9.0 alone; this is {}.{}".format(*capability)
    return None


def prepare() -> str | None:
    """Why the library cannot be called: it cannot be imported, for which it looks for its compiler, or has changed."""
    try:
        forward, backward = _functions()
    except Exception as error:
        return f"{DISTRIBUTION} cannot be imported: {type(error).__name__}: {error}"
    common = (*_options(1.0, Window(0, 0), None), "softcap", "learnable_sink")
    for function, own in ((forward, ("out", "return_lse")), (backward, ("dq", "dk", "dv", "dlse", "deterministic"))):
        missing = [name for name in (*own, *common) if name not in inspect.signature(function).parameters]
        if missing:
            return f"{DISTRIBUTION} has changed: {function.__name__} takes no {', '.join(missing)}"
    return None


def _functions() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What the library's own autograd function calls: they write results where they are told, in any order in memory."""
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    return _flash_attn_fwd, _flash_attn_bwd


def _options(scale: float, window: Window, sequences: Sequences | None) -> dict[str, Any]:
    """What both functions are told of a call.

    Of packed calls it is not told the longest sequence, which would have to be read: its grid follows from the numbers of rows
    and of sequences.
    """
    return {
        "softmax_scale": scale,
        "window_size_left": window.left,
        "window_size_right": window.right,
        "cu_seqlens_q": None if sequences is None else sequences.of_queries,
        "cu_seqlens_k": None if sequences is None else sequences.of_keys,
    }


def refuse(problem: Problem) -> str | None:
    """What the capability cannot say."""
    if problem.needs_grad and problem.head_dim < 128 and problem.head_dim % 32 in (8, 16):
        return f"its gradients are wrong at E = {problem.head_dim}, as at all E < 128 that are 8 or 16 above a multiple of 32"
    return refuse_shapes(problem)


def workspace(problem: Problem) -> int:
    """Its sums in float32 and, of packed calls, the copies of :func:`_cleared` and a semaphore for each block of rows.

    There are semaphores for as many blocks as the whole pack has, in each sequence.
    """
    sequences = sequences_about(problem)
    of_rows = problem.batch * problem.heads * problem.query_length * problem.head_dim
    of_keys = problem.batch * problem.kv_heads * problem.key_length * problem.head_dim
    if not problem.needs_grad:
        return problem.dtype.itemsize * of_keys if sequences else 0
    sums = 4 * (of_rows + 2 * of_keys)
    if not sequences:
        return sums
    blocks = problem.heads * problem.query_length // 64 + 4 * problem.kv_heads * problem.key_length // 48
    copies = problem.dtype.itemsize * 2 * (of_rows + of_keys)
    return sums + 4 * 128 * sequences * problem.heads * problem.head_dim + copies + 4 * sequences * blocks


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window,
    *,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp of each row."""
    forward, _ = _functions()
    output = empty_like(query)
    query, scale, _ = positive_scale(query, scale)
    layout = layout_of(query, key, window, cu_seqlens_q, cu_seqlens_k)
    sequences = layout.sequences
    if sequences is not None:
        value = _cleared(value, sequences.keys_that_are_seen(key.size(2)))
    _, log_sum_exp, *_ = forward(
        *(layout.theirs(each) for each in (query, layout.cut(key), layout.cut(value))),
        out=layout.written(output),
        return_lse=True,
        softcap=softcap,
        learnable_sink=_of_its_dtypes(sinks),
        **_options(scale, window, sequences),
    )
    if sequences is None:
        return output, log_sum_exp
    # In a sequence without keys it takes those before it for them.
    sees = sequences.rows_that_see(query.size(2))
    return output.masked_fill_(~sees, 0), log_sum_exp.where(sees[:, 0], -math.inf)[None]


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
    softcap: float | None,
    sinks: Tensor | None,
    grad_log_sum_exp: Tensor | None,
    needs_grad: frozenset[str],
) -> dict[str, Tensor]:
    """The gradients of query, key, value and sinks: the library computes all, where they belong."""
    _, backward = _functions()
    layout = layout_of(query, key, window, cu_seqlens_q, cu_seqlens_k)
    gradients = {
        "query": empty_like(query),
        "key": gradient_of_all(key, layout.unseen),
        "value": gradient_of_all(value, layout.unseen),
    }
    query, scale, factor = positive_scale(query, scale)
    sequences = layout.sequences
    if sequences is not None:
        sees, seen = sequences.rows_that_see(query.size(2)), sequences.keys_that_are_seen(key.size(2))
        query, grad_output = _cleared(query, sees), _cleared(grad_output, sees)
        key, value = _cleared(key, seen), _cleared(value, seen)
        if grad_log_sum_exp is not None:
            grad_log_sum_exp = grad_log_sum_exp.where(sees[:, 0], 0)
    own = _of_its_dtypes(sinks)
    *_, last = backward(
        *(layout.theirs(each) for each in (query, layout.cut(key), layout.cut(value), output, grad_output)),
        layout.of_rows(log_sum_exp),
        dq=layout.written(gradients["query"]),
        dk=layout.written(layout.cut(gradients["key"])),
        dv=layout.written(layout.cut(gradients["value"])),
        dlse=layout.of_rows(grad_log_sum_exp),
        # The same bits every time, as attnreg promises.
        deterministic=True,
        softcap=softcap or 0.0,
        learnable_sink=own,
        **_options(scale, window, sequences),
    )
    if factor != 1:
        gradients["query"].mul_(factor)
    if sinks is not None:
        gradients["sinks"] = last.to(sinks.dtype)
    return {name: gradient for name, gradient in gradients.items() if name in needs_grad}


def _of_its_dtypes(sinks: Tensor | None) -> Tensor | None:
    """The sinks in float32: of what it takes, the one in which the library's sum over all rows is not rounded."""
    return None if sinks is None else sinks.float()


def _cleared(tensor: Tensor, mask: Tensor) -> Tensor:
    """A tensor (N, H, L, E) with zeros where a mask (L, 1) has none, which may be NaN.

    The library reads whole tiles, past the end of a sequence too, and multiplies by a weight of 0 what lies there.
    """
    return tensor.where(mask, 0)
