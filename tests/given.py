"""What calls may give beside their tensors: a table of examples by which tests go through all of it, on every backend that takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from running import runs
from torch import Tensor

import attnreg
from attnreg import Window
from attnreg.op import OPS, ROWS, Op

WINDOW = Window(3, 2)
SIZES = {"N": 2, "H": 4, "G": 2, "Q": 7, "K": 9, "E": 8, "D": 8, "W": WINDOW.size}


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


# Tensors of floating point get the dtype of the call's. Some rows see no key, and some keys no row.
EXAMPLES: Mapping[str, Mapping[str, Any]] = {
    "nothing": {},
    "bias": {"bias": _random(4, 7, 6).masked_fill(_random(4, 7, 6) > 0.8, -torch.inf)},
    "key_lengths": {"key_lengths": torch.tensor([9, 4])},
    "key_starts": {"key_starts": torch.tensor([3, 0], dtype=torch.int32)},
    "query_starts": {"query_starts": torch.tensor([-2, 5])},
    "all of rows": {
        "key_lengths": torch.tensor([8, 9]),
        "key_starts": torch.tensor([2, 0]),
        "query_starts": torch.tensor([0, 4]),
    },
    "packed": {"cu_seqlens_q": torch.tensor([0, 2, 2, 6], dtype=torch.int32)},
    "packed, other keys": {"cu_seqlens_q": torch.tensor([0, 3, 7]), "cu_seqlens_k": torch.tensor([0, 5, 8])},
    "packed, bias": {"cu_seqlens_q": torch.tensor([0, 4, 7]), "bias": _random(4, 1, 6)},
    "softcap": {"softcap": 0.7},
    "sinks": {"sinks": _random(4)},
    "dropout": {"dropout_p": 0.4, "seed": torch.tensor([-(2**40) - 5])},
    "everything": {
        "bias": _random(1, 4, 7, 6),
        "key_starts": torch.tensor([1, 0]),
        "key_lengths": torch.tensor([9, 6]),
        "scale": 0.6,
        "softcap": 1.5,
        "sinks": _random(4),
        "dropout_p": 0.3,
        "seed": torch.tensor([11]),
    },
}


@dataclass(frozen=True)
class Call:
    """A call with an example, on leaves of autograd.

    Attributes:
        op: its row.
        tensors: the op's tensors by name.
        given: the example, by name.
        upstream: a gradient for each result, by name.
    """

    op: Op
    tensors: dict[str, Tensor]
    given: dict[str, Any]
    upstream: dict[str, Tensor]

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What has a gradient, by name."""
        floating = {
            name: each for name, each in self.given.items() if isinstance(each, Tensor) and each.is_floating_point()
        }
        return {**self.tensors, **floating}

    @property
    def everything(self) -> dict[str, Tensor]:
        """All its tensors, by name."""
        given = {name: each for name, each in self.given.items() if isinstance(each, Tensor)}
        return {**self.tensors, **given}

    def leaf(self, **leaves: Tensor) -> Call:
        """The call with other tensors in the place of these."""
        return replace(
            self,
            tensors={name: leaves.get(name, each) for name, each in self.tensors.items()},
            given={name: leaves.get(name, each) for name, each in self.given.items()},
        )

    def results(self, backend: str | None = None, *, function: Any = None, **changes: Any) -> tuple[Tensor, ...]:
        """The results of its public function, or of another one."""
        function = function or getattr(attnreg, self.op.name)
        found = function(*self.tensors.values(), WINDOW, **{**self.given, **changes}, backend=backend)
        return found if isinstance(found, tuple) else (found,)

    def with_gradients(self, backend: str | None = None, **changes: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The first result, and the gradients of all leaves."""
        result, *_ = self.results(backend, **changes)
        upstream = next(iter(self.upstream.values()))
        return result.detach(), dict(
            zip(self.leaves, torch.autograd.grad(result, list(self.leaves.values()), upstream))
        )


def make_call(op: str, example: str, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Call:
    """A call of an op with an example."""
    row, given = ROWS[op], dict(EXAMPLES[example])
    sizes = {**SIZES, "N": 1} if "cu_seqlens_q" in given else SIZES
    if "cu_seqlens_k" not in given and "cu_seqlens_q" in given:
        sizes = {**sizes, "K": sizes["Q"]}
    generator = torch.Generator().manual_seed(seed)

    def tensor(dims: str, dtype: torch.dtype) -> Tensor:
        return torch.randn([sizes[letter] for letter in dims], generator=generator).to(dtype).to(device)

    for name, each in given.items():
        if isinstance(each, Tensor):
            on = each.to(device)
            given[name] = on.to(dtype).requires_grad_() if on.is_floating_point() else on
    return Call(
        row,
        {name: tensor(dims, dtype).requires_grad_() for name, dims in row.tensors.items()},
        given,
        {name: tensor(result.dims, result.dtype(dtype)) for name, result in row.results.items()},
    )


def has(op: str, example: str) -> bool:
    """Whether an op has all that an example gives."""
    return {argument.name for argument in ROWS[op].arguments}.issuperset(EXAMPLES[example])


PAIRS = [pytest.param(op, example, id=f"{op}-{example}") for op in OPS for example in EXAMPLES if has(op, example)]


def taking(*dtypes: torch.dtype, more: tuple[str, ...] = (), ops: tuple[str, ...] = OPS) -> list[Any]:
    """Parameters (op, example, backend, device, dtype): what each backend takes, with these further arguments."""
    taken = {status.name: status.backend.taken for status in attnreg.backends() if status.backend is not None}
    return [
        pytest.param(*pair.values, *run.values, marks=run.marks, id=f"{pair.id}-{run.id}")
        for run in runs(*dtypes)
        for pair in PAIRS
        if pair.values[0] in ops and pair.values[0] in taken[run.values[0]]
        if ({*EXAMPLES[pair.values[1]], *more} & ROWS[pair.values[0]].optional) <= taken[run.values[0]][pair.values[0]]
    ]
