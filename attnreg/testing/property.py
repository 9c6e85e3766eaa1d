"""A property: something that is true of every right backend, the cases in which it is tried, and how.

Each is a function of a backend under test and a case, that returns what is wrong or None, in the registry ``PROPERTIES``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch

from attnreg.backend import is_able
from attnreg.measuring.threads import one_thread
from attnreg.printable import trouble
from attnreg.testing.case import Case, make_case
from attnreg.testing.cases import fitted, without_name
from attnreg.testing.subject import Subject

Check = Callable[[Subject, Case], "str | None"]
Choice = Callable[[Subject, bool], Iterable[Case]]

NARROW = (torch.bfloat16, torch.float16)

# Tried where a backend refuses that of a case by a rule of its own.
COMMON_HEAD_DIMS = (32, 64, 128)


@dataclass(frozen=True)
class Property:
    """Something that is true of every right backend.

    Attributes:
        name: what reports call it.
        says: what is true, in a sentence.
        choose: the cases for a backend, fewer in a quick run; those that the backend refuses are left out.
        check: what is wrong with a case, or None.
        unless: why it does not apply to a backend, or None.
    """

    name: str
    says: str
    choose: Choice
    check: Check
    unless: Callable[[Subject], str | None] = lambda subject: None

    def __reduce__(self) -> tuple[Callable[[str], Property], tuple[str]]:
        """Another process has it by its name."""
        return property_named, (self.name,)


# By name; a module's in the order in which they are tried.
PROPERTIES: dict[str, Property] = {}


def property_named(name: str) -> Property:
    """The property of that name."""
    return PROPERTIES[name]


def holds(
    name: str, says: str, choose: Choice, *, unless: Callable[[Subject], str | None] = lambda subject: None
) -> Callable[[Check], Check]:
    """Register the decorated check as a property."""

    def add(check: Check) -> Check:
        PROPERTIES[name] = Property(name, says, choose, check, unless)
        return check

    return add


@dataclass(frozen=True)
class Selection:
    """What a property is tried with.

    Attributes:
        cases: those that the backend takes.
        left_out: how many cases it refuses, by reason.
        refused: those of them that its capability declares, which it refuses all the same.
        reason: why the property does not apply; None where it does.
    """

    cases: tuple[Case, ...]
    left_out: Mapping[str, int]
    refused: Mapping[str, int] = field(default_factory=dict)
    reason: str | None = None


def select(
    property: Property, subject: Subject, *, quick: bool = False, before: Callable[[Case], None] = lambda case: None
) -> Selection:
    """The cases of a property that a backend under test declares that it can do; ``before`` is told each that it is asked of."""
    reason = property.unless(subject)
    if reason is not None:
        return Selection((), {}, reason=reason)
    cases: dict[Case, Case] = {}
    left_out: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    for case in property.choose(subject, quick):
        before(case)
        refusals = subject.refusals(case.problem)
        if refusals and property.name != REFUSALS:
            case, refusals = _at_another_head_dim(subject, case, refusals)
        if refusals and property.name != REFUSALS:
            left_out.update(refusals)
            if is_able(subject.backend, case.problem):
                refused.update(refusals)
        else:
            cases.setdefault(without_name(case), case)
    if cases:
        return Selection(tuple(cases.values()), left_out, refused)
    reasons = [reason for reason, _ in left_out.most_common(2)]
    return Selection(
        (), left_out, refused, "; ".join(reasons) or ("not in a quick run" if quick else "no case is about it")
    )


# The one property whose cases are those that a backend does not take.
REFUSALS = "refusals"


# Choosing cases


def calls(
    subject: Subject,
    cases: Sequence[Case],
    *,
    dtypes: Sequence[torch.dtype] | None = None,
    gradients: bool | None = None,
    ops: Iterable[str] | None = None,
) -> Iterator[Case]:
    """The calls of every op and dtype that are made of these cases.

    Args:
        subject: the backend under test, whose nearest sizes the cases get.
        cases: rows of the table.
        dtypes: which; None for :func:`two` of those of the backend.
        gradients: whether they are asked for; None for wherever the backend has some.
        ops: which; None for those of the backend.
    """
    for dtype in two(subject) if dtypes is None else dtypes:
        for op in subject.ops if ops is None else ops:
            needs_grad = subject.has_gradients(op) if gradients is None else gradients
            for case in cases:
                yield fitted(case.of(op, dtype, subject.device, needs_grad=needs_grad), subject.backend.capability)


def _at_another_head_dim(subject: Subject, case: Case, refusals: tuple[str, ...]) -> tuple[Case, tuple[str, ...]]:
    """A refused case at a common head dim that the backend's own rule admits, where there is one; and what is against it."""
    capability, problem = subject.backend.capability, case.problem
    if not is_able(subject.backend, problem):
        return case, refusals
    # Two head dims are what such a case is for.
    for size in COMMON_HEAD_DIMS if len({problem.head_dim, problem.value_dim} - {0}) == 1 else ():
        dims = {"head_dim": problem.head_dim and size, "value_dim": problem.value_dim and size}
        other = fitted(case.changed(**dims), capability)
        if not subject.refusals(other.problem):
            return other, ()
    return case, refusals


