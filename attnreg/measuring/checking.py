"""Whether a result is right: only then does its time count."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attnreg.measuring.inputs import Calls, Inputs
from attnreg.measuring.reference import Strip, complete_parts, compute, inputs_of, parts_of, strips
from attnreg.measuring.task import Task
from attnreg.precision import allow_tf32

# What counts as fp32-accurate even where the naive computation happens to be better, and as TF32-accurate where torch's
# setting allows TF32: two factors of 11 bits.
FP32_ACCURATE, TF32_ACCURATE = 1e-6, 2**-10
# How many rounding steps of the largest gradient may be left where another one vanishes.
STEPS_OF_NOTHING = 8


@dataclass(frozen=True, eq=False)
class Expected:
    """The truth on one strip.

    Attributes:
        strip: where.
        truth: the complete parts in float64, by name: "output", and the gradient of each input by the input's name.
        sizes: for each the norm that its error is divided by.
        limits: for each the largest relative error that passes.
    """

    strip: Strip
    truth: dict[str, Tensor]
    sizes: dict[str, float]
    limits: dict[str, float]


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


def expectations(task: Task, inputs: Inputs) -> tuple[Expected, ...]:
    """The truth on every strip, with the error budget: twice that of the naive computation in the same dtype plus a rounding.

    In float32, an error of 1e-6 passes as well, or of 2^-10 where torch's setting allows TF32. A softmax over one key is
    constant: its gradients vanish, as a difference of equal terms, and may keep a few rounding steps of the others.
    """
    accurate = TF32_ACCURATE if allow_tf32() else FP32_ACCURATE
    expected = []
    for strip in strips(task):
        truth = _complete(task, strip, inputs, torch.float64)
        naive = _complete(task, strip, inputs, task.dtype)
        rounding = torch.finfo(task.dtype).eps
        least = accurate if task.dtype == torch.float32 else 0.0
        sizes = {name: float(part.where(part.isfinite(), 0).norm()) for name, part in truth.items()}
        limits = {}
        largest = max(sizes[name] for name in task.inputs)
        for name, part in truth.items():
            if name in task.inputs and sizes[name] < rounding * largest:
                sizes[name], limits[name] = largest, max(STEPS_OF_NOTHING * rounding, least)
            else:
                limits[name] = max(2 * relative_error(naive[name], part, sizes[name]) + rounding, least)
        expected.append(Expected(strip, truth, sizes, limits))
    return tuple(expected)


def check(task: Task, direction: str, calls: Calls, inputs: Inputs, expected: tuple[Expected, ...]) -> Verdict:
    """Run one direction once and compare it with the truth.

    Memory that the result is likely to get is filled with NaN first, so that an element nobody writes shows.
    """
    output, gradients = None, None
    if direction == "forward":
        _poison((inputs.upstream,))
        output = calls.forward()
        shapes = {"output": (output, task.output)}
    else:
        run = calls.make_backward()
        _poison(inputs.tensors)
        gradients = run()
        shapes = dict(zip(task.inputs, zip(gradients, task.inputs.values())))
    for name, (given, shape) in shapes.items():
        if tuple(given.shape) != shape or given.dtype != task.dtype:
            return Verdict({}, f"{name}: has shape {tuple(given.shape)}, {given.dtype}; expected {shape}")
        if bool(given.isnan().any()):
            return Verdict({}, f"{name}: holds NaN")
    errors: dict[str, float] = {}
    fault = None
    for each in expected:
        for name, part in parts_of(task, each.strip, output, gradients).items():
            error = relative_error(part, each.truth[name], each.sizes[name])
            errors[name] = max(error, errors.get(name, 0.0))
            if not error <= each.limits[name] and fault is None:
                fault = (
                    f"{name}: relative error {error:.1e} exceeds {each.limits[name]:.1e}, in queries "
                    f"{each.strip.rows.start} to {each.strip.rows.stop - 1} of sequence {each.strip.batch}"
                )
    return Verdict(errors, fault)


def relative_error(given: Tensor, truth: Tensor, size: float) -> float:
    """``norm(given - truth) / size`` over the finite elements of ``truth``; infinite if the others are not equal."""
    finite = truth.isfinite()
    if not bool((given.to(truth.dtype) == truth)[~finite].all()):
        return math.inf
    wrong = float((given.to(truth.dtype) - truth).where(finite, 0).norm())
    return wrong / size if size else (math.inf if wrong else 0.0)


def _complete(task: Task, strip: Strip, inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    output, gradients = compute(task, strip, inputs_of(task, strip, inputs, dtype))
    return complete_parts(task, strip, output, gradients)


def _poison(tensors: tuple[Tensor, ...]) -> None:
    """Leave NaN in freed memory of these sizes; the allocator hands it out again next."""
    poison = [torch.full_like(tensor, torch.nan) for tensor in tensors]
    del poison
