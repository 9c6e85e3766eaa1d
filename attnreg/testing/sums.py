"""Sums of positive numbers of 16 bits, in which those that are added up in 16 bits lose the last ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from attnreg.op import ATTENTION, ROWS
from attnreg.testing.case import Case, make_case
from attnreg.testing.inputs import Inputs
from attnreg.testing.judging import truth_in
from attnreg.testing.property import calls, narrow
from attnreg.testing.subject import Subject
from attnreg.window import Window

# How much of the sum of its terms, in size, a sum in float32 may be off by.
SUM_IN_FLOAT32 = 2.0**-18

OF_HEAD_DIMS = make_case("long_heads", batch=1, heads=1, query_length=17, head_dim=256, window=Window(0, 0))
OF_ROWS = make_case("long_rows", batch=1, heads=1, query_length=260, head_dim=4, window=Window(255, 0))
# Scores are small, so that no key has most of the weight.
OF_KEYS = make_case(
    "long_averages", batch=1, heads=1, query_length=300, head_dim=8, window=Window(299, 299), scale=0.05
)
OF_HEADS = make_case(
    "many_heads_of_one", batch=1, heads=64, kv_heads=1, query_length=8, head_dim=8, window=Window(7, 7), scale=0.05
)


def sums_of_results(subject: Subject) -> Iterator[Case]:
    """Calls whose results are long sums."""
    for op in subject.ops:
        own = getattr(subject.backend, op) is not None
        cases = [OF_HEAD_DIMS] if "E" in "".join(ROWS[op].tensors.values()) else [OF_ROWS]
        if op == ATTENTION.name:
            cases = [*cases, OF_KEYS] if own else [OF_KEYS]
        yield from calls(subject, cases, dtypes=narrow(subject), gradients=False, ops=[op])


def sums_of_gradients(subject: Subject) -> Iterator[Case]:
    """Calls whose gradients are."""
    return calls(subject, [OF_KEYS, OF_HEADS], dtypes=narrow(subject), gradients=True)


def of_one_sign(case: Case) -> Inputs:
    """A call in which all terms of a sum have one sign.

    Of attention, the gradients of scores too: the first key has a value and the others have none, so that it gains what they
    lose. They are negative keys, so that the gradient of a query is a sum of positive terms.
    """
    drawn = case.draw()
    tensors = {name: tensor.abs() for name, tensor in drawn.tensors.items()}
    if case.problem.op == ATTENTION.name and case.problem.needs_grad:
        first = torch.arange(case.problem.key_length, device=case.problem.device)[:, None] == 0
        tensors["key"] = tensors["key"].where(first, -tensors["key"])
        tensors["value"] = (8 + tensors["value"]).where(first, 0)
    return replace(drawn, tensors=tensors, upstream=drawn.upstream.abs())


def fault_of_sum(name: str, found: Tensor, true: Tensor, step: float) -> str | None:
    """What is wrong with a sum that may be off by ``step`` of it, and by as much as float32 is; None where nothing is."""
    true = true.where(true.isfinite(), 0)
    wrong = (found.double() - true).abs().where(found.isfinite() | (true != 0), 0)
    beyond = wrong - (step + SUM_IN_FLOAT32) * true.abs()
    if not bool((beyond <= 1e-30).all()):
        place = int(beyond.nan_to_num(nan=torch.inf).argmax())
        return f"{name}: {float(found.flatten()[place]):.6g}, where the sum in float32 is {float(true.flatten()[place]):.6g}"
    return None


def fault_of_results(subject: Subject, case: Case) -> str | None:
    """What is wrong with a result; of attention, with its log-sum-exp too, which is the score of a row that sees one key."""
    inputs = of_one_sign(case)
    with subject.watched() as seen:
        found = subject.run(case, inputs).output
    true = truth_in(case, inputs, torch.float64).results
    name = next(iter(true))
    fault = fault_of_sum(name, found, true[name], torch.finfo(case.problem.dtype).eps)
    if fault is None and "log_sum_exp" in true and seen and seen[-1].op is ATTENTION:
        fault = fault_of_sum("log_sum_exp", seen[-1].returned[1], true["log_sum_exp"], 0.0)
    return fault


def fault_of_gradients(subject: Subject, case: Case) -> str | None:
    """What is wrong with a gradient."""
    inputs = of_one_sign(case)
    true = truth_in(case, inputs, torch.float64).gradients
    step = torch.finfo(case.problem.dtype).eps
    for name, found in subject.run(case, inputs).gradients.items():
        fault = fault_of_sum(f"gradient of {name}", found, true[name], step)
        if fault is not None:
            return fault
    return None
