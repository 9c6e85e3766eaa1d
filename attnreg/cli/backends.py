"""``attnreg backends``."""

from __future__ import annotations

from typing import Any

from attnreg.cli.shared import ALL_OPS, JsonOption, print_json, print_table, say, whole
from attnreg.inspection import BackendStatus
from attnreg.inspection import backends as backend_statuses
from attnreg.op import OPS
from attnreg.problem import dtype_name


def backends(json: JsonOption = False) -> None:
    """List the backends, and why one cannot run here."""
    statuses = backend_statuses()
    if json:
        print_json([_to_json(status) for status in statuses])
        return
    if statuses:
        headings = ("backend", "from", "devices", "dtypes", "ops", "backward", "runs here")
        print_table(headings, [_row(status) for status in statuses])
        say(f"\nops: all = {ALL_OPS}\n")
    else:
        say("no backend is registered")
    # Under the table rather than in it: never broken into pieces, whatever the width.
    for status in statuses:
        summary = f": {status.backend.summary}" if status.backend is not None and status.backend.summary else ""
        say(whole(f"{status.name} ({status.distribution}){summary}"))
        if status.backend is not None and status.backend.options:
            names = ", ".join(status.backend.options)
            say(f"  options, as in {status.name}:{next(iter(status.backend.options))}=...: {names}")
        if status.reason is not None:
            told = status.reason if status.backend is None else f"cannot run here: {status.reason}"
            say(f"  {whole(told)}")


def _to_json(status: BackendStatus) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": status.name,
        "distribution": status.distribution,
        "runs_here": status.runs_here,
        "reason": status.reason,
        "ops": status.ops,
        "backward_ops": status.backward_ops,
    }
    if status.backend is not None:
        capability = status.backend.capability
        found |= {
            "summary": status.backend.summary,
            "devices": None if capability.devices is None else sorted(capability.devices),
            "dtypes": sorted(map(dtype_name, capability.dtypes)),
            "takes": {op: sorted(names) for op, names in status.backend.taken.items()},
            "options": list(status.backend.options),
        }
    return found


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
