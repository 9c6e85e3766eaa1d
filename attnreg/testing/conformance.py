"""A backend run through all properties: which hold, which are broken, which do not apply, and why."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any

import torch

from attnreg.backend import Backend, has_backward, has_op
from attnreg.op import OPS, ROWS
from attnreg.packages import own_version
from attnreg.problem import Problem
from attnreg.request import did_you_mean
from attnreg.testing import about_calls, about_memory, about_rows, about_softmax, about_values
from attnreg.testing.case import Case
from attnreg.testing.property import PROPERTIES, REFUSALS, Failure, Property, Selection, examine, select
from attnreg.testing.shrinking import smallest
from attnreg.testing.subject import WITH_ALL_RESULTS, Subject, under_test

# The modules whose properties are tried, in this order.
MODULES = (about_values, about_rows, about_softmax, about_memory, about_calls)
# A property is given up after so many cases that break it.
MOST_FAILURES = 3
# So many reasons for refusing what a capability declares are told in one remark.
MOST_REASONS = 3
# The properties without which nothing is known of a backend, and of what.
NEEDED = {"values": "results", "gradients": "gradients"}

HELD, BROKEN, DOES_NOT_APPLY = "held", "broken", "does not apply"


@dataclass(frozen=True, eq=False)
class Finding:
    """What was found of one property.

    Attributes:
        tested: the property.
        cases: how many were tried.
        failures: those in which it is broken, up to ``MOST_FAILURES``.
        minimal: the smallest call that breaks it, if any does.
        left_out: how many cases the backend refuses, by reason.
        refused: those of them that its capability declares.
        reason: why it does not apply, or None.
        seconds: how long it took.
    """

    tested: Property
    cases: int
    failures: tuple[Failure, ...]
    minimal: Failure | None
    left_out: Mapping[str, int]
    refused: Mapping[str, int]
    reason: str | None
    seconds: float

    @property
    def state(self) -> str:
        """``HELD``, ``BROKEN`` or ``DOES_NOT_APPLY``."""
        return DOES_NOT_APPLY if self.reason is not None else BROKEN if self.failures else HELD


@dataclass(frozen=True, eq=False)
class Report:
    """What was found of a backend.

    Attributes:
        backend: what it is called, with the options that were tested.
        device: where it was tested.
        findings: of each property that was tried.
        forward_only: the ops that it has without gradients.
        lacking: the ops that it does not have.
        quick: whether the run was a quick one.
        seconds: how long it took.
    """

    backend: str
    device: torch.device
    findings: tuple[Finding, ...]
    forward_only: tuple[str, ...]
    lacking: tuple[str, ...]
    quick: bool
    seconds: float

    @property
    def broken(self) -> tuple[str, ...]:
        """The names of the properties that are broken."""
        return tuple(finding.tested.name for finding in self.findings if finding.state == BROKEN)

    @property
    def untried(self) -> str | None:
        """Why nothing is known of the backend's numbers; None where a result was compared."""
        values = next((each for each in self.findings if each.tested.name == "values"), None)
        return None if values is None else values.reason

    @property
    def unproven(self) -> list[str]:
        """What a backend must show and this one has not: results and, where it has gradients of any op, gradients."""
        has_gradients = set(OPS) - set(self.forward_only) - set(self.lacking) != set()
        return unproven({finding.tested.name: finding.reason for finding in self.findings}, has_gradients)

    @property
    def conforms(self) -> bool:
        """Whether no property is broken, and results and gradients were looked at."""
        return not self.broken and not self.unproven

    def remarks(self) -> list[str]:
        """What a reader must know to judge by the report."""
        found = []
        for op in self.forward_only:
            found.append(f"forward only: it has no gradients of {op}, and nothing was tried of them")
        for op in self.lacking:
            found.append(f"it has no {op}")
        found += self.unproven
        told = _refused(
            sum(finding.cases for finding in self.findings if finding.tested.name != REFUSALS),
            [finding.refused for finding in self.findings],
        )
        return found if told is None else [*found, told]

    def left_out(self) -> Mapping[str, int]:
        """How many cases the backend refuses, by reason; the most frequent first."""
        counted: Counter[str] = Counter()
        for finding in self.findings:
            counted.update(finding.left_out)
        return dict(counted.most_common())

    def as_json(self) -> dict[str, Any]:
        """All of it, in what JSON has."""
        return {
            "backend": self.backend,
            "device": str(self.device),
            "quick": self.quick,
            "conforms": self.conforms,
            "broken": list(self.broken),
            "remarks": self.remarks(),
            "seconds": round(self.seconds, 2),
            "versions": {
                "attnreg": own_version(),
                torch.__name__: torch.__version__,
                "python": platform.python_version(),
            },
            "properties": [_finding_as_json(finding, self.backend) for finding in self.findings],
        }


