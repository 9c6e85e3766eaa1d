"""Regret: how much longer the chosen backend takes than the best candidate or peer, on calls that no table has measured.

``python -m attnreg_benchmarks.regret --json FILE`` measures every candidate on a grid of windows, lengths and head dims
between those of the shipped tables, and the peers, which are what users would write instead; asks the dispatcher, and gives
``chosen / best``: 1.0 is the best choice there is. FlexAttention, which is compiled for each shape, is left out. It judges
whatever tables the dispatcher finds; with ``ATTNREG_CACHE_DIR`` set to an empty folder these are the shipped ones.

Two ways measure nothing, and need no such device. ``--again FILE`` chooses anew for the calls of an earlier run, by the table
that is shipped for its device: what a change of a table or of the lookup is worth. ``--left-out TABLE`` leaves each entry of
a table out in turn, and the others choose for it.
"""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from attnreg.backend import Capability, Entry
from attnreg.dispatch import Decision, choose
from attnreg.measuring.steadiness import disturbed
from attnreg.op import OPS
from attnreg.plan import explain_problem
from attnreg.problem import Problem, dtype_name
from attnreg.registry import registry
from attnreg.tables.call import sizes_in_words
from attnreg.tables.lookup import Stored, measured
from attnreg.tables.store import SHIPPED, load
from attnreg.tables.table import Table as Tuning
from attnreg.tables.table import TableError
from attnreg.testing.stage import set_stage
from attnreg.tuning.tune import grid, measure_all
from attnreg_benchmarks.contender import Contender
from attnreg_benchmarks.machine import environment
from attnreg_benchmarks.peers import PEERS
from attnreg_benchmarks.peers.flex_on_cpu import FLEX
from attnreg_benchmarks.results import now, write
from attnreg_benchmarks.run import clock
from attnreg_benchmarks.workloads import DIRECTIONS

# Nothing here is a size of a shipped table: windows, head dims, lengths and heads lie between, or beyond.
GRIDS: dict[str, tuple[dict[str, Any], ...]] = {
    "cuda": (
        {"windows": (11, 90, 700), "head_dims": (112,), "lengths": (6000,), "heads": ((24, 24),)},
        {"windows": (23, 181), "head_dims": (80,), "lengths": (2500,), "heads": ((32, 8),)},
        {"windows": (45, 350), "head_dims": (160,), "lengths": (3000,), "heads": ((20, 20),)},
    ),
    "cpu": (
        {"windows": (3, 23, 90), "head_dims": (80,), "lengths": (700, 1500), "heads": ((6, 6),)},
        {"windows": (11,), "head_dims": (48,), "lengths": (2500,), "heads": ((4, 2),)},
        # So small that the fewest operations can win.
        {"windows": (3,), "head_dims": (48,), "lengths": (90, 180, 400), "heads": ((1, 1), (3, 3))},
    ),
}


@dataclass(frozen=True)
class Regret:
    """One call: what was chosen, and what would have been best.

    Attributes:
        call: the call in words.
        gradients: forward and backward together, or the forward alone.
        chosen: the dispatcher's choice.
        reason: why it chose so.
        best: the fastest candidate or peer.
        regret: the time of ``chosen`` over that of ``best``.
        seconds: every candidate's and peer's time.
        disturbed: whether something else used the device while one of them was measured.
    """

    call: str
    gradients: bool
    chosen: str
    reason: str
    best: str
    regret: float
    seconds: dict[str, float]
    disturbed: bool = False


