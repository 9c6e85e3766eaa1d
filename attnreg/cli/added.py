"""Commands that installed distributions add to ``attnreg``: each an entry point of the group ``attnreg.commands``.

Its name is the command's, its object a function whose parameters typer reads. Nothing of it is imported before an added
command is run or all are listed; one that cannot be used says why, and costs only itself.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib.metadata import EntryPoint
from typing import Any

import typer

from attnreg.cli.shared import fail
from attnreg.entry_points import entry_points
from attnreg.printable import trouble

GROUP = "attnreg.commands"


def added_commands(taken: Collection[str]) -> dict[str, Any]:
    """The added commands by name, beside those whose names are ``taken``."""
    found: dict[str, Any] = {}
    for entry_point, distribution in entry_points(GROUP):
        name = f"{entry_point.name} ({distribution})"
        if entry_point.name in taken or entry_point.name in found:
            found[name] = _unusable(name, "its name is taken")
        else:
            found[entry_point.name] = _load(entry_point, name)
    return found


def command_of(name: str, function: Any, **settings: Any) -> Any:
    """The command that calls a function. Its class differs between versions of typer."""
    alone = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)
    alone.command(name, **settings)(function)
    return typer.main.get_command(alone)


def _load(entry_point: EntryPoint, name: str) -> Any:
    try:
        function = entry_point.load()
        if not callable(function):
            raise TypeError(f"a command must be a function, {entry_point.value} is {type(function).__name__}")
        return command_of(entry_point.name, function)
    # Whatever a stranger's module does when it is imported, or its function's parameters do when typer reads them.
    except BaseException as error:
        return _unusable(name, trouble(error))


def _unusable(name: str, reason: str) -> Any:
    told = f"cannot be used: {reason}"

    def refuse() -> None:
        fail(f"the command {name} {told}")

    # Whatever options it is called with: they are those of the command that is not there.
    anything = {"ignore_unknown_options": True, "allow_extra_args": True}
    # The short help as well: typer cuts off one that it makes of the help.
    return command_of(name, refuse, help=told, short_help=told, context_settings=anything)
