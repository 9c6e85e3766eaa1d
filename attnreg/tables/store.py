"""The files: the user's tables under the cache directory, one pinned by ``ATTNREG_TABLE``, and those that are shipped.

A table that cannot be read never breaks a call: it is left as it is, and said. Nor do any files make a call wait for more than
half a second: of what there is too much of, the newest is read, and that is said.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import time
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from attnreg.backend import Entry
from attnreg.environ import variables
from attnreg.measured import Measured
from attnreg.paths import NoCacheDir, cache_dir, expanded, shown
from attnreg.precision import reduced_precision
from attnreg.printable import printable
from attnreg.problem import Problem
from attnreg.tables.environment import Environment, environment
from attnreg.tables.lookup import Rows, Stored, measured
from attnreg.tables.table import MOST_BYTES, Table, TableError, TableText

logger = logging.getLogger("attnreg")

SHIPPED = Path(__file__).parent / "shipped"
# What :func:`table_dir` hangs on.
_FOLDER_KEYS = (b"ATTNREG_CACHE_DIR", b"XDG_CACHE_HOME", b"HOME")
_PIN_KEY = b"ATTNREG_TABLE"
# So many of the user's tables are read, the newest: each costs every call some time, and new versions leave old ones behind.
MOST_FILES = 64
# And so much of all of them, those of other devices with them, of which only the beginning is looked into.
MOST_BYTES_READ = 2**24
# Of those of a device, so much of the newest is parsed for a call.
MOST_PARSED = MOST_BYTES
# A folder that was changed so recently may change once more without its time saying so.
_SETTLED_NANOSECONDS = 10**9

# When a file was written, its size and its inode.
_Status = tuple[int, int, int]


def table_dir() -> Path:
    """Where the user's tables lie.

    Raises:
        NoCacheDir: nothing says where.
    """
    return cache_dir() / "tables"


def pinned() -> Path | None:
    """The table that ``ATTNREG_TABLE`` names, which stands for all of the user's."""
    given = os.environ.get("ATTNREG_TABLE")
    if not given:
        return None
    try:
        return expanded(given, "ATTNREG_TABLE")
    except NoCacheDir:  # then no file has that name, which is told as of any other
        return Path(given)


def load(path: Path) -> Table:
    """The table in a file.

    Raises:
        TableError: there is no table in it, or it cannot be read.
    """
    return _read(path).whole()


@dataclass(frozen=True)
class _Here:
    """The tables for one device, for float32 calls or for all others, and by what they were chosen."""

    stamp: Hashable
    settings: tuple[object, ...]
    entries: tuple[Entry, ...]
    stored: tuple[Stored, ...]
    problems: tuple[str, ...]


