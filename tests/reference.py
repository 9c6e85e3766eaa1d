"""Calls of attnreg beside the oracle: a value and all gradients of one case, from both."""

from __future__ import annotations

import torch
from cases import Inputs
from torch import Tensor

from attnreg import Window
from attnreg.op import ROWS
from attnreg.testing import oracle


def call(op: str, inputs: Inputs, window: Window, **options: object) -> tuple[Tensor, dict[str, Tensor]]:
    """The op's value and all its gradients, as attnreg gives them."""
    import attnreg

    function = getattr(attnreg, op)
    # detach() keeps the strides, which clone() would not: a case's layout must reach the function.
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.tensors.items()}
    output = function(
        *(leaves[name] for name in ROWS[op].tensors),
        window,
        **{name: leaf for name, leaf in leaves.items() if name not in ROWS[op].tensors},
        key_lengths=inputs.key_lengths,
        **inputs.options,
        **options,
    )
    gradients = torch.autograd.grad(output, list(leaves.values()), inputs.grad)
    return output.detach(), dict(zip(leaves, gradients))


def truth(op: str, inputs: Inputs, window: Window) -> tuple[Tensor, dict[str, Tensor]]:
    """The op's value and all its gradients, computed densely in the dtype of the inputs."""
    row = ROWS[op]
    (result, *_) = row.results
    tensors = {name: inputs.tensors[name] for name in row.tensors}
    arguments = {**inputs.tensors, "key_lengths": inputs.key_lengths, **inputs.options}
    arguments = {name: given for name, given in arguments.items() if name not in row.tensors}
    found = oracle.truth(row, tensors, window, arguments, {result: inputs.grad})
    return found.results[result], dict(found.gradients)


def brute_force_visible(query_length: int, key_length: int, left: int, right: int) -> set[tuple[int, int, int]]:
    """All (row, slot, key) that are visible, by loops and nothing else."""
    return {
        (i, j - (i + key_length - query_length) + left, j)
        for i in range(query_length)
        for j in range(key_length)
        if -left <= j - (i + key_length - query_length) <= right
    }
