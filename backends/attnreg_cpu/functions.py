"""The functions of the backend: each makes room for its results, in memory as what they belong to, and calls one op.

What rows see, dropout, every dtype and the cut into work for threads are the kernels': see ``csrc/cpu/``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnreg import Window, empty_like
from attnreg_cpu.build import ops


def local_dot_product(
    query: Tensor,
    key: Tensor,
    window: Window,
    *,
    bias: Tensor | None,
    key_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    query_starts: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float,
) -> Tensor:
    """Scores: ``S = scale * Q K^T + bias`` on the band, -inf in hidden slots and nowhere else."""
    left, right = window.left, window.right
    scores = empty_like(query, left + right + 1)
    rows = (key_lengths, key_starts, query_starts, cu_seqlens_q, cu_seqlens_k)
    ops().dot_product(query, key, scores, bias, *rows, left, right, scale)
    return scores


def local_dot_product_backward(
    grad_scores: Tensor,
    query: Tensor,
    key: Tensor,
    window: Window,
    *,
    bias: Tensor | None,
    key_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    query_starts: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float,
    needs_grad: frozenset[str],
) -> dict[str, Tensor]:
    """``dQ = scale dS K``, ``dK = scale dS^T Q``, and dS summed to the bias' shape."""
    inputs = {"query": query, "key": key, "bias": bias}
    gradients = _room(inputs, needs_grad)
    rows = (key_lengths, key_starts, query_starts, cu_seqlens_q, cu_seqlens_k)
    wanted = map(gradients.get, inputs)
    ops().dot_product_backward(grad_scores, query, key, *wanted, bias, *rows, window.left, window.right, scale)
    return gradients


def local_weighted_average(
    weights: Tensor,
    value: Tensor,
    window: Window,
    *,
    key_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    query_starts: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:
    """Output (N, H, Lq, D), over visible slots."""
    output = empty_like(weights, value.shape[3])
    rows = (key_lengths, key_starts, query_starts, cu_seqlens_q, cu_seqlens_k)
    ops().weighted_average(weights, value, output, *rows, window.left, window.right)
    return output


def local_weighted_average_backward(
    grad_output: Tensor,
    weights: Tensor,
    value: Tensor,
    window: Window,
    *,
    key_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    query_starts: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    needs_grad: frozenset[str],
) -> dict[str, Tensor]:
    """``dW = dO V^T`` in visible slots, 0 in the others; ``dV = W^T dO``."""
    inputs: dict[str, Tensor | None] = {"weights": weights, "value": value}
    gradients = _room(inputs, needs_grad)
    rows = (key_lengths, key_starts, query_starts, cu_seqlens_q, cu_seqlens_k)
    wanted = map(gradients.get, inputs)
    ops().weighted_average_backward(grad_output, weights, value, *wanted, *rows, window.left, window.right)
    return gradients


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window,
    *,
    bias: Tensor | None,
    key_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    query_starts: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (N, H, Lq, D) and log-sum-exp (N, H, Lq): softmax over tiles of keys, of which no band is ever made."""
    plain_rows = key_lengths is key_starts is query_starts is cu_seqlens_q is None
    plain_softmax = bias is sinks is None and softcap is dropout_p is None
    if plain_rows and plain_softmax and query.is_contiguous():
        # Half of what a tiny call costs is what is handed over.
        results: tuple[Tensor, Tensor] = ops().plain_attention(query, key, value, window.left, window.right, scale)
        return results
    rows = (key_lengths, key_starts, query_starts, cu_seqlens_q, cu_seqlens_k)
    output = empty_like(query, value.shape[3])
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    log_sum_exp = torch.empty(query.shape[:3], dtype=dtype)
    ops().attention(
        *(query, key, value, output, log_sum_exp, bias),
        *(*rows, sinks, seed, window.left, window.right, scale, softcap or 0.0, dropout_p or 0.0),
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
    bias: Tensor | None,
    key_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    query_starts: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float | None = None,
    seed: Tensor | None = None,
    grad_log_sum_exp: Tensor | None = None,
    needs_grad: frozenset[str],
) -> dict[str, Tensor]:
    """All gradients, of scores that are made again, tile by tile; ``output`` is not needed."""
    inputs = {"query": query, "key": key, "value": value, "bias": bias, "sinks": sinks}
    gradients = _room(inputs, needs_grad)
    rows = (key_lengths, key_starts, query_starts, cu_seqlens_q, cu_seqlens_k)
    ops().attention_backward(
        *(grad_output, query, key, value, log_sum_exp, grad_log_sum_exp),
        *(*map(gradients.get, inputs), bias),
        *(*rows, sinks, seed, window.left, window.right, scale, softcap or 0.0, dropout_p or 0.0),
    )
    return gradients


def _room(inputs: dict[str, Tensor | None], needs_grad: frozenset[str]) -> dict[str, Tensor]:
    """A tensor for each gradient that is wanted."""
    return {name: empty_like(each) for name, each in inputs.items() if each is not None and name in needs_grad}
