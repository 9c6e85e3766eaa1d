"""``attnreg tune``: its options, and what it shows; the measuring is :mod:`attnreg.tuning`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from attnreg.cli.shared import (
    ALL_OPS,
    DeviceOption,
    bad_value_of,
    check_device,
    new_console,
    parse_device,
    parse_dtype,
    parse_integers,
    plot_errors,
    progress_bar,
)
from attnreg.tables.call import kinds
from attnreg.tables.store import pinned
from attnreg.tables.table import Table

# What measures is imported where it is asked for: the other commands do without.
if TYPE_CHECKING:
    from attnreg.tuning.tune import Step


def tune(
    op: Annotated[
        list[str] | None, typer.Option("--op", metavar="OP", help=f"Of {ALL_OPS}; repeatable. Default: all.")
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option("--dtype", metavar="DTYPE", help="Repeatable. Default: float32, bfloat16, on a GPU float16 too."),
    ] = None,
    head_dim: Annotated[
        list[int] | None, typer.Option("--head-dim", min=1, help="E = D; repeatable. Default: 64, 128.")
    ] = None,
    length: Annotated[
        list[int] | None, typer.Option("--length", min=1, help="Lq = Lk; repeatable. Default: 4096, on a CPU 1024.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="N.")] = 1,
    heads: Annotated[
        list[str] | None,
        typer.Option("--heads", metavar="H[,HKV]", help="Repeatable. Default: 64, on a CPU 8."),
    ] = None,
    window: Annotated[
        list[int] | None,
        typer.Option("--window", min=1, help="W; repeatable. Default: powers of two to 1024 and the steps between."),
    ] = None,
    grad: Annotated[
        bool | None, typer.Option("--grad/--no-grad", help="Only with gradients, or only without. Default: both.")
    ] = None,
    backend: Annotated[
        list[str] | None, typer.Option("--backend", metavar="NAME", help="Only this candidate; repeatable.")
    ] = None,
    device: DeviceOption = None,
    seconds: Annotated[float, typer.Option("--seconds", min=0.001, help="Sample each candidate so long.")] = 0.06,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            help="Measure nothing: draw the user's table, or the calls chosen of it, into this file (.png, ...).",
        ),
    ] = None,
    export: Annotated[
        Path | None, typer.Option("--export", metavar="FILE", help="Measure nothing: write the user's table to FILE.")
    ] = None,
    import_: Annotated[
        Path | None,
        typer.Option("--import", metavar="FILE", help="Measure nothing: merge the table in FILE into the user's."),
    ] = None,
) -> None:
    """Measure the backends on this machine, so that the fastest is chosen from then on.

    Each candidate runs in a child process, is compared with float64 first, and timed with a cold cache. The table lies in
    the user's cache directory (ATTNREG_CACHE_DIR). Ctrl-C keeps what was measured. ATTNREG_TABLE=FILE pins a table instead.
    """
    from attnreg.tuning import plot as plotting
    from attnreg.tuning import writing

    on = parse_device(device)
    if sum(given is not None for given in (plot, export, import_)) > 1:
        raise typer.BadParameter("give only one of --plot, --export and --import")
    given: dict[str, Any] = {
        "ops": op,
        "dtypes": None if dtype is None else [parse_dtype(each) for each in dtype],
        "head_dims": head_dim,
        "lengths": length,
        "heads": None if heads is None else [_heads(each) for each in heads],
        "windows": window,
        "gradients": None if grad is None else (grad,),
        "backends": backend,
    }
    options = {name: value for name, value in given.items() if value is not None}
    if options and (import_ or export):
        raise typer.BadParameter(
            "--export and --import take whole tables; no choice of calls or backends goes with them"
        )
    if import_ is not None:
        with bad_value_of("--import"):
            merged, not_used_here = writing.import_table(import_)
        typer.echo(f"merged into {merged}")
        for reason in not_used_here:
            typer.echo(f"calls on this machine do not go by it: {reason}")
    elif export is not None:
        with bad_value_of("--export"):
            writing.export_table(on, export)
        typer.echo(f"table: {export}")
    elif plot is not None:
        with plot_errors():
            plotting.plot_table(on, plot, batch=batch, **options)
        typer.echo(f"plot: {plot}")
    else:
        check_device(on)
        with bad_value_of(None):
            _tune(on, batch=batch, seconds=seconds, console=new_console(), **options)


def _heads(given: str) -> tuple[int, int]:
    names = ("H", "HKV") if "," in given else ("H",)
    numbers = parse_integers(given, "--heads", names)
    return numbers[0], numbers[-1]


def _tune(device: torch.device, *, console: Console, **options: Any) -> None:
    """Tune with a progress bar, then show the winners, and where the table lies."""
    from attnreg.measuring.steadiness import DISTURBED_FROM
    from attnreg.tuning.tune import tune as measure

    with progress_bar(console) as progress:
        bar = progress.add_task("measuring")

        def show(step: Step) -> None:
            progress.update(
                bar,
                completed=step.done,
                total=step.total,
                description=f"{step.problem.op} {step.problem.window} {step.backend}",
            )

        found = measure(device=device, progress=show, **options)
    if found.interrupted:
        console.print("interrupted; what was measured until here is kept", highlight=False)
    if found.path is None:
        console.print("nothing was measured: no backend can run any of these calls", highlight=False)
        return
    _print_winners(found.table, console)
    console.print(f"table: {found.path}", highlight=False, soft_wrap=True)
    if found.disturbed:
        console.print(
            f"measured while something else used the device, as a copy took {DISTURBED_FROM} times its usual time or more; "
            "better measured again:",
            highlight=False,
            soft_wrap=True,
        )
        for call, name in found.disturbed:
            (kind,) = kinds([call])
            console.print(f"  {name}: {kind} W={call.window.size}", highlight=False, soft_wrap=True)
    pin = pinned()
    if pin is not None:
        console.print(f"calls do not go by it: ATTNREG_TABLE pins {pin}", highlight=False, soft_wrap=True)


def _print_winners(table: Table, console: Console) -> None:
    for kind, calls in kinds(table.rows).items():
        console.print(f"\n{kind}", highlight=False, soft_wrap=True)
        grid = Grid(box=None, pad_edge=False, padding=(0, 2))
        for heading in ("W", "fastest", "ms", "next"):
            grid.add_column(heading, justify="right" if heading in ("W", "ms") else "left", no_wrap=True)
        for call in calls:
            figures = table.rows[call].items()
            timed = sorted((figure.seconds, name) for name, figure in figures if figure.seconds is not None)
            first = (timed[0][1], f"{timed[0][0] * 1e3:.4g}") if timed else ("none", "-")
            second = f"{timed[1][1]} {timed[1][0] / timed[0][0]:.2f}x" if len(timed) > 1 else ""
            grid.add_row(str(call.window.size), *map(Text, (*first, second)))
        console.print(grid)
    console.print()