class Tables:
    """The tables of this process: what was read of the files, and what could not be written to one."""

    def __init__(self) -> None:
        self._changes = 0
        self.forget()

    def forget(self) -> None:
        """Drop what could not be written, and read every file anew."""
        self._unwritten: dict[str, Table] = {}
        self._texts: dict[str, tuple[_Status, TableText | TableError]] = {}
        self._folders: dict[str, tuple[tuple[int, int], tuple[str, ...], tuple[str, ...]]] = {}
        # The user's folder, and what it hangs on.
        self._own: tuple[tuple[object, ...], str] | None = None
        self._here: dict[tuple[str, int | None, bool], _Here] = {}
        # What was logged already.
        self._reported: set[str] = set()
        self.changed()

    def changed(self) -> None:
        """Count a change that this process made, which a file's time may be too coarse to show."""
        self._changes += 1

    def hold(self, table: Table) -> None:
        """Keep a table that cannot be written, for this process alone."""
        name = table.environment.file_name
        self._unwritten[name] = self._unwritten[name].merged(table) if name in self._unwritten else table
        self.changed()

    def stamp(self) -> Hashable:
        """What changes when the tables do by which this process chooses, whoever writes one and however, or their order.

        Costs microseconds.
        """
        pin = pinned() if variables.get(_PIN_KEY) else None
        own = (str(pin),) if pin is not None else self._own_files([])
        # What the order of the tables hangs on, of torch's settings.
        found: list[object] = [self._changes, torch.get_num_threads(), *map(reduced_precision, ("cpu", "cuda"))]
        for path in (*own, *self._files(str(SHIPPED), [])):
            found += (path, _status(path))
        return tuple(found)

    def measured(
        self,
        problem: Problem,
        entries: Sequence[Entry],
        stamp: Hashable | None = None,
        of: Problem | None = None,
    ) -> tuple[tuple[Measured, ...], tuple[str, ...]]:
        """What the tables say of ``problem``, the first to be asked first, and what is wrong with those that are not used.

        What is wrong is logged, too, once: a call goes on without the table. ``stamp`` is that of just now, if it is at hand,
        and ``of`` the call that ``problem`` stands for, if it does for another.
        """
        while True:
            here = self._for(problem, tuple(entries), self.stamp() if stamp is None else stamp)
            try:
                return measured(problem, here.stored, of), here.problems
            except TableError:  # found only now; the table counts for nothing from here on
                # Nor do others of which it is found now: to begin anew for each would take as often as long.
                for each in here.stored:
                    with suppress(TableError):
                        each.nearest(problem)
                self._here.clear()

    def stored(self, here: Environment, *, of_float32: bool) -> tuple[tuple[Stored, ...], tuple[str, ...]]:
        """The tables that say something of this environment, best first, and what is wrong with the others.

        The pinned one, or the user's own, those nearest in versions first; then those shipped for such a device. ``of_float32``
        is whether float32 calls are asked for; see ``Environment.hard_mismatches``.
        """
        found: list[Stored] = []
        problems: list[str] = []

        def keep(source: str, name: str, table: Rows, *remarks: str) -> None:
            differences = table.environment.soft_mismatches(here, of_float32=of_float32)
            found.append(Stored(table, source, name, (*remarks, *differences)))

        pin = pinned()
        own = (str(pin),) if pin is not None else self._own_files(problems)
        fitting = []
        for path, name, table in self._readable(own, "table", problems, pin):
            hard = table.environment.hard_mismatches(here, of_float32=of_float32)
            if not hard:
                fitting.append((path, name, table))
            # Tables of other devices lie in the same folder by right.
            elif pin is not None or table.environment.device == here.device:
                problems.append(f"{_title('table', name, pin)} is not used: {'; '.join(hard)}")
        for name, table in self._affordable(fitting, problems, pin):
            keep("tuned", name, table)
        if pin is None:
            for name, unwritten in self._unwritten.items():
                if not unwritten.environment.hard_mismatches(here, of_float32=of_float32):
                    keep("tuned", f"{name} (in this process)", unwritten)
        found.sort(key=lambda each: len(each.remarks))
        for _, name, table in self._readable(self._files(str(SHIPPED), problems), "shipped table", problems):
            theirs = table.environment.device
            # Shipped for a class of devices: all CPUs, and all GPUs of that capability.
            if theirs.type == here.device.type and (
                theirs.type == "cpu" or theirs.capability == here.device.capability
            ):
                keep("shipped", name, table, *((f"measured on {theirs}",) if theirs != here.device else ()))
        return tuple(found), tuple(problems)

    def _readable(
        self, paths: Iterable[str], kind: str, problems: list[str], pin: Path | None = None
    ) -> Iterator[tuple[str, str, TableText]]:
        """The tables in these files, each with the file's path and name; why one cannot be read is added to ``problems``."""
        for path in paths:
            name = printable(os.path.basename(path))
            try:
                table = self._text(path)
            except TableError as error:
                problems.append(f"{_title(kind, name, pin)} is not used: {error}{_advice(pin)}")
            else:
                yield path, name, table

    def _affordable(
        self, tables: Sequence[tuple[str, str, TableText]], problems: list[str], pin: Path | None
    ) -> Iterator[tuple[str, TableText]]:
        """Those of these tables, with their names, that a call has the time to parse; what is wrong is added to ``problems``."""
        costs = {}
        for path, name, table in tables:
            try:
                costs[path] = table.cost
            except TableError as error:
                problems.append(f"{_title('table', name, pin)} is not used: {error}")
        kept: set[str] = set()
        parsed = 0
        for path in sorted(costs, key=_age):
            parsed += costs[path]
            if parsed > MOST_PARSED:
                folder = shown(Path(path).parent)
                problems.append(
                    f"of {len(costs)} tables of this device the {len(kept)} newest are used, as all would keep calls waiting: "
                    f"remove some of {folder}"
                )
                break
            kept.add(path)
        for path, name, table in tables:
            if path in kept:
                yield name, table

    def _for(self, problem: Problem, entries: tuple[Entry, ...], stamp: Hashable) -> _Here:
        device, of_float32 = problem.device, problem.dtype is torch.float32
        settings = (torch.get_num_threads(), reduced_precision(device.type) if of_float32 else None)
        key = (device.type, device.index, of_float32)
        here = self._here.get(key)
        if here is None or here.stamp != stamp or here.settings != settings or here.entries != entries:
            stored = self.stored(environment(device, entries), of_float32=of_float32)
            here = self._here[key] = _Here(stamp, settings, entries, *stored)
            self.report(here.problems)
        return here

    def report(self, problems: Iterable[str]) -> None:
        """Log each of these once in this process, as warnings: a call goes on, whatever is wrong with a table."""
        for problem in problems:
            if problem not in self._reported:
                self._reported.add(problem)
                logger.warning("attnreg: %s", problem)

    def _own_files(self, problems: list[str]) -> tuple[str, ...]:
        key = (table_dir, *[variables.get(each) for each in _FOLDER_KEYS])
        if self._own is None or self._own[0] != key:
            try:
                self._own = (key, str(table_dir()))
            except NoCacheDir as error:  # not kept: what is in the way may be gone the next time
                problems.append(f"there are no tables of the user's: {printable(str(error), 1000)}")
                return ()
        return self._files(self._own[1], problems)

    def _files(self, folder: str, problems: list[str]) -> tuple[str, ...]:
        try:
            found = os.stat(folder)
            status = (found.st_mtime_ns, found.st_ino)
            known = self._folders.get(folder)
            if known is not None and known[0] == status:
                problems += known[2]
                return known[1]
            names = sorted(each for each in os.listdir(folder) if each.endswith(".json") and not each.startswith("."))
        except FileNotFoundError:
            return ()
        except OSError as error:
            problems.append(f"the tables in {shown(Path(folder))} are not used: {error.strerror or error}")
            return ()
        paths = [os.path.join(folder, name) for name in names]
        newest = _newest(paths)
        wrong: tuple[str, ...] = ()
        if len(newest) < len(paths):
            wrong = (f"of {len(paths)} tables the {len(newest)} newest are used: remove some of {shown(Path(folder))}",)
            paths = [path for path in paths if path in newest]
            problems += wrong
        if time.time_ns() - status[0] > _SETTLED_NANOSECONDS:
            self._folders[folder] = (status, tuple(paths), wrong)
        return tuple(paths)

    def _text(self, path: str) -> TableText:
        """The table in a file, read again only when the file has changed.

        Raises:
            TableError: there is none in it, as far as is known yet, or it cannot be read.
        """
        status = _status(path)
        known = self._texts.get(path)
        if known is None or status is None or known[0] != status:
            try:
                text: TableText | TableError = _read(Path(path))
            except TableError as error:
                text = error
            # Whatever else goes wrong, as where memory runs out, is no call's affair.
            except Exception as error:
                text = TableError(f"{type(error).__name__}: {error}")
            if status is None:
                known = ((0, 0, 0), text)
            else:
                known = self._texts[path] = (status, text)
        if isinstance(known[1], TableError):
            raise known[1]
        if known[1].fault is not None:
            raise known[1].fault
        return known[1]


