"""Which keys a row of a case sees, by the sentence of the contract; and how what is hidden is spoilt."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attnreg.op import ROWS
from attnreg.problem import Problem
from attnreg.testing.case import Case
from attnreg.testing.inputs import Inputs


@dataclass(frozen=True, eq=False)
class Visibility:
    """What is seen in a call, on the CPU.

    Attributes:
        keys: (N, H, Lq, Lk), which keys a row sees.
        slots: (N, H, Lq, W), which slots of its window hold a key that it sees.
        problem: the call.
    """

    keys: Tensor
    slots: Tensor
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


def visibility(case: Case, inputs: Inputs) -> Visibility:
    """What is seen in a case with these tensors. No size of it may be 0."""
    problem = case.problem
    shape = (problem.batch, problem.heads, problem.query_length, problem.key_length)
    position = torch.arange(problem.query_length)[:, None] + problem.key_length - problem.query_length
    slot = torch.arange(problem.key_length) - position + problem.window.left
    keys = ((slot >= 0) & (slot < problem.window.size)).expand(shape)
    lengths = inputs.arguments.get("key_lengths")
    if lengths is not None:
        keys = keys & (torch.arange(problem.key_length) < lengths.cpu().view(-1, 1, 1, 1))
    bias = inputs.arguments.get("bias")
    if bias is not None:
        band = bias.detach().double().cpu().expand(*shape[:3], problem.window.size)
        keys = keys & (band.gather(-1, slot.clamp(0, problem.window.size - 1).expand(shape)) != -math.inf)
    key = position - problem.window.left + torch.arange(problem.window.size)
    there = (key >= 0) & (key < problem.key_length)
    slots = keys.gather(-1, key.clamp(0, problem.key_length - 1).expand(*shape[:3], -1)) & there
    return Visibility(keys, slots, problem)


def spoil(case: Case, inputs: Inputs, bad: float) -> Inputs:
    """The same call with ``bad`` wherever nothing may look: as new tensors, each in its place in memory."""
    seen = visibility(case, inputs)
    device = inputs.upstream.device

    def spoilt(tensor: Tensor, kept: Tensor) -> Tensor:
        kept = kept.to(device)
        return tensor.where(kept if kept.dim() == tensor.dim() else kept[..., None], bad)

    row = ROWS[case.problem.op]
    tensors = {}
    for name, dims in row.tensors.items():
        kept = seen.slots if "W" in dims else seen.seeing if "Q" in dims else seen.seen
        tensors[name] = spoilt(inputs.tensors[name], kept)
    result = next(iter(row.results.values()))
    upstream = spoilt(inputs.upstream, seen.slots if "W" in result.dims else seen.seeing)
    return Inputs(tensors, inputs.arguments, upstream)
