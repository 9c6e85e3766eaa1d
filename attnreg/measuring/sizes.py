"""How large a call is: its sizes, the shapes of its tensors, the bytes that it moves."""

from __future__ import annotations

from math import prod

import torch

from attnreg.op import ROWS
from attnreg.problem import Problem
from attnreg.window import Window


def square_problem(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int, int],
    window: Window,
    *,
    needs_grad: bool = False,
) -> Problem:
    """A call with as many queries as keys, values as wide as keys, and no optional argument; ``sizes`` are N, H, Hkv, L, E."""
    batch, heads, kv_heads, length, width = sizes
    letters = "".join(ROWS[op].tensors.values())
    return Problem(
        op=op,
        device=device,
        dtype=dtype,
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        query_length=length,
        key_length=length,
        head_dim=width if "E" in letters else 0,
        value_dim=width if "D" in letters else 0,
        window=window,
        needs_grad=needs_grad,
    )


def tensor_shapes(problem: Problem) -> dict[str, tuple[int, ...]]:
    """The shapes of the op's tensors by name, in the order in which it takes them."""
    return {name: _shape(problem, dims) for name, dims in ROWS[problem.op].tensors.items()}


def result_shape(problem: Problem) -> tuple[int, ...]:
    """The shape of what users get, which is that of the gradient sent back."""
    return _shape(problem, next(iter(ROWS[problem.op].results.values())).dims)


def bytes_moved(problem: Problem, direction: str) -> int:
    """The bytes of every tensor that must be read or written.

    Forward: what the call gives, and its result. Backward: what it gives, the incoming gradient and a gradient of all that has
    one; and the result, where the op's backward gets it.
    """
    op = ROWS[problem.op]
    size = problem.dtype.itemsize
    tensors = size * sum(map(prod, tensor_shapes(problem).values()))
    result = size * prod(result_shape(problem))
    given = {name: prod(each.shape) * each.dtype.itemsize for name, each in problem.given if each.dtype is not None}
    inputs = tensors + sum(given.values())
    if direction == "forward":
        return inputs + result
    gradients = tensors + sum(given[name] for name in given if name in op.differentiable)
    return inputs + gradients + result * (2 if op.keeps_results else 1)


def _shape(problem: Problem, dims: str) -> tuple[int, ...]:
    return tuple(problem.size(letter) for letter in dims)
