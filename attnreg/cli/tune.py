"""``attnreg tune``: what it does is :mod:`attnreg.tuning.command`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

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
)


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
    # Not before it is asked for: the other commands do without.
    from attnreg.tuning import command

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
            merged, not_used_here = command.import_table(import_)
        typer.echo(f"merged into {merged}")
        for reason in not_used_here:
            typer.echo(f"calls on this machine do not go by it: {reason}")
    elif export is not None:
        with bad_value_of("--export"):
            command.export_table(on, export)
        typer.echo(f"table: {export}")
    elif plot is not None:
        with plot_errors():
            command.plot_table(on, plot, batch=batch, **options)
        typer.echo(f"plot: {plot}")
    else:
        check_device(on)
        with bad_value_of(None):
            command.tune_table(on, batch=batch, seconds=seconds, console=new_console(), **options)


def _heads(given: str) -> tuple[int, int]:
    names = ("H", "HKV") if "," in given else ("H",)
    numbers = parse_integers(given, "--heads", names)
    return numbers[0], numbers[-1]
