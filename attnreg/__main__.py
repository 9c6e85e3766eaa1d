"""``python -m attnreg``: the command ``attnreg``."""

from attnreg.cli import app

app(prog_name="attnreg")
