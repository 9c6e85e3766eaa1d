"""Whether a result is right: only then does its time count."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attnreg.measuring.sizes import result_shape
from attnreg.op import ATTENTION
from attnreg.problem import Problem
from attnreg.testing.budget import Budget, budget
from attnreg.testing.inputs import Calls, Inputs
from attnreg.testing.oracle import Strip, parts_of, scores_of, strips, truth_of


@dataclass(frozen=True, eq=False)
class Expected:
    """The truth on one strip.

    Attributes:
        strip: where.
        truth: the complete parts in float64, by name: "output", and the gradient of each leaf by the leaf's name.
        budgets: for each which error passes.
    """

    strip: Strip
    truth: Mapping[str, Tensor]
    budgets: Mapping[str, Budget]


@dataclass(frozen=True)
class Verdict:
    """What a check found.

    Attributes:
        errors: by name, ``norm(result - truth) / norm(truth)`` on the strip where it is largest; over the norm of the call's
            largest gradient for one that vanishes.
        fault: the first thing that is wrong, or None.
    """

    errors: dict[str, float]
    fault: str | None


def expectations(problem: Problem, inputs: Inputs) -> tuple[Expected, ...]:
    """The truth on every strip, with the error budget."""
    expected = []
    for strip in strips(problem, inputs):
        truth, terms = truth_of(problem, strip, inputs, torch.float64)
        naive, _ = truth_of(problem, strip, inputs, problem.dtype)
        gradients = [part for name, part in truth.items() if name != "output"]
        score = largest_score(problem, strip, inputs)
        budgets = {
            name: budget(
                part,
                naive[name],
                problem.dtype,
                () if name == "output" else gradients,
                largest_score=score,
                terms=terms.get(name),
            )
            for name, part in truth.items()
        }
        expected.append(Expected(strip, truth, budgets))
    return tuple(expected)


def largest_score(problem: Problem, strip: Strip, inputs: Inputs) -> float:
    """The size of the largest score that has a part in attention, in float64; 0 for another call: its budget does not ask for it.

    One that is far below its row's largest has a weight of 0, however it is rounded. Where not a digit of a score is left behind
    the point, as of the lowest number there is, a row says nothing of the others.
    """
    if problem.op != ATTENTION.name or problem.dtype != torch.float64:
        return 0.0
    scores = scores_of(problem, strip, inputs)
    sinks = inputs.arguments.get("sinks")
    if sinks is not None:
        # One more number that a row's exponentials are a sum of.
        group = problem.heads // problem.kv_heads
        of_strip = sinks[strip.kv_heads.start * group : strip.kv_heads.stop * group]
        scores = torch.cat([scores, of_strip.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)], -1)
    if not scores.numel():
        return 0.0
    step = torch.finfo(torch.float64).eps
    counts = scores.isfinite() & (scores >= scores.amax(-1, keepdim=True) + math.log(step)) & (scores.abs() * step < 1)
    return float(scores.where(counts, 0).abs().max())


def check(problem: Problem, direction: str, calls: Calls, inputs: Inputs, expected: tuple[Expected, ...]) -> Verdict:
    """Run one direction once and compare it with the truth.

    Memory that the result is likely to get is filled with NaN first, so that an element nobody writes shows.
    """
    output: Tensor | None = None
    gradients: dict[str, Tensor] = {}
    if direction == "forward":
        _poison((inputs.upstream,))
        output = calls.forward()
        shapes = {"output": (output, result_shape(problem), problem.dtype)}
    else:
        run = calls.make_backward()
        _poison(tuple(inputs.leaves.values()))
        gradients = dict(zip(inputs.leaves, run()))
        shapes = {name: (gradients[name], tuple(leaf.shape), leaf.dtype) for name, leaf in inputs.leaves.items()}
    for name, (given, shape, dtype) in shapes.items():
        if tuple(given.shape) != shape or given.dtype != dtype:
            return Verdict({}, f"{name}: has shape {tuple(given.shape)}, {given.dtype}; expected {shape}")
        if bool(given.isnan().any()):
            return Verdict({}, f"{name}: holds NaN")
    errors: dict[str, float] = {}
    fault = None
    for each in expected:
        for name, part in parts_of(problem, each.strip, inputs, output, gradients).items():
            errors[name] = max(each.budgets[name].error(part, each.truth[name]), errors.get(name, 0.0))
            wrong = each.budgets[name].fault(part, each.truth[name])
            if wrong is not None and fault is None:
                fault = f"{name}: {wrong}, in {each.strip}"
    return Verdict(errors, fault)


def _poison(tensors: tuple[Tensor, ...]) -> None:
    """Leave NaN in freed memory of these sizes; the allocator hands it out again next."""
    poison = [torch.full_like(tensor, torch.nan) for tensor in tensors]
    del poison
