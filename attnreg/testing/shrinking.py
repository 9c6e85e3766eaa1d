"""From a case that fails to the smallest that still does, one fact at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from time import monotonic

from attnreg.op import ROWS
from attnreg.testing.case import Case
from attnreg.testing.property import REFUSALS, Failure, examine
from attnreg.testing.subject import Subject
from attnreg.window import Window

# A search ends after so many tries, or so many seconds.
MOST_TRIES, MOST_SECONDS = 400, 6.0


def smallest(failure: Failure, subject: Subject, before: Callable[[Case], None] = lambda case: None) -> Failure:
    """The failure of the smallest case that greedy steps lead to; it is of the same property, raised or found alike.

    ``before`` is told each case that is tried.
    """
    end, tries = monotonic() + MOST_SECONDS, 0
    going = True
    while going:
        going = False
        for case in _smaller(failure.case):
            if tries >= MOST_TRIES or monotonic() > end:
                return failure
            before(case)
            if bool(subject.refusals(case.problem)) != (failure.tested.name == REFUSALS):
                continue
            tries += 1
            found = examine(failure.tested, subject, case)
            if found is not None and (found.error is None) == (failure.error is None):
                failure, going = found, True
                break
    return failure


def _smaller(case: Case) -> Iterator[Case]:
    """Cases with one fact less, or a smaller one; the largest steps first."""
    problem, window = case.problem, case.problem.window
    if case.layout != "contiguous":
        yield replace(case, layout="contiguous")
    for argument in ROWS[problem.op].extras:
        name = argument.name
        if problem.gives(name) is not None or name in dict(case.values):
            yield _without(case, name)
    if case.magnitude != 1 or case.one_sign:
        yield replace(case, magnitude=1.0, one_sign=False)
    for heads, kv_heads in ((1, 1), (problem.kv_heads, problem.kv_heads), (problem.heads // problem.kv_heads, 1)):
        if (heads, kv_heads) < (problem.heads, problem.kv_heads):
            yield case.changed(heads=heads, kv_heads=kv_heads)
    if problem.query_length == problem.key_length:
        for size in _below(problem.query_length):
            yield case.changed(query_length=size, key_length=size)
    if problem.head_dim == problem.value_dim:
        for size in _below(problem.head_dim):
            yield case.changed(head_dim=size, value_dim=size)
    for fact in ("batch", "query_length", "key_length", "head_dim", "value_dim"):
        for size in _below(getattr(problem, fact)):
            yield case.changed(**{fact: size})
    for size in _below(window.left, least=0):
        yield case.changed(window=Window(size, window.right))
    for size in _below(window.right, least=0):
        yield case.changed(window=Window(window.left, size))
    offsets = {argument.name for argument in ROWS[problem.op].arguments if argument.ascends}
    yield from _with_fewer_sequences(case, offsets)
    for name, value in case.values:
        if not isinstance(value, tuple):
            continue
        for place, number in enumerate(value if name in offsets else value[: problem.batch]):
            # Offsets begin with 0 and ascend.
            least = value[max(place - 1, 0)] if name in offsets else 0
            most = number if name in offsets else min(number, problem.key_length)
            for size in _below(most, least) if isinstance(number, int) else ():
                yield _with_value(case, name, (*value[:place], size, *value[place + 1 :]))
    for name, given in problem.given:
        for place, size in enumerate(given.shape):
            if size > 1 and next(row for row in ROWS[problem.op].arguments if row.name == name).broadcasts:
                shape = (*given.shape[:place], 1, *given.shape[place + 1 :])
                changed = tuple(
                    (each, replace(its, shape=shape) if each == name else its) for each, its in problem.given
                )
                yield replace(case, problem=replace(problem, given=changed))


def _below(size: int, least: int = 1) -> list[int]:
    """Smaller sizes: the least, half, one less."""
    return [each for each in dict.fromkeys((least, size // 2, size - 1)) if least <= each < size]


def _with_fewer_sequences(case: Case, offsets: set[str]) -> Iterator[Case]:
    """Packs that lack a sequence: without its end, it is one with the next."""
    chosen = {name: value for name, value in case.values if name in offsets}
    for place in range(1, max(map(len, chosen.values()), default=0)):
        yield replace(
            case,
            values=tuple(
                (name, (*value[:place], *value[place + 1 :]) if name in chosen else value)
                for name, value in case.values
            ),
        )


def _without(case: Case, name: str) -> Case:
    """Without an argument, and those that need it."""
    dropped = {name, *(argument.name for argument in ROWS[case.problem.op].arguments if argument.needs == name)}
    if name == "dropout_p":
        dropped.add("seed")  # alone it says nothing
    return replace(
        case,
        problem=replace(
            case.problem, given=tuple((each, its) for each, its in case.problem.given if each not in dropped)
        ),
        values=tuple((each, value) for each, value in case.values if each not in dropped),
        dims=tuple((each, count) for each, count in case.dims if each not in dropped),
        dtypes=tuple((each, its) for each, its in case.dtypes if each not in dropped),
        hidden=0.0 if name == "bias" else case.hidden,
    )


def _with_value(case: Case, name: str, value: object) -> Case:
    return replace(case, values=tuple((each, value if each == name else its) for each, its in case.values))
