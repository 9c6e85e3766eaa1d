"""The tensors of a call, and what is done with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnreg.measuring.sizes import result_shape, tensor_shapes
from attnreg.op import ROWS, Argument
from attnreg.problem import Given, Problem

Gradients = tuple[Tensor, ...]

# What a number is where a call gives one: a factor, a bound or a share, it may be all of these.
NUMBER = 0.5


@dataclass(frozen=True, eq=False)
class Inputs:
    """One set of tensors for a call.

    Attributes:
        tensors: the op's tensors by name, in the order in which it takes them.
        arguments: the optional arguments that are given, by name.
        upstream: the gradient of the result, in its shape.
    """

    tensors: Mapping[str, Tensor]
    arguments: Mapping[str, Any]
    upstream: Tensor

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What has a gradient, by name: the tensors, and those of the arguments that are of floating point."""
        floating = {
            name: given
            for name, given in self.arguments.items()
            if isinstance(given, Tensor) and given.is_floating_point()
        }
        return {**self.tensors, **floating}


def copy_into(target: Inputs, source: Inputs) -> None:
    """Write the numbers of another call of the same shapes into these tensors."""
    for name, tensor in target.tensors.items():
        tensor.copy_(source.tensors[name])
    for name, given in target.arguments.items():
        if isinstance(given, Tensor):
            given.copy_(source.arguments[name])
    target.upstream.copy_(source.upstream)


@dataclass(frozen=True)
class Calls:
    """What is done with one set of inputs.

    Attributes:
        forward: gives the result in the op's layout.
        make_backward: runs what a backward needs of the forward, outside of any measurement, and gives the backward: a call
            that gives the gradients of ``Inputs.leaves``, in their order and shapes.
    """

    forward: Callable[[], Tensor]
    make_backward: Callable[[], Callable[[], Gradients]]


def autograd_calls(function: Callable[..., Tensor], inputs: Inputs) -> Calls:
    """The calls of a differentiable function of the tensors, and by name the arguments.

    The backward is ``torch.autograd.grad`` alone.
    """

    def forward() -> Tensor:
        with torch.no_grad():
            return function(*inputs.tensors.values(), **inputs.arguments)

    def make_backward() -> Callable[[], Gradients]:
        leaves, output = call_with_leaves(function, inputs)
        return lambda: torch.autograd.grad(output, leaves, inputs.upstream, retain_graph=True)

    return Calls(forward, make_backward)


def call_with_leaves(function: Callable[..., Tensor], inputs: Inputs) -> tuple[list[Tensor], Tensor]:
    """A call whose result can be differentiated, and what by: leaves that share the inputs' memory."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.leaves.items()}
    arguments = {name: leaves.get(name, given) for name, given in inputs.arguments.items()}
    return list(leaves.values()), function(*(leaves[name] for name in inputs.tensors), **arguments)


def random_inputs(problem: Problem, generator: torch.Generator) -> Inputs:
    """Tensors of standard normal numbers: zeros would hide errors, and can run faster than real data do."""

    def random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype, device=problem.device)

    def argument(row: Argument, given: Given) -> Any:
        if given.dtype is None:
            return NUMBER
        if row.kind == "floating":
            return random(given.shape, given.dtype)
        assert row.at_most is not None
        most = problem.size(row.at_most)
        return torch.randint(
            most + 1, given.shape, generator=generator, dtype=given.dtype, device=problem.device
        ).clamp_(min=min(1, most))

    rows = {row.name: row for row in ROWS[problem.op].arguments}
    return Inputs(
        {name: random(shape, problem.dtype) for name, shape in tensor_shapes(problem).items()},
        {name: argument(rows[name], given) for name, given in problem.given},
        random(result_shape(problem), problem.dtype),
    )
