"""Latency against window by a table: one line a candidate, the chosen one marked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attnreg.drawing import check_picture, latency_axes
from attnreg.problem import Problem
from attnreg.tables.call import kinds
from attnreg.tables.table import Table

# Panels side by side.
MOST_ACROSS = 6


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
