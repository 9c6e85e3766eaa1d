"""A benchmark's results for people: one table for each op and direction, and the reasons for what is missing in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attnreg.cli.shared import print_table, say
from attnreg_benchmarks.results import Results
from attnreg_benchmarks.run import Record
from attnreg_benchmarks.workloads import DIRECTIONS


def print_results(results: Results) -> None:
    """Print the environment, the ceilings, the tables, and why a contender has no time."""
    environment, ceilings = results.environment, results.ceilings
    versions = ", ".join(f"{name} {version}" for name, version in environment.packages.items())
    commit = (
        f", commit {environment.commit[:12]}{' + changes' if environment.dirty else ''}" if environment.commit else ""
    )
    rates = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in ceilings.flops_per_second.items())
    lines = [
        f"{environment.device}: {versions}{commit}",
        f"measured ceilings: copy {ceilings.bytes_per_second / 1e12:.3g} TB/s, read + written; matmul {rates}",
        "Times in ms, and floor / time: 1.00 is the physical limit. * is the fastest.",
    ]
    say("\n".join(lines))
    for op, direction in dict.fromkeys((each.op, way) for each in results.workloads.values() for way in DIRECTIONS):
        headings, rows = _table(results, op, direction)
        if rows:
            say(f"\n{op}, {direction}\n")
            print_table(headings, rows, right=headings[1:])
    for line in _notes(results.records):
        say(line)


def _table(results: Results, op: str, direction: str) -> tuple[list[str], list[list[str]]]:
    """The headings and the times of one op in one direction, a row for each workload; no row where nothing was timed."""
    timed: dict[str, dict[str, Record]] = {name: {} for name, each in results.workloads.items() if each.op == op}
    for record in results.records:
        if record.workload in timed and record.direction == direction and record.seconds is not None:
            timed[record.workload][record.contender] = record
    contenders = list(dict.fromkeys(contender for found in timed.values() for contender in found))
    rows = []
    for workload, found in timed.items():
        if found:
            best = min(found.values(), key=lambda record: record.seconds or 0.0)
            cells = [_cell(found.get(contender), best) for contender in contenders]
            rows.append([workload, f"{best.floor * 1e3:.3f}", *cells])
    return ["workload", "floor", *contenders], rows


def _cell(record: Record | None, best: Record) -> str:
    if record is None or record.seconds is None or record.fraction is None:
        return "-"
    mark = "*" if record is best else ""
    return f"{record.seconds * 1e3:.3f} {record.fraction:.2f}{mark}"


def _notes(records: Sequence[Record]) -> Iterator[str]:
    """For each contender, what stands against its times, with what that applies to."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for record in records:
        note = record.reason
        if record.method == "events":
            note = "cannot be captured; timed by events, the host's work can be part of it"
        if note is not None:
            where = f"{record.workload} {record.direction}"
            grouped.setdefault((record.contender, note), []).append(where)
    for (contender, note), places in grouped.items():
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        yield f"{contender}: {note} ({places[0]}{more})"
