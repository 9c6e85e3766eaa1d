"""``attnreg conform``: a backend run through the properties of :mod:`attnreg.testing`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attnreg.cli.shared import (
    DeviceOption,
    check_device,
    fail,
    new_console,
    parse_device,
    progress_bar,
    say,
    whole,
    wrapped,
)

# What tests is imported where it is asked for: the other commands do without.
if TYPE_CHECKING:
    from attnreg.testing.conformance import Finding, Report

WIDTH = 80


def conform(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="The backend, with options or without, as in backend=.", show_default=False
        ),
    ],
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all that was found to FILE.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A fraction of the cases: seconds instead of minutes.")
    ] = False,
    properties: Annotated[
        list[str] | None, typer.Option("--property", metavar="NAME", help="Only this property; repeatable.")
    ] = None,
    device: DeviceOption = None,
) -> None:
    """Prove a backend: try every property of the contract that applies to what it declares.

    A property that is broken is shown with the smallest call that breaks it. The exit code is 0 where all hold, 1 where one
    is broken or nothing could be tried, 2 where there is no such backend.
    """
    from attnreg.testing.conformance import chosen_properties, conform
    from attnreg.testing.subject import UnknownBackend, why_not_here

    on = parse_device(device)
    check_device(on)
    try:
        reason = why_not_here(name, on)
        chosen_properties(properties)
    except UnknownBackend as error:
        raise typer.BadParameter(str(error), param_hint="NAME") from None
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if reason is not None:
        fail(f"{name} cannot be tested on {on}: {reason}")
    console = new_console()
    say(f"{name} on {on}{', quick' if quick else ''}\n\n{'property':20}{'result':16}{'calls':>6}{'s':>8}")
    with progress_bar(console) as progress:
        bar = progress.add_task("")

        def advance(property_name: str, done: int, total: int) -> None:
            progress.update(bar, description=property_name, completed=done, total=total)

        def tell(finding: Finding) -> None:
            # Through the console, which keeps the bar below; a line a property is all the progress that a pipe gets.
            progress.console.print("\n".join(_row(finding)), markup=False, highlight=False, soft_wrap=True, crop=False)
            console.file.flush()

        report = conform(name, device=on, quick=quick, properties=properties, progress=advance, found=tell)
    say("\n".join(_summary(report)))
    if json_file is not None:
        try:
            json_file.write_text(json.dumps(report.as_json(), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            fail(f"--json: {error}")
        say(f"all that was found: {json_file}")
    if not report.conforms:
        raise typer.Exit(1)


def _row(finding: Finding) -> list[str]:
    line = f"{finding.tested.name:20}{finding.state:16}{finding.cases:>6}{finding.seconds:>8.1f}"
    return [line] if finding.reason is None else [line, *_wrapped(finding.reason, "    ")]


def _summary(report: Report) -> list[str]:
    from attnreg.testing.conformance import BROKEN, DOES_NOT_APPLY, HELD, python_of

    lines = []
    for finding in report.findings:
        minimal = finding.minimal
        if minimal is None:
            continue
        lines += ["", f"{finding.tested.name}: {finding.tested.says}"]
        lines += _wrapped(f"but {minimal.fault}", "  ")
        lines += ["  The smallest call that breaks it:", ""]
        lines += [f"    {line}".rstrip() for line in python_of(minimal, report.backend)]
    left_out = list(report.left_out().items())
    if left_out:
        lines += ["", "Cases that it refuses, by reason:"]
        for reason, count in left_out:
            lines += _wrapped(f"{count} x {reason}", "  ")
    lines.append("")
    for remark in report.remarks():
        lines += _wrapped(remark, "")
    states = [finding.state for finding in report.findings]
    lines.append(
        f"{states.count(HELD)} properties held, {states.count(BROKEN)} broken, "
        f"{states.count(DOES_NOT_APPLY)} do not apply; "
        f"{sum(finding.cases for finding in report.findings)} calls in {report.seconds:.1f} s"
    )
    return lines


def _wrapped(text: str, indent: str) -> list[str]:
    return wrapped(whole(text), WIDTH, indent=f"{indent}  ", first=indent)
