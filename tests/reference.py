"""What is true: the three ops written down densely, in any dtype, with nothing of attnreg in it but Window's two numbers.

In float64 this is the truth; in a lower precision it is the naive computation by which the error budget is set.
"""

from __future__ import annotations

import torch
from cases import Inputs
from torch import Tensor

from attnreg import Window


def call(op: str, inputs: Inputs, window: Window, **options: object) -> tuple[Tensor, dict[str, Tensor]]:
    """The op's value and all its gradients, as attnreg gives them."""
    import attnreg

    function = getattr(attnreg, op)
    return _with_gradients(
        lambda tensors: function(
            *(tensors[name] for name in tensors if name != "bias"),
            window,
            **({"bias": tensors["bias"]} if "bias" in tensors else {}),
            key_lengths=inputs.key_lengths,
            **inputs.options,
            **options,
        ),
        inputs,
    )


def truth(op: str, inputs: Inputs, window: Window) -> tuple[Tensor, dict[str, Tensor]]:
    """The op's value and all its gradients, computed densely in the dtype of the inputs."""
    return _with_gradients(lambda tensors: _DENSE[op](tensors, inputs, window), inputs)


def _with_gradients(function, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
    # detach() keeps the strides, which clone() would not: a case's layout must reach the function.
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.tensors.items()}
    output = function(leaves)
    output.backward(inputs.grad)
    return output.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def positions(query_length: int, key_length: int, window: Window, device: torch.device) -> Tensor:
    """The key of each slot, (Lq, W), by the one sentence of the contract: -left <= j - (i + len_k - len_q) <= right."""
    rows = torch.arange(query_length, device=device)[:, None] + key_length - query_length
    return rows + torch.arange(-window.left, window.right + 1, device=device)


def visible_slots(inputs: Inputs, query_length: int, key_length: int, window: Window, device: torch.device) -> Tensor:
    key = positions(query_length, key_length, window, device)
    visible = ((key >= 0) & (key < key_length))[None, None]
    if inputs.key_lengths is not None:
        visible = visible & (key < inputs.key_lengths.view(-1, 1, 1, 1))
    return visible


def _dot_product(tensors: dict[str, Tensor], inputs: Inputs, window: Window, scale: float) -> tuple[Tensor, Tensor]:
    query, key = tensors["query"], tensors["key"]
    key = key.repeat_interleave(query.shape[1] // max(key.shape[1], 1), 1)
    shape = (*query.shape[:3], window.size)
    at = positions(query.shape[2], key.shape[2], window, query.device)
    visible = visible_slots(inputs, query.shape[2], key.shape[2], window, query.device).expand(shape)
    if key.shape[2] == 0:
        return (0 * query.sum() + 0 * key.sum()) + query.new_full(shape, -torch.inf), visible
    dense = scale * (query @ key.mT)
    scores = dense.gather(-1, at.clamp(0, key.shape[2] - 1).expand(shape))
    if "bias" in tensors:
        visible = visible & (tensors["bias"] != -torch.inf)
        scores = scores + tensors["bias"].where(tensors["bias"] != -torch.inf, 0).to(scores.dtype)
    return scores.where(visible, -torch.inf), visible


def _average(weights: Tensor, value: Tensor, visible: Tensor, window: Window) -> Tensor:
    value = value.repeat_interleave(weights.shape[1] // max(value.shape[1], 1), 1)
    length = value.shape[2]
    if length == 0:
        return 0 * weights.sum() + 0 * value.sum() + weights.new_zeros((*weights.shape[:3], value.shape[3]))
    at = positions(weights.shape[2], length, window, value.device).clamp(0, length - 1)
    dense = weights.new_zeros((*weights.shape[:3], length))
    dense = dense.scatter_add(-1, at.expand(weights.shape), weights.where(visible, 0))
    return dense @ value


def _dense_dot_product(tensors, inputs, window):
    return _dot_product(tensors, inputs, window, inputs.options.get("scale", 1.0))[0]


def _dense_weighted_average(tensors, inputs, window):
    weights, value = tensors["weights"], tensors["value"]
    visible = visible_slots(inputs, weights.shape[2], value.shape[2], window, value.device).expand(weights.shape)
    return _average(weights, value, visible, window)


def _dense_attention(tensors, inputs, window):
    scale = inputs.options.get("scale", tensors["query"].shape[-1] ** -0.5)
    scores, visible = _dot_product(tensors, inputs, window, scale)
    some = visible.any(-1, keepdim=True)
    weights = scores.where(some, 0).softmax(-1).where(visible, 0)
    return _average(weights, tensors["value"], visible, window)


_DENSE = {
    "local_dot_product": _dense_dot_product,
    "local_weighted_average": _dense_weighted_average,
    "local_attention": _dense_attention,
}


def brute_force_visible(query_length: int, key_length: int, left: int, right: int) -> set[tuple[int, int, int]]:
    """All (row, slot, key) that are visible, by loops and nothing else."""
    return {
        (i, j - (i + key_length - query_length) + left, j)
        for i in range(query_length)
        for j in range(key_length)
        if -left <= j - (i + key_length - query_length) <= right
    }
