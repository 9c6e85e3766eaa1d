"""Measuring one candidate on one call: right first, then fast."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import lru_cache, partial

import torch
from torch import Tensor

from attnreg import functional
from attnreg.measured import Figure
from attnreg.measuring.sizes import bytes_moved
from attnreg.measuring.steadiness import copy_seconds
from attnreg.measuring.timing import measure, measuring_stream, sets_for_cold_cache
from attnreg.problem import Problem
from attnreg.testing.checking import Expected, check, expectations
from attnreg.testing.inputs import Inputs, autograd_calls, call_with_leaves, random_inputs


@dataclass(frozen=True, eq=False)
class Stage:
    """What the candidates for one call share: inputs enough to make the cache cold, and the truth on the first."""

    sets: tuple[Inputs, ...]
    expected: tuple[Expected, ...]


@dataclass(frozen=True)
class Measurement:
    """One candidate, measured once.

    Attributes:
        figure: what was found.
        copy_seconds: what a copy took right after (see ``attnreg.measuring.steadiness``); None where there is no time.
    """

    figure: Figure
    copy_seconds: float | None = None


def measure_candidate(problem: Problem, backend: str, seconds: float) -> Measurement:
    """The time of ``backend`` on a call, or the reason why there is none.

    Args:
        problem: the call; with gradients forward and backward are measured together, otherwise the forward alone.
        backend: the candidate's name.
        seconds: about how long to sample.
    """
    device, gradients = problem.device, problem.needs_grad
    try:
        stage = _stage(replace(problem, needs_grad=False))
    except (RuntimeError, MemoryError) as error:
        return failed(f"its inputs cannot be made: {first_line(error)}")
    run: Callable[..., Tensor] = partial(getattr(functional, problem.op), window=problem.window, backend=backend)
    try:
        with measuring_stream(device):
            calls = [autograd_calls(run, inputs) for inputs in stage.sets]
            for direction in ("forward", "backward") if gradients else ("forward",):
                verdict = check(problem, direction, calls[0], stage.sets[0], stage.expected)
                if verdict.fault is not None:
                    return failed(f"wrong: {verdict.fault}")
            timed = [_both(run, inputs) if gradients else each.forward for each, inputs in zip(calls, stage.sets)]
            timing = measure(timed, device, seconds=seconds)
        figure = Figure(seconds=timing.median, spread=timing.spread, measured=now())
        return Measurement(figure, copy_seconds(device))
    # Whatever a candidate raises is its own affair.
    except Exception as error:
        return failed(first_line(error))
    finally:
        calls, timed = [], []
        _release()


def why_unusable(device: torch.device) -> str | None:
    """Why nothing more can run on the device in this process; None where it can."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        torch.zeros(1, device=device).item()
    except RuntimeError as error:
        return first_line(error)
    return None


def failed(reason: str) -> Measurement:
    """One without a time."""
    return Measurement(Figure(reason=reason, measured=now()))


def now() -> str:
    """The time in UTC, as tables hold it."""
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")


def first_line(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def _both(run: Callable[..., Tensor], inputs: Inputs) -> Callable[[], Sequence[Tensor]]:
    def both() -> Sequence[Tensor]:
        leaves, output = call_with_leaves(run, inputs)
        return torch.autograd.grad(output, leaves, inputs.upstream)

    return both


@lru_cache(maxsize=1)
def _stage(problem: Problem) -> Stage:
    generator = torch.Generator(problem.device).manual_seed(0)
    with measuring_stream(problem.device):
        count = sets_for_cold_cache(bytes_moved(problem, "forward"), problem.device)
        sets = tuple(random_inputs(problem, generator) for _ in range(count))
        return Stage(sets, expectations(problem, sets[0]))


def forget_stage() -> None:
    """Give the inputs of the last call back."""
    _stage.cache_clear()
    _release()


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        with suppress(RuntimeError):  # a device that has become unusable is told by why_unusable
            torch.cuda.empty_cache()
