"""``local_weighted_average``: the values in a window averaged with given weights, and the gradients."""

from __future__ import annotations

from torch import Tensor

from attnreg import Window
from attnreg_triton.band_average import band_average
from attnreg_triton.band_average_transposed import band_average_transposed
from attnreg_triton.band_dot import band_dot


def local_weighted_average(weights: Tensor, value: Tensor, window: Window, *, key_lengths: Tensor | None) -> Tensor:
    """``O = P V`` over the visible slots of the band P."""
    return band_average(weights, value, window, key_lengths=key_lengths)


def local_weighted_average_backward(
    grad_output: Tensor,
    weights: Tensor,
    value: Tensor,
    window: Window,
    *,
    key_lengths: Tensor | None,
    needs_grad: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """``dP = dO V^T`` on the band and ``dV = P^T dO``, over the visible slots."""
    needs_weights, needs_value = needs_grad
    grad_weights = grad_value = None
    if needs_weights:
        grad_weights = band_dot(grad_output, value, window, key_lengths=key_lengths, fill=0.0)
    if needs_value:
        grad_value = band_average_transposed(
            weights, grad_output, window, key_shape=value.shape, key_lengths=key_lengths
        )
    return grad_weights, grad_value
