"""Choosing a backend for a problem: a pure function from facts to a decision that explains itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isnan
from typing import Any

from attnreg.backend import Backend, BackendError, Entry, Fault, option_values, refusals
from attnreg.composition import workspace
from attnreg.device import memory_bytes
from attnreg.measured import Figure, Measured
from attnreg.op import ROWS
from attnreg.printable import trouble
from attnreg.problem import Problem, visible_window
from attnreg.request import Request, Wish, did_you_mean

# Of a device's memory one call may take so much for itself: its tensors, and what else the program has, want the rest.
MOST_OF_MEMORY = 0.5
# No device is asked how much it has where that is all.
LITTLE_MEMORY = 2**28
# Times within this part of the shorter one may be a tie.
TIE = 0.03


@dataclass(frozen=True)
class Candidate:
    """One registered backend as seen by one decision.

    Attributes:
        name: the backend's name.
        distribution: where it comes from.
        rank: its heuristic rank for the problem, lower is better; None where it is refused.
        refusals: every reason why it cannot run the problem; empty where it can.
        figure: what was measured of it for such a problem; None where nothing was.
    """

    name: str
    distribution: str
    rank: float | None
    refusals: tuple[str, ...]
    figure: Figure | None = None


@dataclass(frozen=True)
class Decision:
    """Which backend runs a problem, and why; ``str()`` of it is the readable trace.

    Attributes:
        problem: the call.
        backend: the chosen backend's name.
        reason: why it was chosen.
        source: "forced", "tuned", "shipped" or "heuristic": who decided.
        candidates: every registered backend, the chosen one first, those that could run next, refused ones last.
        faults: the plug-ins that could not be used.
        options: what was asked of the backend, by option and as it was written.
        remarks: what is to be said of the tables of measured times, and of what was asked for and passed over.
    """

    problem: Problem
    backend: str
    reason: str
    candidates: tuple[Candidate, ...]
    faults: tuple[Fault, ...] = ()
    options: tuple[tuple[str, str], ...] = ()
    source: str = "heuristic"
    remarks: tuple[str, ...] = ()

    @property
    def request(self) -> Request:
        """The chosen backend with its options, which asks for the same again."""
        return Request(self.backend, self.options)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What IPython and notebooks show."""
        printer.text(str(self))

    def __str__(self) -> str:
        lines = [str(self.problem), f"-> {self.request}: {self.reason}"]
        (own,) = (candidate.figure for candidate in self.candidates if candidate.name == self.backend)
        taken = None if own is None else own.seconds
        for candidate in self.candidates:
            if candidate.name == self.backend:
                continue
            time = _time(candidate.figure, taken)
            if candidate.refusals:
                faster = (
                    taken is not None and candidate.figure is not None and (candidate.figure.seconds or taken) < taken
                )
                wish = "; to have it, change:" if faster else ":"
                lines.append(f"   {candidate.name} ({candidate.distribution}) refused{time}{wish}")
                lines += [f"     - {reason}" for reason in candidate.refusals]
            else:
                lines.append(
                    f"   {candidate.name} ({candidate.distribution}) could run it, rank {candidate.rank:g}{time}"
                )
        lines += [f"   {fault}" for fault in self.faults]
        lines += [f"   {remark}" for remark in self.remarks]
        return "\n".join(lines)


