"""attnreg's backends as contenders, each asked for through the public functions, also with options."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import attnreg
from attnreg import Problem
from attnreg.backend import Backend, refusals, with_options
from attnreg.request import parse_request
from attnreg.testing.inputs import Calls, Inputs, autograd_calls
from attnreg.tuning.candidate import function_of
from attnreg_benchmarks.contender import Contender

# The rank of the slow but always right reference, see attnreg.Backend: it takes part only when it is asked for.
REFERENCE_RANK = 100


def backends(names: Sequence[str] = ()) -> tuple[Contender, ...]:
    """The backends of these names (``NAME`` or ``NAME:OPTION=VALUE,...``); without any, all but the reference.

    Raises:
        ValueError: no backend has such a name, or not these options; the message lists what there is.
    """
    known: dict[str, tuple[Backend, tuple[str, ...]]] = {
        status.name: (status.backend, status.ops) for status in attnreg.backends() if status.backend is not None
    }
    requests = [parse_request(name) for name in names]
    unknown = [request.name for request in requests if request.name not in known]
    if unknown:
        raise ValueError(f"no backend is called {unknown[0]!r}; registered: {', '.join(sorted(known))}")
    for request in requests:
        with_options(known[request.name][0], request.options)
    chosen = names or [name for name, (backend, _) in known.items() if backend.rank != REFERENCE_RANK]
    return tuple(_contender(name, *known[parse_request(name).name]) for name in dict.fromkeys(chosen))


def _contender(name: str, backend: Backend, ops: tuple[str, ...]) -> Contender:
    def refuse(problem: Problem) -> str | None:
        return "; ".join(refusals(backend, problem)) or None

    def prepare(problem: Problem, inputs: Inputs) -> Calls:
        op = function_of(problem)
        function: functools.partial[Any] = functools.partial(op, window=problem.window, backend=name)
        return autograd_calls(function, inputs)

    return Contender(name, "backend", ops, refuse, prepare)
