"""Properties of what lies between the two products: soft cap, sinks, dropout, and the log-sum-exp as a result."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from attnreg.op import ATTENTION
from attnreg.testing import philox
from attnreg.testing.about_values import judged
from attnreg.testing.case import Case, make_case
from attnreg.testing.cases import rows_of
from attnreg.testing.inputs import Inputs
from attnreg.testing.judging import expected, expected_of, fault_of_outcome
from attnreg.testing.property import calls, holds, one, takes, two
from attnreg.testing.subject import Outcome, Subject, with_leaves
from attnreg.testing.visibility import visibility
from attnreg.window import Window


def _of(subject: Subject, quick: bool, *groups: str) -> Iterable[Case]:
    dtypes = one(subject) if quick else subject.dtypes
    return _of_attention(subject, rows_of(*groups, quick=quick), dtypes)


def _of_attention(subject: Subject, cases: list[Case], dtypes: Iterable[torch.dtype]) -> Iterable[Case]:
    return calls(subject, cases, dtypes=list(dtypes), ops=[op for op in subject.ops if op == ATTENTION.name])


@holds(
    "softcap",
    "a soft cap bends scores after scaling and before the bias",
    lambda subject, quick: _of(subject, quick, "softcap"),
    unless=lambda subject: takes("softcap", subject),
)
def softcap(subject: Subject, case: Case) -> str | None:
    """A large one hardly does."""
    return judged(subject, case)


@holds(
    "sinks",
    "a sink has its share of the weight of every row that sees a key, and of no output",
    lambda subject, quick: _of(subject, quick, "sinks"),
    unless=lambda subject: takes("sinks", subject),
)
def sinks(subject: Subject, case: Case) -> str | None:
    """One of -inf has none; each has a gradient, in its own dtype."""
    return judged(subject, case)


@holds(
    "lse_gradients",
    "the log-sum-exp is a result with gradients of its own",
    lambda subject, quick: _of(subject, quick, "lse_gradients"),
    unless=lambda subject: takes("grad_log_sum_exp", subject),
)
def lse_gradients(subject: Subject, case: Case) -> str | None:
    """Under a random gradient of both results, and of it alone; and without any."""
    inputs = case.draw()
    if not case.problem.needs_grad:
        return judged(subject, case)
    fault = fault_of_outcome(subject.run(case, inputs), expected(case))
    if fault is not None:
        return fault
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.leaves.items()}
    _, *further = subject.results(case, with_leaves(inputs, leaves))
    gradients = torch.autograd.grad(
        further, list(leaves.values()), list(inputs.incoming.values()), allow_unused=True, materialize_grads=True
    )
    alone = expected_of(case, replace(inputs, upstream=torch.zeros_like(inputs.upstream)))
    for (name, _), gradient in zip(leaves.items(), gradients):
        true, allowed = alone[f"gradient of {name}"]
        fault = allowed.fault(gradient, true)
        if fault is not None:
            return f"gradient of {name}: {fault}, where the log-sum-exp alone has an incoming gradient"
    with torch.no_grad():
        output, *further = subject.results(case, inputs)
    fault = fault_of_outcome(Outcome(output, {}, dict(zip(inputs.incoming, further))), expected(case))
    return None if fault is None else f"{fault}, where no gradients are asked for"


@holds(
    "dropout",
    "weights are dropped by the generator of the contract, and those that stay make up for it",
    lambda subject, quick: _of(subject, quick, "dropout"),
    unless=lambda subject: takes("dropout_p", subject),
)
def dropout(subject: Subject, case: Case) -> str | None:
    """The same ones in the backward; the log-sum-exp knows nothing of it."""
    return judged(subject, case)


# Longer than a tile, with a window that is no wider than values are: a row's keys then have a column each.
_READ_OFF = [
    make_case(
        "read_off",
        kv_heads=1,
        query_length=70,
        key_length=90,
        head_dim=32,
        window=Window(18, 13),
        dropout_p=0.3,
    ),
    make_case(
        "read_off_padded",
        batch=3,
        heads=1,
        query_length=70,
        key_length=150,
        head_dim=64,
        window=Window(63, 0),
        dropout_p=0.1,
        key_starts=(3, 0, 21),
        query_starts=(80, 77, 30),
    ),
    make_case(
        "read_off_packed",
        heads=2,
        query_length=150,
        key_length=140,
        head_dim=64,
        window=Window(9, 50),
        dropout_p=0.5,
        cu_seqlens_q=(0, 1, 70, 70, 131),
        cu_seqlens_k=(0, 7, 66, 70, 140),
    ),
]


@holds(
    "dropped_weights",
    "exactly the weights are dropped that the generator says, in the backward too",
    lambda subject, quick: _of_attention(
        subject, _READ_OFF[:1] if quick else _READ_OFF, one(subject) if quick else two(subject)
    ),
    unless=lambda subject: takes("dropout_p", subject),
)
def dropped_weights(subject: Subject, case: Case) -> str | None:
    """Read off where they are 0: of values and incoming gradients that are rows of the identity.

    Then of another seed, that is written into the same tensor.
    """
    inputs = _of_identity(case)
    seed = inputs.arguments["seed"]
    for number in (int(seed), int(seed) ^ 2**32):
        seed.fill_(number)
        fault = _fault_of_pattern(case, inputs, number, subject.run(case, inputs))
        if fault is not None:
            return fault
    return None


def _of_identity(case: Case) -> Inputs:
    drawn, width = case.draw(), case.problem.value_dim

    def rows(like: Tensor) -> Tensor:
        columns = torch.arange(like.shape[2], device=like.device) % width
        return torch.nn.functional.one_hot(columns, width).to(like.dtype).expand(like.shape).contiguous()

    return replace(
        drawn, tensors={**drawn.tensors, "value": rows(drawn.tensors["value"])}, upstream=rows(drawn.upstream)
    )


def _fault_of_pattern(case: Case, inputs: Inputs, seed: int, outcome: Outcome) -> str | None:
    problem, width = case.problem, case.problem.value_dim
    places = map(range, (problem.batch, problem.heads, problem.query_length, problem.key_length))
    kept = visibility(case, inputs).keys & philox.kept(seed, dict(case.values)["dropout_p"], *places)

    def columns(stays: Tensor) -> Tensor:
        """Of which columns of the identity something stays."""
        column = (torch.arange(stays.shape[-1]) % width).expand(stays.shape)
        return torch.zeros(*stays.shape[:-1], width).scatter_add(-1, column, stays.float()) > 0

    found = [("output: weights", outcome.output, columns(kept))]
    if "value" in outcome.gradients:
        of_kv_heads = (problem.batch, problem.kv_heads, -1, problem.query_length, problem.key_length)
        wanted = columns(kept.view(of_kv_heads).any(2).mT)
        found.append(("gradient of value: weights", outcome.gradients["value"], wanted))
    for name, part, wanted in found:
        wrong = (part != 0) != wanted.to(part.device)
        if bool(wrong.any()):
            return (
                f"{name} are dropped otherwise than the generator says, {int(wrong.sum())} of {wrong.numel()} numbers"
            )
    return None
