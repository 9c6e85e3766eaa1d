"""``attnreg conform``: a backend run through the properties of :mod:`attnreg.testing`."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attnreg.cli.shared import (
    DeviceOption,
    check_device,
    complete_backend,
    completing,
    fail,
    new_console,
    number,
    output_width,
    parse_device,
    progress_bar,
    reason_of,
    say,
    stacked,
    unknown_backend,
    whole,
    wrapped,
)
from attnreg.request import did_you_mean

# What tests is imported where it is asked for: the other commands do without.
if TYPE_CHECKING:
    from attnreg.testing.conformance import Finding, Report

WIDTH = 80
HEADINGS = ("property", "result", "calls", "s")
# The columns of a row.
ROW = 50


def _known_properties() -> list[str]:
    from attnreg.testing.conformance import chosen_properties

    return sorted(each.name for each in chosen_properties(None))


def conform(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="The backend, with options or without, as in backend=.",
            show_default=False,
            autocompletion=complete_backend,
        ),
    ],
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all that was found to FILE.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A fraction of the cases: seconds instead of minutes.")
    ] = False,
    properties: Annotated[
        list[str] | None,
        typer.Option(
            "--property",
            metavar="NAME",
            help="Only this property; repeatable.",
            autocompletion=completing(_known_properties),
        ),
    ] = None,
    device: DeviceOption = None,
    limit: Annotated[
        float,
        typer.Option(
            "--limit",
            parser=number(1),
            metavar="SECONDS",
            help="A case that takes longer is given up, and breaks its property.",
        ),
    ] = 120.0,
) -> None:
    """Test a backend against the contract.

    Every property that applies to what it declares is tried, in a process of its own. One that is broken is shown with the
    smallest call that breaks it. The exit code is 0 where all hold, 1 where one is broken or nothing could be tried, 2 where
    there is no such backend.
    """
    from attnreg.testing.apart import NoProcess, conform_apart, why_not_apart
    from attnreg.testing.conformance import conform
    from attnreg.testing.subject import UnknownBackend, why_not_here

    on = parse_device(device)
    check_device(on)
    try:
        reason = why_not_here(name, on)
    except UnknownBackend:
        raise typer.BadParameter(unknown_backend(name.partition(":")[0]), param_hint="NAME") from None
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="NAME") from None
    _check_properties(properties)
    if reason is not None:
        fail(f"{name} cannot be tested on {on}: {reason}")
    together = why_not_apart(name)
    run: Callable[..., Report] = partial(conform_apart, limit=limit) if together is None else conform
    if together is not None:
        say("\n".join(_wrapped(f"It is tested in this process: {together}.", "")), err=True)
    console = new_console()
    say(f"{name} on {on}{', quick' if quick else ''}\n")
    if output_width() >= ROW:
        say(_set(HEADINGS))
    with progress_bar(console) as progress:
        bar = progress.add_task("")

        def advance(property_name: str, done: int, total: int) -> None:
            progress.update(bar, description=property_name, completed=done, total=total)

        def tell(finding: Finding) -> None:
            # Through the console, which keeps the bar below; a line a property is all the progress that a pipe gets.
            progress.console.print("\n".join(_row(finding)), markup=False, highlight=False, soft_wrap=True, crop=False)
            console.file.flush()

        try:
            report = run(name, device=on, quick=quick, properties=properties, progress=advance, found=tell)
        except NoProcess as error:
            fail(str(error))
    _print_summary(report)
    if json_file is not None:
        try:
            json_file.write_text(json.dumps(report.as_json(), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            fail(f"--json: {reason_of(error)}")
        say(f"all that was found: {json_file}")
    if not report.conforms:
        raise typer.Exit(1)


def _check_properties(names: list[str] | None) -> None:
    """Refuse a name that is no property's."""
    known = _known_properties()
    for name in names or ():
        if name not in known:
            told = f"no property is called {name!r}{did_you_mean(name, known)}; there are {', '.join(known)}"
            raise typer.BadParameter(told, param_hint="--property")


def _row(finding: Finding) -> list[str]:
    cells = (finding.tested.name, finding.state, str(finding.cases), f"{finding.seconds:.1f}")
    width = output_width()
    lines = [_set(cells)] if width >= ROW else ["", *stacked(HEADINGS, [cells], width)]
    return lines if finding.reason is None else [*lines, *_wrapped(finding.reason, "    ")]


def _set(cells: tuple[str, ...]) -> str:
    tested, state, cases, seconds = cells
    return f"{tested:20}{state:16}{cases:>6}{seconds:>8}"


def _print_summary(report: Report) -> None:
    from attnreg.testing.conformance import BROKEN, DOES_NOT_APPLY, HELD, python_of

    for finding in report.findings:
        minimal = finding.minimal
        if minimal is None:
            continue
        say(f"\n{finding.tested.name}: {finding.tested.says}")
        say("\n".join(_wrapped(f"but {minimal.fault}", "  ")))
        say("  The smallest call that breaks it:\n")
        say("\n".join(f"    {line}".rstrip() for line in python_of(minimal, report.backend)), is_code=True)
    lines = []
    left_out = list(report.left_out().items())
    if left_out:
        lines += ["", "Cases that it refuses, by reason:"]
        for reason, count in left_out:
            lines += _wrapped(f"{count} x {reason}", "  ")
    lines.append("")
    for remark in report.remarks():
        lines += _wrapped(remark, "")
    states = [finding.state for finding in report.findings]
    held, broken, does_not_apply = (states.count(state) for state in (HELD, BROKEN, DOES_NOT_APPLY))
    calls = sum(finding.cases for finding in report.findings)
    lines.append(
        f"{held} {'property' if held == 1 else 'properties'} held, {broken} broken, "
        f"{does_not_apply} {'does' if does_not_apply == 1 else 'do'} not apply; "
        f"{calls} call{'' if calls == 1 else 's'} in {report.seconds:.1f} s"
    )
    say("\n".join(lines))


def _wrapped(text: str, indent: str) -> list[str]:
    return wrapped(whole(text), min(WIDTH, output_width()), indent=f"{indent}  ", first=indent)
