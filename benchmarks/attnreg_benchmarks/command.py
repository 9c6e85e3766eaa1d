"""``attnreg bench``, which the entry-point group ``attnreg.commands`` adds to attnreg's commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from attnreg import Problem
from attnreg.cli.shared import (
    ALL_OPS,
    DeviceOption,
    bad_value_of,
    check_device,
    check_op,
    complete_backend,
    complete_op,
    integer,
    new_console,
    parse_device,
    plot_errors,
    print_table,
    progress_bar,
    say,
)
from attnreg.drawing import check_picture
from attnreg_benchmarks import results
from attnreg_benchmarks.backends import backends as backends_to_measure
from attnreg_benchmarks.contender import Contender
from attnreg_benchmarks.machine import ceilings, environment
from attnreg_benchmarks.peers import PEERS
from attnreg_benchmarks.plot import plot_results
from attnreg_benchmarks.report import print_results
from attnreg_benchmarks.run import Record, merge, run
from attnreg_benchmarks.workloads import DIRECTIONS, select


def bench(
    workload: Annotated[
        list[str] | None,
        typer.Option(
            "--workload",
            metavar="GLOB",
            help="Only workloads whose name or group fits, such as '*fused*' or '*/w64'; repeatable. See --list.",
        ),
    ] = None,
    op: Annotated[
        str | None,
        typer.Option("--op", metavar="OP", help=f"Only one of {ALL_OPS}.", autocompletion=complete_op),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            "--backend",
            metavar="NAME",
            help="Only this backend; repeatable. Default: all but the slow reference.",
            autocompletion=complete_backend,
        ),
    ] = None,
    direction: Annotated[
        str | None, typer.Option("--direction", metavar="WAY", help="forward or backward. Default: both.")
    ] = None,
    device: DeviceOption = None,
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Other libraries that are installed, too.")] = True,
    repeat: Annotated[
        int,
        typer.Option(
            "--repeat",
            parser=integer(1),
            metavar="TIMES",
            help="Go through everything so many times; medians of all are shown.",
        ),
    ] = 1,
    json: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", help="Where the results go. Default: a file named after device and date."
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Draw latency against window into this file (.png, .svg, ...)."),
    ] = None,
    stored: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="Measure nothing: show, and with --plot draw, these results."),
    ] = None,
    only_list: Annotated[bool, typer.Option("--list", help="List the workloads, and measure nothing.")] = False,
) -> None:
    """Measure against other libraries and the limit.

    The limit is the device's: in the same run its copy bandwidth and its matmul rate are measured. They give each workload its
    floor, the time that no kernel can beat. Every result is checked first: a wrong one gets no time. Backward is the backward
    alone.
    """
    if op is not None:
        check_op(op)
    if direction is not None and direction not in DIRECTIONS:
        raise typer.BadParameter(f"{direction!r} is neither forward nor backward", param_hint="--direction")
    directions = DIRECTIONS if direction is None else (direction,)
    if plot is not None:
        with plot_errors():
            check_picture(plot)

    console = new_console()
    if stored is not None:
        with bad_value_of("--from"):
            found = results.load(stored)
        with bad_value_of("--workload"):
            found = results.narrow(found, workload or (), op, directions)
        print_results(found)
    else:
        on = parse_device(device)
        with bad_value_of("--workload"):
            workloads = select(on.type, workload or (), op)
        if only_list:
            print_table(("workload", "call"), [(name, str(problem)) for name, problem in workloads.items()])
            return
        check_device(on)
        with bad_value_of("--backend"):
            contenders = (*backends_to_measure(backend or ()), *(PEERS if peers else ()))
        found = benchmark(workloads, contenders, directions, on, repeat, console)
        print_results(found)
        path = results.default_path(found) if json is None else json
        with bad_value_of("--json"):
            results.save(found, path)
        say(f"results: {path}")
    if plot is not None:
        with plot_errors():
            plot_results(found, plot)
        say(f"plot: {plot}")


def benchmark(
    workloads: Mapping[str, Problem],
    contenders: Sequence[Contender],
    directions: Sequence[str],
    device: torch.device,
    repeat: int,
    console: Console,
) -> results.Results:
    """Measure, with a progress bar. Ctrl-C ends the measuring; what was measured until then is kept."""
    records: list[Record] = []
    with console.status("measuring the machine's ceilings"):
        limits = ceilings(device)
    with progress_bar(console) as progress:
        total = repeat * len(directions) * sum(each.op in one.ops for each in workloads.values() for one in contenders)
        bar = progress.add_task("measuring", total=total)
        try:
            for record in run(workloads, contenders, directions, device, limits, repeat):
                records.append(record)
                progress.update(bar, advance=1, description=f"{record.workload} {record.direction}")
        except KeyboardInterrupt:
            console.print("interrupted; what was measured until here is kept", highlight=False)
    return results.Results(results.now(), environment(device), limits, workloads, merge(records))
