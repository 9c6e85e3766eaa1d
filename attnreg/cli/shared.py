"""What the commands share: options and how they are read, what is told where something goes wrong, the console."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import torch
import typer

from attnreg.backend import BackendError, option_values
from attnreg.device import why_unusable
from attnreg.drawing import MissingMatplotlib
from attnreg.op import OPS, ROWS
from attnreg.printable import printable
from attnreg.problem import dtype_name
from attnreg.registry import registry
from attnreg.request import did_you_mean, parse_wish

# rich is imported where something is drawn with it: most commands print plain lines.
if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

ALL_OPS = ", ".join(OPS)
DTYPES = {dtype_name(dtype): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)}
# The columns of an output that is no terminal: enough for every table as it is.
WIDE = 1000
# Spaces between the columns of a table.
GAP = 2


def completing(names: Callable[[], Collection[str]]) -> Callable[[str], list[str]]:
    """What completes an option's value in the shell, of these names."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names() if name.startswith(incomplete)]

    return complete


complete_op = completing(lambda: OPS)
complete_dtype = completing(lambda: DTYPES)
# What a call may give beside its tensors, of any op.
GIVEN = tuple(dict.fromkeys(row.name for op in ROWS.values() for row in op.extras if row.name in op.optional))
complete_given = completing(lambda: GIVEN)
complete_backend = completing(lambda: [entry.backend.name for entry in registry.entries])
# How the library says that a backend was asked for as the command passes it on.
_BY_ARGUMENT = "the argument backend="
_VARIABLE = "ATTNREG_BACKEND"

DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device", metavar="DEVICE", help="As torch names it: cpu, cuda, cuda:1. Default: cuda where there is one."
    ),
]
BackendOption = Annotated[
    str | None,
    typer.Option(
        "--backend",
        metavar="NAME",
        help="Ask for this backend; for several in order of preference with ; between. Default: as ATTNREG_BACKEND says, else "
        "attnreg chooses.",
        autocompletion=complete_backend,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def check_op(name: str) -> None:
    """Refuse a name that is no op's."""
    if name not in OPS:
        raise typer.BadParameter(f"{name!r} is not one of {ALL_OPS}", param_hint="--op")


def parse_dtype(name: str) -> torch.dtype:
    """The dtype of that name, which may begin with "torch."."""
    dtype = DTYPES.get(name.removeprefix("torch."))
    if dtype is None:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(DTYPES)}", param_hint="--dtype")
    return dtype


def parse_given(given: str) -> tuple[str, ...]:
    """The names of optional arguments in an option's value, with commas between them; none for "none"."""
    names = tuple(dict.fromkeys(part.strip() for part in given.split(",")))
    if names == ("none",):
        return ()
    for name in names:
        if name not in GIVEN:
            raise typer.BadParameter(
                f"{name!r} is not one of {', '.join(GIVEN)}{did_you_mean(name, GIVEN)}", param_hint="--with"
            )
    return names


def parse_integers(given: str, option: str, names: tuple[str, ...]) -> tuple[int, ...]:
    """The numbers of an option's value, one for each of ``names``, with commas between them."""
    try:
        numbers = tuple(int(part) for part in given.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != len(names) or min(numbers) < 0:
        raise typer.BadParameter(
            f"expected {','.join(names)}, {len(names)} integers of at least 0; got {given!r}", param_hint=option
        )
    return numbers


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """What reads an option's value as an integer, and refuses it with what was given; typer would not say that."""
    told = f"an integer of at least {least}" if most is None else f"an integer from {least} to {most}"

    def parse(given: str) -> int:
        try:
            number = int(given)
        except ValueError:
            raise typer.BadParameter(f"expected {told}; got {given!r}") from None
        if number < least or (most is not None and number > most):
            raise typer.BadParameter(f"expected {told}; got {given!r}")
        return number

    return parse


def number(least: float) -> Callable[[str], float]:
    """The same for a number that need not be whole."""

    def parse(given: str) -> float:
        try:
            number = float(given)
        except ValueError:
            number = math.nan
        if not least <= number < math.inf:
            raise typer.BadParameter(f"expected a number of at least {least}; got {given!r}")
        return number

    return parse


def unknown_backend(name: str) -> str:
    """The message for a name that no registered backend has."""
    names = sorted(entry.backend.name for entry in registry.entries)
    broken = "".join(f"\n  {fault}" for fault in registry.faults)
    return f"no backend is called {name!r}{did_you_mean(name, names)}; registered: {', '.join(names) or 'none'}{broken}"


def check_backends(names: Collection[str] | None) -> None:
    """Refuse a name that is no registered backend's."""
    known = {entry.backend.name for entry in registry.entries}
    for name in names or ():
        if name not in known:
            raise typer.BadParameter(unknown_backend(name), param_hint="--backend")


def check_wish(backend: str | None) -> None:
    """Refuse what asks for no backend that there is: the value of ``--backend`` or, where that is not given, the variable's."""
    wrong = wrong_wish(backend)
    if wrong is not None:
        hint = f"the environment variable {_VARIABLE}" if backend is None else "--backend"
        raise typer.BadParameter(wrong, param_hint=hint)


def wrong_wish(backend: str | None) -> str | None:
    """Why no call whatever could get a backend that is asked for so, or by the environment variable where this is None."""
    asked = (os.environ.get(_VARIABLE) or None) if backend is None else backend
    if asked is None:
        return None
    try:
        wish = parse_wish(asked)
    except ValueError as error:
        return str(error)
    backends = {entry.backend.name: entry.backend for entry in registry.entries}
    reasons = []
    for request in wish.preferred:
        if request.name not in backends:
            reasons.append(unknown_backend(request.name))
            continue
        _, wrong = option_values(backends[request.name], request.options)
        if not wrong:
            return None
        reasons.append(f"{request}: {'; '.join(wrong)}")
    return "\n".join(reasons) or None


def check_autotune() -> None:
    """Refuse a value of the environment variable that a call would stumble over."""
    with bad_value_of(None):
        registry.autotunes  # noqa: B018 - reads it


def as_option(text: str) -> str:
    """What the library says of a call, with the name that a user of the command knows."""
    return text.replace(_BY_ARGUMENT, "--backend")


def parse_device(name: str | None) -> torch.device:
    """The device of that name, there or not; the default where no name is given."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise typer.BadParameter(str(error).splitlines()[0], param_hint="--device") from None


def check_device(device: torch.device) -> None:
    """Refuse a device that no tensor can be put on."""
    missing = why_unusable(device)
    if missing is not None:
        raise typer.BadParameter(f"cannot put tensors on {str(device)!r}: {missing}", param_hint="--device")


def output_width(*, err: bool = False) -> int:
    """The columns of the output, or of the errors: as ``COLUMNS`` says, else those of the terminal; ``WIDE`` where it is none."""
    columns = WIDE
    if err and sys.stderr.isatty():  # the output itself may be piped meanwhile
        with suppress(OSError, ValueError):
            columns = os.get_terminal_size(sys.stderr.fileno()).columns or WIDE
    return shutil.get_terminal_size((columns, 24)).columns


def new_console() -> Console:
    """Made anew for each command: it keeps the stream that it finds, and the width of one that is no terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else output_width())


def progress_bar(console: Console) -> Progress:
    """A bar for tasks of so many steps, each with a description; nothing where the console is a file."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[str] = ()) -> None:
    """Print a table whose words are never broken; where the output is too narrow for it, a line for each cell.

    Args:
        headings: of the columns.
        rows: the cells of each row, one for each heading.
        right: the headings of the columns that are set to the right, as numbers are.
    """
    say("\n".join(table_lines(headings, rows, output_width(), right)))


def table_lines(
    headings: Sequence[str], rows: Sequence[Sequence[str]], width: int, right: Collection[str] = ()
) -> list[str]:
    """The lines of :func:`print_table` for an output of ``width`` columns."""
    cells = [[whole(cell) for cell in row] for row in (headings, *rows)]
    columns = list(zip(*cells))
    widths = [max(map(len, column)) for column in columns]
    least = [max(len(word) for cell in column for word in (cell.split() or [""])) for column in columns]
    available = width - GAP * (len(columns) - 1)
    if sum(least) > available:
        return stacked(headings, cells[1:], width)
    while sum(widths) > available:
        place = max((i for i in range(len(widths)) if widths[i] > least[i]), key=widths.__getitem__)
        widths[place] -= 1
    justify = [str.rjust if heading in right else str.ljust for heading in headings]

    def lines(row: Sequence[str]) -> Iterator[str]:
        pieces = [wrapped(cell, width) for cell, width in zip(row, widths)]
        for number in range(max(map(len, pieces))):
            parts = [cell[number] if number < len(cell) else "" for cell in pieces]
            yield (" " * GAP).join(set_(part, width) for set_, part, width in zip(justify, parts, widths)).rstrip()

    rule = (" " * GAP).join("-" * width for width in widths)
    return [*lines(cells[0]), rule, *(line for row in cells[1:] for line in lines(row))]


def stacked(headings: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """The lines of a table that is too wide: a line, or as many as it needs, for each cell, and an empty one between rows."""
    found = []
    for row in rows:
        for heading, cell in zip(headings, row):
            found += wrapped(f"{heading}: {cell}", width, indent="  ")
        found.append("")
    return found[:-1]


def wrapped(text: str, width: int, indent: str = "", first: str = "") -> list[str]:
    """The lines of a text broken between words, the first and the others with these indents."""
    return textwrap.wrap(
        text,
        max(width, 1),
        initial_indent=first,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    ) or [""]


def say(text: str, *, err: bool = False, is_code: bool = False) -> None:
    """Print a text of one line or more; what a terminal would obey, or cannot encode, as escapes.

    A line that is too long for a terminal is broken between words. Elsewhere lines stay whole: they are searched. Those of
    code stay whole everywhere: copied from the terminal, they run.
    """
    stream = sys.stderr if err else sys.stdout
    encoding = stream.encoding or "utf-8"
    lines = [whole(line) for line in text.split("\n")]
    if stream.isatty() and not is_code:
        lines = [part for line in lines for part in _broken(line, output_width(err=err))]
    typer.echo("\n".join(lines).encode(encoding, "backslashreplace").decode(encoding), err=err)


def _broken(line: str, width: int) -> list[str]:
    if len(line) <= width:
        return [line]
    return wrapped(line, width, indent=" " * (len(line) - len(line.lstrip()) + 2))


def whole(line: str) -> str:
    """``line`` with escapes for what cannot be printed, however long it is."""
    return printable(line, sys.maxsize)


def print_json(value: Any) -> None:
    """Print ``value`` as JSON, in ASCII."""
    typer.echo(json.dumps(value, indent=2))


def fail(message: str) -> NoReturn:
    """End the command with a message and exit code 1."""
    say(f"Error: {message}", err=True)
    raise typer.Exit(1)


@contextmanager
def backend_errors() -> Iterator[None]:
    """A refusal is an answer: its message, and exit code 1."""
    try:
        yield
    except BackendError as error:
        fail(as_option(str(error)))


@contextmanager
def bad_value_of(option: str | None) -> Iterator[None]:
    """What cannot be done with an option's value is told as the option's fault."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise typer.BadParameter(reason_of(error), param_hint=option) from None


def reason_of(error: Exception) -> str:
    """What is wrong, for somebody who knows no numbers of errors: with the file, if it is about one."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return str(error)


@contextmanager
def plot_errors() -> Iterator[None]:
    """What keeps ``--plot`` from drawing; that matplotlib is missing is not the option's fault."""
    try:
        with bad_value_of("--plot"):
            yield
    except MissingMatplotlib as error:
        fail(str(error))
