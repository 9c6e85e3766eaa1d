"""What the commands share: options and how they are read, what is told where something goes wrong, the console."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, NoReturn

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from attnreg.backend import BackendError
from attnreg.device import why_unusable
from attnreg.drawing import MissingMatplotlib
from attnreg.op import OPS
from attnreg.problem import dtype_name

ALL_OPS = ", ".join(OPS)
DTYPES = {dtype_name(dtype): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)}

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
        help="Ask for this backend. Default: that of ATTNREG_BACKEND, else attnreg chooses.",
    ),
]


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


def new_console() -> Console:
    """Made anew for each command: it keeps the stream and the width that it finds."""
    return Console()


def progress_bar(console: Console) -> Progress:
    """A bar for tasks of so many steps, each with a description; nothing where the console is a file."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def fail(message: str) -> NoReturn:
    """End the command with a message and exit code 1."""
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(1)


@contextmanager
def backend_errors() -> Iterator[None]:
    """A refusal is an answer: its message, and exit code 1."""
    try:
        yield
    except BackendError as error:
        fail(str(error))


@contextmanager
def bad_value_of(option: str | None) -> Iterator[None]:
    """What cannot be done with an option's value is told as the option's fault."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


@contextmanager
def plot_errors() -> Iterator[None]:
    """What keeps ``--plot`` from drawing; that matplotlib is missing is not the option's fault."""
    try:
        with bad_value_of("--plot"):
            yield
    except MissingMatplotlib as error:
        fail(str(error))