def conform(
    backend: str | Backend,
    *,
    device: str | torch.device = "cpu",
    quick: bool = False,
    properties: Iterable[str] | None = None,
    shrink: bool = True,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
    found: Callable[[Finding], None] = lambda finding: None,
) -> Report:
    """Try every property of a backend on one device, in this process: a backend that ends it, or hangs, takes it along.

    ``attnreg conform`` does the same in a process of its own.

    Args:
        backend: a registered backend by name, with options or without; or a Backend.
        device: where.
        quick: a fraction of the cases.
        properties: the names of those to try; None for all.
        shrink: whether the smallest call that breaks a property is looked for.
        progress: told before each case: the property, how many were tried, how many there are.
        found: told what was found of a property, as soon as it is.

    Raises:
        LookupError: no such backend is registered.
        ValueError: a property is unknown, or the backend does not take the options.
    """
    chosen = chosen_properties(properties)
    start = monotonic()
    findings = []

    def told(property: Property, case: Case, done: int, total: int) -> None:
        if total:
            progress(property.name, done, total)

    with under_test(backend, device) as subject:
        for property in chosen:
            findings.append(find_out(property, subject, quick, shrink, told))
            found(findings[-1])
        return report(subject.backend, subject.title, subject.device, findings, quick, monotonic() - start)


def report(
    backend: Backend, title: str, device: torch.device, findings: Iterable[Finding], quick: bool, seconds: float
) -> Report:
    """What was found, with what is to be known of the backend itself."""
    ops = [op for op in OPS if has_op(backend, ROWS[op])]
    return Report(
        backend=title,
        device=device,
        findings=tuple(findings),
        forward_only=tuple(op for op in ops if not has_backward(backend, ROWS[op])),
        lacking=tuple(op for op in OPS if op not in ops),
        quick=quick,
        seconds=seconds,
    )


def unproven(reasons: Mapping[str, str | None], has_gradients: bool) -> list[str]:
    """What nothing is known of, given why each property that was asked for was not tried; None where it was."""
    return [
        f"nothing is known of its {what}: {reasons[name]}"
        for name, what in NEEDED.items()
        if reasons.get(name) is not None and (name != "gradients" or has_gradients)
    ]


def refused_of(selections: Mapping[Property, Selection]) -> str | None:
    """How many cases that its capability declares a backend refuses, and why; None where it refuses none."""
    tried = sum(len(each.cases) for property, each in selections.items() if property.name != REFUSALS)
    return _refused(tried, [each.refused for each in selections.values()])


def _refused(tried: int, refused: Iterable[Mapping[str, int]]) -> str | None:
    counted: Counter[str] = Counter()
    for each in refused:
        counted.update(each)
    if not counted:
        return None
    reasons = [f"{reason} ({count})" for reason, count in counted.most_common(MOST_REASONS)]
    more = len(counted) - len(reasons)
    if more:
        reasons.append(f"{more} reason{'' if more == 1 else 's'} more")
    # Of a case that its capability declares there is one reason: its own.
    count = sum(counted.values())
    return f"it refuses {count} of {tried + count} cases that its capability declares: {'; '.join(reasons)}"


