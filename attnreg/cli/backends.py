"""``attnreg backends``."""

from __future__ import annotations

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from attnreg.cli.shared import ALL_OPS, new_console
from attnreg.inspection import BackendStatus
from attnreg.inspection import backends as backend_statuses
from attnreg.op import OPS
from attnreg.problem import dtype_name


def backends() -> None:
    """List the backends, and why one cannot run here."""
    statuses = backend_statuses()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(
        "backend", overflow="fold", min_width=min(max((len(each.name) for each in statuses), default=0), 20)
    )
    for heading in ("from", "devices", "dtypes", "ops", "backward", "runs here"):
        table.add_column(heading, overflow="fold")
    for status in statuses:
        table.add_row(*map(Text, _row(status)))
    console = new_console()
    if statuses:
        console.print(table)
        typer.echo(f"ops: all = {ALL_OPS}\n")
    else:
        typer.echo("no backend is registered")
    # Under the table rather than in it: never broken into pieces, whatever the width.
    for status in statuses:
        summary = f": {status.backend.summary}" if status.backend is not None and status.backend.summary else ""
        typer.echo(f"{status.name} ({status.distribution}){summary}")
        if status.backend is not None and status.backend.options:
            names = ", ".join(status.backend.options)
            typer.echo(f"  options, as in {status.name}:{next(iter(status.backend.options))}=...: {names}")
        if status.reason is not None:
            typer.echo(f"  {status.reason}" if status.backend is None else f"  cannot run here: {status.reason}")


def _row(status: BackendStatus) -> tuple[str, ...]:
    if status.backend is None:
        return status.name, status.distribution, "-", "-", "-", "-", "no: broken"
    capability = status.backend.capability

    def listed(ops: tuple[str, ...]) -> str:
        return "all" if ops == OPS else ", ".join(op.removeprefix("local_") for op in ops) or "none"

    return (
        status.name,
        status.distribution,
        "any" if capability.devices is None else ", ".join(sorted(capability.devices)),
        ", ".join(sorted(map(dtype_name, capability.dtypes))),
        listed(status.ops),
        listed(status.backward_ops),
        "yes" if status.runs_here else "no",
    )
