"""``attnreg tables``: the tables of measured times that there are here, what is in one, and getting rid of one's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Annotated

import torch
import typer

from attnreg.cli.group import Group
from attnreg.cli.shared import completing, fail, print_table, say, whole
from attnreg.measured import Figure
from attnreg.paths import NoCacheDir
from attnreg.problem import Problem
from attnreg.registry import registry
from attnreg.tables import store
from attnreg.tables.call import kinds
from attnreg.tables.environment import environment
from attnreg.tables.table import Table, TableError

tables = typer.Typer(
    cls=Group,
    help="List, show or clear the tables of measured times.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@dataclass(frozen=True)
class TableFile:
    """A file that holds a table, or should.

    Attributes:
        path: where it lies.
        whose: "yours", "pinned" (by ``ATTNREG_TABLE``) or "shipped".
    """

    path: Path
    whose: str

    @cached_property
    def table(self) -> Table | None:
        """What is in it; None where that is no table."""
        try:
            return store.load(self.path)
        except TableError:
            return None

    @property
    def measured(self) -> str:
        """The day of its newest figure, in UTC; "-" where there is none."""
        rows = {} if self.table is None else self.table.rows
        return max((figure.measured[:10] for figures in rows.values() for figure in figures.values()), default="-")

    @property
    def days(self) -> int | None:
        """How long ago that was; None where that cannot be told."""
        try:
            day = datetime.strptime(self.measured, "%Y-%m-%d").date()
        except ValueError:
            return None
        return (datetime.now(timezone.utc).date() - day).days


@dataclass(frozen=True)
class TableInUse:
    """A table by which calls on a device go.

    Attributes:
        device: the device.
        file: the table.
        remarks: how the machine that it is from differs from this one.
    """

    device: torch.device
    file: TableFile
    remarks: tuple[str, ...]


def devices() -> list[torch.device]:
    """The devices of this machine for which there can be tables."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(count))]


def own_folder() -> Path | None:
    """Where the user's tables lie; None where nothing says where."""
    try:
        return store.table_dir()
    except NoCacheDir:
        return None


def table_files() -> list[TableFile]:
    """The pinned table, the user's own, and the shipped ones."""
    pin = store.pinned()
    folder = own_folder()
    found = [TableFile(pin, "pinned")] if pin is not None else []
    own = [] if folder is None else _tables_in(folder)
    return [
        *found,
        *(TableFile(path, "yours") for path in own),
        *(TableFile(path, "shipped") for path in _tables_in(store.SHIPPED)),
    ]


complete_table = completing(lambda: dict.fromkeys(file.path.name for file in table_files()))
complete_own_table = completing(lambda: [file.path.name for file in table_files() if file.whose == "yours"])


def tables_in_use() -> tuple[list[TableInUse], list[str]]:
    """The tables by which calls go here, those to be asked first first, and what is wrong with those that are not used."""
    files = table_files()
    found: list[TableInUse] = []
    problems: list[str] = []
    for device in devices():
        here = environment(device, registry.entries)
        stored, wrong = registry.tables.stored(here, of_float32=False)
        problems += wrong
        float32 = {each.name for each in registry.tables.stored(here, of_float32=True)[0]}
        for each in stored:
            for file in files:
                if (file.path.name, file.whose == "shipped") == (each.name, each.source == "shipped"):
                    remarks = each.remarks if each.name in float32 else (*each.remarks, "not for float32 calls")
                    found.append(TableInUse(device, file, remarks))
                    break
    return found, list(dict.fromkeys(problems))


@tables.command("list")
def list_() -> None:
    """List the tables, and which are used here.

    They are yours, the one that ATTNREG_TABLE pins, and those that attnreg ships.
    """
    used, problems = tables_in_use()
    rows = []
    for file in table_files():
        by = [str(each.device) for each in used if each.file.path == file.path]
        calls = "-" if file.table is None else str(len(file.table.rows))
        rows.append((file.path.name, file.whose, calls, file.measured, ", ".join(by) or "no"))
    print_table(("table", "whose", "calls", "measured", "used here"), rows, right=("calls",))
    typer.echo()
    for each in used:
        if each.remarks:
            say(whole(f"{each.file.path.name}, for {each.device}: {'; '.join(each.remarks)}"))
    for problem in problems:
        say(whole(problem))
    folder = own_folder()
    if folder is not None:
        say(whole(f"yours lie in {folder}"))


