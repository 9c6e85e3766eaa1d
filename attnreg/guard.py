"""Whether a call's tensors are like those of an earlier call: by a guard, as torch's compiler guards what it has compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Guard = Callable[..., bool]

# It is torch's own, and no promise.
_TensorGuards: Any = getattr(torch._C._dynamo.guards, "TensorGuards", None)


def guard(tensors: Sequence[Tensor]) -> Guard:
    """A function of as many tensors: whether each is like its counterpart here in all that a plan depends on.

    That is its class, dtype, device, layout, shape, ``requires_grad``, and whether it is to be negated when it is read; strides
    do not count. ``Tensor.is_nested`` has to be asked before: torch's guard ends the process where a nested tensor is given.
    """
    # One call in C++ costs a fifth of asking in Python. It takes no tensor twice.
    if _TensorGuards is not None and len({id(tensor) for tensor in tensors}) == len(tensors):
        sizes = [[*tensor.shape] for tensor in tensors]
        any_strides = [[None] * tensor.dim() for tensor in tensors]
        check: Guard = _TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=any_strides).check
        return check
    facts = [_facts(tensor) for tensor in tensors]

    def are_alike(*others: Any) -> bool:
        return torch._C._get_tracing_state() is None and [_facts(other) for other in others] == facts

    return are_alike


def _facts(tensor: Any) -> tuple[object, ...]:
    if not isinstance(tensor, Tensor):
        return ()
    return (
        type(tensor),
        tensor.dtype,
        tensor.device,
        tensor.layout,
        tensor.shape,
        tensor.requires_grad,
        tensor.is_neg(),
    )
