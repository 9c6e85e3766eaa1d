"""A benchmark's results as JSON: the records, and all that is needed to judge or draw them later."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from attnreg import Window
from attnreg.problem import dtype_name
from attnreg_benchmarks.floor import Ceilings
from attnreg_benchmarks.machine import Environment
from attnreg_benchmarks.run import Record
from attnreg_benchmarks.workloads import DIRECTIONS, Workload, matching

FORMAT = 1


@dataclass(frozen=True)
class Results:
    """One run of the benchmark.

    Attributes:
        date: when it was made, UTC, ISO 8601.
        environment: where.
        ceilings: what the machine can do, measured in the same run.
        workloads: what was measured.
        records: what was found, one for each workload, direction and contender.
    """

    date: str
    environment: Environment
    ceilings: Ceilings
    workloads: tuple[Workload, ...]
    records: tuple[Record, ...]


def now() -> str:
    """The date of a result: UTC, to the second."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def default_path(results: Results) -> Path:
    """Named after the device and the date: in ``benchmarks/results`` of a checkout, else in the current folder."""
    device = re.sub(r"[^a-z0-9]+", "-", results.environment.device.lower()).strip("-")
    date = re.sub(r"[^0-9TZ]", "", results.date)
    folder = Path(__file__).parents[1] / "results"
    return (folder if folder.is_dir() else Path()) / f"bench-{device}-{date}.json"


def save(results: Results, path: Path) -> None:
    """Write ``results`` to ``path``, as :func:`write` does."""
    content: dict[str, Any] = {"format": FORMAT, **asdict(results)}
    content["workloads"] = [_workload_to_json(workload) for workload in results.workloads]
    content["records"] = [{**asdict(record), "fraction": record.fraction} for record in results.records]
    write(content, path)


def write(content: dict[str, Any], path: Path) -> None:
    """Write any benchmark's results as JSON, whole or not at all. Folders that are missing are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    unfinished.replace(path)


def load(path: Path) -> Results:
    """Read what :func:`save` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no results of this benchmark; the message says what is wrong.
    """
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, expected {FORMAT}")
        return Results(
            date=content["date"],
            environment=Environment(**content["environment"]),
            ceilings=Ceilings(**content["ceilings"]),
            workloads=tuple(map(_workload_from_json, content["workloads"])),
            records=tuple(map(_record_from_json, content["records"])),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no results of attnreg bench: {type(error).__name__}: {error}") from None


def narrow(
    results: Results, patterns: Sequence[str] = (), op: str | None = None, directions: Sequence[str] = DIRECTIONS
) -> Results:
    """Only the workloads that fit one of ``patterns`` and are of ``op``, in these directions; see ``workloads.select``.

    Raises:
        ValueError: a pattern fits none of the workloads; the message lists their groups.
    """
    workloads = matching(results.workloads, patterns, op)
    names = {workload.name for workload in workloads}
    records = tuple(each for each in results.records if each.workload in names and each.direction in directions)
    return replace(results, workloads=workloads, records=records)


def _workload_to_json(workload: Workload) -> dict[str, Any]:
    return {
        "name": workload.name,
        **asdict(workload),
        "window": [workload.window.left, workload.window.right],
        "dtype": dtype_name(workload.dtype),
    }


def _workload_from_json(given: dict[str, Any]) -> Workload:
    known = {name: value for name, value in given.items() if name != "name"}
    return Workload(**{**known, "window": Window(*given["window"]), "dtype": getattr(torch, given["dtype"])})


def _record_from_json(given: dict[str, Any]) -> Record:
    known = {each.name: given[each.name] for each in fields(Record)}
    return Record(**{**known, "runs": tuple(given["runs"])})
