"""``local_dot_product``: the scores of a query against the keys in its window, and their gradients."""

from __future__ import annotations

from torch import Tensor

from attnreg import Window
from attnreg_triton.band_average import band_average
from attnreg_triton.band_average_transposed import band_average_transposed
from attnreg_triton.band_dot import band_dot
from attnreg_triton.bias_gradient import band_sum


def local_dot_product(
    query: Tensor, key: Tensor, window: Window, *, bias: Tensor | None, key_lengths: Tensor | None, scale: float
) -> Tensor:
    """``S = scale * Q K^T + bias`` on the band, -inf in invisible slots."""
    return band_dot(query, key, window, bias=bias, key_lengths=key_lengths, scale=scale, fill=float("-inf"))


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
    """``dQ = scale * dS K``, ``dK = scale * dS^T Q`` and ``dbias = dS``, over the visible slots."""
    needs_query, needs_key, needs_bias = needs_grad
    grad_query = grad_key = grad_bias = None
    if needs_query:
        grad_query = band_average(grad_scores, key, window, bias=bias, key_lengths=key_lengths, scale=scale)
    if needs_key:
        grad_key = band_average_transposed(
            grad_scores, query, window, key_shape=key.shape, bias=bias, key_lengths=key_lengths, scale=scale
        )
    if needs_bias and bias is not None:
        grad_bias = band_sum(grad_scores, window, bias=bias, key_lengths=key_lengths, len_k=key.shape[2])
    return grad_query, grad_key, grad_bias
