"""Who is measured: what a backend and a peer have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attnreg_benchmarks.workloads import Workload

Gradients = tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Inputs:
    """One set of tensors for a workload.

    Attributes:
        tensors: the op's tensors, in the order in which it takes them, that of ``Workload.inputs``.
        upstream: the gradient of the output, in the output's shape.
    """

    tensors: tuple[Tensor, ...]
    upstream: Tensor


@dataclass(frozen=True)
class Calls:
    """What a contender does with one set of inputs.

    Attributes:
        forward: gives the output in the workload's layout (N, H, L, D), or (N, H, L, W) for ``local_dot_product``.
        make_backward: runs what a backward needs of the forward, outside of any measurement, and gives the backward: a call
            that gives the gradients of all inputs, in their order and shapes.
    """

    forward: Callable[[], Tensor]
    make_backward: Callable[[], Callable[[], Gradients]]


@dataclass(frozen=True)
class Contender:
    """A backend of attnreg, or a peer: another library's implementation of the same op.

    Attributes:
        name: what it is called in results.
        kind: "backend" or "peer".
        ops: the ops that it has; it is not asked for others.
        refuse: ``(workload, direction, device) -> reason`` why it cannot run that there, or None.
        prepare: ``(workload, inputs) -> Calls``; called once for each set of inputs. It and what it returns may raise.
    """

    name: str
    kind: str
    ops: tuple[str, ...]
    refuse: Callable[[Workload, str, torch.device], str | None]
    prepare: Callable[[Workload, Inputs], Calls]


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


def random_inputs(workload: Workload, device: torch.device, generator: torch.Generator) -> Inputs:
    """Tensors of standard normal numbers: zeros would hide errors, and can run faster than real data do."""

    def random(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=workload.dtype, device=device)

    return Inputs(tuple(map(random, workload.inputs.values())), random(workload.output))
