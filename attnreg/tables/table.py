"""A table: for one environment, what was measured of every candidate, by the facts of the call. One JSON file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch

from attnreg.measured import Figure
from attnreg.problem import OPS, Problem, dtype_name
from attnreg.tuning.environment import Device, Environment
from attnreg.window import Window

# The form of the file: another number, and an older or newer attnreg reads it not at all.
FORMAT = 1


class TableError(ValueError):
    """A file is no table that this attnreg reads; the message says why."""


@dataclass(frozen=True, slots=True)
class Key:
    """The facts of a call that its time depends on.

    Attributes:
        op: the op.
        dtype: of the tensors, without "torch.".
        head_dim, value_dim: E and D, 0 where the op has none.
        group: query heads to a key/value head, H / Hkv.
        window: how many keys a query sees at most: W, or less where the sequences are shorter.
        queries, keys: Lq and Lk.
        sequences: N * H.
        gradients: False for the forward alone, True for forward and backward together.
    """

    op: str
    dtype: str
    head_dim: int
    value_dim: int
    group: int
    window: int
    queries: int
    keys: int
    sequences: int
    gradients: bool

    def __str__(self) -> str:
        return (
            f"W={self.window} Lq={self.queries} Lk={self.keys} E={self.head_dim} D={self.value_dim} "
            f"N*H={self.sequences} H/Hkv={self.group}"
        )


def key_of(problem: Problem) -> Key:
    """The key of a call."""
    left = min(problem.window.left, max(problem.key_length - 1, 0))
    right = min(problem.window.right, max(problem.query_length - 1, 0))
    return Key(
        op=problem.op,
        dtype=dtype_name(problem.dtype),
        head_dim=problem.head_dim,
        value_dim=problem.value_dim,
        group=problem.heads // max(problem.kv_heads, 1),
        window=left + right + 1,
        queries=problem.query_length,
        keys=problem.key_length,
        sequences=problem.batch * problem.heads,
        gradients=problem.needs_grad,
    )


def kinds(rows: Iterable[Key]) -> dict[str, list[Key]]:
    """Keys that differ in the window alone, in its order, by what they have in common in words."""
    found: dict[str, list[Key]] = {}
    for key in sorted(rows, key=lambda key: (*asdict(replace(key, window=0)).values(), key.window)):
        what = "forward and backward" if key.gradients else "forward"
        sizes = (
            f"E={key.head_dim} D={key.value_dim} Lq={key.queries} Lk={key.keys} N*H={key.sequences} H/Hkv={key.group}"
        )
        found.setdefault(f"{key.op}, {what}; {key.dtype} {sizes}", []).append(key)
    return found


def problem_of(key: Key, device: torch.device) -> Problem:
    """A call that has this key."""
    heads = max(key.sequences, key.group)
    return Problem(
        op=key.op,
        device=device,
        dtype=getattr(torch, key.dtype),
        batch=1,
        heads=heads,
        kv_heads=heads // max(key.group, 1),
        query_length=key.queries,
        key_length=key.keys,
        head_dim=key.head_dim,
        value_dim=key.value_dim,
        window=Window.causal(key.window),
        needs_grad=key.gradients,
    )


@dataclass(frozen=True)
class Table:
    """Figures by key and candidate, and the environment that they are from."""

    environment: Environment
    rows: Mapping[Key, Mapping[str, Figure]] = field(default_factory=dict)

    def merged(self, other: Table) -> Table:
        """Both tables' figures; where both have one of the same candidate for the same call, the one measured last."""
        rows = {key: dict(figures) for key, figures in self.rows.items()}
        for key, figures in other.rows.items():
            mine = rows.setdefault(key, {})
            for name, figure in figures.items():
                if name not in mine or mine[name].measured <= figure.measured:
                    mine[name] = figure
        return Table(self.environment, rows)


def to_json(table: Table) -> str:
    """The file's text: a line for each candidate, so that two versions of a file can be compared and merged by eye."""
    rows = []
    for key, figures in sorted(table.rows.items(), key=lambda row: tuple(asdict(row[0]).values())):
        lines = [f"{json.dumps(name)}: {json.dumps(_written(figure))}" for name, figure in sorted(figures.items())]
        listed = ",\n      ".join(lines)
        rows.append(f'    {{"call": {json.dumps(asdict(key))}, "candidates": {{\n      {listed}}}}}')
    environment = json.dumps(asdict(table.environment), indent=2).replace("\n", "\n  ")
    listed = ",\n".join(rows)
    return f'{{\n  "format": {FORMAT},\n  "environment": {environment},\n  "rows": [\n{listed}\n  ]\n}}\n'


def from_json(text: str) -> Table:
    """The table in a file's text.

    Raises:
        TableError: it is none, or of another format.
    """
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TableError(f"it is not JSON: {error}") from None
    if not isinstance(given, dict) or "format" not in given:
        raise TableError('it is no table of attnreg: it has no "format"')
    if given["format"] != FORMAT:
        raise TableError(f"its format is {given['format']!r}; this attnreg reads {FORMAT}")
    try:
        environment = Environment(**{**given["environment"], "device": Device(**given["environment"]["device"])})
        _check_text(environment.attnreg, environment.torch, *asdict(environment.device).values())
        if not isinstance(environment.backends, dict):
            raise TypeError("the environment's backends are no object")
        rows = {
            _key(row["call"]): {name: _figure(figure) for name, figure in row["candidates"].items()}
            for row in given["rows"]
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TableError(f"it is no table of attnreg: {type(error).__name__}: {error}") from None
    return Table(environment, rows)


def _written(figure: Figure) -> dict[str, Any]:
    if figure.seconds is None:
        return {"reason": figure.reason, "measured": figure.measured}
    return {"seconds": figure.seconds, "spread": figure.spread, "measured": figure.measured}


def _key(given: Mapping[str, Any]) -> Key:
    key = Key(**given)
    for each in fields(key):
        value = getattr(key, each.name)
        if each.type == "int" and (type(value) is not int or value < 0):
            raise ValueError(f"{each.name} is {value!r}, not a whole number of at least 0")
    _check_text(key.dtype)
    if not isinstance(getattr(torch, key.dtype, None), torch.dtype):
        raise ValueError(f"{key.dtype!r} is no dtype")
    if key.op not in OPS or type(key.gradients) is not bool:
        raise ValueError(f"a call has the op {key.op!r} and gradients {key.gradients!r}")
    return key


def _figure(given: Mapping[str, Any]) -> Figure:
    figure = Figure(**given)
    _check_text(figure.measured)
    if figure.seconds is None:
        _check_text(figure.reason)
        return figure
    if not all(type(number) in (int, float) for number in (figure.seconds, figure.spread)):
        raise TypeError(f"a time is {figure.seconds!r} with spread {figure.spread!r}")
    if not (0 < figure.seconds < math.inf and 0 <= figure.spread < math.inf):
        raise ValueError(f"a time is {figure.seconds!r} with spread {figure.spread!r}")
    return figure


def _check_text(*given: object) -> None:
    for each in given:
        if not isinstance(each, str):
            raise TypeError(f"expected text, got {each!r}")
