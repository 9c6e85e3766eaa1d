"""Writing tables: whole files, under a lock, into the user's folder; and the user's figures as one table, in and out."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch
from filelock import FileLock

from attnreg.registry import registry
from attnreg.tables import store
from attnreg.tables.environment import environment
from attnreg.tables.table import Table, TableError, to_json

# A process that died holding the lock has let go of it; one that writes needs milliseconds.
LOCK_SECONDS = 60


def check_writable() -> None:
    """Raise an OSError that names the folder unless tables can be written: better before measuring than after."""
    folder = store.table_dir()
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
    folder = store.table_dir()
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{table.environment.file_name}.lock", timeout=LOCK_SECONDS):
        for path in _names(folder / table.environment.file_name):
            if not path.exists():
                break
            try:
                table = store.load(path).merged(table)
                break
            except TableError:
                continue
        write(table, path)
    registry.tables.changed()
    registry.look_at_tables()
    return path


def keep(table: Table) -> str | None:
    """Save ``table``; where it cannot be written it serves this process alone. Returns what is wrong, or None."""
    try:
        save(table)
    except (OSError, TimeoutError) as error:
        registry.tables.hold(table)
        registry.look_at_tables()
        return str(error)
    return None


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
        found = Table(whose, found.rows).merged(Table(whose, rows))
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
