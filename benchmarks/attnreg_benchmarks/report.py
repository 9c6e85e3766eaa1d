"""A benchmark's results for people: one table for each op and direction, and the reasons for what is missing in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from attnreg_benchmarks.results import Results
from attnreg_benchmarks.run import Record
from attnreg_benchmarks.workloads import DIRECTIONS


def print_results(results: Results, console: Console) -> None:
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
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    for op, direction in dict.fromkeys((each.op, way) for each in results.workloads.values() for way in DIRECTIONS):
        table = _table(results, op, direction)
        if table is not None:
            _print_whole(table, console)
    for line in _notes(results.records):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _table(results: Results, op: str, direction: str) -> Table | None:
    """The times of one op in one direction, a row for each workload; None where nothing was timed."""
    timed: dict[str, dict[str, Record]] = {name: {} for name, each in results.workloads.items() if each.op == op}
    for record in results.records:
        if record.workload in timed and record.direction == direction and record.seconds is not None:
            timed[record.workload][record.contender] = record
    contenders = list(dict.fromkeys(contender for found in timed.values() for contender in found))
    if not contenders:
        return None
    table = Table(title=f"{op}, {direction}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("workload", no_wrap=True)
    for heading in ("floor", *contenders):
        table.add_column(heading, justify="right", no_wrap=True)
    for workload, found in timed.items():
        if found:
            best = min(found.values(), key=lambda record: record.seconds or 0.0)
            cells = [_cell(found.get(contender), best) for contender in contenders]
            table.add_row(Text(workload), f"{best.floor * 1e3:.3f}", *cells)
    return table


def _cell(record: Record | None, best: Record) -> Text:
    if record is None or record.seconds is None or record.fraction is None:
        return Text("-")
    mark = "*" if record is best else " "
    return Text(f"{record.seconds * 1e3:.3f} {record.fraction:.2f}{mark}")


def _print_whole(table: Table, console: Console) -> None:
    """Lines as long as the table needs, whatever the width of the terminal: a cut figure is of no use."""
    width = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    Console(file=console.file, width=width).print(table)


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