def check_case(backend: str | Backend, property: str, case: Case) -> None:
    """Try one property of a backend with one case, on the case's device.

    Raises:
        AssertionError: it is broken; the message says how.
        LookupError, ValueError: as :func:`conform`.
    """
    (chosen,) = chosen_properties([property])
    with under_test(backend, case.problem.device) as subject:
        failure = examine(chosen, subject, case)
    if failure is not None:
        raise AssertionError(f"{chosen.says}; but {failure.fault}") from failure.error


def chosen_properties(names: Iterable[str] | None) -> tuple[Property, ...]:
    """Properties by name, in the order in which they are tried; all for None.

    Raises:
        ValueError: one is unknown.
    """
    order = [module.__name__ for module in MODULES]
    ordered = sorted(PROPERTIES.values(), key=lambda property: order.index(property.check.__module__))
    wanted = PROPERTIES.keys() if names is None else set(names)
    unknown = sorted(wanted - PROPERTIES.keys())
    if unknown:
        meant = did_you_mean(unknown[0], list(PROPERTIES))
        raise ValueError(f"no property is called {', '.join(unknown)}{meant}; there are {', '.join(PROPERTIES)}")
    return tuple(property for property in ordered if property.name in wanted)


def python_of(failure: Failure, backend: str) -> list[str]:
    """Lines of Python that repeat a failure."""
    problem = failure.case.problem
    further = any(problem.gives(argument.name) is not None for argument in ROWS[problem.op].incoming)
    return [
        "import torch",
        "import attnreg",
        "from attnreg import Window",
        "from attnreg.testing import check_case, make_case",
        "",
        *failure.case.lines(),
        "inputs = case.draw()",
        f"attnreg.{WITH_ALL_RESULTS if further else problem.op}(",
        "    *inputs.tensors.values(),",
        "    case.problem.window,",
        "    **inputs.arguments,",
        f"    backend={backend!r},",
        ")",
        f"check_case({backend!r}, {failure.tested.name!r}, case)",
    ]


def find_out(
    property: Property, subject: Subject, quick: bool, shrink: bool, told: Callable[[Property, Case, int, int], None]
) -> Finding:
    """What is found of a property.

    ``told`` is told each case before the backend hears of it, with how many were tried and how many there are: none where cases
    are chosen.
    """
    start = monotonic()
    selection = select(property, subject, quick=quick, before=lambda case: told(property, case, 0, 0))
    failures: list[Failure] = []
    tried, total = 0, len(selection.cases)
    for case in selection.cases:
        told(property, case, tried, total)
        failure = examine(property, subject, case)
        tried += 1
        if failure is not None:
            failures.append(failure)
            if len(failures) == MOST_FAILURES:
                break
    minimal = min(failures, key=lambda failure: _size(failure.case.problem), default=None)
    if minimal is not None and shrink:
        minimal = smallest(minimal, subject, lambda case: told(property, case, tried, total))
    return Finding(
        tested=property,
        cases=tried,
        failures=tuple(failures),
        minimal=minimal,
        left_out=selection.left_out,
        refused=selection.refused,
        reason=selection.reason,
        seconds=monotonic() - start,
    )


def _size(problem: Problem) -> int:
    return problem.batch * problem.heads * problem.query_length * problem.key_length * max(problem.head_dim, 1)


def _finding_as_json(finding: Finding, backend: str) -> dict[str, Any]:
    minimal = finding.minimal
    return {
        "name": finding.tested.name,
        "says": finding.tested.says,
        "state": finding.state,
        "cases": finding.cases,
        "seconds": round(finding.seconds, 3),
        "reason": finding.reason,
        "left_out": dict(finding.left_out),
        "refused": dict(finding.refused),
        "failures": [
            {"case": str(each.case), "problem": str(each.case.problem), "fault": each.fault}
            for each in finding.failures
        ],
        "minimal": None
        if minimal is None
        else {
            "problem": str(minimal.case.problem),
            "fault": minimal.fault,
            "python": "\n".join(python_of(minimal, backend)),
        },
    }