def choose(
    problem: Problem,
    entries: Sequence[Entry],
    *,
    like: Problem | None = None,
    wish: Wish | None = None,
    failed: Mapping[str, str] | None = None,
    faults: Sequence[Fault] = (),
    measured: Sequence[Measured] = (),
    remarks: Sequence[str] = (),
) -> Decision:
    """The decision for ``problem`` among ``entries``, with all that there is to be said of it.

    Precedence: a forced backend, which passes its own filter or is refused and is never replaced; else the fastest that
    passes, by the first of ``measured`` that has a time of one; else the lowest rank among those that pass. One whose result was
    measured as wrong is chosen only where it is forced; one that needs more memory than there is, only where it is forced or
    where all do. Times that differ by no more than their spread, or than ``TIE`` of the shorter where that is less, are a tie.
    Ties go to the lower rank, then to the name that sorts first.

    Args:
        problem: the call.
        entries: the registered backends.
        like: the problem by which backends are ranked; None for ``problem`` itself.
        wish: what was asked for, if anything.
        failed: for backends whose preparation failed, by name, the reason.
        faults: plug-ins that could not be used, kept for the trace.
        measured: what tables say of such a problem, those to be believed first.
        remarks: what is to be said of the tables.

    Raises:
        BackendError: the backends that were asked for are unknown or refuse, or every backend does; lists every reason.
    """
    candidates = sorted(
        (_candidate(entry, problem, like or problem, failed or {}, wish) for entry in entries), key=_order
    )
    options: tuple[tuple[str, str], ...] = ()
    if wish is not None:
        names = [entry.backend.name for entry in entries]
        remarks = (*remarks, *_unknown(wish, names))
    if wish is not None and wish.preferred:
        request, passed_over = _first_able(wish, problem, candidates, entries, faults)
        remarks = (*remarks, *passed_over)
        name, by, options = request.name, measured[0] if measured else None, request.options
        source, reason = "forced", f"forced by {wish.by}"
        if len(wish.preferred) > 1:
            reason = f"the first of {', '.join(map(str, wish.preferred))} that can run it, as {wish.by} asks"
    else:
        passing = [candidate for candidate in candidates if not candidate.refusals]
        unfit = _unfit(passing, entries, like or problem, measured)
        candidates = [
            replace(each, rank=None, refusals=(unfit[each.name],)) if each.name in unfit else each
            for each in candidates
        ]
        candidates.sort(key=_order)
        passing = [candidate for candidate in candidates if not candidate.refusals]
        if not passing:
            raise BackendError(_nobody(problem, candidates, faults))
        chosen, by = _pick(passing, measured)
        name = chosen.name
        if by is None:
            others = (
                "the only one that can run it" if len(passing) == 1 else f"the lowest of {len(passing)} that can run it"
            )
            source, reason = "heuristic", f"heuristic, rank {chosen.rank:g}, {others}; {_undecided(passing, measured)}"
        else:
            source, reason = by.source, f"{by.source}{_time(by.figures[name])} ({by.text})"
            remarks = (*by.remarks, *remarks)
    if by is not None:
        candidates = [replace(candidate, figure=by.figures.get(candidate.name)) for candidate in candidates]
    candidates.sort(key=lambda candidate: candidate.name != name)
    return Decision(problem, name, reason, tuple(candidates), tuple(faults), options, source, tuple(remarks))


def _first_able(
    wish: Wish, problem: Problem, candidates: Sequence[Candidate], entries: Sequence[Entry], faults: Sequence[Fault]
) -> tuple[Request, tuple[str, ...]]:
    """The first of the preferred backends that can run a problem, and what is wrong with the options asked of those before it.

    Raises:
        BackendError: none can; lists every reason.
    """
    backends = {entry.backend.name: entry.backend for entry in entries}
    refusals_of = {candidate.name: candidate.refusals for candidate in candidates}
    told: list[tuple[Request, tuple[str, ...]]] = []
    passed_over: list[str] = []
    for request in wish.preferred:
        if request.name not in backends:
            if len(wish.preferred) == 1:
                raise BackendError(unknown_backend(request, wish, entries, faults))
            told.append((request, (f"no backend of that name is registered{did_you_mean(request.name, [*backends])}",)))
            continue
        _, wrong = option_values(backends[request.name], request.options)
        reasons = (*refusals_of[request.name], *wrong)
        if not reasons:
            return request, tuple(passed_over)
        told.append((request, reasons))
        if wrong:
            passed_over.append(f"{request}, asked for by {wish.by}, is passed over: {'; '.join(wrong)}")
    if len(told) == 1:
        ((request, reasons),) = told
        listed = "".join(f"\n  - {reason}" for reason in reasons)
        raise BackendError(f"backend {str(request)!r}, asked for by {wish.by}, cannot run {problem}:{listed}")
    lines = [f"none of the backends {str(wish)!r}, asked for by {wish.by}, can run {problem}"]
    for request, reasons in told:
        lines += [f"{request}:", *(f"  - {reason}" for reason in reasons)]
    raise BackendError("\n  ".join(lines))


