"""How it is measured: for each workload, contender and direction, the result is checked, and timed only if it is right."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from attnreg import Problem
from attnreg.device import why_unusable
from attnreg.measuring.failure import release
from attnreg.measuring.timing import Call, Timing, measure, measuring_stream
from attnreg.printable import told
from attnreg.testing.checking import Verdict, check
from attnreg.testing.stage import Stage, set_stage
from attnreg_benchmarks.contender import Contender
from attnreg_benchmarks.floor import Ceilings, floor_seconds

# How long one call is sampled, in seconds.
SAMPLING_SECONDS = 0.15


@dataclass(frozen=True)
class Record:
    """What was found out about one contender on one workload in one direction.

    Attributes:
        workload: the workload's name.
        direction: "forward" or "backward".
        contender: the backend's or the peer's name.
        kind: "backend" or "peer".
        floor: the physical floor in seconds.
        seconds: a call's time, the median of all runs; None where there is none.
        spread: seconds between the quartiles within a run, the largest of all runs.
        runs: the median of each run, in seconds.
        method: how it was timed, see :class:`attnreg.measuring.timing.Timing`.
        errors: relative errors by name: "output", or the gradient of each input by the input's name.
        reason: why there is no time; None where there is one.
    """

    workload: str
    direction: str
    contender: str
    kind: str
    floor: float
    seconds: float | None = None
    spread: float | None = None
    runs: tuple[float, ...] = ()
    method: str | None = None
    errors: dict[str, float] = field(default_factory=dict)
    reason: str | None = None

    @property
    def fraction(self) -> float | None:
        """``floor / seconds``: 1.0 is the physical limit."""
        return None if self.seconds is None else self.floor / self.seconds


def verify(stage: Stage, contender: Contender, direction: str) -> Verdict:
    """Run one direction once, and compare it with the truth."""
    with measuring_stream(stage.problem.device):
        first = stage.sets[0]
        calls = contender.prepare(stage.problem, first)
        return check(stage.problem, direction, calls, first, stage.expected)


def clock(stage: Stage, contender: Contender, direction: str, seconds: float = SAMPLING_SECONDS) -> Timing:
    """Time one direction over all sets of inputs."""
    with measuring_stream(stage.problem.device):
        prepared = [contender.prepare(stage.problem, inputs) for inputs in stage.sets]
        forward = direction == "forward"
        calls: list[Call] = [each.forward if forward else each.make_backward() for each in prepared]
        return measure(calls, stage.problem.device, seconds=seconds)


def run(
    workloads: Mapping[str, Problem],
    contenders: Sequence[Contender],
    directions: Sequence[str],
    device: torch.device,
    ceilings: Ceilings,
    repeat: int = 1,
) -> Iterator[Record]:
    """Measure every contender on every workload in every direction, ``repeat`` times over; one record for each time.

    A contender that refuses, is wrong, raises or runs out of memory costs only itself: its record has the reason. Only one that
    leaves the device unusable ends the measuring; whatever follows then has that for its reason.
    """
    unusable: str | None = None
    settled: dict[tuple[str, str, str], Record] = {}
    for repetition in range(repeat):
        for name, workload in workloads.items():
            problem = replace(workload, device=device)
            stage: Stage | str = unusable or _try_to_set_stage(problem, repetition)
            for contender in (each for each in contenders if problem.op in each.ops):
                for direction in directions:
                    floor = floor_seconds(problem, direction, ceilings)
                    blank = Record(name, direction, contender.name, contender.kind, floor)
                    key = (name, contender.name, direction)
                    record = settled.get(key, blank)
                    if record.reason is None and unusable is not None:
                        record = replace(record, reason=unusable)
                    elif record.reason is None:
                        record = _measured(record, stage, contender, direction)
                        fault = why_unusable(device) if record.reason is not None else None
                        if fault is not None:
                            unusable = f"not run: {contender.name} left the device unusable ({fault})"
                    # Later repetitions keep the errors, and whatever stands against a time.
                    settled[key] = replace(record, seconds=None, spread=None, runs=(), method=None)
                    yield record
            del stage


def merge(records: Iterable[Record]) -> tuple[Record, ...]:
    """One record for each workload, contender and direction: the median of its runs; a reason goes before any time."""
    grouped: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        grouped.setdefault((record.workload, record.contender, record.direction), []).append(record)
    return tuple(map(_merged, grouped.values()))


def _merged(records: Sequence[Record]) -> Record:
    failed = [record for record in records if record.reason is not None]
    if failed:
        return failed[0]
    runs = tuple(record.seconds for record in records if record.seconds is not None)
    spread = max(record.spread or 0.0 for record in records)
    return replace(records[0], seconds=statistics.median(runs), spread=spread, runs=runs)


def _measured(record: Record, stage: Stage | str, contender: Contender, direction: str) -> Record:
    """``record`` with a time, or with the reason why there is none."""
    if isinstance(stage, str):
        return replace(record, reason=stage)
    try:
        reason = contender.refuse(replace(stage.problem, needs_grad=direction == "backward"))
        if reason is not None:
            return replace(record, reason=reason)
        if not record.errors:
            verdict = verify(stage, contender, direction)
            record = replace(record, errors=verdict.errors)
            if verdict.fault is not None:
                return replace(record, reason=f"wrong: {verdict.fault}")
        timing = clock(stage, contender, direction)
    # Whatever a contender raises is its own affair.
    except Exception as error:
        reason = told(error)
    else:
        return replace(record, seconds=timing.median, spread=timing.spread, runs=(timing.median,), method=timing.method)
    release()  # not before the traceback, and with it the contender's tensors, is gone
    return replace(record, reason=reason)


def _try_to_set_stage(problem: Problem, seed: int) -> Stage | str:
    """The stage, or why there is none."""
    try:
        return set_stage(problem, seed)
    except (RuntimeError, MemoryError) as error:
        return f"its inputs cannot be made: {told(error)}"
