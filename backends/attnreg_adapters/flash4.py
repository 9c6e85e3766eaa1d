"""FlashAttention 4 (the distribution flash-attn-4), where it is installed, called with a window."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnreg import Problem, Window, empty_like
from attnreg_adapters.flash import gradient_of_all, positive_scale, refuse_shapes
from attnreg_adapters.layout import lengths_first, unseen_keys

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
    options = _options(1.0, Window(0, 0))
    for function, results in ((forward, ("out", "return_lse")), (backward, ("dq", "dk", "dv", "deterministic"))):
        missing = [name for name in (*results, *options) if name not in inspect.signature(function).parameters]
        if missing:
            return f"{DISTRIBUTION} has changed: {function.__name__} takes no {', '.join(missing)}"
    return None


def _functions() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What the library's own autograd function calls: they write results where they are told, in any order in memory."""
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    return _flash_attn_fwd, _flash_attn_bwd


def _options(scale: float, window: Window) -> dict[str, float | int]:
    """What both functions are told of a call."""
    return {"softmax_scale": scale, "window_size_left": window.left, "window_size_right": window.right}


def refuse(problem: Problem) -> str | None:
    """What the capability cannot say."""
    if problem.needs_grad and problem.head_dim < 128 and problem.head_dim % 32 in (8, 16):
        return f"its gradients are wrong at E = {problem.head_dim}, as at all E < 128 that are 8 or 16 above a multiple of 32"
    return refuse_shapes(problem)


def local_attention(
    query: Tensor, key: Tensor, value: Tensor, window: Window, *, scale: float
) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp of each row as the library gives it."""
    forward, _ = _functions()
    output = empty_like(query)
    query, scale, _ = positive_scale(query, scale)
    unseen = unseen_keys(query.size(2), key.size(2), window)
    _, log_sum_exp, *_ = forward(
        *(lengths_first(each) for each in (query, key[:, :, unseen:], value[:, :, unseen:])),
        out=output.transpose(1, 2),
        return_lse=True,
        **_options(scale, window),
    )
    return output, log_sum_exp


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
    """The gradients of query, key and value: the library computes all three, where they belong."""
    _, backward = _functions()
    unseen = unseen_keys(query.size(2), key.size(2), window)
    gradients = {
        "query": empty_like(query),
        "key": gradient_of_all(key, unseen),
        "value": gradient_of_all(value, unseen),
    }
    query, scale, factor = positive_scale(query, scale)
    backward(
        *(lengths_first(each) for each in (query, key[:, :, unseen:], value[:, :, unseen:], output, grad_output)),
        log_sum_exp,
        dq=gradients["query"].transpose(1, 2),
        dk=gradients["key"][:, :, unseen:].transpose(1, 2),
        dv=gradients["value"][:, :, unseen:].transpose(1, 2),
        # The same bits every time, as attnreg promises.
        deterministic=True,
        **_options(scale, window),
    )
    if factor != 1:
        gradients["query"].mul_(factor)
    return {name: gradient for name, gradient in gradients.items() if name in needs_grad}
