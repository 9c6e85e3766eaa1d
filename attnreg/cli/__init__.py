"""The command ``attnreg``: which backends there are, which one a call would get, a demo, tuning; a file for each command.

Only the command imports this package, so that ``import attnreg`` needs neither typer nor rich. Other distributions add
commands in the entry-point group ``attnreg.commands``, as attnreg's benchmarks add ``bench``.
"""

from attnreg.cli.application import app

__all__ = ["app"]
