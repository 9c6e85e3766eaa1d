"""Choosing a backend for a problem: a pure function from facts to a decision that explains itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from attnreg.backend import BackendError, Entry, Fault, option_values, refusals
from attnreg.measured import Figure, Measured
from attnreg.problem import Problem
from attnreg.request import Request

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
        remarks: what is to be said of the tables of measured times.
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
    request: Request | None = None,
    failed: Mapping[str, str] | None = None,
    faults: Sequence[Fault] = (),
    measured: Sequence[Measured] = (),
    remarks: Sequence[str] = (),
) -> Decision:
    """The decision for ``problem`` among ``entries``, with all that there is to be said of it.

    Precedence: a forced backend, which passes its own filter or is refused and is never replaced; else the fastest that
    passes, by the first of ``measured`` that has a time of one; else the lowest rank among those that pass. Times that
    differ by no more than their spread, or than ``TIE`` of the shorter where that is less, are a tie. Ties go to the
    lower rank, then to the name that sorts first.

    Args:
        problem: the call.
        entries: the registered backends.
        like: the problem by which backends are ranked; None for ``problem`` itself.
        request: the backend that was asked for, if any.
        failed: for backends whose preparation failed, by name, the reason.
        faults: plug-ins that could not be used, kept for the trace.
        measured: what tables say of such a problem, those to be believed first.
        remarks: what is to be said of the tables.

    Raises:
        BackendError: the forced backend is unknown or refuses, or every backend does; lists every reason.
    """
    candidates = sorted((_candidate(entry, problem, like or problem, failed or {}) for entry in entries), key=_order)
    options: tuple[tuple[str, str], ...] = ()
    if request is not None:
        backend = next((entry.backend for entry in entries if entry.backend.name == request.name), None)
        if backend is None:
            raise BackendError(unknown_backend(request, entries, faults))
        candidates.sort(key=lambda candidate: candidate.name != request.name)
        refused = (*candidates[0].refusals, *option_values(backend, request.options)[1])
        if refused:
            reasons = "".join(f"\n  - {reason}" for reason in refused)
            raise BackendError(f"backend {str(request)!r}, asked for by {request.by}, cannot run {problem}:{reasons}")
        name, by, options = request.name, measured[0] if measured else None, request.options
        source, reason = "forced", f"forced by {request.by}"
    else:
        passing = [candidate for candidate in candidates if not candidate.refusals]
        if not passing:
            raise BackendError(_nobody(problem, candidates, faults))
        chosen, by = _pick(passing, measured)
        name = chosen.name
        if by is None:
            others = (
                "the only one that can run it" if len(passing) == 1 else f"the lowest of {len(passing)} that can run it"
            )
            source, reason = "heuristic", f"heuristic, rank {chosen.rank:g}, {others}; nothing was measured"
        else:
            source, reason = by.source, f"{by.source}{_time(by.figures[name])} ({by.text})"
            remarks = (*by.remarks, *remarks)
    if by is not None:
        candidates = [replace(candidate, figure=by.figures.get(candidate.name)) for candidate in candidates]
    candidates.sort(key=lambda candidate: candidate.name != name)
    return Decision(problem, name, reason, tuple(candidates), tuple(faults), options, source, tuple(remarks))


def select(
    problem: Problem,
    entries: Sequence[Entry],
    passing: Sequence[Entry],
    *,
    like: Problem,
    request: Request | None,
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
        request: the backend that was asked for, if any.
        failed: for backends whose preparation failed, by name, the reason.
        faults: plug-ins that could not be used.
        measured: what tables say of such a problem.

    Raises:
        BackendError: as ``choose``.
    """
    if request is not None:
        passing = [entry for entry in passing if entry.backend.name == request.name]
    candidates = [_ranked(entry, like) for entry in passing]
    ranked = sorted((each for each in candidates if not each.refusals), key=_order)
    if request is None and ranked:
        return Request(_pick(ranked, measured)[0].name)
    if request is not None and ranked and not option_values(passing[0].backend, request.options)[1]:
        return request
    return choose(problem, entries, like=like, request=request, failed=failed, faults=faults, measured=measured).request


def unknown_backend(request: Request, entries: Sequence[Entry], faults: Sequence[Fault]) -> str:
    """The message for a name that no registered backend has."""
    names = ", ".join(sorted(entry.backend.name for entry in entries)) or "none"
    broken = "".join(f"\n  {fault}" for fault in faults)
    return f"no backend is called {request.name!r}, asked for by {request.by}; registered: {names}{broken}"


def _candidate(entry: Entry, problem: Problem, like: Problem, failed: Mapping[str, str]) -> Candidate:
    name = entry.backend.name
    reasons = refusals(entry.backend, problem)
    if name in failed:
        reasons = (*reasons, failed[name])
    return Candidate(name, entry.distribution, None, reasons) if reasons else _ranked(entry, like)


def _ranked(entry: Entry, problem: Problem) -> Candidate:
    backend = entry.backend
    try:
        rank = float(backend.rank(problem) if callable(backend.rank) else backend.rank)
    except Exception as error:
        reasons = (f"its rank() raised {type(error).__name__}: {error}",)
        return Candidate(backend.name, entry.distribution, None, reasons)
    return Candidate(backend.name, entry.distribution, rank, ())


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
