"""The functions of the backend: the products, the band, and what lies between.

Each takes the options ``block``, the rows of a block (None: by ``rule``), and ``workspace``, the MiB for dense blocks.

The products are torch's own, so that float32 follows torch's matmul precision setting. ``scale`` rides on the product
(cuBLAS ``alpha``), before any rounding. As in every product over dense blocks, an infinity or NaN in a *visible* row of an
average also reaches the other rows of its block, though never those of another sequence.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnreg import Window
from attnreg_cublas.call import Call

# MiB of dense blocks at a time.
WORKSPACE = 256


def local_dot_product(
    query: Tensor,
    key: Tensor,
    window: Window,
    *,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    scale: float,
    block: int | None = None,
    workspace: int = WORKSPACE,
) -> Tensor:
    """Scores: S = scale * Q.K^T + bias on the band."""
    call = Call(query, key, window, bias, key_lengths, block, workspace)
    return call.band(query, key, scale=scale, hidden=-math.inf)


def local_dot_product_backward(
    grad_scores: Tensor,
    query: Tensor,
    key: Tensor,
    window: Window,
    *,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    scale: float,
    needs_grad: tuple[bool, bool, bool],
    block: int | None = None,
    workspace: int = WORKSPACE,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients: dQ = scale * dS.K, dK = scale * dS^T.Q, dbias = dS summed to the shape of the bias."""
    call = Call(query, key, window, bias, key_lengths, block, workspace)
    grad_query = call.average(grad_scores, key, scale=scale) if needs_grad[0] else None
    grad_key = call.average_by_key(grad_scores, query, scale=scale) if needs_grad[1] else None
    grad_bias = None
    if needs_grad[2] and bias is not None:
        grad_bias = sum_to(call.masked(grad_scores), bias)
    return grad_query, grad_key, grad_bias


def local_weighted_average(
    weights: Tensor,
    value: Tensor,
    window: Window,
    *,
    key_lengths: Tensor | None,
    block: int | None = None,
    workspace: int = WORKSPACE,
) -> Tensor:
    """Output: O = A.V over the band."""
    return Call(weights, value, window, None, key_lengths, block, workspace).average(weights, value)


def local_weighted_average_backward(
    grad_output: Tensor,
    weights: Tensor,
    value: Tensor,
    window: Window,
    *,
    key_lengths: Tensor | None,
    needs_grad: tuple[bool, bool],
    block: int | None = None,
    workspace: int = WORKSPACE,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients: dA = dO.V^T on the band, dV = A^T.dO."""
    call = Call(weights, value, window, None, key_lengths, block, workspace)
    grad_weights = call.band(grad_output, value, scale=1.0, hidden=0.0) if needs_grad[0] else None
    grad_value = call.average_by_key(weights, grad_output) if needs_grad[1] else None
    return grad_weights, grad_value


def sum_to(band: Tensor, bias: Tensor) -> Tensor:
    """The gradient of a bias from that of its broadcast: summed to its shape, in fp32 or wider."""
    broadcast = [dim for dim in range(4) if bias.size(dim) == 1]
    if not broadcast:
        return band.to(bias.dtype)
    wide = torch.promote_types(torch.float32, bias.dtype)
    return band.sum(broadcast, keepdim=True, dtype=wide).to(bias.dtype)
