"""The files: the user's tables under the cache directory, one pinned by ``ATTNREG_TABLE``, and those that are shipped.

A table that cannot be read never breaks a call: it is left as it is, and said.
"""

from __future__ import annotations

import logging
import os
import stat
import time
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from attnreg.backend import Entry
from attnreg.environ import variables
from attnreg.measured import Measured
from attnreg.paths import NoCacheDir, cache_dir, expanded
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
        # The user's folder, or why there is none, and what that hangs on.
        self._own: tuple[tuple[object, ...], str, str | None] | None = None
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
        for name, table in self._readable(own, "table", problems):
            hard = table.environment.hard_mismatches(here, of_float32=of_float32)
            if not hard:
                keep("tuned", name, table)
            # Tables of other devices lie in the same folder by right.
            elif pin is not None or table.environment.device == here.device:
                problems.append(f"the table {name} is not used: {'; '.join(hard)}")
        if pin is None:
            for name, unwritten in self._unwritten.items():
                if not unwritten.environment.hard_mismatches(here, of_float32=of_float32):
                    keep("tuned", f"{name} (in this process)", unwritten)
        found.sort(key=lambda each: len(each.remarks))
        for name, table in self._readable(self._files(str(SHIPPED), problems), "shipped table", problems):
            theirs = table.environment.device
            # Shipped for a class of devices: all CPUs, and all GPUs of that capability.
            if theirs.type == here.device.type and (
                theirs.type == "cpu" or theirs.capability == here.device.capability
            ):
                keep("shipped", name, table, *((f"measured on {theirs}",) if theirs != here.device else ()))
        return tuple(found), tuple(problems)

    def _readable(self, paths: Iterable[str], kind: str, problems: list[str]) -> Iterator[tuple[str, TableText]]:
        """The tables in these files, each with the file's name; why one cannot be read is added to ``problems``."""
        for path in paths:
            name = printable(os.path.basename(path))
            try:
                table = self._text(path)
            except TableError as error:
                problems.append(f"the {kind} {name} is not used: {error}")
            else:
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
                self._own = (key, str(table_dir()), None)
            except NoCacheDir as error:
                self._own = (key, "", f"there are no tables of the user's: {printable(str(error))}")
        _, folder, missing = self._own
        if missing is not None:
            problems.append(missing)
            return ()
        return self._files(folder, problems)

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
            name = printable(os.path.basename(folder))
            problems.append(f"the tables in {name} are not used: {error.strerror or error}")
            return ()
        paths = [os.path.join(folder, name) for name in names]
        wrong: tuple[str, ...] = ()
        if len(paths) > MOST_FILES:
            wrong = (f"of {len(paths)} tables the {MOST_FILES} newest are used: remove some of {printable(folder)}",)
            paths = sorted(sorted(paths, key=lambda path: _status(path) or (0, 0, 0))[-MOST_FILES:])
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


def _read(path: Path) -> TableText:
    try:
        # Without waiting for who opens a pipe's other end; what is no file, such as a device, may have no end.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(handle, "rb") as file:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise TableError("it is no regular file")
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise TableError(f"it has {max(status.st_size, len(text))} bytes; a table has {MOST_BYTES} at most")
        return TableText(text.decode())
    except UnicodeDecodeError as error:
        raise TableError(str(error)) from None
    except OSError as error:
        raise TableError(f"it cannot be read: {error.strerror or error}") from None
