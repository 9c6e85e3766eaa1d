"""What is true of a case, and what is wrong with what a backend made of it."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from attnreg.measuring.threads import one_thread
from attnreg.op import ROWS
from attnreg.problem import Problem
from attnreg.testing.budget import Budget, budget
from attnreg.testing.case import Case
from attnreg.testing.checking import largest_score
from attnreg.testing.inputs import Inputs
from attnreg.testing.oracle import Strip, Truth, truth
from attnreg.testing.subject import Outcome


def truth_in(case: Case, inputs: Inputs, dtype: torch.dtype) -> Truth:
    """The results and gradients of a call computed densely in ``dtype``; a bias that is wider stays so."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if dtype == torch.float64 or tensor.dtype == case.problem.dtype else tensor

    row = ROWS[case.problem.op]
    arguments = {
        name: cast(given) if isinstance(given, Tensor) and given.is_floating_point() else given
        for name, given in inputs.arguments.items()
    }
    tensors = {name: cast(tensor) for name, tensor in inputs.tensors.items()}
    # A gradient of a statistic of rows has the statistic's own dtype.
    upstream = {next(iter(row.results)): cast(inputs.upstream), **inputs.incoming}
    with one_thread():
        return truth(row, tensors, case.problem.window, arguments, upstream)


def expected(case: Case) -> Mapping[str, tuple[Tensor, Budget]]:
    """What is true of a case as it is drawn, and which error passes: by the names of ``Outcome.parts``."""
    return _expected(case)


@functools.lru_cache(maxsize=512)
def _expected(case: Case) -> Mapping[str, tuple[Tensor, Budget]]:
    return expected_of(case, case.draw())


def expected_of(case: Case, inputs: Inputs) -> Mapping[str, tuple[Tensor, Budget]]:
    """The same of a call with these tensors."""
    true, naive = (truth_in(case, inputs, dtype) for dtype in (torch.float64, case.problem.dtype))
    problem, dtype = case.problem, case.problem.dtype
    with one_thread():
        score = largest_score(problem, _whole(problem), inputs)
    name = next(iter(ROWS[problem.op].results))
    allowed = budget(true.results[name], naive.results[name], dtype, largest_score=score)
    parts = {"output": (true.results[name], allowed)}
    for further in inputs.incoming:
        # As exact as the products of the tensors' dtype let it be, however the result itself is kept.
        allowed = budget(true.results[further], naive.results[further], dtype, largest_score=score)
        parts[further] = (true.results[further], allowed)
    others = list(true.gradients.values())
    for name, gradient in true.gradients.items():
        own = inputs.leaves[name].dtype
        # A gradient is rounded to its own tensor's dtype, whichever is the coarser.
        coarser = own if torch.finfo(own).eps > torch.finfo(dtype).eps else dtype
        terms = true.terms.get(name)
        allowed = budget(gradient, naive.gradients[name], coarser, others, largest_score=score, terms=terms)
        parts[f"gradient of {name}"] = (gradient, allowed)
    return parts


def _whole(problem: Problem) -> Strip:
    rows, keys = range(problem.query_length), range(problem.key_length)
    return Strip(range(problem.batch), range(problem.kv_heads), keys, rows, keys)


def fault_of_outcome(outcome: Outcome, expected: Mapping[str, tuple[Tensor, Budget]]) -> str | None:
    """The first thing that is wrong with what a call gave; None where all is within the budget."""
    for name, part in outcome.parts().items():
        true, allowed = expected[name]
        if part.shape != true.shape:
            return f"{name}: shape {tuple(part.shape)}, expected {tuple(true.shape)}"
        fault = allowed.fault(part, true)
        if fault is not None:
            return f"{name}: {fault}"
    return None


def difference(got: Outcome, wanted: Outcome) -> str | None:
    """Which part of an outcome has other bits than that of another one; None where all are the same."""
    for (name, part), other in zip(got.parts().items(), wanted.parts().values()):
        if part.shape != other.shape:
            return f"{name}: shape {tuple(part.shape)}, not {tuple(other.shape)}"
        if not torch.equal(part.nan_to_num(nan=1e30), other.nan_to_num(nan=1e30)):
            return f"{name}: off by {largest_difference(part, other):.1e}"
    return None


def largest_difference(got: Tensor, wanted: Tensor) -> float:
    """The largest of the differences of two tensors, infinite where one alone is not finite."""
    apart = (got.double() - wanted.double()).abs().where(got != wanted, 0)
    return float(apart.nan_to_num(nan=float("inf")).max()) if apart.numel() else 0.0
