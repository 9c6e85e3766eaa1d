"""What is measured: one op on one shape."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from attnreg.problem import Problem
from attnreg.window import Window

FUSED, DOT, AVERAGE = "local_attention", "local_dot_product", "local_weighted_average"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One op on one shape, with as many queries as keys, as values as head dims, no bias and no key lengths.

    Attributes:
        op: one of ``attnreg.problem.OPS``.
        batch: N.
        heads: H, the query heads.
        kv_heads: Hkv, the key and value heads.
        length: L, the number of queries and of keys.
        head_dim: E and D, the last dimension of query, key and value.
        window: which keys a query sees; W = ``window.size``.
        dtype: of every tensor.
    """

    op: str
    batch: int
    heads: int
    kv_heads: int
    length: int
    head_dim: int
    window: Window
    dtype: torch.dtype

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the op's tensors by name, in the order in which it takes them."""
        query = (self.batch, self.heads, self.length, self.head_dim)
        key = (self.batch, self.kv_heads, self.length, self.head_dim)
        if self.op == DOT:
            return {"query": query, "key": key}
        if self.op == AVERAGE:
            return {"weights": self._band, "value": key}
        return {"query": query, "key": key, "value": key}

    @property
    def output(self) -> tuple[int, ...]:
        """The output's shape, which is that of the gradient sent back."""
        return self._band if self.op == DOT else (self.batch, self.heads, self.length, self.head_dim)

    @property
    def _band(self) -> tuple[int, ...]:
        return (self.batch, self.heads, self.length, self.window.size)

    def problem(self, device: torch.device, *, needs_grad: bool) -> Problem:
        """The call as attnreg's dispatcher sees it."""
        return Problem(
            op=self.op,
            device=device,
            dtype=self.dtype,
            batch=self.batch,
            heads=self.heads,
            kv_heads=self.kv_heads,
            query_length=self.length,
            key_length=self.length,
            head_dim=0 if self.op == AVERAGE else self.head_dim,
            value_dim=0 if self.op == DOT else self.head_dim,
            window=self.window,
            needs_grad=needs_grad,
        )

    def __str__(self) -> str:
        return (
            f"{self.op} {self.batch},{self.heads},{self.kv_heads},{self.length},{self.head_dim} "
            f"{str(self.dtype).removeprefix('torch.')} {self.window}"
        )


def bytes_moved(task: Task, direction: str) -> int:
    """The bytes of every tensor that must be read or written.

    Forward: the inputs and the output. Backward: the inputs, the incoming gradient and the inputs' gradients; the fused op
    also reads its output.
    """
    inputs = sum(map(prod, task.inputs.values()))
    output = prod(task.output)
    elements = {"forward": inputs + output, "backward": 2 * inputs + output * (2 if task.op == FUSED else 1)}
    return elements[direction] * torch.finfo(task.dtype).bits // 8
