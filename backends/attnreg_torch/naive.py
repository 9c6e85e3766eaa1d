"""The definition of the three ops, as plain as it can be written: every other backend is measured against it.

For each query the keys of its window are gathered side by side, (N, H, Lq, W, E), and multiplied. That is far too much memory
for real work, and nothing in it can go wrong at a border. Autograd differentiates it, any number of times.

What is invisible may be NaN or inf: ``where`` selects it away, and the derivative of ``where`` does so with its gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnreg import Problem, Window
from attnreg.memory import laid_out, strides_like, with_gradient_laid_out


def local_dot_product(
    query: Tensor, key: Tensor, window: Window, *, bias: Tensor | None, key_lengths: Tensor | None, scale: float
) -> Tensor:
    """``scores[n, h, i, c] = scale * query[n, h, i] . key[n, h', j] + bias[n, h, i, c]`` with ``j = i + Lk - Lq - left + c``."""
    scores, visible = _scores(query, key, window, bias, key_lengths, scale)
    scores = _clamped(scores.to(query.dtype)).where(visible, -torch.inf)
    return laid_out(scores, strides_like(query, window.size))


def local_weighted_average(weights: Tensor, value: Tensor, window: Window, *, key_lengths: Tensor | None) -> Tensor:
    """``output[n, h, i] = sum over c of weights[n, h, i, c] * value[n, h', j]``, over visible slots."""
    visible = _visible(weights.shape[2], value.shape[2], window, None, key_lengths, value.device)
    output = _average(_accumulated(with_gradient_laid_out(weights)), value, window, visible)
    return laid_out(output.to(weights.dtype), strides_like(weights, value.shape[3]))


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
    """``output[n, h, i] = sum over c of softmax(scores[n, h, i])[c] * value[n, h', j]``, over visible slots."""
    scores, visible = _scores(query, key, window, bias, key_lengths, scale)
    scores = scores.where(visible, -torch.inf)
    # A row without a visible key gets finite scores, so that softmax stays finite; its weights are then 0 as a whole.
    weights = scores.where(visible.any(-1, keepdim=True), 0.0).softmax(-1)
    output = _average(weights, value, window, visible).to(query.dtype)
    return laid_out(output, strides_like(query, value.shape[3])), scores.detach().logsumexp(-1)


def _scores(
    query: Tensor, key: Tensor, window: Window, bias: Tensor | None, key_lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Scores, arbitrary in invisible slots, in float32 or float64; and which slots are visible."""
    visible = _visible(query.shape[2], key.shape[2], window, bias, key_lengths, query.device)
    keys = _gathered(key, query.shape[1], query.shape[2], window, visible)
    scores = scale * (_accumulated(with_gradient_laid_out(query)).unsqueeze(-2) * keys).sum(-1)
    if bias is not None:
        # A bias in a wider dtype may be beyond this one's range.
        scores = scores + _clamped(
            with_gradient_laid_out(bias).to(scores.dtype, copy=True), torch.finfo(scores.dtype).max
        )
    return _clamped(scores), visible.expand(scores.shape)


def _clamped(scores: Tensor, highest: float = torch.inf) -> Tensor:
    """``scores``, a new tensor, from its dtype's lowest number on: -inf means hidden, which a visible slot never is.

    As with any rounding, the derivative is that of what was rounded.
    """
    with torch.no_grad():
        return scores.clamp_min_(torch.finfo(scores.dtype).min).clamp_max_(highest)


def _average(weights: Tensor, value: Tensor, window: Window, visible: Tensor) -> Tensor:
    values = _gathered(value, weights.shape[1], weights.shape[2], window, visible)
    return (weights.where(visible, 0.0).unsqueeze(-1) * values).sum(-2)


def _gathered(key: Tensor, heads: int, query_length: int, window: Window, visible: Tensor) -> Tensor:
    """The keys of each query's window side by side, (N, H, Lq, W, E), 0 in invisible slots."""
    positions = _positions(query_length, key.shape[2], window, key.device).clamp(0, key.shape[2] - 1)
    of_query_heads = _accumulated(with_gradient_laid_out(key)).repeat_interleave(heads // key.shape[1], dim=1)
    if key.device.type == "cpu" and torch._C._functorch.peek_interpreter_stack() is None:
        # Its gradient is added up in order. That of an indexed tensor is so on a GPU; here threads add as they come. But vmap,
        # traced with open sizes, would keep those of the trace.
        gathered: Tensor = of_query_heads.index_select(2, positions.flatten()).unflatten(2, positions.shape)
    else:
        gathered = of_query_heads[:, :, positions]
    visible_keys: Tensor = gathered.where(visible.unsqueeze(-1), 0.0)
    return visible_keys


def _visible(
    query_length: int,
    key_length: int,
    window: Window,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Which slots are visible, broadcasting to (N, H, Lq, W)."""
    positions = _positions(query_length, key_length, window, device)
    visible = ((positions >= 0) & (positions < key_length))[None, None]
    if key_lengths is not None:
        visible = visible & (positions < key_lengths[:, None, None, None])
    if bias is not None:
        visible = visible & (bias != -torch.inf)
    return visible


def _positions(query_length: int, key_length: int, window: Window, device: torch.device) -> Tensor:
    """The key's position for each row and slot, (Lq, W); it may lie outside the sequence."""
    rows = torch.arange(query_length, device=device)[:, None]
    slots = torch.arange(window.size, device=device)
    return rows + (key_length - query_length) - window.left + slots


def _accumulated(tensor: Tensor) -> Tensor:
    """float64 as it is, anything else in float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def workspace(problem: Problem) -> int:
    """Bytes: the gathered keys or values and their products, (N, H, Lq, W, E) each; with gradients those of both stay."""
    elements = problem.batch * problem.heads * problem.query_length * problem.window.size
    size = 8 if problem.dtype == torch.float64 else 4
    return elements * max(problem.head_dim, problem.value_dim) * size * (5 if problem.needs_grad else 2)
