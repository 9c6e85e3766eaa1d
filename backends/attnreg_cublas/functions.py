"""The functions of the backend: the products, the band, and what lies between.

Each takes the options ``block``, the rows of a block (None: by ``rule``), and ``workspace``, the MiB for dense blocks.

The products are torch's own or made by its cuBLAS, so that float32 follows torch's matmul precision setting. ``scale`` rides on
the product (cuBLAS ``alpha``), before any rounding. As in every product over dense blocks, an infinity or NaN in a *visible* row
of an average also reaches the other rows of its block, though never those of another sequence; with a bias it reaches none of
them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnreg import Window
from attnreg_cublas.call import Call
from attnreg_cublas.given import Given

# MiB of dense blocks at a time.
WORKSPACE = 256


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
    scale: float,
    block: int | None = None,
    workspace: int = WORKSPACE,
) -> Tensor:
    """Scores: S = scale * Q.K^T + bias on the band."""
    given = Given(key_lengths, key_starts, query_starts, cu_seqlens_q)
    call = Call(query, key, window, bias, given, block, workspace)
    return call.band(query, key, query, scale=scale, hidden=-math.inf)


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
    scale: float,
    needs_grad: frozenset[str],
    block: int | None = None,
    workspace: int = WORKSPACE,
) -> dict[str, Tensor]:
    """Gradients: dQ = scale * dS.K, dK = scale * dS^T.Q, dbias = dS summed to the shape of the bias."""
    given = Given(key_lengths, key_starts, query_starts, cu_seqlens_q)
    call = Call(query, key, window, bias, given, block, workspace)
    gradients = {}
    if "query" in needs_grad:
        gradients["query"] = call.average(grad_scores, key, query, scale=scale)
    if "key" in needs_grad:
        gradients["key"] = call.average_by_key(grad_scores, query, key, scale=scale)
    if bias is not None and "bias" in needs_grad:
        gradients["bias"] = bias_gradient(call, grad_scores, bias)
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
    block: int | None = None,
    workspace: int = WORKSPACE,
) -> Tensor:
    """Output: O = A.V over the band."""
    given = Given(key_lengths, key_starts, query_starts, cu_seqlens_q)
    return Call(weights, value, window, None, given, block, workspace).average(weights, value, weights)


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
    needs_grad: frozenset[str],
    block: int | None = None,
    workspace: int = WORKSPACE,
) -> dict[str, Tensor]:
    """Gradients: dA = dO.V^T on the band, dV = A^T.dO."""
    given = Given(key_lengths, key_starts, query_starts, cu_seqlens_q)
    call = Call(weights, value, window, None, given, block, workspace)
    gradients = {}
    if "weights" in needs_grad:
        gradients["weights"] = call.band(grad_output, value, weights, scale=1.0, hidden=0.0)
    if "value" in needs_grad:
        gradients["value"] = call.average_by_key(weights, grad_output, value)
    return gradients


def bias_gradient(call: Call, grad_scores: Tensor, bias: Tensor) -> Tensor:
    """The gradient of a bias: dS, or its sum over the dimensions in which the bias broadcasts, in fp32 or wider."""
    broadcast = [dim for dim in range(4) if bias.size(dim) != grad_scores.size(dim)]
    if not broadcast:
        return call.masked(grad_scores, bias).to(bias.dtype)
    wide = torch.promote_types(torch.float32, bias.dtype)
    return call.masked(grad_scores, grad_scores).sum(broadcast, keepdim=True, dtype=wide).to(bias.dtype)
