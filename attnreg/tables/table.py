"""A table: for one environment, what was measured of every candidate, by call. One JSON file.

A text is read no further than it is needed: of the table of another device whose it is, and of one's own the entries of a
call's kind. It is anybody's until it is read: what is of another form than this attnreg writes, or larger, is no table, and
nothing is kept that could not be printed. Nor does it cost a call more than a moment, whatever it holds.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from attnreg.measured import Figure, now
from attnreg.printable import printable
from attnreg.problem import Problem, dtype_name
from attnreg.tables.call import as_measured, call_from_json, call_to_json, from_format_1, order
from attnreg.tables.environment import Device, Environment

# The form of the file: another number, and an older or newer attnreg reads it not at all. The first form is read, too.
FORMAT = 2

# What a file may hold, so that to read all of it takes less than half a second. A tuning with all that it offers makes a
# thousand rows of a third of a megabyte.
MOST_BYTES = 2**21
MOST_ROWS = 4096
MOST_CANDIDATES = 256
# What stands before the rows: a page or two.
_MOST_HEAD = 2**16
# No object or list of a table is shorter. Python makes them ten times as slowly as anything else that JSON holds.
_LEAST_PART = 16
MOST_THREADS = 2**20
# Of a version or a device's name.
MOST_LETTERS = 200
# No machine copies more than its last cache holds in so little time (see ``attnreg.measuring.steadiness``).
_LEAST_COPY_SECONDS = 2e-5

Row = tuple[Problem, Mapping[str, Figure]]


class TableError(ValueError):
    """A file is no table that this attnreg reads; the message says why, and can be printed."""

    def __init__(self, reason: str) -> None:
        super().__init__(printable(reason))


@dataclass(frozen=True)
class Table:
    """Figures by call, as ``as_measured`` gives it, and candidate, and the environment that they are from.

    Attributes:
        environment: where they were measured.
        rows: the figures.
        copy_seconds: the least time of a copy there, see ``attnreg.measuring.steadiness``; None where it is not known.
    """

    environment: Environment
    rows: Mapping[Problem, Mapping[str, Figure]] = field(default_factory=dict)
    copy_seconds: float | None = None

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
        """Both tables' figures, and of the same candidate for the same call the better founded one.

        That is one that was measured beside nothing else, then the one measured last. A row has as many candidates as it may:
        those of ``other``, then those measured last.
        """
        today = now()

        def worth(figure: Figure) -> tuple[bool, str]:
            return not figure.disturbed, past(figure.measured, today)

        rows = {call: dict(figures) for call, figures in self.rows.items()}
        for call, figures in other.rows.items():
            mine = rows.setdefault(call, {})
            for name, figure in figures.items():
                known = mine.get(name)
                # Of a measurement that is there already, more may be known by now.
                is_same = known is not None and (known.measured, known.seconds) == (figure.measured, figure.seconds)
                if known is None or is_same or worth(known) <= worth(figure):
                    mine[name] = figure
            if len(mine) > MOST_CANDIDATES:  # nobody would read it
                by_date = sorted(mine, key=lambda name: past(mine[name].measured, today), reverse=True)
                by_date.sort(key=lambda name: name not in figures)
                rows[call] = {name: mine[name] for name in by_date[:MOST_CANDIDATES]}
        copies = [each for each in (self.copy_seconds, other.copy_seconds) if each is not None]
        return Table(self.environment, rows, min(copies, default=None))

    def lasting(self) -> Table:
        """The figures that are facts: without those whose reason may be gone the next time."""
        rows = {
            call: {name: figure for name, figure in figures.items() if not figure.passing}
            for call, figures in self.rows.items()
        }
        return replace(self, rows={call: figures for call, figures in rows.items() if figures})

    def newest(self, count: int, first: Collection[Problem] = ()) -> Table:
        """At most so many rows: those of the calls that go ``first``, then those that were measured last."""
        if len(self.rows) <= count:
            return self
        today = now()
        by_date = sorted(
            self.rows.items(), key=lambda row: (row[0] in first, measured_last(row[1], today)), reverse=True
        )
        return replace(self, rows=dict(by_date[:count]))


def past(date: str, today: str) -> str:
    """A date as it is compared with others: one that lies after ``today`` says nothing, or it would always be the last."""
    return date if date <= today else ""


def measured_last(figures: Mapping[str, Figure], today: str) -> str:
    """When the last of these was measured, as far as :func:`past` lets it count."""
    return max((past(figure.measured, today) for figure in figures.values()), default="")


class TableText:
    """The text of a table, read in steps: whose it is, then the rows of a kind of call.

    A row that :func:`to_json` wrote is found by how it begins, and only then parsed: a whole table makes thousands of objects,
    for which the first call of a process would wait, and with them for a collection of all garbage.

    Attributes:
        environment: where the table was measured.
        copy_seconds: as in :class:`Table`.
        fault: what a step has found wrong; None until then.

    Raises:
        TableError: from any step: it is no table.
    """

    def __init__(self, text: str) -> None:
        self.fault: TableError | None = None
        self._text = text
        self._kinds: dict[object, list[Row]] = {}
        if len(text) > MOST_BYTES:
            raise TableError(f"it has {len(text)} characters; a table has {MOST_BYTES} at most")
        given = _head(text)
        _check_format(given)
        with _no_table():
            self.environment = _environment(given["environment"])
            self.copy_seconds = _copy_seconds(given.get("copy_seconds"))
        self._format = given["format"]

    @cached_property
    def cost(self) -> int:
        """How many characters are parsed for a call, at most."""
        with self._keeping_fault():
            if self._row_texts is None:
                return len(self._text)
            sizes: Counter[tuple[str, ...]] = Counter()
            for text in self._row_texts:
                begin = _BEGIN.match(text)
                # bfloat16 and float16 stand in for each other.
                kind = (begin[1], begin[2].removeprefix("b")) if begin else ()
                sizes[kind] += len(text)
            of_any_kind = sizes.pop((), 0)
            return of_any_kind + max(sizes.values(), default=0)

    def of_kind(self, op: str, dtypes: frozenset[torch.dtype], needs_grad: bool) -> list[Row]:
        """The rows of an op, in these dtypes, with or without gradients, in the order of the file."""
        kind = (op, dtypes, needs_grad)
        if kind not in self._kinds:
            with self._keeping_fault():
                self._kinds[kind] = self._of_kind(*kind)
        return self._kinds[kind]

    def whole(self) -> Table:
        """The whole table."""
        with self._keeping_fault():
            return self._table

    def _of_kind(self, op: str, dtypes: frozenset[torch.dtype], needs_grad: bool) -> list[Row]:
        if self._row_texts is None:
            return self._table.of_kind(op, dtypes, needs_grad)
        begins = tuple(f'{{"op": "{op}", "dtype": "{dtype_name(dtype)}", ' for dtype in dtypes)
        other = f'"needs_grad": {json.dumps(not needs_grad)}'
        texts = [text for text in self._row_texts if text.startswith(begins) or not _BEGIN.match(text)]
        texts = [text for text in texts if other not in text.partition(_CANDIDATES)[0]]
        rows = dict(self._row(_parsed(f"{_CALL}{text}")) for text in texts)
        # One that is written otherwise shows its kind only now.
        return Table(self.environment, rows).of_kind(op, dtypes, needs_grad)

    @cached_property
    def _row_texts(self) -> list[str] | None:
        texts = _row_texts(self._text) if self._format == FORMAT else None
        _check_count(texts or ())
        return texts

    @cached_property
    def _table(self) -> Table:
        given = _parsed(self._text)
        _check_format(given)
        with _no_table():
            rows = given["rows"]
            if not isinstance(rows, list):
                raise TypeError("its rows are no list")
            _check_count(rows)
            if given["format"] == 1:
                rows = [{**row, "call": from_format_1(row["call"])} for row in rows]
            return Table(self.environment, dict(map(self._row, rows)), self.copy_seconds)

    def _row(self, given: Mapping[str, Any]) -> Row:
        with _no_table():
            candidates = given["candidates"]
            if len(given) != 2 or len(candidates) > MOST_CANDIDATES:
                raise ValueError(f"a row has {len(given)} parts and {len(candidates)} candidates")
            call = call_from_json(given["call"], torch.device(self.environment.device.type))
            return as_measured(call), {_name(name): _figure(figure) for name, figure in candidates.items()}

    @contextmanager
    def _keeping_fault(self) -> Iterator[None]:
        try:
            with _no_table():
                yield
        except TableError as error:
            self.fault = error
            raise


# How the rows of a file are laid out.
_CALL, _CANDIDATES = '{"call": ', ', "candidates": '
_BEGIN = re.compile(r'{"op": "(\w+)", "dtype": "(\w+)", ')
_ROWS = re.compile(r'"rows"\s*:\s*\[')
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
    known = f'"copy_seconds": {json.dumps(table.copy_seconds)},\n  ' if table.copy_seconds is not None else ""
    head = f'{{\n  "format": {FORMAT},\n  "environment": {environment},\n  {known}'
    return f"{head}{_BEFORE_ROWS}{_BETWEEN_ROWS.join(rows)}{_AFTER_ROWS}"


def from_json(text: str) -> Table:
    """The table in a file's text.

    Raises:
        TableError: it is none, or of another format.
    """
    return TableText(text).whole()


def _head(text: str) -> Any:
    """What stands before the rows, which says whose the table is; of a short text, all that it holds where it has none."""
    rows = _ROWS.search(text, 0, _MOST_HEAD)
    if rows is not None:
        with suppress(TableError):
            given = _parsed(f"{text[: rows.start()].rstrip().removesuffix(',')}}}")
            if {"environment", "format"} <= given.keys():
                return given
    if len(text) > _MOST_HEAD:
        raise TableError(f"its first {_MOST_HEAD} characters hold no format and environment, and then rows")
    return _parsed(text)


def _parsed(text: str) -> Any:
    parts = text.count("[") + text.count("{")
    if _LEAST_PART * parts > len(text) + _MOST_HEAD:
        raise TableError(f"it has {parts} lists and objects in {len(text)} characters")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TableError(f"it is not JSON: {error}") from None


def _check_format(given: Any) -> None:
    if not isinstance(given, dict) or "format" not in given:
        raise TableError('it is no table of attnreg: it has no "format"')
    if type(given["format"]) is not int or given["format"] not in (1, FORMAT):
        raise TableError(f"its format is {given['format']!r}; this attnreg reads {FORMAT}")


def _check_count(rows: Sequence[object]) -> None:
    if len(rows) > MOST_ROWS:
        raise TableError(f"it has {len(rows)} rows; a table has {MOST_ROWS} at most")


@contextmanager
def _no_table() -> Iterator[None]:
    try:
        yield
    except TableError:
        raise
    # Whatever a text holds, it is no more than that.
    except Exception as error:
        raise TableError(f"it is no table of attnreg: {type(error).__name__}: {error}") from None


def _written(figure: Figure) -> dict[str, Any]:
    disturbed = {"disturbed": True} if figure.disturbed else {}
    if figure.seconds is None:
        return {"reason": figure.reason, "measured": figure.measured}
    return {"seconds": figure.seconds, "spread": figure.spread, "measured": figure.measured, **disturbed}


def _environment(given: Mapping[str, Any]) -> Environment:
    device = Device(**given["device"])
    here = Environment(**{**given, "device": device})
    for each in (*asdict(device).values(), here.attnreg, here.torch):
        _words(each)
    for each in (here.triton, here.driver, here.float32):
        if each is not None:
            _words(each)
    # An accelerator that torch does not know raises.
    if torch.device(device.type).type != device.type:
        raise ValueError(f"the device's type is {device.type!r}")
    if here.threads is not None and not (type(here.threads) is int and 0 < here.threads <= MOST_THREADS):
        raise ValueError(f"threads is {here.threads!r}")
    if not isinstance(here.backends, dict) or len(here.backends) > MOST_CANDIDATES:
        raise TypeError("the environment's backends are no object, or too many")
    return replace(here, backends={_name(name): _words(source) for name, source in here.backends.items()})


def _figure(given: Mapping[str, Any]) -> Figure:
    unknown = given.keys() - _FIGURE
    if unknown:
        raise ValueError(f"a figure has no {', '.join(map(repr, sorted(unknown)))}")
    measured, disturbed = given.get("measured", ""), given.get("disturbed", False)
    if not isinstance(measured, str) or not _DATE.fullmatch(measured):
        raise ValueError(f"a date is {measured!r}")
    if type(disturbed) is not bool:
        raise TypeError(f"disturbed is {disturbed!r}")
    seconds = _seconds("seconds", given.get("seconds"), may_lack="reason" in given)
    if seconds is None:
        reason = given["reason"]
        if not isinstance(reason, str):
            raise TypeError(f"a reason is {reason!r}")
        return Figure(reason=printable(reason), measured=measured, disturbed=disturbed)
    spread = given.get("spread", 0.0)
    return Figure(
        seconds=seconds,
        spread=0.0 if spread == 0 else _seconds("spread", spread) or 0.0,
        measured=measured,
        disturbed=disturbed,
    )


def _copy_seconds(given: object) -> float | None:
    seconds = _seconds("copy_seconds", given, may_lack=True)
    # Or all that is measured from then on would seem to have been disturbed.
    return None if seconds is None or seconds < _LEAST_COPY_SECONDS else seconds


_FIGURE = frozenset(("seconds", "spread", "reason", "measured", "disturbed"))
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,200}")
_DATE = re.compile(r"(\d{4}-\d\d-\d\d(T\d\d:\d\d:\d\d(\.\d{1,6})?(\+00:00|Z)?)?)?", re.ASCII)


def _seconds(name: str, given: object, *, may_lack: bool = False) -> float | None:
    if given is None and may_lack:
        return None
    if type(given) not in (int, float):
        raise TypeError(f"{name} is {given!r}, no time")
    assert isinstance(given, (int, float))
    # A day for one call: what takes longer is none that anybody measured.
    if not 0 < given < 86400:
        raise ValueError(f"{name} is {given!r}, no time")
    return float(given)


def _name(given: object) -> str:
    if not isinstance(given, str) or not _NAME.fullmatch(given):
        raise ValueError(f"a backend's name is {given!r}")
    return given


def _words(given: object) -> str:
    if not isinstance(given, str) or len(given) > MOST_LETTERS or not given.isprintable():
        raise ValueError(f"expected a few words, got {given!r}")
    return given
