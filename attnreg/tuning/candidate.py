"""Measuring one candidate on one call: right first, then fast."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from attnreg.functional import local_attention, local_attention_with_lse, local_dot_product, local_weighted_average
from attnreg.measured import WRONG, Figure, now
from attnreg.measuring.failure import is_out_of_memory, release
from attnreg.measuring.steadiness import copy_seconds, waited_seconds
from attnreg.measuring.timing import Timing, measure, measuring_stream
from attnreg.op import ROWS
from attnreg.printable import printable, told
from attnreg.problem import Problem
from attnreg.testing.checking import check
from attnreg.testing.inputs import Inputs, autograd_calls, call_with_leaves, gradients_of
from attnreg.testing.stage import set_stage
from attnreg.tuning.settings import of_its_own

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function for function in (local_attention, local_dot_product, local_weighted_average)
}
# The candidates for a call are measured one after another.
_stage = lru_cache(maxsize=1)(set_stage)


@dataclass(frozen=True)
class Measurement:
    """One candidate, measured once.

    Attributes:
        figure: what was found.
        copy_seconds: what a copy took right after (see ``attnreg.measuring.steadiness``); None where there is no time.
        waited: for what part of the time threads waited for a core; None where there is no time, on a GPU, or nobody says.
    """

    figure: Figure
    copy_seconds: float | None = None
    waited: float | None = None


def measure_candidate(problem: Problem, backend: str, seconds: float) -> Measurement:
    """The time of ``backend`` on a call, or the reason why there is none.

    Args:
        problem: the call; with gradients forward and backward are measured together, otherwise the forward alone.
        backend: the candidate's name.
        seconds: about how long to sample.
    """
    with of_its_own(problem.device):
        try:
            return _measured(problem, backend, seconds)
        # Whatever a candidate raises is its own affair.
        except Exception as error:
            return failed(told(error), passing=is_out_of_memory(error))
        finally:
            release()


def function_of(problem: Problem) -> Callable[..., Any]:
    """The public function that makes such a call: one that gives all results where gradients of others than the first come in."""
    has_others = any(problem.gives(row.name) is not None for row in ROWS[problem.op].incoming)
    return local_attention_with_lse if has_others else _FUNCTIONS[problem.op]


def _measured(problem: Problem, backend: str, seconds: float) -> Measurement:
    device, gradients = problem.device, problem.needs_grad
    try:
        stage = _stage(replace(problem, needs_grad=False))
    except (RuntimeError, MemoryError) as error:
        return failed(f"its inputs cannot be made: {told(error)}", passing=True)
    run = partial(function_of(problem), window=problem.window, backend=backend)
    with measuring_stream(device):
        calls = [autograd_calls(run, inputs) for inputs in stage.sets]
        for direction in ("forward", "backward") if gradients else ("forward",):
            verdict = check(problem, direction, calls[0], stage.sets[0], stage.expected)
            if verdict.fault is not None:
                return failed(f"{WRONG}{verdict.fault}")
        timed = [_both(run, inputs) if gradients else each.forward for each, inputs in zip(calls, stage.sets)]
        timing, waited = _timed(timed, device, seconds)
    figure = Figure(seconds=timing.median, spread=timing.spread, measured=now())
    return Measurement(figure, copy_seconds(device), waited)


def _timed(calls: Sequence[Callable[[], object]], device: torch.device, seconds: float) -> tuple[Timing, float | None]:
    before, start = waited_seconds(), time.perf_counter()
    timing = measure(calls, device, seconds=seconds)
    elapsed, after = time.perf_counter() - start, waited_seconds()
    if device.type != "cpu" or before is None or after is None:
        return timing, None
    return timing, (after - before) / elapsed


def failed(reason: str, *, passing: bool = False) -> Measurement:
    """One without a time; ``passing`` says whether it may have one the next time."""
    return Measurement(Figure(reason=printable(reason), measured=now(), passing=passing))


def _both(run: Callable[..., Any], inputs: Inputs) -> Callable[[], Sequence[Tensor]]:
    def both() -> Sequence[Tensor]:
        leaves, results = call_with_leaves(run, inputs)
        return gradients_of(results, leaves, inputs)

    return both


def forget_stage() -> None:
    """Give the inputs of the last call back."""
    _stage.cache_clear()
    release()
