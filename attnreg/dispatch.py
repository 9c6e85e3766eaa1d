"""Choosing a backend for a problem: a pure function from facts to a decision that explains itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from attnreg.backend import Backend, BackendError, option_values, refusals
from attnreg.problem import Problem
from attnreg.request import Request


@dataclass(frozen=True)
class Entry:
    """A registered backend, and where it comes from.

    Attributes:
        backend: the backend.
        distribution: the distribution whose plug-in offered it, or where it was registered from.
    """

    backend: Backend
    distribution: str


@dataclass(frozen=True)
class Fault:
    """A plug-in that could not be used, or not wholly.

    Attributes:
        plugin: the entry point's name.
        distribution: the distribution that published it.
        error: what went wrong.
    """

    plugin: str
    distribution: str
    error: str

    def __str__(self) -> str:
        return f"plug-in {self.plugin!r} of {self.distribution}: {self.error}"


@dataclass(frozen=True)
class Forced:
    """A backend that somebody asked for, and by which means."""

    request: Request
    by: str


@dataclass(frozen=True)
class Candidate:
    """One registered backend as seen by one decision.

    Attributes:
        name: the backend's name.
        distribution: where it comes from.
        rank: its heuristic rank for the problem, lower is better; None where it is refused.
        refusals: every reason why it cannot run the problem; empty where it can.
    """

    name: str
    distribution: str
    rank: float | None
    refusals: tuple[str, ...]


@dataclass(frozen=True)
class Decision:
    """Which backend runs a problem, and why; ``str()`` of it is the readable trace.

    Attributes:
        problem: the call.
        backend: the chosen backend's name.
        reason: why it was chosen.
        candidates: every registered backend, the chosen one first, those that could run next, refused ones last.
        faults: the plug-ins that could not be used.
        options: what was asked of the backend, by option and as it was written.
    """

    problem: Problem
    backend: str
    reason: str
    candidates: tuple[Candidate, ...]
    faults: tuple[Fault, ...] = ()
    options: tuple[tuple[str, str], ...] = ()

    @property
    def request(self) -> Request:
        """The chosen backend with its options, which asks for the same again."""
        return Request(self.backend, self.options)

    def __str__(self) -> str:
        lines = [str(self.problem), f"-> {self.request}: {self.reason}"]
        for candidate in self.candidates:
            if candidate.name == self.backend:
                continue
            if candidate.refusals:
                lines.append(f"   {candidate.name} ({candidate.distribution}) refused:")
                lines += [f"     - {reason}" for reason in candidate.refusals]
            else:
                lines.append(f"   {candidate.name} ({candidate.distribution}) could run it, rank {candidate.rank:g}")
        lines += [f"   {fault}" for fault in self.faults]
        return "\n".join(lines)


def choose(
    problem: Problem,
    entries: Sequence[Entry],
    *,
    forced: Forced | None = None,
    failed: Mapping[str, str] | None = None,
    faults: Sequence[Fault] = (),
) -> Decision:
    """The decision for ``problem`` among ``entries``.

    Precedence: a forced backend, which passes its own filter or is refused and is never replaced; else the lowest
    rank among those that pass, a tie going to the name that sorts first.

    Args:
        problem: the call.
        entries: the registered backends.
        forced: the backend that was asked for, if any.
        failed: for backends whose preparation failed, by name, the reason.
        faults: plug-ins that could not be used, kept for the trace.

    Raises:
        BackendError: the forced backend is unknown or refuses, or every backend does; lists every reason.
    """
    candidates = sorted((_candidate(entry, problem, failed or {}) for entry in entries), key=_order)
    if forced is None:
        if not candidates or candidates[0].refusals:
            raise BackendError(_nobody(problem, candidates, faults))
        first = candidates[0]
        rivals = sum(not candidate.refusals for candidate in candidates) - 1
        others = "the only one that can run it" if not rivals else f"the lowest of {rivals + 1} that can run it"
        reason = f"heuristic, rank {first.rank:g}, {others}; nothing was measured"
        return Decision(problem, first.name, reason, tuple(candidates), tuple(faults))
    request = forced.request
    backend = next((entry.backend for entry in entries if entry.backend.name == request.name), None)
    if backend is None:
        raise BackendError(unknown_backend(forced, entries, faults))
    candidates.sort(key=lambda candidate: candidate.name != request.name)
    refused = (*candidates[0].refusals, *option_values(backend, request.options)[1])
    if refused:
        reasons = "".join(f"\n  - {reason}" for reason in refused)
        raise BackendError(f"backend {str(request)!r}, asked for by {forced.by}, cannot run {problem}:{reasons}")
    reason = f"forced by {forced.by}"
    return Decision(problem, request.name, reason, tuple(candidates), tuple(faults), request.options)


def unknown_backend(forced: Forced, entries: Sequence[Entry], faults: Sequence[Fault]) -> str:
    """The message for a name that no registered backend has."""
    names = ", ".join(sorted(entry.backend.name for entry in entries)) or "none"
    broken = "".join(f"\n  {fault}" for fault in faults)
    return f"no backend is called {forced.request.name!r}, asked for by {forced.by}; registered: {names}{broken}"


def _candidate(entry: Entry, problem: Problem, failed: Mapping[str, str]) -> Candidate:
    backend = entry.backend
    reasons = refusals(backend, problem)
    if backend.name in failed:
        reasons += (failed[backend.name],)
    rank: float | None = None
    if not reasons:
        try:
            rank = float(backend.rank(problem) if callable(backend.rank) else backend.rank)
        except Exception as error:
            reasons = (f"its rank() raised {type(error).__name__}: {error}",)
    return Candidate(backend.name, entry.distribution, rank, reasons)


def _order(candidate: Candidate) -> tuple[bool, float, str]:
    return candidate.rank is None, candidate.rank or 0.0, candidate.name


def _nobody(problem: Problem, candidates: Sequence[Candidate], faults: Sequence[Fault]) -> str:
    lines = [f"no backend can run {problem}"]
    for candidate in candidates:
        lines += [f"{candidate.name}:", *(f"  - {reason}" for reason in candidate.refusals)]
    return "\n  ".join([*lines, *(str(fault) for fault in faults)])
