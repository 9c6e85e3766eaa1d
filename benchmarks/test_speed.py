"""Every workload of this machine's kind on every contender, for pytest-benchmark: its storage, comparison and statistics.

``make bench`` runs it. A round is one whole measurement as ``attnreg bench`` makes it; its figure is that measurement's median.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from attnreg_benchmarks.backends import backends
from attnreg_benchmarks.floor import floor_seconds
from attnreg_benchmarks.machine import ceilings
from attnreg_benchmarks.peers import PEERS
from attnreg_benchmarks.run import clock, verify
from attnreg_benchmarks.workloads import DIRECTIONS, select

from attnreg.testing.stage import set_stage

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONTENDERS = (*backends(), *PEERS)
ROUNDS = 3

limits = functools.cache(lambda: ceilings(DEVICE))
stage_of = functools.lru_cache(maxsize=1)(set_stage)


class MeasuredTime:
    """A timer for pytest-benchmark that shows what was measured: on a GPU the host's clock would show something else."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def parameters():
    for name, problem in select(DEVICE.type).items():
        for direction in DIRECTIONS:
            for contender in CONTENDERS:
                if problem.op in contender.ops:
                    yield pytest.param(name, problem, direction, contender, id=f"{name}-{direction}-{contender.name}")


TIMER = MeasuredTime()


@pytest.mark.benchmark(timer=TIMER, disable_gc=False)
@pytest.mark.parametrize(("name", "problem", "direction", "contender"), parameters())
def test_speed(benchmark, name, problem, direction, contender):
    reason = contender.refuse(replace(problem, needs_grad=direction == "backward"))
    if reason is not None:
        pytest.skip(f"{contender.name}: {reason}")
    stage = stage_of(problem)
    verdict = verify(stage, contender, direction)
    if verdict.fault is not None:
        pytest.fail(f"{contender.name} is wrong: {verdict.fault}")

    def measure():
        timing = clock(stage, contender, direction)
        TIMER.now += timing.median
        return timing

    benchmark.group = f"{name} {direction}"
    timing = benchmark.pedantic(measure, rounds=ROUNDS)
    floor = floor_seconds(problem, direction, limits())
    benchmark.extra_info.update(
        contender=contender.name,
        floor=floor,
        fraction=floor / benchmark.stats.stats.median,
        errors=verdict.errors,
        method=timing.method,
    )
