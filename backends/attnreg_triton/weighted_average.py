"""``local_weighted_average``: the values in a window averaged with given weights, and the gradients."""

from __future__ import annotations

from torch import Tensor

from attnreg import Window
from attnreg_triton.band_average import band_average
from attnreg_triton.band_average_transposed import band_average_transposed
from attnreg_triton.band_dot import band_dot


def local_weighted_average(weights: Tensor, value: Tensor, window: Window, *, key_lengths: Tensor | None) -> Tensor:
    """``O = P V`` over the visible slots of the band P."""
    return band_average(weights, value, window, like=weights, key_lengths=key_lengths)


def local_weighted_average_backward(
    grad_output: Tensor,
    weights: Tensor,
    value: Tensor,
    window: Window,
    *,
    key_lengths: Tensor | None,
    needs_grad: frozenset[str],
) -> dict[str, Tensor]:
    """``dP = dO V^T`` on the band and ``dV = P^T dO``, over the visible slots."""
    gradients = {}
    if "weights" in needs_grad:
        gradients["weights"] = band_dot(grad_output, value, window, like=weights, key_lengths=key_lengths, fill=0.0)
    if "value" in needs_grad:
        gradients["value"] = band_average_transposed(weights, grad_output, window, like=value, key_lengths=key_lengths)
    return gradients
