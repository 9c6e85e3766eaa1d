"""``local_weighted_average``: the values in a window averaged with given weights, and the gradients."""

from __future__ import annotations

from torch import Tensor

from attnreg import Window
from attnreg_triton.band_average import band_average
from attnreg_triton.band_average_transposed import band_average_transposed
from attnreg_triton.band_dot import band_dot
from attnreg_triton.rows import place


def local_weighted_average(weights: Tensor, value: Tensor, window: Window, **rows: Tensor | None) -> Tensor:
    """``O = P V`` over the visible slots of the band P; ``rows`` are the arguments of ``rows.place``."""
    here = place(weights.shape[2], value.shape[2], window, by_key=False, **rows)
    return band_average(weights, value, window, here, like=weights)


def local_weighted_average_backward(
    grad_output: Tensor,
    weights: Tensor,
    value: Tensor,
    window: Window,
    *,
    needs_grad: frozenset[str],
    **rows: Tensor | None,
) -> dict[str, Tensor]:
    """``dP = dO V^T`` on the band and ``dV = P^T dO``, over the visible slots."""
    here = place(weights.shape[2], value.shape[2], window, by_key="value" in needs_grad, **rows)
    gradients = {}
    if "weights" in needs_grad:
        gradients["weights"] = band_dot(grad_output, value, window, here, like=weights, fill=0.0)
    if "value" in needs_grad:
        gradients["value"] = band_average_transposed(weights, grad_output, window, here, like=value)
    return gradients