def regrets(
    problems: Sequence[Problem],
    backends: Sequence[str] | None,
    seconds: float,
    repeat: int = 1,
    peers: Sequence[Contender] = (),
) -> list[Regret]:
    """Measure every candidate and peer on every call, and compare with the choice. Ctrl-C keeps what is whole.

    Everything is measured ``repeat`` times, in turns, and the least median counts: what else a machine does only ever adds.

    Raises:
        RuntimeError: a chosen backend has no time: a choice that does not run is worse than any regret.
    """
    times: dict[Problem, dict[str, float]] = {}
    copies: list[tuple[Problem, float | None]] = []
    failures: dict[tuple[Problem, str], str] = {}
    last: Problem | None = None
    turns = (measure_all(problems, seconds=seconds, backends=backends) for _ in range(repeat))
    try:
        for step in chain.from_iterable(turns):
            if step.problem != last:
                for name, taken in _seconds_of_peers(step.problem, peers, seconds):
                    timed = times.setdefault(step.problem, {})
                    timed[name] = min(taken, timed.get(name, math.inf))
            last = step.problem
            copies.append((last, step.copy_seconds))
            if step.figure.seconds is not None:
                timed = times.setdefault(last, {})
                timed[step.backend] = min(step.figure.seconds, timed.get(step.backend, math.inf))
            else:
                failures[step.problem, step.backend] = step.figure.reason or ""
    except KeyboardInterrupt:
        if last is not None:
            times.pop(last, None)
    spoilt = {problem for (problem, _), bad in zip(copies, disturbed([seconds for _, seconds in copies])) if bad}
    found = []
    for problem, timed in times.items():
        decision = explain_problem(problem, None)
        if decision.backend not in timed:
            why = failures.get((problem, decision.backend), "it was not measured")
            raise RuntimeError(f"{in_words(problem)}: {decision.backend} was chosen and has no time: {why}")
        found.append(replace(_regret(in_words(problem), decision, timed), disturbed=problem in spoilt))
    return found


def _seconds_of_peers(problem: Problem, peers: Sequence[Contender], seconds: float) -> Iterator[tuple[str, float]]:
    """What each peer takes that can run a call; with gradients, forward and backward."""
    able = [peer for peer in peers if problem.op in peer.ops and peer.refuse(problem) is None]
    if not able:
        return
    stage = set_stage(replace(problem, needs_grad=False))
    for peer in able:
        directions = DIRECTIONS if problem.needs_grad else DIRECTIONS[:1]
        yield peer.name, sum(clock(stage, peer, direction, seconds).median for direction in directions)


def left_out(table: Tuning) -> list[Regret]:
    """For each entry of a table that compares candidates, what the other entries choose among these."""
    found = []
    for call, figures in table.rows.items():
        times = {name: figure.seconds for name, figure in figures.items() if figure.seconds is not None}
        if len(times) < 2:
            continue
        others = Tuning(table.environment, {other: row for other, row in table.rows.items() if other != call})
        decision = _choice(call, times, Stored(others, "shipped", "the others", ()))
        found.append(_regret(f"{call.op} {dtype_name(call.dtype)} {sizes_in_words(call)}", decision, times))
    return found


def again(recorded: Sequence[Mapping[str, Any]], table: Path) -> list[Regret]:
    """For the calls of an earlier run, given as this module stores them, what a table chooses among the candidates there.

    Raises:
        ValueError: a call is none of today's grid.
    """
    tuning = load(table)
    device = torch.device(tuning.environment.device.type)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    problems = {(in_words(problem), problem.needs_grad): problem for problem in _problems(device, dtypes)}
    stored = Stored(tuning, "shipped", table.name, ())
    # Peers were measured as well, and no table can choose them.
    names = {entry.backend.name for entry in registry.entries}
    found = []
    for each in recorded:
        call, needs_grad, times = each["call"], each["gradients"], each["seconds"]
        problem = problems.get((call, needs_grad))
        if problem is None:
            raise ValueError(f"its call {call!r} is none of today's grid")
        able = {name: taken for name, taken in times.items() if name in names}
        found.append(_regret(call, _choice(problem, able, stored), able))
    return found


def shipped_for(device_name: str) -> Path:
    """The table that is shipped for a device of this name.

    Raises:
        ValueError: there is none.
    """
    for path in sorted(SHIPPED.glob("*.json")):
        if load(path).environment.device.name == device_name:
            return path
    raise ValueError(f"no table is shipped for {device_name!r}")


def in_words(problem: Problem) -> str:
    """A call of the grid, by which it is found again in an earlier run."""
    sizes = (problem.batch, problem.heads, problem.kv_heads, problem.key_length, problem.head_dim or problem.value_dim)
    return f"{problem.op} {','.join(map(str, sizes))} {dtype_name(problem.dtype)} {problem.window}"


def _problems(device: torch.device, dtypes: Sequence[torch.dtype]) -> list[Problem]:
    return [
        problem
        for part in GRIDS[device.type]
        for problem in grid(device=device, ops=OPS, dtypes=dtypes, batch=1, gradients=(False, True), **part)
    ]


def _choice(problem: Problem, seconds: Mapping[str, float], *tables: Stored) -> Decision:
    """What the dispatcher would choose by ``tables`` alone, or by rank, if the candidates with a time were all there is."""
    entries = [_able(entry, problem) for entry in registry.entries if entry.backend.name in seconds]
    return choose(problem, entries, measured=measured(problem, tables))


