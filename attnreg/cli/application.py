"""The application: attnreg's own commands, in the order of its help, then those that others add.

A command is imported when it is run, or when all are listed.
"""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import typer

from attnreg.cli.added import added_commands, command_of
from attnreg.cli.group import Group, usage_errors
from attnreg.packages import own_version

# By name, the module in ``attnreg.cli`` and what in it is the command: a function, or a typer application of several.
OWN = {
    "backends": ("backends", "backends"),
    "explain": ("explain", "explain"),
    "info": ("info", "info"),
    "demo": ("demo", "demo"),
    "tune": ("tune", "tune"),
    "tables": ("tables", "tables"),
    "new-backend": ("new_backend", "new_backend"),
    "conform": ("conform", "conform"),
    "audit": ("audit", "audit"),
}


class Commands(Group):
    """The commands by name. The classes that are ``Any`` here differ between versions of typer."""

    _complete = False

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """Read what stands before the command."""
        with usage_errors():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        """Read what stands after the command, and run it."""
        with usage_errors():
            return super().invoke(ctx)

    def list_commands(self, ctx: Any) -> list[str]:
        """The names, in the order of the help."""
        self._add_all()
        return [*OWN, *(name for name in self.commands if name not in OWN)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name; None where there is none."""
        if cmd_name in OWN:
            self._add_own(cmd_name)
        else:
            self._add_all()
        return super().get_command(ctx, cmd_name)

    def _add_all(self) -> None:
        if not self._complete:
            self._complete = True
            for name in OWN:
                self._add_own(name)
            self.commands.update(added_commands(OWN))

    def _add_own(self, name: str) -> None:
        if name not in self.commands:
            module, attribute = OWN[name]
            found = getattr(import_module(f"attnreg.cli.{module}"), attribute)
            several = isinstance(found, typer.Typer)
            self.commands[name] = typer.main.get_command(found) if several else command_of(name, found)


# Plain help and errors: in rich's boxes a long message is broken up, and nobody can search for it.
app = typer.Typer(
    name="attnreg",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"attnreg {own_version()}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version, and exit.")
    ] = False,
) -> None:
    """Local (sliding-window) attention in PyTorch: the fastest correct kernel on this machine."""
