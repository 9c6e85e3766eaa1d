"""What ``attnreg bench`` does, step by step; its options are declared beside the other commands'."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from attnreg_benchmarks.contender import Contender
from attnreg_benchmarks.machine import ceilings, environment
from attnreg_benchmarks.results import Results, now
from attnreg_benchmarks.run import Record, merge, run
from attnreg_benchmarks.workloads import Workload


def benchmark(
    workloads: Sequence[Workload],
    contenders: Sequence[Contender],
    directions: Sequence[str],
    device: torch.device,
    repeat: int,
    console: Console,
) -> Results:
    """Measure, with a progress bar. Ctrl-C ends the measuring; what was measured until then is kept."""
    records: list[Record] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with console.status("measuring the machine's ceilings"):
        limits = ceilings(device)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        total = repeat * len(directions) * sum(each.op in one.ops for each in workloads for one in contenders)
        bar = progress.add_task("measuring", total=total)
        try:
            for record in run(workloads, contenders, directions, device, limits, repeat):
                records.append(record)
                progress.update(bar, advance=1, description=f"{record.workload} {record.direction}")
        except KeyboardInterrupt:
            console.print("interrupted; what was measured until here is kept", highlight=False)
    return Results(now(), environment(device), limits, tuple(workloads), merge(records))