def _regret(call: str, decision: Decision, seconds: Mapping[str, float]) -> Regret:
    best = min(seconds, key=lambda name: seconds[name])
    ratio = seconds[decision.backend] / seconds[best]
    return Regret(call, decision.problem.needs_grad, decision.backend, decision.reason, best, ratio, dict(seconds))


def _able(entry: Entry, problem: Problem) -> Entry:
    """A backend that stands for its figures alone, and need not be able to run here."""
    capability = Capability(dtypes=(problem.dtype,))
    return replace(
        entry, backend=replace(entry.backend, capability=capability, library=None, unavailable=None, refuse=None)
    )


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, which ends a command that takes too long, is what Ctrl-C is: whole calls are kept."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(
    json_file: Annotated[Path, typer.Option("--json", metavar="FILE", help="Where the results go.")],
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    dtype: Annotated[list[str] | None, typer.Option("--dtype", help="Repeatable. Default: float32, bfloat16.")] = None,
    backend: Annotated[list[str] | None, typer.Option("--backend", help="Repeatable. Default: all.")] = None,
    seconds: Annotated[float, typer.Option("--seconds", help="Sample each candidate so long.")] = 0.06,
    repeat: Annotated[int, typer.Option("--repeat", min=1, help="Measure everything so many times.")] = 1,
    table_file: Annotated[
        Path | None,
        typer.Option("--left-out", metavar="TABLE", help="Measure nothing: judge this table by its own entries."),
    ] = None,
    earlier: Annotated[
        Path | None,
        typer.Option("--again", metavar="FILE", help="Measure nothing: choose anew for the calls of an earlier run."),
    ] = None,
) -> None:
    """Measure, print the geometric mean and the worst of each op, and store everything."""
    date = now()
    if table_file is not None and earlier is not None:
        raise typer.BadParameter("--left-out and --again exclude each other")
    if earlier is not None:
        try:
            content = json.loads(earlier.read_text())
            date, where = content["date"], content["environment"]
            found = again(content["regrets"], shipped_for(where["device"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise typer.BadParameter(f"{earlier}: {type(error).__name__}: {error}", param_hint="--again") from None
    elif table_file is not None:
        try:
            tuning = load(table_file)
        except TableError as error:
            raise typer.BadParameter(f"{table_file}: {error}", param_hint="--left-out") from None
        where = asdict(tuning.environment)
        found = left_out(tuning)
    else:
        on = torch.device(device)
        dtypes = [getattr(torch, name) for name in dtype or ("float32", "bfloat16")]
        where = asdict(environment(on))
        with _terminated_as_interrupted():
            found = regrets(
                _problems(on, dtypes), backend, seconds, repeat, [peer for peer in PEERS if peer is not FLEX]
            )
    summary = summarize(found)
    stored = {
        "date": date,
        "environment": where,
        "summary": summary,
        "regrets": [asdict(each) for each in found],
    }
    write(stored, json_file)
    table = Table("op", "", "calls", "geometric mean", "worst")
    for name, group in summary.items():
        op, _, what = name.partition(", ")
        table.add_row(op, what, f"{group['calls']:.0f}", f"{group['geometric_mean']:.3f}", f"{group['worst']:.3f}")
    Console().print(table)
    count = sum(each.disturbed for each in found)
    if count:
        print(f"{count} of {len(found)} calls were measured while something else used the device")
    for each in sorted(found, key=lambda each: -each.regret)[:8]:
        if each.regret == 1:
            break
        print(
            f"{each.regret:.3f} {each.chosen} instead of {each.best}: {each.call} gradients={each.gradients}; {each.reason}"
        )


def summarize(found: Sequence[Regret]) -> dict[str, dict[str, float]]:
    """The geometric mean and the worst regret, by op and direction, and of all."""
    groups: dict[str, list[float]] = {}
    for each in found:
        what = "forward and backward" if each.gradients else "forward"
        for name in ("all", f"{each.call.split()[0]}, {what}"):
            groups.setdefault(name, []).append(each.regret)
    return {
        name: {
            "calls": len(ratios),
            "geometric_mean": math.exp(sum(map(math.log, ratios)) / len(ratios)),
            "worst": max(ratios),
        }
        for name, ratios in groups.items()
    }


if __name__ == "__main__":
    typer.run(main)
