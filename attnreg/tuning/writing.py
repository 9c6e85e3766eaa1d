"""Writing tables: whole files, under a lock, into the user's folder; and the user's figures as one table, in and out."""

from __future__ import annotations

import itertools
import os
import stat
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from attnreg.paths import NoCacheDir, make_private
from attnreg.problem import Problem
from attnreg.registry import registry
from attnreg.tables import store
from attnreg.tables.environment import Environment, environment
from attnreg.tables.table import MOST_BYTES, MOST_ROWS, Table, TableError, to_json

# A process that died holding the lock has let go of it; one that writes needs milliseconds.
LOCK_SECONDS = 60.0
# A call waits no longer for another process to write.
CALL_SECONDS = 5.0
# What was written for so long without an end has lost its writer.
_LONGEST_WRITING_SECONDS = 3600.0


def check_writable(environment: Environment, seconds: float = LOCK_SECONDS) -> None:
    """Raise an OSError that says what is in the way unless :func:`save` can write: better before measuring than after.

    All of it is done but for the last step, in which a table takes its place.
    """
    folder: Path | None = None
    try:
        folder = store.table_dir()
        make_private(folder)
        with _locked(folder, environment, seconds):
            _sweep(folder)
            with _beside(Path(os.path.realpath(_place(folder, environment)[0]))) as temporary:
                temporary.write_text("{}", encoding="utf-8")
    except OSError as error:
        # Which names the folder itself.
        where = "" if folder is None or isinstance(error, NoCacheDir) else f" to {folder}"
        raise OSError(f"tables cannot be written{where}: {error.strerror or error}") from None


def save(table: Table, seconds: float = LOCK_SECONDS) -> Path:
    """Merge ``table`` into the file of its environment, under a lock: what another process wrote meanwhile is kept.

    Figures that are no lasting facts are left out. A file of that name that cannot be read as a table, or that belongs to
    another user, is left alone: the table goes beside it. It holds no more rows than a table may, first of all these.

    Args:
        table: the figures.
        seconds: how long to wait for another process that writes.

    Raises:
        OSError: it cannot be written; a TimeoutError where another process is still writing.
    """
    folder = store.table_dir()
    make_private(folder)
    with _locked(folder, table.environment, seconds):
        path, there = _place(folder, table.environment)
        merged = table.lasting() if there is None else there.merged(table.lasting())
        write(merged, path, first=table.rows.keys())
    registry.tables.changed()
    registry.look_at_tables()
    return path


def keep(table: Table) -> str | None:
    """Save ``table``; what is not in the file then serves this process alone. Returns what is wrong, or None."""
    fault = None
    try:
        if table.lasting().rows:
            save(table, CALL_SECONDS)
    except OSError as error:
        fault = error.strerror or str(error)
    if fault is not None or table.lasting() != table:
        hold(table)
    return fault


def hold(table: Table) -> None:
    """Keep ``table`` for this process alone."""
    registry.tables.hold(table)
    registry.look_at_tables()


def write(table: Table, path: Path, first: Collection[Problem] = ()) -> None:
    """Write a file that others see either as it was or whole; of more rows than it may hold, as ``Table.newest`` gives them.

    Of a symbolic link it is what that leads to. What is there and is no file, such as ``/dev/stdout``, is written into.

    Raises:
        OSError: it cannot be written.
    """
    table = table.newest(MOST_ROWS, first)
    text = to_json(table)
    while len(text) > MOST_BYTES:  # rows of many candidates: nobody would read it
        table = table.newest(len(table.rows) // 2, first)
        text = to_json(table)
    try:
        real = Path(os.path.realpath(path))
        if not _is_file_or_nothing(path, real):
            with open(os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_NOCTTY), "w", encoding="utf-8") as file:
                file.write(text)
            return
        with _beside(real) as temporary:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, real)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from None


