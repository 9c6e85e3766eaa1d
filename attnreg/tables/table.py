"""A table: for one environment, what was measured of every candidate, by call. One JSON file.

A text is read no further than it is needed: of the table of another device whose it is, and of one's own the entries of a
call's kind.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch

from attnreg.measured import Figure
from attnreg.problem import Problem, dtype_name
from attnreg.tables.call import as_measured, call_from_json, call_to_json, from_format_1, order
from attnreg.tables.environment import Device, Environment

# The form of the file: another number, and an older or newer attnreg reads it not at all. The first form is read, too.
FORMAT = 2

Row = tuple[Problem, Mapping[str, Figure]]


class TableError(ValueError):
    """A file is no table that this attnreg reads; the message says why."""


@dataclass(frozen=True)
class Table:
    """Figures by call, as ``as_measured`` gives it, and candidate, and the environment that they are from."""

    environment: Environment
    rows: Mapping[Problem, Mapping[str, Figure]] = field(default_factory=dict)

    def of_kind(self, op: str, dtypes: frozenset[torch.dtype], needs_grad: bool) -> list[Row]:
        """The rows of an op, in these dtypes, with or without gradients, in their order."""
        return [
            (call, figures)
            for call, figures in self.rows.items()
            if call.op == op and call.needs_grad is needs_grad and call.dtype in dtypes
        ]

    def whole(self) -> Table:
        """The table itself."""
        return self

    def merged(self, other: Table) -> Table:
        """Both tables' figures; where both have one of the same candidate for the same call, the one measured last."""
        rows = {call: dict(figures) for call, figures in self.rows.items()}
        for call, figures in other.rows.items():
            mine = rows.setdefault(call, {})
            for name, figure in figures.items():
                if name not in mine or mine[name].measured <= figure.measured:
                    mine[name] = figure
        return Table(self.environment, rows)


class TableText:
    """The text of a table, read in steps: whose it is, then the rows of a kind of call.

    A row that :func:`to_json` wrote is found by how it begins, and only then parsed: a whole table makes thousands of objects,
    for which the first call of a process would wait, and with them for a collection of all garbage.

    Attributes:
        environment: where the table was measured.
        fault: what a step has found wrong; None until then.

    Raises:
        TableError: from any step: it is no table.
    """

    def __init__(self, text: str) -> None:
        self.fault: TableError | None = None
        self._text = text
        # What stands before the rows says whose the table is.
        head = text.partition('"rows"')[0].rstrip().removesuffix(",")
        try:
            given = json.loads(f"{head}}}")
            given["environment"], given["format"]
        except (ValueError, RecursionError, KeyError, TypeError):
            given = _parsed(text)
        _check_format(given)
        with _no_table():
            environment = given["environment"]
            self.environment = Environment(**{**environment, "device": Device(**environment["device"])})
            _check_text(self.environment.attnreg, self.environment.torch, *asdict(self.environment.device).values())
            if not isinstance(self.environment.backends, dict):
                raise TypeError("the environment's backends are no object")
        self._format = given["format"]

    def of_kind(self, op: str, dtypes: frozenset[torch.dtype], needs_grad: bool) -> list[Row]:
        """The rows of an op, in these dtypes, with or without gradients, in the order of the file."""
        with self._keeping_fault():
            if self._row_texts is None:
                return self._whole().of_kind(op, dtypes, needs_grad)
            begins = tuple(f'{{"op": "{op}", "dtype": "{dtype_name(dtype)}", ' for dtype in dtypes)
            other = f'"needs_grad": {json.dumps(not needs_grad)}'
            texts = [text for text in self._row_texts if text.startswith(begins) or not _BEGIN.match(text)]
            texts = [text for text in texts if other not in text.partition(_CANDIDATES)[0]]
            rows = dict(self._row(_parsed(f"{_CALL}{text}")) for text in texts)
            # One that is written otherwise shows its kind only now.
            return Table(self.environment, rows).of_kind(op, dtypes, needs_grad)

    def whole(self) -> Table:
        """The whole table."""
        with self._keeping_fault():
            return self._whole()

    @cached_property
    def _row_texts(self) -> list[str] | None:
        return _row_texts(self._text) if self._format == FORMAT else None

    def _whole(self) -> Table:
        given = _parsed(self._text)
        _check_format(given)
        with _no_table():
            rows = given["rows"]
            if given["format"] == 1:
                rows = [{**row, "call": from_format_1(row["call"])} for row in rows]
            return Table(self.environment, dict(map(self._row, rows)))

    def _row(self, given: Mapping[str, Any]) -> Row:
        with _no_table():
            call = call_from_json(given["call"], torch.device(self.environment.device.type))
            return as_measured(call), {name: _figure(figure) for name, figure in given["candidates"].items()}

    @contextmanager
    def _keeping_fault(self) -> Iterator[None]:
        try:
            yield
        except TableError as error:
            self.fault = error
            raise


# How the rows of a file are laid out.
_CALL, _CANDIDATES = '{"call": ', ', "candidates": '
_BEGIN = re.compile(r'{"op": "\w+", "dtype": "\w+", ')
_BEFORE_ROWS, _BETWEEN_ROWS, _AFTER_ROWS = '"rows": [\n    ', ",\n    ", "\n  ]\n}\n"


def _row_texts(text: str) -> list[str] | None:
    """Of each row what follows ``_CALL``; None where the file is laid out otherwise.

    No text in JSON holds a line break, nor a quotation mark without a backslash.
    """
    _, found, rows = text.partition(f"{_BEFORE_ROWS}{_CALL}")
    if not found or not rows.endswith(_AFTER_ROWS):
        return None
    texts = rows.removesuffix(_AFTER_ROWS).split(f"{_BETWEEN_ROWS}{_CALL}")
    return texts if len(texts) == text.count('"call"') else None


def to_json(table: Table) -> str:
    """The file's text: a line for each candidate, so that two versions of a file can be compared and merged by eye."""
    rows = []
    for call, figures in sorted(table.rows.items(), key=lambda row: order(row[0])):
        lines = [f"{json.dumps(name)}: {json.dumps(_written(figure))}" for name, figure in sorted(figures.items())]
        listed = ",\n      ".join(lines)
        rows.append(f"{_CALL}{json.dumps(call_to_json(call))}{_CANDIDATES}{{\n      {listed}}}}}")
    environment = json.dumps(table.environment.to_json(), indent=2).replace("\n", "\n  ")
    head = f'{{\n  "format": {FORMAT},\n  "environment": {environment},\n  '
    return f"{head}{_BEFORE_ROWS}{_BETWEEN_ROWS.join(rows)}{_AFTER_ROWS}"


def from_json(text: str) -> Table:
    """The table in a file's text.

    Raises:
        TableError: it is none, or of another format.
    """
    return TableText(text).whole()


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TableError(f"it is not JSON: {error}") from None


def _check_format(given: Any) -> None:
    if not isinstance(given, dict) or "format" not in given:
        raise TableError('it is no table of attnreg: it has no "format"')
    if given["format"] not in (1, FORMAT):
        raise TableError(f"its format is {given['format']!r}; this attnreg reads {FORMAT}")


@contextmanager
def _no_table() -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TableError(f"it is no table of attnreg: {type(error).__name__}: {error}") from None


def _written(figure: Figure) -> dict[str, Any]:
    if figure.seconds is None:
        return {"reason": figure.reason, "measured": figure.measured}
    return {"seconds": figure.seconds, "spread": figure.spread, "measured": figure.measured}


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
