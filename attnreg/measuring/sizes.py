"""How large a call is: its sizes, the shapes of its tensors, the bytes that it moves."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from math import prod

import torch

from attnreg.op import ROWS, SIZES, Argument, Op
from attnreg.problem import Given, Problem
from attnreg.request import did_you_mean
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


def with_given(problem: Problem, names: Collection[str]) -> Problem:
    """``problem`` with these optional arguments given, and those that they need; incoming gradients by their names, likewise.

    Tensors are as calls mostly have them: of a bias a row for each head, (1, H, 1, W), in the dtype of the op's tensors; integers
    of 64 bits.

    Raises:
        ValueError: the op has no such argument, or they do not go together.
    """
    rows = {row.name: row for row in ROWS[problem.op].extras if not row.for_all}
    for name in names:
        if name not in rows:
            raise ValueError(
                f"{problem.op} has no optional argument {name!r}{did_you_mean(name, list(rows))}; it has {', '.join(rows)}"
            )
    chosen = [rows[name] for name in with_needed(ROWS[problem.op], names)]
    for row in chosen:
        if row in ROWS[problem.op].incoming and not problem.needs_grad:
            raise ValueError(f"{row.name} comes in where gradients are needed alone")
        for other in chosen:
            if other.name in row.excludes:
                raise ValueError(f"{row.name} and {other.name} cannot be given together")
        for letter, size in row.sizes.items():
            if problem.size(letter) != size:
                raise ValueError(f"with {row.name}, the {SIZES[letter]} is {size}; got {problem.size(letter)}")
    return replace(problem, given=tuple((row.name, _usually_given(problem, row)) for row in chosen))


def with_needed(op: Op, names: Collection[str]) -> tuple[str, ...]:
    """Those of these optional arguments that ``op`` has, and those that they need, in the order of its row."""
    needed = {row.needs for row in op.extras if row.name in names}
    return tuple(row.name for row in op.extras if row.name in names or row.name in needed)


def _usually_given(problem: Problem, row: Argument) -> Given:
    if row.dims is None:
        return Given()
    sizes = {letter: problem.size(letter) for letter in row.dims if letter not in "1S"}
    if row.broadcasts:
        sizes |= {"N": 1, "Q": 1, "1": 1}
    dtype = problem.dtype if row.kind == "floating" else torch.int64
    return Given(tuple(sizes[letter] for letter in row.dims if letter != "S"), dtype)


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
