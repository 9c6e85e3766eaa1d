"""The tensors of a task, and the calls that are made with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attnreg.measuring.task import Task

Gradients = tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Inputs:
    """One set of tensors for a task.

    Attributes:
        tensors: the op's tensors, in the order in which it takes them, that of ``Task.inputs``.
        upstream: the gradient of the output, in the output's shape.
    """

    tensors: tuple[Tensor, ...]
    upstream: Tensor


@dataclass(frozen=True)
class Calls:
    """What is done with one set of inputs.

    Attributes:
        forward: gives the output in the task's layout (N, H, L, D), or (N, H, L, W) for ``local_dot_product``.
        make_backward: runs what a backward needs of the forward, outside of any measurement, and gives the backward: a call
            that gives the gradients of all inputs, in their order and shapes.
    """

    forward: Callable[[], Tensor]
    make_backward: Callable[[], Callable[[], Gradients]]


def autograd_calls(function: Callable[..., Tensor], inputs: Inputs) -> Calls:
    """The calls of a differentiable function of the inputs' tensors; the backward is ``torch.autograd.grad`` alone."""

    def forward() -> Tensor:
        with torch.no_grad():
            return function(*inputs.tensors)

    def make_backward() -> Callable[[], Gradients]:
        leaves = [tensor.detach().requires_grad_() for tensor in inputs.tensors]
        output = function(*leaves)
        return lambda: torch.autograd.grad(output, leaves, inputs.upstream, retain_graph=True)

    return Calls(forward, make_backward)


def random_inputs(task: Task, device: torch.device, generator: torch.Generator) -> Inputs:
    """Tensors of standard normal numbers: zeros would hide errors, and can run faster than real data do."""

    def random(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=task.dtype, device=device)

    return Inputs(tuple(map(random, task.inputs.values())), random(task.output))
