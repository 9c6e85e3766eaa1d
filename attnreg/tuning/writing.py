"""Writing tables: whole files, under a lock, into the user's folder."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from attnreg.registry import registry
from attnreg.tables import store
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
