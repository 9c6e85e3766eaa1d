"""A benchmark's results as JSON: the records, and all that is needed to judge or draw them later."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from attnreg import Problem, Window
from attnreg.measuring.sizes import square_problem
from attnreg.tables.call import call_from_json, call_to_json
from attnreg_benchmarks.floor import Ceilings
from attnreg_benchmarks.machine import Environment
from attnreg_benchmarks.run import Record
from attnreg_benchmarks.workloads import DIRECTIONS, matching

# The first form is read, too.
FORMAT = 2


@dataclass(frozen=True)
class Results:
    """One run of the benchmark.

    Attributes:
        date: when it was made, UTC, ISO 8601.
        environment: where.
        ceilings: what the machine can do, measured in the same run.
        workloads: the calls that were measured, by name.
        records: what was found, one for each workload, direction and contender.
    """

    date: str
    environment: Environment
    ceilings: Ceilings
    workloads: Mapping[str, Problem]
    records: tuple[Record, ...]


def now() -> str:
    """The date of a result: UTC, to the second."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def command_line(module: str, results: Path) -> str:
    """What was typed to run ``module`` in this process; where its results go is left open."""
    return shlex.join(["python", "-m", module, *sys.argv[1:]]).replace(str(results), "FILE")


def default_path(results: Results) -> Path:
    """Named after the device and the date: in ``benchmarks/results`` of a checkout, else in the current folder."""
    device = re.sub(r"[^a-z0-9]+", "-", results.environment.device.lower()).strip("-")
    date = re.sub(r"[^0-9TZ]", "", results.date)
    folder = Path(__file__).parents[1] / "results"
    return (folder if folder.is_dir() else Path()) / f"bench-{device}-{date}.json"


def save(results: Results, path: Path) -> None:
    """Write ``results`` to ``path``, as :func:`write` does."""
    content = {
        "format": FORMAT,
        "date": results.date,
        "environment": asdict(results.environment),
        "ceilings": asdict(results.ceilings),
        "workloads": [
            {"name": name, "device_type": problem.device.type, **call_to_json(problem)}
            for name, problem in results.workloads.items()
        ],
        "records": [{**asdict(record), "fraction": record.fraction} for record in results.records],
    }
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
        if content["format"] not in (1, FORMAT):
            raise ValueError(f"format {content['format']!r}, expected {FORMAT}")
        call = _call_of_format_1 if content["format"] == 1 else _call
        return Results(
            date=content["date"],
            environment=Environment(**content["environment"]),
            ceilings=Ceilings(**content["ceilings"]),
            workloads={each["name"]: call(each) for each in content["workloads"]},
            records=tuple(map(_record_from_json, content["records"])),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no results of attnreg bench: {type(error).__name__}: {error}") from None


def narrow(
    results: Results, patterns: Sequence[str] = (), op: str | None = None, directions: Sequence[str] = DIRECTIONS
) -> Results:
    """Only the workloads that fit one of ``patterns`` and are of ``op``, in these directions; see ``workloads.select``.

    Raises:
        ValueError: a pattern fits none of the workloads; the message lists their series.
    """
    workloads = matching(results.workloads, patterns, op)
    records = tuple(each for each in results.records if each.workload in workloads and each.direction in directions)
    return replace(results, workloads=workloads, records=records)


def _call(written: Mapping[str, Any]) -> Problem:
    call = {name: value for name, value in written.items() if name not in ("name", "device_type")}
    return call_from_json(call, torch.device(written["device_type"]))


def _call_of_format_1(written: Mapping[str, Any]) -> Problem:
    return square_problem(
        written["op"],
        torch.device(written["device_type"]),
        getattr(torch, written["dtype"]),
        (written["batch"], written["heads"], written["kv_heads"], written["length"], written["head_dim"]),
        Window(*written["window"]),
    )


def _record_from_json(given: dict[str, Any]) -> Record:
    known = {each.name: given[each.name] for each in fields(Record)}
    return Record(**{**known, "runs": tuple(given["runs"])})
