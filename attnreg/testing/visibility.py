"""Which keys a row of a case sees, by the sentence of the contract; and how what is hidden is spoilt."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnreg.op import ROWS
from attnreg.problem import Problem
from attnreg.testing.case import Case
from attnreg.testing.inputs import Inputs
from attnreg.testing.placing import placing


@dataclass(frozen=True, eq=False)
class Visibility:
    """What is seen in a call, on the CPU.

    Attributes:
        keys: (N, H, Lq, Lk), which keys a row sees.
        slots: (N, H, Lq, W), which slots of its window hold a key that it sees; None where nothing of the call has slots.
        problem: the call.
    """

    keys: Tensor
    slots: Tensor | None
    problem: Problem

    @property
    def seeing(self) -> Tensor:
        """(N, H, Lq): which rows see a key."""
        return self.keys.any(-1)

    @property
    def seen(self) -> Tensor:
        """(N, Hkv, Lk): which keys some row sees."""
        problem = self.problem
        groups = (problem.batch, problem.kv_heads, problem.heads // problem.kv_heads, -1)
        return self.keys.any(2).view(groups).any(2)

    def of(self, dims: str) -> Tensor:
        """What is seen of a tensor with these sizes, of all but its last one where that holds what is seen or not as a whole."""
        if "W" in dims:
            assert self.slots is not None
            return self.slots
        return self.seeing if "Q" in dims else self.seen


def visibility(case: Case, inputs: Inputs) -> Visibility:
    """What is seen in a case with these tensors. No size of it may be 0."""
    problem = case.problem
    window, cpu = problem.window, torch.device("cpu")
    shape = (problem.batch, problem.heads, problem.query_length, problem.key_length)
    place = placing(problem.query_length, problem.key_length, window, inputs.arguments, cpu)
    keys = place.visible.expand(shape)
    bias = inputs.arguments.get("bias")
    if bias is not None:
        band = bias.detach().double().cpu()
        if bias.shape[-1] > 1:
            slot = place.slot_of_key.clamp(0, window.size - 1).expand(shape)
            band = band.expand(*shape[:3], window.size).gather(-1, slot)
        keys = keys & (band != -math.inf)
    slots = None
    if ROWS[problem.op].has_slots or (bias is not None and bias.shape[-1] > 1):
        key = place.key_of_slot
        there = (key >= 0) & (key < problem.key_length)
        slots = keys.gather(-1, key.clamp(0, problem.key_length - 1).expand(*shape[:3], -1)) & there
    return Visibility(keys, slots, problem)


def spoil(case: Case, inputs: Inputs, bad: float) -> Inputs:
    """The same call with ``bad`` wherever nothing may look: as new tensors, each in its place in memory."""
    seen = visibility(case, inputs)
    device = inputs.upstream.device

    def spoilt(tensor: Tensor, dims: str) -> Tensor:
        kept = seen.of(dims).to(device)
        return tensor.where(kept if kept.dim() == tensor.dim() else kept[..., None], bad)

    row = ROWS[case.problem.op]
    return replace(
        inputs,
        tensors={name: spoilt(inputs.tensors[name], dims) for name, dims in row.tensors.items()},
        upstream=spoilt(inputs.upstream, next(iter(row.results.values())).dims),
        incoming={name: spoilt(gradient, row.results[name].dims) for name, gradient in inputs.incoming.items()},
    )
