"""Latency against window, or against length, of every contender over the floor; one panel for each series and direction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnreg import Problem
from attnreg.drawing import check_picture, latency_axes
from attnreg.problem import dtype_name
from attnreg_benchmarks.results import Results
from attnreg_benchmarks.run import Record
from attnreg_benchmarks.workloads import DIRECTIONS, by_length, series_of


def plot_results(results: Results, path: Path) -> None:
    """Draw ``results`` into ``path``; its suffix says the format, such as .png or .svg.

    Raises:
        MissingMatplotlib, ValueError: as :func:`check_picture`; a ValueError also where nothing was timed.
        OSError: the file cannot be written.
    """
    check_picture(path)
    from matplotlib.figure import Figure

    series = _series(results)
    if not series:
        raise ValueError("there is nothing to plot: no contender was timed")
    directions = [each for each in DIRECTIONS if any(record.direction == each for record in results.records)]
    figure = Figure(figsize=(max(5 * len(directions), 7.5), 3.4 * len(series) + 1.2), layout="constrained")
    colours = _colours(results.records)
    panels = figure.subplots(len(series), len(directions), squeeze=False)
    for row, workloads in zip(panels, series):
        for axes, direction in zip(row, directions):
            _panel(axes, workloads, [each for each in results.records if each.direction == direction], colours)
            axes.set_title(f"{_title(workloads)}\n{direction}", fontsize=9)
    handles = {label: line for axes in panels.flat for line, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(
        handles.values(),
        handles.keys(),
        title=f"{results.environment.device}: backends solid, peers dashed",
        loc="outside upper center",
        ncols=min(len(handles), 3 * len(directions)),
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _series(results: Results) -> list[dict[str, Problem]]:
    """The calls that were timed, by series."""
    timed = {record.workload for record in results.records if record.seconds is not None}
    series: dict[str, dict[str, Problem]] = {}
    for name, problem in results.workloads.items():
        if name in timed:
            series.setdefault(series_of(name), {})[name] = problem
    return list(series.values())


def _panel(axes: Any, workloads: dict[str, Problem], records: Sequence[Record], colours: dict[str, Any]) -> None:
    lengths = by_length(next(iter(workloads)))
    position = {name: each.key_length if lengths else each.window.size for name, each in workloads.items()}
    here = [record for record in records if record.workload in position]
    for contender, colour in colours.items():
        timed = [record for record in here if record.contender == contender and record.seconds is not None]
        if timed:
            dashed = "--" if timed[0].kind == "peer" else "-"
            points = [(position[record.workload], 1e3 * (record.seconds or 0.0)) for record in timed]
            axes.plot(*zip(*points), dashed, marker="o", markersize=3, color=colour, label=contender)
    floor = {position[record.workload]: 1e3 * record.floor for record in here}
    axes.plot(*zip(*sorted(floor.items())), ":", marker="_", color="black", label="floor")
    latency_axes(axes, floor, "length L" if lengths else "window W")


def _colours(records: Sequence[Record]) -> dict[str, Any]:
    """One colour for each contender that was timed, the same in all panels."""
    names = dict.fromkeys(record.contender for record in records if record.seconds is not None)
    return {name: f"C{index % 10}" for index, name in enumerate(names)}


def _title(workloads: dict[str, Problem]) -> str:
    name, first = next(iter(workloads.items()))
    length = "" if by_length(name) else f" L={first.key_length}"
    width = first.head_dim or first.value_dim
    return (
        f"{first.op} N={first.batch} H={first.heads} Hkv={first.kv_heads}{length} E={width} {dtype_name(first.dtype)}"
    )
