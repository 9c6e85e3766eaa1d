"""``local_dot_product``: the scores of a query against the keys in its window, and their gradients."""

from __future__ import annotations

from torch import Tensor

from attnreg import Window
from attnreg_triton.band_average import band_average
from attnreg_triton.band_average_transposed import band_average_transposed
from attnreg_triton.band_dot import band_dot
from attnreg_triton.bias_gradient import band_sum
from attnreg_triton.rows import place


def local_dot_product(
    query: Tensor, key: Tensor, window: Window, *, bias: Tensor | None, scale: float, **rows: Tensor | None
) -> Tensor:
    """``S = scale * Q K^T + bias`` on the band, -inf in invisible slots; ``rows`` are the arguments of ``rows.place``."""
    here = place(query.shape[2], key.shape[2], window, by_key=False, **rows)
    return band_dot(query, key, window, here, like=query, bias=bias, scale=scale, fill=float("-inf"))


def local_dot_product_backward(
    grad_scores: Tensor,
    query: Tensor,
    key: Tensor,
    window: Window,
    *,
    bias: Tensor | None,
    scale: float,
    needs_grad: frozenset[str],
    **rows: Tensor | None,
) -> dict[str, Tensor]:
    """``dQ = scale * dS K``, ``dK = scale * dS^T Q`` and ``dbias = dS``, over the visible slots."""
    here = place(query.shape[2], key.shape[2], window, by_key="key" in needs_grad, **rows)
    gradients = {}
    if "query" in needs_grad:
        gradients["query"] = band_average(grad_scores, key, window, here, like=query, bias=bias, scale=scale)
    if "key" in needs_grad:
        gradients["key"] = band_average_transposed(grad_scores, query, window, here, like=key, bias=bias, scale=scale)
    if "bias" in needs_grad and bias is not None:
        gradients["bias"] = band_sum(grad_scores, here, bias=bias, len_k=key.shape[2])
    return gradients