def _unknown(wish: Wish, names: Sequence[str]) -> Iterator[str]:
    """What is to be said of names in a wish that no backend has."""
    for request in wish.preferred if len(wish.preferred) > 1 else ():
        if request.name not in names:
            yield f"{request.name}, asked for by {wish.by}, is not registered{did_you_mean(request.name, names)}"
    for name in wish.excluded:
        if name not in names:
            yield f"-{name}, asked for by {wish.by}, excludes nothing: no such backend{did_you_mean(name, names)}"


def select(
    problem: Problem,
    entries: Sequence[Entry],
    passing: Sequence[Entry],
    *,
    like: Problem,
    wish: Wish | None,
    failed: Mapping[str, str],
    faults: Sequence[Fault],
    measured: Sequence[Measured],
) -> Request:
    """What :func:`choose` chooses, at a fraction of the cost: without the reasons against the others.

    Args:
        problem: the call.
        entries: the registered backends.
        passing: those of them that can run it, as far as they were asked without their ranks.
        like: the problem by which backends are ranked.
        wish: what was asked for, if anything.
        failed: for backends whose preparation failed, by name, the reason.
        faults: plug-ins that could not be used.
        measured: what tables say of such a problem.

    Raises:
        BackendError: as ``choose``.
    """
    ranked = sorted((each for each in (_ranked(entry, like) for entry in passing) if not each.refusals), key=_order)
    if wish is None or not wish.preferred:
        unfit = _unfit(ranked, passing, like, measured)
        fit = [each for each in ranked if each.name not in unfit]
        if fit:
            return Request(_pick(fit, measured)[0].name)
    else:
        able = {each.name for each in ranked}
        backends = {entry.backend.name: entry.backend for entry in passing if entry.backend.name in able}
        for request in wish.preferred:
            backend = backends.get(request.name)
            if backend is not None and not option_values(backend, request.options)[1]:
                return request
    return choose(problem, entries, like=like, wish=wish, failed=failed, faults=faults, measured=measured).request


def unknown_backend(request: Request, wish: Wish, entries: Sequence[Entry], faults: Sequence[Fault]) -> str:
    """The message for a name that no registered backend has."""
    names = sorted(entry.backend.name for entry in entries)
    broken = "".join(f"\n  {fault}" for fault in faults)
    return (
        f"no backend is called {request.name!r}, asked for by {wish.by}{did_you_mean(request.name, names)}; "
        f"registered: {', '.join(names) or 'none'}{broken}"
    )


def _candidate(
    entry: Entry, problem: Problem, like: Problem, failed: Mapping[str, str], wish: Wish | None
) -> Candidate:
    name = entry.backend.name
    reasons = refusals(entry.backend, problem)
    if name in failed:
        reasons = (*reasons, failed[name])
    if wish is not None and name in wish.excluded:
        reasons = (*reasons, f"excluded by {wish.by}")
    return Candidate(name, entry.distribution, None, reasons) if reasons else _ranked(entry, like)


def _ranked(entry: Entry, problem: Problem) -> Candidate:
    backend = entry.backend
    try:
        rank = float(backend.rank(problem) if callable(backend.rank) else backend.rank)
        if isnan(rank):
            raise ValueError("it is no number")
    except BaseException as error:
        reasons = (f"its rank() raised {trouble(error)}",)
        return Candidate(backend.name, entry.distribution, None, reasons)
    return Candidate(backend.name, entry.distribution, rank, ())


