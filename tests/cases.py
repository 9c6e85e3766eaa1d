"""The cases of ``attnreg.testing.cases`` as the tests of one thing each write them: by op, with the bias among the tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnreg import Window
from attnreg.op import OPS as OPS
from attnreg.testing import cases as kit
from attnreg.testing.case import make_case


@dataclass(frozen=True)
class Case:
    """One call's shapes and options, as ``make_case`` takes them."""

    name: str
    batch: int = 2
    heads: int = 2
    kv_heads: int = 2
    query_length: int = 37
    key_length: int = 37
    head_dim: int = 16
    value_dim: int = 16
    window: Window = field(default_factory=lambda: Window.causal(8))
    bias: str | None = None
    hidden: float = 0.0
    bias_dtype: torch.dtype | None = None
    key_lengths: tuple[int, ...] | None = None
    layout: str = "contiguous"
    scale: float | None = None
    further: dict[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


def _of_kit(case: kit.Case) -> Case:
    problem, bias = case.problem, case.problem.gives("bias")
    letters = None if bias is None else "".join("1" if size == 1 else each for size, each in zip(bias.shape, "NHLW"))
    sizes = ("batch", "heads", "kv_heads", "query_length", "key_length", "head_dim", "value_dim", "window")
    return Case(
        case.name,
        **{name: getattr(problem, name) for name in sizes},
        bias=letters,
        hidden=case.hidden,
        bias_dtype=dict(case.dtypes).get("bias"),
        layout=case.layout,
        **dict(case.values),
    )


CASES = [_of_kit(case) for case in kit.CASES]


@dataclass
class Inputs:
    """The tensors of one case, and the gradient to send back."""

    tensors: dict[str, Tensor]
    key_lengths: Tensor | None
    options: dict[str, object]
    grad: Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        """A copy in another dtype; the bias too."""
        return Inputs(
            {name: tensor.detach().to(dtype) for name, tensor in self.tensors.items()},
            self.key_lengths,
            self.options,
            self.grad.to(dtype),
        )


def make_inputs(op: str, case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Inputs:
    """Random tensors for one case, ``further`` arguments as ``make_case`` takes them; the incoming gradient is random too: one of ones would hide a flipped window."""
    facts = {**case.__dict__}
    facts.update(facts.pop("further"))
    # The whole case first: its arguments are those of attention, of which an op may lack some.
    whole = make_case(**facts, dtype=dtype, device=device, seed=seed)
    drawn = whole.of(op, dtype, torch.device(device)).draw()
    given = dict(drawn.arguments)
    tensors, key_lengths = dict(drawn.tensors), given.pop("key_lengths", None)
    for name in ("bias", "sinks"):
        if name in given:
            tensors[name] = given.pop(name)
    return Inputs(tensors, key_lengths, given, drawn.upstream)