def one(subject: Subject) -> Sequence[torch.dtype]:
    """The dtype in which faults show best: of those that it differentiates, where there is one."""
    wide = [dtype for dtype in (torch.float32, torch.float64) if dtype in subject.dtypes]
    dtypes = [*wide, *subject.dtypes]
    return [dtype for dtype in dtypes if _differentiates(subject, dtype)][:1] or dtypes[:1]


def _differentiates(subject: Subject, dtype: torch.dtype) -> bool:
    for op in subject.ops:
        if subject.has_gradients(op):
            case = fitted(make_case().of(op, dtype, subject.device), subject.backend.capability)
            refusals = subject.refusals(case.problem)
            if refusals and _at_another_head_dim(subject, case, refusals)[1]:
                return False
    return True


def two(subject: Subject) -> Sequence[torch.dtype]:
    """That, and one of 16 bits."""
    first = list(one(subject))
    return [*first, *[dtype for dtype in NARROW if dtype in subject.dtypes and dtype not in first][:1]]


def of_run(subject: Subject, quick: bool) -> Sequence[torch.dtype]:
    """All, or those two in a quick run."""
    return two(subject) if quick else subject.dtypes


def narrow(subject: Subject) -> Sequence[torch.dtype]:
    """Those of 16 bits."""
    return [dtype for dtype in NARROW if dtype in subject.dtypes]


def takes(name: str, subject: Subject) -> str | None:
    """Why nothing that gives this argument can be tried; None where some op of the backend takes it."""
    return None if any(name in subject.backend.taken[op] for op in subject.ops) else f"it does not take {name}"


@dataclass(frozen=True, eq=False)
class Failure:
    """A case in which a property is broken.

    Attributes:
        tested: the property.
        case: the case.
        fault: what is wrong.
        error: what was raised, if that is it.
    """

    tested: Property
    case: Case
    fault: str
    error: BaseException | None = None


# Those in which the number of threads has a part: where work is shared among them, or one is left behind. The others take one,
# as their calls are tiny.
WITH_ALL_THREADS = ("values", "gradients", "repeatable", "settings", "threads")


def examine(property: Property, subject: Subject, case: Case) -> Failure | None:
    """What is wrong with a case; None where the property holds.

    Whatever a backend raises is a fault of its, an exception that stops a generator, a task or a test too.
    """
    try:
        with nullcontext() if property.name in WITH_ALL_THREADS else one_thread():
            fault = property.check(subject, case)
    except BaseException as error:
        return Failure(property, case, f"raised {trouble(error)}", error)
    return None if fault is None else Failure(property, case, fault)
