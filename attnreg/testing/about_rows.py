"""Properties of where rows stand and which keys they may see: starts of keys and of queries, and packed sequences."""

from __future__ import annotations

from collections.abc import Iterable

from attnreg.op import ATTENTION
from attnreg.testing.about_values import judged
from attnreg.testing.case import Case
from attnreg.testing.cases import rows_of
from attnreg.testing.property import calls, holds, one, takes
from attnreg.testing.subject import Subject


def _of(subject: Subject, quick: bool, *groups: str) -> Iterable[Case]:
    dtypes = one(subject) if quick else subject.dtypes
    return calls(subject, rows_of(*groups, quick=quick), dtypes=dtypes)


@holds(
    "key_starts",
    "keys before a sequence's start are invisible",
    lambda subject, quick: _of(subject, quick, "key_starts"),
    unless=lambda subject: takes("key_starts", subject),
)
def key_starts(subject: Subject, case: Case) -> str | None:
    """As left padding; and where few keys or none are left under the length."""
    return judged(subject, case)


def _anywhere(subject: Subject, quick: bool) -> Iterable[Case]:
    yield from _of(subject, quick, "query_starts")
    # No band has as many slots as these windows, and a composition would make one.
    if subject.backend.local_attention is not None:
        yield from calls(subject, rows_of("far_rows", quick=quick), dtypes=one(subject), ops=[ATTENTION.name])


@holds(
    "query_starts",
    "a sequence's first query stands at its start, wherever that is",
    _anywhere,
    unless=lambda subject: takes("query_starts", subject),
)
def query_starts(subject: Subject, case: Case) -> str | None:
    """In the middle of the keys, before the first and past the last one, and so far away that 32 bits do not hold it."""
    return judged(subject, case)


@holds(
    "packed",
    "sequences that are packed are each a call of its own",
    lambda subject, quick: _of(subject, quick, "packed"),
    unless=lambda subject: takes("cu_seqlens_q", subject),
)
def packed(subject: Subject, case: Case) -> str | None:
    """Of no row and of one, shorter and longer than the window, with more queries than keys; rows of none see nothing."""
    return judged(subject, case)
