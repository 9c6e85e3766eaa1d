"""``attnreg tune``: its options, and what it shows; the measuring is :mod:`attnreg.tuning`."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from attnreg.cli.shared import (
    ALL_OPS,
    GIVEN,
    DeviceOption,
    bad_value_of,
    check_backends,
    check_device,
    check_op,
    complete_backend,
    complete_dtype,
    complete_given,
    complete_op,
    fail,
    integer,
    new_console,
    number,
    parse_device,
    parse_dtype,
    parse_given,
    parse_integers,
    plot_errors,
    progress_bar,
    say,
)
from attnreg.cli.tables import print_winners, timed
from attnreg.tables.call import kinds
from attnreg.tables.store import pinned

# What measures is imported where it is asked for: the other commands do without.
if TYPE_CHECKING:
    from attnreg.tuning.tune import Step, Tuned

# Where the output is no terminal, a line tells how far it is this often.
TELLING_SECONDS = 10.0


def tune(
    op: Annotated[
        list[str] | None,
        typer.Option("--op", metavar="OP", help=f"Of {ALL_OPS}; repeatable. Default: all.", autocompletion=complete_op),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            "--dtype",
            metavar="DTYPE",
            help="Repeatable. Default: float32, bfloat16, on a GPU float16 too.",
            autocompletion=complete_dtype,
        ),
    ] = None,
    head_dim: Annotated[
        list[int] | None,
        typer.Option("--head-dim", parser=integer(1), metavar="E", help="E = D; repeatable. Default: 64, 128."),
    ] = None,
    length: Annotated[
        list[int] | None,
        typer.Option(
            "--length", parser=integer(1), metavar="L", help="Lq = Lk; repeatable. Default: 4096, on a CPU 1024."
        ),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", parser=integer(1), metavar="N", help="N.")] = 1,
    heads: Annotated[
        list[str] | None,
        typer.Option("--heads", metavar="H[,HKV]", help="Repeatable. Default: 64, on a CPU 8."),
    ] = None,
    window: Annotated[
        list[int] | None,
        typer.Option(
            "--window",
            parser=integer(1),
            metavar="W",
            help="W; repeatable. Default: powers of two to 1024 and the steps between.",
        ),
    ] = None,
    grad: Annotated[
        bool | None, typer.Option("--grad/--no-grad", help="Only with gradients, or only without. Default: both.")
    ] = None,
    with_: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="NAME,...",
            help="Calls that give these optional arguments, or none; repeatable. Default: none. "
            f"Of {', '.join(GIVEN)}.",
            autocompletion=complete_given,
        ),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            "--backend",
            metavar="NAME",
            help="Only this candidate; repeatable.",
            autocompletion=complete_backend,
        ),
    ] = None,
    device: DeviceOption = None,
    seconds: Annotated[
        float,
        typer.Option("--seconds", parser=number(0.001), metavar="S", help="Sample each candidate so long."),
    ] = 0.06,
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
    """Measure the backends; the fastest is then chosen.

    Each candidate runs in a child process, is compared with float64 first, and timed with a cold cache. The table lies in
    the user's cache directory (ATTNREG_CACHE_DIR). Ctrl-C keeps what was measured. ATTNREG_TABLE=FILE pins a table instead.
    """
    from attnreg.tuning import plot as plotting
    from attnreg.tuning import writing

    on = parse_device(device)
    if sum(given is not None for given in (plot, export, import_)) > 1:
        raise typer.BadParameter("give only one of --plot, --export and --import")
    for each in op or ():
        check_op(each)
    check_backends(backend)
    given: dict[str, Any] = {
        "ops": op,
        "dtypes": None if dtype is None else [parse_dtype(each) for each in dtype],
        "head_dims": head_dim,
        "lengths": length,
        "heads": None if heads is None else [_heads(each) for each in heads],
        "windows": window,
        "gradients": None if grad is None else (grad,),
        "given": None if with_ is None else [parse_given(each) for each in with_],
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
        say(f"merged into {merged}")
        for reason in not_used_here:
            say(f"calls on this machine do not go by it: {reason}")
    elif export is not None:
        with bad_value_of("--export"):
            writing.export_table(on, export)
        # What is no file, such as /dev/stdout, has got the table itself.
        say(f"table: {export}", err=not export.is_file())
    elif plot is not None:
        with plot_errors():
            plotting.plot_table(on, plot, batch=batch, **options)
        say(f"plot: {plot}")
    else:
        check_device(on)
        _tune(on, batch=batch, seconds=seconds, **options)


def _heads(given: str) -> tuple[int, int]:
    names = ("H", "HKV") if "," in given else ("H",)
    numbers = parse_integers(given, "--heads", names)
    query, kv = numbers[0], numbers[-1]
    if query < 1 or kv < 1 or query % kv:
        raise typer.BadParameter(
            f"expected at least one head, and H a multiple of HKV; got {given!r}", param_hint="--heads"
        )
    return query, kv


def _tune(device: torch.device, **options: Any) -> None:
    """Tune with a progress bar, or lines where nobody watches; then show the winners, and where the table lies."""
    from attnreg.tuning.tune import tune as measure
    from attnreg.tuning.worker import NoPython

    console = new_console()
    try:
        with _interrupted_by_signals() as signals, progress_bar(console) as progress, bad_value_of(None):
            bar = progress.add_task("measuring")
            told = time.monotonic()

            def show(step: Step) -> None:
                nonlocal told
                what = f"{step.problem.op} {step.problem.window} {step.backend}"
                progress.update(bar, completed=step.done, total=step.total, description=what)
                if not console.is_terminal and time.monotonic() > told + TELLING_SECONDS:
                    told = time.monotonic()
                    say(f"measured {step.done} of {step.total}: {what}", err=True)

            found = measure(device=device, progress=show, **options)
    except NoPython as error:
        fail(str(error))
    _report(found)
    if signals:
        raise typer.Exit(128 + signals[0])
    if found.fault is not None or not any(timed(figures) for figures in found.table.rows.values()):
        raise typer.Exit(1)


@contextmanager
def _interrupted_by_signals() -> Iterator[list[int]]:
    """What ends a program from outside ends a tuning as Ctrl-C does, which keeps what was measured; yields those that came."""
    came: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _report(found: Tuned) -> None:
    if found.interrupted:
        say("interrupted; what was measured until here is kept")
    if not found.table.rows:
        if not found.interrupted:
            say("nothing was measured: no backend can run any of these calls")
        return
    print_winners(found.table)
    say("")
    if found.path is not None:
        say(f"table: {found.path}")
    if found.fault is not None:
        say(f"the table could not be written: {found.fault}", err=True)
        if found.rescued is not None:
            say(f"it lies in {found.rescued}; `attnreg tune --import {found.rescued}` merges it", err=True)
    if found.disturbed:
        say(
            "measured while something else used the device, as the times of copies and of waiting for a core tell; "
            "better measured again:"
        )
        for call, name in found.disturbed:
            (kind,) = kinds([call])
            say(f"  {name}: {kind} W={call.window.size}")
    alone = {name for figures in found.table.rows.values() if len(figures) == 1 for name in figures}
    if alone:
        names = ", ".join(sorted(alone))
        say(f"measured alone for some calls, which go by no time of one candidate that is compared with none: {names}")
    pin = pinned()
    if pin is not None:
        say(f"calls do not go by it: ATTNREG_TABLE pins {pin}")
