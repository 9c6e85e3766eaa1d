"""What ``attnreg tune`` does, step by step; its options are declared beside the other commands'."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as Grid
from rich.text import Text

from attnreg.backend import BackendError
from attnreg.dispatch import choose
from attnreg.measured import Measured
from attnreg.measuring.steadiness import DISTURBED_FROM
from attnreg.problem import Problem
from attnreg.registry import registry
from attnreg.tables import store
from attnreg.tables.call import group, kinds
from attnreg.tables.environment import environment
from attnreg.tables.table import Table, TableError
from attnreg.tuning.plot import plot
from attnreg.tuning.tune import Step, tune
from attnreg.tuning.writing import save, write


def tune_table(device: torch.device, *, console: Console, **options: Any) -> None:
    """Tune with a progress bar, then show the winners, and where the table lies."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("measuring")

        def show(step: Step) -> None:
            progress.update(
                bar,
                completed=step.done,
                total=step.total,
                description=f"{step.problem.op} {step.problem.window} {step.backend}",
            )

        found = tune(device=device, progress=show, **options)
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
    pin = store.pinned()
    if pin is not None:
        console.print(f"calls do not go by it: ATTNREG_TABLE pins {pin}", highlight=False, soft_wrap=True)


def export_table(device: torch.device, path: Path) -> None:
    """Write all that the user has measured for ``device`` to one file."""
    write(own_table(device), path)


def import_table(path: Path) -> tuple[Path, tuple[str, ...]]:
    """Merge the table in a file into the user's of the same environment.

    Returns:
        Where that one lies, and why calls on this machine do not go by it; empty where they do.

    Raises:
        ValueError: there is no table in the file.
        OSError: the user's cannot be written.
    """
    try:
        table = store.load(path)
    except TableError as error:
        raise ValueError(f"{path}: {error}") from None
    here = environment(torch.device(table.environment.device.type), ())
    return save(table), table.environment.hard_mismatches(here)


def plot_table(
    device: torch.device,
    path: Path,
    *,
    batch: int = 1,
    ops: Sequence[str] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    head_dims: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    heads: Sequence[tuple[int, int]] | None = None,
    windows: Sequence[int] | None = None,
    gradients: Sequence[bool] | None = None,
    backends: Sequence[str] | None = None,
) -> None:
    """Draw what the user has measured for ``device``, or what is shipped where that is nothing: all, or these calls of it.

    Raises:
        ValueError: there is no table, or none of these calls in it.
    """
    whole = own_table(device, shipped=True)

    def fits(call: Problem) -> bool:
        shapes = None if heads is None else [(batch * query, query // kv) for query, kv in heads]
        asked = (
            (ops, call.op),
            (dtypes, call.dtype),
            (head_dims, call.head_dim or call.value_dim),
            (lengths, call.key_length),
            (shapes, (call.heads, group(call))),
            (windows, call.window.size),
            (gradients, call.needs_grad),
        )
        return all(wanted is None or given in wanted for wanted, given in asked)

    table = Table(whole.environment, {call: figures for call, figures in whole.rows.items() if fits(call)})
    if not table.rows:
        raise ValueError("the table has none of these calls")
    chosen = {}
    for call, figures in table.rows.items():
        with suppress(BackendError):  # none that can run it here: none is chosen
            measured = [Measured("tuned", figures)]
            decision = choose(call, registry.entries, failed=registry.failed, measured=measured)
            chosen[call] = decision.backend
    plot(table, chosen, path, backends)


def own_table(device: torch.device, *, shipped: bool = False) -> Table:
    """The user's tables for ``device`` as one.

    Raises:
        ValueError: there is none.
    """
    here = environment(device, registry.entries)
    stored, problems = registry.tables.stored(here)
    sources = {"tuned"} if any(each.source == "tuned" for each in stored) or not shipped else {"shipped"}
    own = [each.table.whole() for each in stored if each.source in sources]
    if not own:
        raise ValueError("; ".join((f"there is no table for {here.device}; `attnreg tune` makes one", *problems)))
    table = own[-1]
    for better in reversed(own[:-1]):
        table = Table(better.environment, table.rows).merged(better)
    return table


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