def _is_file_or_nothing(path: Path, real: Path) -> bool:
    """Whether a file may take the place of ``real``, to which ``path`` leads: nothing else is there."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return True
    # What the system gives for one that is open, as in ``/dev/stdout``, need not be a name that it has.
    return stat.S_ISREG(status.st_mode) and os.path.exists(real) and os.path.samestat(status, os.stat(real))


def own_table(device: torch.device, *, shipped: bool = False) -> Table:
    """The user's tables for ``device`` as one; with ``shipped``, what is shipped for it where there are none.

    Of figures with another precision of float32 products than this process', those of float32 calls are left out.

    Raises:
        ValueError: there is none.
    """
    here = environment(device, registry.entries)
    stored, problems = registry.tables.stored(here, of_float32=False)
    sources = {"tuned"} if any(each.source == "tuned" for each in stored) or not shipped else {"shipped"}
    found = Table(here)
    for each in reversed([each for each in stored if each.source in sources]):
        table = each.table.whole()
        alike = table.environment.float32 == here.float32
        rows = {call: row for call, row in table.rows.items() if alike or call.dtype is not torch.float32}
        whose = replace(table.environment, float32=here.float32)
        found = Table(whose, found.rows, found.copy_seconds).merged(Table(whose, rows, table.copy_seconds))
    if not found.rows:
        raise ValueError("; ".join((f"there is no table for {here.device}; `attnreg tune` makes one", *problems)))
    return found


def export_table(device: torch.device, path: Path) -> None:
    """Write all that the user has measured for ``device`` to one file, as :func:`own_table` gives it.

    Raises:
        ValueError: there is no table.
        OSError: the file cannot be written.
    """
    write(own_table(device), path)


def import_table(path: Path) -> tuple[Path, tuple[str, ...]]:
    """Merge the table in a file into the user's of the same environment.

    Returns:
        Where that one lies, and why calls on this machine do not go by it; empty where they do.

    Raises:
        ValueError: there is no table in the file.
        OSError: the user's cannot be written.
    """
    try:
        table = store.load(path)
    except TableError as error:
        raise ValueError(f"{path}: {error}") from None
    here = environment(torch.device(table.environment.device.type), ())
    return save(table), table.environment.hard_mismatches(here, of_float32=False)


@contextmanager
def _locked(folder: Path, environment: Environment, seconds: float) -> Iterator[None]:
    """Alone with the files of an environment.

    Raises:
        OSError: the lock cannot be had; a TimeoutError where another process holds it for longer.
    """
    path = folder / f".{environment.file_name}.lock"
    # Who may write into the folder may lock: another user could not save otherwise.
    mode = 0o600 | (stat.S_IMODE(folder.stat().st_mode) & 0o066)
    lock = FileLock(path, timeout=seconds, mode=mode)
    try:
        lock.acquire()
    except Timeout:
        raise TimeoutError(f"another process holds {path} for {seconds:g} s already") from None
    except NotImplementedError:
        raise OSError(f"the file system of {folder} cannot lock files") from None
    except OSError as error:
        raise OSError(f"{path} cannot be locked: {error.strerror or error}") from None
    try:
        yield
    finally:
        lock.release()


def _place(folder: Path, environment: Environment) -> tuple[Path, Table | None]:
    """The file for the tables of an environment, and the table that is there."""
    for path in _names(folder / environment.file_name):
        if not os.path.lexists(path):
            return path, None
        if not _is_replaceable(path):
            continue
        with suppress(TableError):
            return path, store.load(path)
    raise AssertionError("there is no end of names")


def _is_replaceable(path: Path) -> bool:
    """Whether this user may put another file in the place of one: in a sticky folder it has to be their own.

    So must a symbolic link be: what it leads to is written.
    """
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode) and status.st_uid not in (0, os.geteuid()):
        return False
    folder = path.parent.stat()
    if not folder.st_mode & stat.S_ISVTX:
        return True
    return os.geteuid() in (0, folder.st_uid, status.st_uid)


def _sweep(folder: Path) -> None:
    """Remove what processes that were killed while they wrote left behind."""
    for left in folder.glob(f".*.json.{_UNFINISHED}*"):
        with suppress(OSError):
            if time.time() - left.lstat().st_mtime > _LONGEST_WRITING_SECONDS:
                left.unlink()


# How the name of a file goes on that is not finished.
_UNFINISHED = "unfinished-"


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.{_UNFINISHED}")
    os.close(handle)
    try:
        os.chmod(name, 0o644)
        yield Path(name)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name)


def _names(path: Path) -> Iterator[Path]:
    yield path
    for number in itertools.count(2):
        yield path.with_stem(f"{path.stem}-{number}")