def _status(path: str) -> _Status | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return (found.st_mtime_ns, found.st_size, found.st_ino)


def _age(path: str) -> int:
    """What files are sorted by, the newest first; one of the future is older than all, or it would always be the newest."""
    status = _status(path)
    return 0 if status is None or status[0] > time.time_ns() else -status[0]


def _newest(paths: Sequence[str]) -> frozenset[str]:
    """Of these files the newest, as many as are read."""
    kept: set[str] = set()
    read = 0
    for path in sorted(paths, key=_age):
        status = _status(path)
        # What is larger than a table is not read.
        read += 0 if status is None or status[1] > MOST_BYTES else status[1]
        if len(kept) == MOST_FILES or read > MOST_BYTES_READ:
            break
        kept.add(path)
    return frozenset(kept)


def _title(kind: str, name: str, pin: Path | None) -> str:
    """What a table is called where it is said that it is not used."""
    return f"the {kind} {name}" if pin is None else f"ATTNREG_TABLE={shown(pin.absolute())}"


def _advice(pin: Path | None) -> str:
    """What to do about a pinned table that cannot be read."""
    if pin is None:
        return ""
    # Nobody wants a table in the place of a device.
    is_to_write = os.path.isfile(pin) or not os.path.lexists(pin)
    return "; unset it" + (f", or write one with `attnreg tune --export {shown(pin)}`" if is_to_write else "")


def _read(path: Path) -> TableText:
    try:
        # What is no file, such as a device, may do something when it is opened, and have no end.
        _check_file(os.stat(path))
        # Without waiting for who opens a pipe's other end, should it be one by now.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            size = _check_file(os.fstat(handle))
            # What a kernel makes up as it is read says that it is empty, and may have no end, or not be there yet.
            with open(handle, "rb", closefd=False) as file:
                text = file.read(size)
        finally:
            os.close(handle)
        if text is None:
            raise TableError("it cannot be read now")
        return TableText(text.decode())
    except UnicodeDecodeError as error:
        raise TableError(str(error)) from None
    except OSError as error:
        raise TableError(f"it cannot be read: {error.strerror or error}") from None


def _check_file(status: os.stat_result) -> int:
    """The size of a file.

    Raises:
        OSError, TableError: it is none, or too large for a table.
    """
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        raise TableError("it is no regular file")
    if status.st_size > MOST_BYTES:
        raise TableError(f"it has {status.st_size} bytes; a table has {MOST_BYTES} at most")
    return status.st_size
