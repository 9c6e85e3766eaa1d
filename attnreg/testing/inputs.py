"""The tensors of a call, and what is done with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnreg.measuring.sizes import result_shape, tensor_shapes
from attnreg.op import ROWS, Argument
from attnreg.problem import Given, Problem

Gradients = tuple[Tensor, ...]

# What a number is where a call gives one: a factor, a bound or a share, it may be all of these.
NUMBER = 0.5
# How many sequences a random pack has at the most, and how many keys each has about.
MOST_SEQUENCES, KEYS_OF_A_SEQUENCE = 16, 256


@dataclass(frozen=True, eq=False)
class Inputs:
    """One set of tensors for a call.

    Attributes:
        tensors: the op's tensors by name, in the order in which it takes them.
        arguments: the optional arguments that are given, by name.
        upstream: the gradient of the result, in its shape.
        incoming: those of further results, by the results' names, where the call asks for these.
    """

    tensors: Mapping[str, Tensor]
    arguments: Mapping[str, Any]
    upstream: Tensor
    incoming: Mapping[str, Tensor] = field(default_factory=dict)

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
    for name, gradient in target.incoming.items():
        gradient.copy_(source.incoming[name])


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


def autograd_calls(function: Callable[..., Any], inputs: Inputs) -> Calls:
    """The calls of a differentiable function of the tensors, and by name the arguments.

    The backward is ``torch.autograd.grad`` alone. Of a function that returns several results the first is taken, unless the
    inputs have incoming gradients for more.
    """

    def forward() -> Tensor:
        with torch.no_grad():
            results = function(*inputs.tensors.values(), **inputs.arguments)
            output: Tensor = results[0] if isinstance(results, tuple) else results
            return output

    def make_backward() -> Callable[[], Gradients]:
        leaves, results = call_with_leaves(function, inputs)
        return lambda: gradients_of(results, leaves, inputs, retain_graph=True)

    return Calls(forward, make_backward)


def gradients_of(results: Any, leaves: Sequence[Tensor], inputs: Inputs, *, retain_graph: bool = False) -> Gradients:
    """The gradients of ``leaves`` under all gradients that come in: one result, or one for each incoming gradient."""
    found = results if isinstance(results, tuple) else (results,)
    incoming = zip(found, (inputs.upstream, *inputs.incoming.values()))
    # The log-sum-exp knows nothing of the values.
    pairs = [(result, gradient) for result, gradient in incoming if result.requires_grad]
    return torch.autograd.grad(
        [result for result, _ in pairs], list(leaves), [gradient for _, gradient in pairs], retain_graph=retain_graph
    )


def call_with_leaves(function: Callable[..., Any], inputs: Inputs) -> tuple[list[Tensor], Any]:
    """A call whose result can be differentiated, and what by: leaves that share the inputs' memory."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.leaves.items()}
    arguments = {name: leaves.get(name, given) for name, given in inputs.arguments.items()}
    return list(leaves.values()), function(*(leaves[name] for name in inputs.tensors), **arguments)


def incoming_shapes(problem: Problem) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the gradients that come in beside that of the result users get, by the results' names."""
    op = ROWS[problem.op]
    return {
        name: (tuple(problem.size(letter) for letter in row.dims), row.dtype(problem.dtype))
        for name, row in op.results.items()
        if problem.gives(f"grad_{name}") is not None
    }


def random_inputs(problem: Problem, generator: torch.Generator) -> Inputs:
    """Tensors of standard normal numbers: zeros would hide errors, and can run faster than real data do."""

    def random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype, device=problem.device)

    def argument(row: Argument, given: Given) -> Any:
        if given.dtype is None:
            return NUMBER
        if row.kind == "floating":
            return random(given.shape, given.dtype)
        return random_integers(problem, row, given, generator)

    rows = {row.name: row for row in ROWS[problem.op].arguments}
    return Inputs(
        {name: random(shape, problem.dtype) for name, shape in tensor_shapes(problem).items()},
        {name: argument(rows[name], given) for name, given in problem.given if name in rows},
        random(result_shape(problem), problem.dtype),
        {name: random(shape, dtype) for name, (shape, dtype) in incoming_shapes(problem).items()},
    )


def random_integers(problem: Problem, row: Argument, given: Given, generator: torch.Generator) -> Tensor:
    """Of an argument of integers random ones: offsets of about as many sequences as there may be, rows that see keys."""
    assert given.dtype is not None
    device = generator.device
    if row.at_most is None and row.dims == "1":
        info = torch.iinfo(given.dtype)
        numbers = torch.randint(info.min, info.max, given.shape, generator=generator, dtype=given.dtype, device=device)
    elif row.ascends:
        most = problem.size(row.at_most or "")
        # As many for queries as for keys, whatever the lengths of both.
        count = min(MOST_SEQUENCES, max(problem.query_length, problem.key_length) // KEYS_OF_A_SEQUENCE) + 1
        ends = torch.randint(most + 1, (count - 1,), generator=generator, device=device).sort().values
        numbers = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), most)])
    else:
        # A length of 0 leaves nothing to compute; a start does so near the end.
        most = problem.size(row.at_most) if row.at_most is not None else problem.key_length
        numbers = torch.randint(most + 1, given.shape, generator=generator, device=device).clamp(min=min(1, most))
        if row.name != "key_lengths":
            numbers = numbers // 4
    return numbers.to(given.dtype).to(problem.device)