def _unfit(
    passing: Sequence[Candidate], entries: Sequence[Entry], problem: Problem, measured: Sequence[Measured]
) -> dict[str, str]:
    """Why some candidates that could run a problem are not to be chosen: measured as wrong, or too large for the memory.

    The latter only where it leaves some.
    """
    wrong = {each.name: reason for each in passing if (reason := _wrong(each.name, measured)) is not None}
    backends = {entry.backend.name: entry.backend for entry in entries}
    right = [each.name for each in passing if each.name not in wrong]
    # A backend does not see what lies outside the sequences.
    window = visible_window(ROWS[problem.op], problem)
    seen = problem if window == problem.window else replace(problem, window=window)
    large = {name: reason for name in right if (reason := _too_large(backends[name], seen)) is not None}
    return wrong if len(large) == len(right) else wrong | large


def _wrong(name: str, measured: Sequence[Measured]) -> str | None:
    """What the nearest measurement of a backend found wrong; None where it found nothing."""
    by = next((each for each in measured if name in each.figures), None)
    if by is None or not by.figures[name].is_wrong:
        return None
    return f"its result was measured as {by.figures[name].reason} ({by.text}); `attnreg tune` measures it again"


def _too_large(backend: Backend, problem: Problem) -> str | None:
    """Why a problem is too large for a backend on its device; None where it is not, or nobody knows."""
    try:
        needed = workspace(backend, problem)
    except BaseException as error:
        return f"its workspace() raised {trouble(error)}"
    there = memory_bytes(problem.device.type, problem.device.index) if needed > LITTLE_MEMORY else None
    if there is None or needed <= MOST_OF_MEMORY * there:
        return None
    return (
        f"it needs {needed / 2**30:.1f} GiB beside the tensors; {problem.device} has {there / 2**30:.1f} GiB, of which a call "
        f"may take {MOST_OF_MEMORY:.0%}"
    )


def _undecided(passing: Sequence[Candidate], measured: Sequence[Measured]) -> str:
    """Why no measurement decides."""
    for each in measured:
        known = [candidate.name for candidate in passing if candidate.name in each.figures]
        if len(known) == 1:
            return f"{known[0]} was measured alone, which compares nothing: tune the others, too ({each.text})"
        if known:
            return f"no time was measured of {', '.join(known)} ({each.text})"
    return "nothing was measured"


def _pick(passing: Sequence[Candidate], measured: Sequence[Measured]) -> tuple[Candidate, Measured | None]:
    """The best of candidates in order of rank, and by which measurement; None where none decides."""
    for each in measured:
        fastest = _fastest(passing, each.figures)
        if fastest is not None:
            return fastest, each
    return passing[0], None


def _fastest(passing: Sequence[Candidate], figures: Mapping[str, Figure]) -> Candidate | None:
    """The fastest of those that have a time; of a tie, the first.

    None where nothing was compared: one alone was measured of several that pass.
    """
    known = [(candidate, figures[candidate.name]) for candidate in passing if candidate.name in figures]
    if len(known) < min(len(passing), 2):
        return None
    timed = [(candidate, figure, figure.seconds) for candidate, figure in known if figure.seconds is not None]
    if not timed:
        return None
    _, figure, least = min(timed, key=lambda each: each[2])
    return next(
        candidate
        for candidate, its, seconds in timed
        if seconds - least <= min(max(its.spread, figure.spread), TIE * least)
    )


def _time(figure: Figure | None, than: float | None = None) -> str:
    """A figure in words, after a comma; nothing where there is none."""
    if figure is None:
        return ""
    if figure.seconds is None:
        return f", not timed: {figure.reason}"
    ratio = "" if than is None else f", {figure.seconds / than:.2f} times that"
    return f", {figure.seconds * 1e3:.4g} ms{ratio}"


def _order(candidate: Candidate) -> tuple[bool, float, str]:
    return candidate.rank is None, candidate.rank or 0.0, candidate.name


def _nobody(problem: Problem, candidates: Sequence[Candidate], faults: Sequence[Fault]) -> str:
    lines = [f"no backend can run {problem}"]
    for candidate in candidates:
        lines += [f"{candidate.name}:", *(f"  - {reason}" for reason in candidate.refusals)]
    return "\n  ".join([*lines, *(str(fault) for fault in faults)])
