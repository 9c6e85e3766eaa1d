"""Latency against window by a table: one line a candidate, the chosen one marked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from attnreg.backend import BackendError
from attnreg.dispatch import choose
from attnreg.drawing import check_picture, latency_axes
from attnreg.measured import Measured
from attnreg.measuring.sizes import with_needed
from attnreg.op import ROWS
from attnreg.problem import Problem
from attnreg.registry import registry
from attnreg.tables.call import class_of, group, kinds
from attnreg.tables.table import Table
from attnreg.tuning.writing import own_table

# Panels side by side.
MOST_ACROSS = 6


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
    given: Sequence[Sequence[str]] | None = None,
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
            (None if given is None else [with_needed(ROWS[call.op], names) for names in given], class_of(call)),
        )
        return all(wanted is None or each in wanted for wanted, each in asked)

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


def plot(table: Table, chosen: Mapping[Problem, str], path: Path, backends: Sequence[str] | None = None) -> None:
    """Draw ``table`` into ``path``, whose suffix says the format: a panel for each kind of call that differs in W alone.

    Args:
        table: what was measured.
        chosen: the candidate that a call of each kind gets.
        path: the picture.
        backends: which candidates; None for all.

    Raises:
        MissingMatplotlib, ValueError: as :func:`check_picture`; a ValueError also where the table has no time.
        OSError: the file cannot be written.
    """
    check_picture(path)
    from matplotlib.figure import Figure

    series = kinds(
        call for call, figures in table.rows.items() if any(figure.seconds is not None for figure in figures.values())
    )
    if not series:
        raise ValueError("there is nothing to plot: the table has no time")
    names = sorted(
        {name for figures in table.rows.values() for name in figures if backends is None or name in backends}
    )
    colours = {name: f"C{index % 10}" for index, name in enumerate(names)}
    across = min(max(math.isqrt(len(series)), min(len(series), 2)), MOST_ACROSS)
    down = -(-len(series) // across)
    drawing = Figure(figsize=(5.5 * across + 1, 3.4 * down + 1.2), layout="constrained")
    panels = drawing.subplots(down, across, squeeze=False)
    for axes, (kind, calls) in zip(panels.flat, series.items()):
        _panel(axes, table, chosen, calls, colours)
        axes.set_title(kind.replace("; ", "\n"), fontsize=8)
    for axes in list(panels.flat)[len(series) :]:
        axes.set_axis_off()
    handles = {label: line for axes in panels.flat for line, label in zip(*axes.get_legend_handles_labels())}
    drawing.legend(
        handles.values(),
        handles.keys(),
        title=f"{table.environment.device}: the chosen one is ringed",
        loc="outside upper center",
        ncols=min(len(handles), 6),
        fontsize=9,
    )
    drawing.savefig(path, dpi=110)


def _panel(
    axes: Any, table: Table, chosen: Mapping[Problem, str], calls: Sequence[Problem], colours: Mapping[str, Any]
) -> None:
    for name, colour in colours.items():
        points = [
            (call.window.size, 1e3 * seconds)
            for call in calls
            if (figure := table.rows[call].get(name)) is not None and (seconds := figure.seconds) is not None
        ]
        if points:
            axes.plot(*zip(*points), "-", marker="o", markersize=3, color=colour, label=name)
    for call in calls:
        name = chosen.get(call, "")
        figure = table.rows[call].get(name)
        if name in colours and figure is not None and figure.seconds is not None:
            ring = {"markersize": 8, "fillstyle": "none", "color": colours[name]}
            axes.plot([call.window.size], [1e3 * figure.seconds], "o", **ring)
    latency_axes(axes, (call.window.size for call in calls), "window W")
