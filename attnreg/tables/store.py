"""The files: the user's tables under the cache directory, one pinned by ``ATTNREG_TABLE``, and those that are shipped.

A table that cannot be read never breaks a call: it is left as it is, and said.
"""

from __future__ import annotations

import itertools
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from attnreg.paths import cache_dir
from attnreg.registry import registry
from attnreg.tuning.environment import Environment
from attnreg.tuning.table import Table, TableError, from_json, to_json

logger = logging.getLogger("attnreg")

SHIPPED = Path(__file__).parents[1] / "tuned"
# A process that died holding the lock has let go of it; one that writes needs milliseconds.
LOCK_SECONDS = 60


@dataclass(frozen=True)
class Stored:
    """A table, and what is to be said of it.

    Attributes:
        table: the table.
        source: "tuned" or "shipped".
        name: the file's name.
        remarks: how its environment differs from this one.
    """

    table: Table
    source: str
    name: str
    remarks: tuple[str, ...]


# What could not be written, by the name of its file.
_unwritten: dict[str, Table] = {}
# How often this process has changed a table.
_changes = 0
_read: dict[Path, tuple[tuple[int, int, int], Table | TableError]] = {}
# What was logged already.
_reported: set[str] = set()


def table_dir() -> Path:
    """Where the user's tables lie."""
    return cache_dir() / "tables"


def pinned() -> Path | None:
    """The table that ``ATTNREG_TABLE`` names, which stands for all of the user's."""
    given = os.environ.get("ATTNREG_TABLE")
    return Path(given) if given else None


def tables(here: Environment) -> tuple[tuple[Stored, ...], tuple[str, ...]]:
    """The tables that say something of this environment, best first, and what is wrong with the others.

    The pinned one, or the user's own, those nearest in versions first; then those shipped for such a device.
    """
    found: list[Stored] = []
    problems: list[str] = []
    pin = pinned()
    for path in [pin] if pin is not None else _files(table_dir(), problems):
        try:
            table = load(path)
        except TableError as error:
            problems.append(f"the table {path.name} is not used: {error}")
            continue
        hard = table.environment.hard_mismatches(here)
        if hard:
            # Tables of other devices lie in the same folder by right.
            if pin is not None or table.environment.device == here.device:
                problems.append(f"the table {path.name} is not used: {'; '.join(hard)}")
            continue
        found.append(Stored(table, "tuned", path.name, table.environment.soft_mismatches(here)))
    if pin is None:
        found += [
            Stored(table, "tuned", f"{name} (in this process)", table.environment.soft_mismatches(here))
            for name, table in _unwritten.items()
            if not table.environment.hard_mismatches(here)
        ]
    found.sort(key=lambda each: len(each.remarks))
    for path in _files(SHIPPED, problems):
        try:
            table = load(path)
        except TableError as error:
            problems.append(f"the shipped table {path.name} is not used: {error}")
            continue
        theirs = table.environment.device
        # Shipped for a class of devices: all CPUs, and all GPUs of that capability.
        if theirs.type == here.device.type and (theirs.type == "cpu" or theirs.capability == here.device.capability):
            remarks = table.environment.soft_mismatches(here)
            other = (f"measured on {theirs}",) if theirs != here.device else ()
            found.append(Stored(table, "shipped", path.name, (*other, *remarks)))
    return tuple(found), tuple(problems)


def load(path: Path) -> Table:
    """The table in a file, read again only when the file has changed.

    Raises:
        TableError: there is no table in it, or it cannot be read.
    """
    try:
        status = path.stat()
        stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        known = _read.get(path)
        if known is None or known[0] != stamp:
            try:
                known = (stamp, from_json(path.read_text(encoding="utf-8")))
            except (TableError, UnicodeDecodeError) as error:
                known = (stamp, TableError(str(error)))
            _read[path] = known
    except OSError as error:
        raise TableError(f"it cannot be read: {error.strerror or error}") from None
    if isinstance(known[1], TableError):
        raise known[1]
    return known[1]


def _changed() -> None:
    """Count a change of this process's own, which a file's time may be too coarse to show, and drop the plans."""
    global _changes
    _changes += 1
    registry.tables_are(stamp())


def stamp() -> tuple[object, ...]:
    """What changes when a table of the user's is written, by whichever process."""
    pin = pinned()
    try:
        status = (pin or table_dir()).stat()
    except OSError:
        return (pin, _changes)
    return (pin, _changes, status.st_mtime_ns, status.st_ino)


def report(problems: Iterable[str]) -> None:
    """Log each of these once in this process, as warnings: a call goes on without the table, whatever is wrong with it."""
    for problem in problems:
        if problem not in _reported:
            _reported.add(problem)
            logger.warning("attnreg: %s", problem)


def check_writable() -> None:
    """Raise an OSError that names the folder unless tables can be written: better before measuring than after."""
    folder = table_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _beside(folder / "table.json"):
            pass
    except OSError as error:
        raise OSError(f"tables cannot be written to {folder}: {error.strerror or error}") from None


def save(table: Table) -> Path:
    """Merge ``table`` into the file of its environment, under a lock: what another process wrote meanwhile is kept.

    A file of that name that cannot be read as a table is left alone: the table goes beside it.

    Raises:
        OSError: it cannot be written.
    """
    from filelock import FileLock

    folder = table_dir()
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{table.environment.file_name}.lock", timeout=LOCK_SECONDS):
        for path in _names(folder / table.environment.file_name):
            if not path.exists():
                break
            try:
                table = load(path).merged(table)
                break
            except TableError:
                continue
        write(table, path)
    _changed()
    return path


def keep(table: Table) -> str | None:
    """Save ``table``; where it cannot be written it serves this process alone. Returns what is wrong, or None."""
    try:
        save(table)
    except (OSError, TimeoutError) as error:
        name = table.environment.file_name
        _unwritten[name] = _unwritten[name].merged(table) if name in _unwritten else table
        _changed()
        return str(error)
    return None


def forget() -> None:
    """Drop what could not be written, and read every file anew."""
    _unwritten.clear()
    _read.clear()
    _reported.clear()
    _changed()


def write(table: Table, path: Path) -> None:
    """Write a file that others see either as it was or whole.

    Raises:
        OSError: it cannot be written.
    """
    try:
        with _beside(path) as temporary:
            temporary.write_text(to_json(table), encoding="utf-8")
            os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from None


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    os.chmod(name, 0o644)
    try:
        yield Path(name)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name)


def _names(path: Path) -> Iterator[Path]:
    yield path
    for number in itertools.count(2):
        yield path.with_stem(f"{path.stem}-{number}")


def _files(folder: Path, problems: list[str]) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.suffix == ".json" and not path.name.startswith("."))
    except FileNotFoundError:
        return []
    except OSError as error:
        problems.append(f"the tables in {folder.name} are not used: {error.strerror or error}")
        return []
