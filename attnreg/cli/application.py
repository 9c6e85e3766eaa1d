"""The application: attnreg's own commands, in the order of its help."""

from __future__ import annotations

import typer

from attnreg.cli.added import Commands
from attnreg.cli.backends import backends
from attnreg.cli.demo import demo
from attnreg.cli.explain import explain
from attnreg.cli.tune import tune

# Plain help and errors: in rich's boxes a long message is broken up, and nobody can search for it.
app = typer.Typer(
    name="attnreg",
    cls=Commands,
    help="Local (sliding-window) attention in PyTorch: the fastest correct kernel on this machine.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for command in (backends, explain, demo, tune):
    app.command()(command)
