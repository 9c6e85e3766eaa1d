"""Commands that installed distributions add to ``attnreg``: each an entry point of the group ``attnreg.commands``.

Its name is the command's, its object a function whose parameters typer reads. Nothing of it is imported before an added
command is run or all are listed; one that cannot be used says why, and costs only itself.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

import typer
from typer.core import TyperGroup

from attnreg.cli.shared import fail
from attnreg.entry_points import entry_points

GROUP = "attnreg.commands"


class Commands(TyperGroup):
    """Attnreg's own commands, then the added ones. The classes that are ``Any`` here differ between versions of typer."""

    _complete = False

    def list_commands(self, ctx: Any) -> list[str]:
        """The names, in the order of the help."""
        self._add()
        return super().list_commands(ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name; None where there is none."""
        if cmd_name not in self.commands:
            self._add()
        return super().get_command(ctx, cmd_name)

    def _add(self) -> None:
        if self._complete:
            return
        self._complete = True
        for entry_point, distribution in entry_points(GROUP):
            name = f"{entry_point.name} ({distribution})"
            if entry_point.name in self.commands:
                self.commands[name] = _unusable(name, "its name is taken")
            else:
                self.commands[entry_point.name] = _load(entry_point, name)


def _load(entry_point: EntryPoint, name: str) -> Any:
    try:
        function = entry_point.load()
        if not callable(function):
            raise TypeError(f"a command must be a function, {entry_point.value} is {type(function).__name__}")
        return _command(entry_point.name, function)
    # Whatever a stranger's module does when it is imported, or its function's parameters do when typer reads them.
    except (Exception, SystemExit) as error:
        return _unusable(name, f"{type(error).__name__}: {error}")


def _unusable(name: str, reason: str) -> Any:
    told = f"cannot be used: {reason}"

    def refuse() -> None:
        fail(f"the command {name} {told}")

    # Whatever options it is called with: they are those of the command that is not there.
    anything = {"ignore_unknown_options": True, "allow_extra_args": True}
    # The short help as well: typer cuts off one that it makes of the help.
    return _command(name, refuse, help=told, short_help=told, context_settings=anything)


def _command(name: str, function: Any, **settings: Any) -> Any:
    alone = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)
    alone.command(name, **settings)(function)
    return typer.main.get_command(alone)
