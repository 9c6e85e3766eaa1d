"""What all candidates for one call share while they are checked and timed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnreg.measuring.sizes import bytes_moved
from attnreg.measuring.timing import measuring_stream, sets_for_cold_cache
from attnreg.problem import Problem
from attnreg.testing.checking import Expected, expectations
from attnreg.testing.inputs import Inputs, random_inputs


@dataclass(frozen=True, eq=False)
class Stage:
    """A call's tensors and the truth.

    Attributes:
        problem: the call.
        sets: as many sets of inputs as make the cache cold.
        expected: what is true of the first set.
    """

    problem: Problem
    sets: tuple[Inputs, ...]
    expected: tuple[Expected, ...]


def set_stage(problem: Problem, seed: int = 0) -> Stage:
    """Random inputs for a call on its device, and what is true of them.

    Raises:
        RuntimeError, MemoryError: there is no room for them.
    """
    generator = torch.Generator(problem.device).manual_seed(seed)
    with measuring_stream(problem.device):
        count = sets_for_cold_cache(bytes_moved(problem, "forward"), problem.device)
        sets = tuple(random_inputs(problem, generator) for _ in range(count))
        return Stage(problem, sets, expectations(problem, sets[0]))
