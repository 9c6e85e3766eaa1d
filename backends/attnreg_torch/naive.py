"""The definition of the three ops, as plain as it can be written: every other backend is measured against it.

For each query the keys of its window are gathered side by side, (N, H, Lq, W, E), and multiplied. That is far too much memory
for real work, and nothing in it can go wrong at a border. Autograd differentiates it, any number of times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnreg import Window


def local_dot_product(
    query: Tensor, key: Tensor, window: Window, *, bias: Tensor | None, key_lengths: Tensor | None, scale: float
) -> Tensor:
    """``scores[n, h, i, c] = scale * query[n, h, i] . key[n, h', j] + bias[n, h, i, c]`` with ``j = i + Lk - Lq - left + c``."""
    scores, _ = _scores(query, key, window, bias, key_lengths, scale)
    return scores.to(query.dtype)


def local_weighted_average(weights: Tensor, value: Tensor, window: Window, *, key_lengths: Tensor | None) -> Tensor:
    """``output[n, h, i] = sum over c of weights[n, h, i, c] * value[n, h', j]``, over visible slots."""
    visible = _visible(weights.shape[2], value.shape[2], window, None, key_lengths, value.device)
    return _average(_accumulated(weights), value, window, visible).to(weights.dtype)


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
    log_sum_exp = scores.detach().logsumexp(-1)
    # A row without a visible key gets finite scores, so that softmax stays finite; its weights are then 0 as a whole.
    weights = scores.where(visible.any(-1, keepdim=True), 0.0).softmax(-1).where(visible, 0.0)
    return _average(weights, value, window, visible).to(query.dtype), log_sum_exp


def _scores(
    query: Tensor, key: Tensor, window: Window, bias: Tensor | None, key_lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    visible = _visible(query.shape[2], key.shape[2], window, bias, key_lengths, query.device)
    keys = _gathered(key, query.shape[1], query.shape[2], window, visible)
    scores = scale * (_accumulated(query).unsqueeze(-2) * keys).sum(-1)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    return scores.where(visible, -torch.inf), visible.expand(scores.shape)


def _average(weights: Tensor, value: Tensor, window: Window, visible: Tensor) -> Tensor:
    values = _gathered(value, weights.shape[1], weights.shape[2], window, visible)
    return (weights.where(visible, 0.0).unsqueeze(-1) * values).sum(-2)


def _gathered(key: Tensor, heads: int, query_length: int, window: Window, visible: Tensor) -> Tensor:
    """The keys of each query's window side by side, (N, H, Lq, W, E), 0 in invisible slots."""
    positions = _positions(query_length, key.shape[2], window, key.device).clamp(0, key.shape[2] - 1)
    of_query_heads = _accumulated(key).repeat_interleave(heads // key.shape[1], dim=1)
    return of_query_heads[:, :, positions].where(visible.unsqueeze(-1), 0.0)


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