@tables.command()
def show(
    name: Annotated[
        str,
        typer.Argument(metavar="TABLE", help="Its name in the list, or a file.", autocompletion=complete_table),
    ],
) -> None:
    """Show what is in a table.

    That is where it was measured, and the fastest backend of each call.
    """
    file = _find(name)
    try:
        table = store.load(file.path)
    except TableError as error:
        fail(whole(f"{file.path}: {error}"))
    for line in _environment_lines(table):
        say(whole(line))
    print_winners(table)


def print_winners(table: Table) -> None:
    """Print, for each kind of call, a table of the fastest and the next backend by window, and why others have no time."""
    for kind, calls in kinds(table.rows).items():
        say(f"\n{whole(kind)}\n")
        rows = []
        for call in calls:
            times = timed(table.rows[call])
            first = (times[0][1], f"{times[0][0] * 1e3:.4g}") if times else ("none", "-")
            second = f"{times[1][1]} {times[1][0] / times[0][0]:.2f}x" if len(times) > 1 else ""
            rows.append((str(call.window.size), *first, second))
        print_table(("W", "fastest", "ms", "next"), rows, right=("W", "ms"))
        for line in _not_timed(table, calls):
            say(whole(line))


def timed(figures: Mapping[str, Figure]) -> list[tuple[float, str]]:
    """The candidates that have a time, the fastest first."""
    return sorted((figure.seconds, name) for name, figure in figures.items() if figure.seconds is not None)


def _not_timed(table: Table, calls: Sequence[Problem]) -> Iterator[str]:
    """Which candidates have no time, for which windows, and why; once for each reason."""
    windows: dict[tuple[str, str], list[int]] = {}
    for call in calls:
        for name, figure in table.rows[call].items():
            if figure.reason is not None:
                windows.setdefault((name, figure.reason), []).append(call.window.size)
    for (name, reason), sizes in sorted(windows.items()):
        yield f"not timed: {name}, W={', '.join(map(str, sizes))}: {reason}"


def _environment_lines(table: Table) -> Iterator[str]:
    where = table.environment
    yield f"measured on {where.device}"
    for name in ("attnreg", "torch", "triton", "driver", "threads", "float32"):
        value = getattr(where, name)
        if value is not None:
            yield f"{'float32 products in' if name == 'float32' else name} {value}"
    for name, source in where.backends.items():
        yield f"backend {name} of {source}"


@tables.command()
def clear(
    # Without a metavar, which versions of typer put differently: this name is shown.
    table: Annotated[
        list[str] | None, typer.Argument(help="Only these. Default: all of yours.", autocompletion=complete_own_table)
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete tables of yours, after asking.

    Those that attnreg ships serve then.
    """
    files = table_files()
    own = [file.path for file in files if file.whose == "yours"]
    chosen = [path for path in own if not table or _is_called(path, table)]
    for name in table or ():
        if not any(_is_called(path, [name]) for path in own):
            raise typer.BadParameter(_why_not_cleared(name, files), param_hint="TABLE")
    if not chosen:
        typer.echo("there is no table of yours")
        return
    for path in chosen:
        say(whole(str(path)))
    if not yes:
        typer.confirm(f"delete {'this table' if len(chosen) == 1 else f'these {len(chosen)} tables'}?", abort=True)
    for path in chosen:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            fail(whole(f"{path} cannot be deleted: {error.strerror or error}"))
    typer.echo(f"deleted: {len(chosen)}")


def _why_not_cleared(name: str, files: Sequence[TableFile]) -> str:
    own = [whole(file.path.name) for file in files if file.whose == "yours"]
    yours = f"yours: {', '.join(own)}" if own else "you have no tables"
    other = next((file for file in files if _is_called(file.path, [name])), None)
    if other is None:
        return f"no table of yours is called {whole(name)!r}; {yours}"
    why = "ships with attnreg" if other.whose == "shipped" else "is pinned by ATTNREG_TABLE"
    return f"{whole(other.path.name)} {why} and cannot be cleared; {yours}"


def _tables_in(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.suffix == ".json" and not path.name.startswith("."))
    except OSError:
        return []


def _find(name: str) -> TableFile:
    files = table_files()
    for file in files:
        if _is_called(file.path, [name]):
            return file
    if Path(name).is_file():
        return TableFile(Path(name), "yours")
    raise typer.BadParameter(
        f"no table is called {whole(name)!r}{_listed([file.path for file in files])}", param_hint="TABLE"
    )


def _is_called(path: Path, names: Sequence[str]) -> bool:
    return path.name in names or path.stem in names


def _listed(paths: Sequence[Path]) -> str:
    return f"; there are {', '.join(whole(path.name) for path in paths)}" if paths else "; there is none"
