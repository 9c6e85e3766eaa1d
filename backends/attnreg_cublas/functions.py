"""The functions of the backend: pack, one batched product, band.

The products are torch's own, so that float32 follows torch's matmul precision setting. ``scale`` rides on the product
(cuBLAS ``alpha``), before any rounding. As in every product over dense blocks, an infinity or NaN in a *visible* row
also reaches the other rows of its block.
"""

from __future__ import annotations

import math

from torch import Tensor

from attnreg import Window
from attnreg_cublas.operands import Operands, product, sum_to


def local_dot_product(
    query: Tensor, key: Tensor, window: Window, *, bias: Tensor | None, key_lengths: Tensor | None, scale: float
) -> Tensor:
    """Scores: S = scale * Q.K^T + bias on the band."""
    operands = Operands(query, key, window, bias, key_lengths)
    dense = product(operands.query_rows(query), operands.key_columns(key).mT, scale)
    return operands.gather(dense, hidden=-math.inf)


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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients: dQ = scale * dS.K, dK = scale * dS^T.Q, dbias = dS summed to the shape of the bias."""
    operands = Operands(query, key, window, bias, key_lengths)
    grad_query = grad_key = grad_bias = None
    if needs_grad[0]:
        rows = product(operands.scatter(grad_scores), operands.key_columns(key), scale)
        grad_query = operands.unpack_queries(rows, query.size(3))
    if needs_grad[1]:
        rows = product(operands.scatter_by_key(grad_scores).mT, operands.query_columns(query), scale, operands.group)
        grad_key = operands.unpack_keys(rows, key.size(3))
    if needs_grad[2] and bias is not None:
        grad_bias = sum_to(operands.mask(grad_scores), bias)
    return grad_query, grad_key, grad_bias


def local_weighted_average(weights: Tensor, value: Tensor, window: Window, *, key_lengths: Tensor | None) -> Tensor:
    """Output: O = A.V over the band."""
    operands = Operands(weights, value, window, None, key_lengths)
    rows = product(operands.scatter(weights), operands.key_columns(value))
    return operands.unpack_queries(rows, value.size(3))


def local_weighted_average_backward(
    grad_output: Tensor,
    weights: Tensor,
    value: Tensor,
    window: Window,
    *,
    key_lengths: Tensor | None,
    needs_grad: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients: dA = dO.V^T on the band, dV = A^T.dO."""
    operands = Operands(weights, value, window, None, key_lengths)
    grad_weights = grad_value = None
    if needs_grad[0]:
        dense = product(operands.query_rows(grad_output), operands.key_columns(value).mT)
        grad_weights = operands.gather(dense, hidden=0.0)
    if needs_grad[1]:
        rows = product(operands.scatter_by_key(weights).mT, operands.query_columns(grad_output), heads=operands.group)
        grad_value = operands.unpack_keys(rows, value.size(3))
    return grad_weights, grad_value
