"""What ``attnreg tune`` does, step by step; its options are declared beside the other commands'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as Grid
from rich.text import Text

from attnreg.registry import registry
from attnreg.tuning import store
from attnreg.tuning.environment import environment
from attnreg.tuning.plot import plot
from attnreg.tuning.table import Table, TableError
from attnreg.tuning.tune import Step, tune


def tune_table(device: torch.device, *, console: Console, **options: Any) -> None:
    """Tune with a progress bar, then show the winners, and where the table lies."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("measuring")

        def show(step: Step) -> None:
            progress.update(bar, completed=step.done, total=step.total, description=f"{step.task} {step.backend}")

        found = tune(device=device, progress=show, **options)
    if found.interrupted:
        console.print("interrupted; what was measured until here is kept", highlight=False)
    if found.path is None:
        console.print("nothing was measured: no backend can run any of these calls", highlight=False)
        return
    console.print(_winners(found.table))
    console.print(f"table: {found.path}", highlight=False, soft_wrap=True)


def export_table(device: torch.device, path: Path) -> None:
    """Write all that the user has measured for ``device`` to one file."""
    store.write(own_table(device), path)


def import_table(path: Path) -> Path:
    """Merge the table in a file into the user's of the same environment; returns that one's path."""
    try:
        return store.save(store.load(path))
    except TableError as error:
        raise ValueError(f"{path}: {error}") from None


def plot_table(device: torch.device, path: Path) -> None:
    """Draw what the user has measured for ``device``; what is shipped where that is nothing."""
    plot(own_table(device, shipped=True), path)


def own_table(device: torch.device, *, shipped: bool = False) -> Table:
    """The user's tables for ``device`` as one.

    Raises:
        ValueError: there is none.
    """
    here = environment(device, {entry.backend.name: entry.distribution for entry in registry.entries})
    stored, problems = store.tables(here)
    own = [each.table for each in stored if each.source == "tuned"]
    if not own and shipped:
        own = [each.table for each in stored]
    if not own:
        raise ValueError("; ".join((f"there is no table for {here.device}; `attnreg tune` makes one", *problems)))
    table = own[-1]
    for better in reversed(own[:-1]):
        table = Table(better.environment, table.rows).merged(better)
    return table


def _winners(table: Table) -> Grid:
    grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("op", "dtype", "E", "L", "W", "", "fastest", "ms", "next"):
        grid.add_column(heading, justify="right" if heading in ("E", "L", "W", "ms") else "left", no_wrap=True)
    for key, figures in table.rows.items():
        timed = sorted((figure.seconds, name) for name, figure in figures.items() if figure.seconds is not None)
        first = (timed[0][1], f"{timed[0][0] * 1e3:.4g}") if timed else ("none", "-")
        second = f"{timed[1][1]} {timed[1][0] / timed[0][0]:.2f}x" if len(timed) > 1 else ""
        grid.add_row(
            key.op.removeprefix("local_"),
            key.dtype,
            str(key.head_dim or key.value_dim),
            str(key.keys),
            str(key.window),
            "fwd+bwd" if key.gradients else "fwd",
            *map(Text, (*first, second)),
        )
    return grid
