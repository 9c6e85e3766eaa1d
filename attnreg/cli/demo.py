"""``attnreg demo``: what it trains and measures is :mod:`attnreg.demo`."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer

from attnreg.backend import BackendError
from attnreg.cli.shared import (
    BackendOption,
    DeviceOption,
    as_option,
    backend_errors,
    check_autotune,
    check_device,
    check_wish,
    integer,
    new_console,
    parse_device,
    print_table,
    progress_bar,
    reason_of,
    say,
)
from attnreg.demo import LanguageModel, Measurement, evaluate, first_layer, measure, own_text, split, train
from attnreg.measuring.threads import one_thread
from attnreg.problem import dtype_name
from attnreg.window import Window

if TYPE_CHECKING:
    from rich.console import Console

DEMO_WINDOWS = (2, 4, 8, 16, 32, 64, 128, 256, 512)
DEMO_LENGTH = 1024


def demo(
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            metavar="FILE",
            exists=True,
            dir_okay=False,
            readable=True,
            help="Train on this file, of any bytes. Default: attnreg's own README and source.",
        ),
    ] = None,
    backend: BackendOption = None,
    steps: Annotated[int, typer.Option("--steps", parser=integer(1), metavar="STEPS", help="Training steps.")] = 200,
    seed: Annotated[
        int,
        typer.Option(
            "--seed",
            parser=integer(0, 2**63 - 1),
            metavar="SEED",
            help="Of the model and of the order of the data.",
        ),
    ] = 0,
    device: DeviceOption = None,
) -> None:
    """Train a small language model, then try each window.

    The model reads bytes, with a causal window of 32 in each of two layers.
    The losses are in bits per byte (random bytes have 8) and the same for every backend, but for rounding.

    The table gives, for each window, the backend, why it was chosen (`attnreg explain` says more), the time of forward
    and backward, and the errors of the output and of the worst gradient against a dense computation in float64,
    relative to the largest element.
    """
    on = parse_device(device)
    check_device(on)
    check_wish(backend)
    check_autotune()
    try:
        training, held_out = split(own_text() if text is None else text.read_bytes())
    except (ValueError, OSError) as error:
        told = reason_of(error) if isinstance(error, OSError) else f"{text}: {error}"
        raise typer.BadParameter(told, param_hint="--text") from None
    source = "attnreg's own README and source" if text is None else str(text)
    say(f"text: {source}, {len(training)} bytes to train on, {len(held_out)} held out")

    console = new_console()
    with one_thread(), backend_errors():
        model = LanguageModel(backend=backend, seed=seed).to(on)
        before, after, seconds = _train(model, training, held_out, steps, seed, console)
        sequence = torch.cat([training, held_out])[-DEMO_LENGTH:]
        measured = _measure(model, sequence, backend, console)

    say(f"\nIn {steps} steps ({seconds:.0f} s) the held-out loss went from {before:.2f} to {after:.2f} bits per byte.")
    if measured:
        used = ", ".join(sorted({each.decision.backend for each in measured}))
        worst = max(max(each.output_error, each.gradient_error) for each in measured)
        say(f"{len(measured)} of {len(DEMO_WINDOWS)} windows ran on {used}, at most {worst:.0e} off float64.")
    else:
        say("None of the windows that were to be measured could be run.")


def _train(
    model: LanguageModel,
    training: torch.Tensor,
    held_out: torch.Tensor,
    steps: int,
    seed: int,
    console: Console,
) -> tuple[float, float, float]:
    """Train and report; the held-out loss before and after, and the seconds it took."""
    start = time.perf_counter()
    before = after = evaluate(model, held_out)
    console.print("\n steps   train   held out   (bits per byte)", highlight=False)
    console.print(f"{0:6d}       -   {before:8.4f}", highlight=False)
    interval = max(steps // 8, 1)
    recent: list[float] = []
    with progress_bar(console) as progress:
        bar = progress.add_task("training", total=steps)
        for step, loss in enumerate(train(model, training, steps=steps, seed=seed), start=1):
            recent.append(loss)
            progress.advance(bar)
            if step % interval == 0 or step == steps:
                after = evaluate(model, held_out)
                mean = sum(recent) / len(recent)
                progress.console.print(f"{step:6d}   {mean:5.4f}   {after:7.4f}", highlight=False)
                recent.clear()
    return before, after, time.perf_counter() - start


def _measure(model: LanguageModel, sequence: torch.Tensor, backend: str | None, console: Console) -> list[Measurement]:
    """Measure every window on the trained model's own query, key and value, and print the table."""
    query, key, value = first_layer(model, sequence)
    rows: list[tuple[str, ...]] = []
    measured, refused = [], []
    with console.status("measuring"):
        for size in DEMO_WINDOWS:
            try:
                result = measure(query, key, value, Window.causal(size), backend=backend)
            except BackendError as error:
                rows.append((str(size), "-", "refused, see below", "-", "-", "-"))
                refused.append(as_option(str(error)))
                continue
            measured.append(result)
            rows.append(
                (
                    str(size),
                    result.decision.backend,
                    re.split(r"\W", result.decision.reason)[0],
                    f"{result.seconds * 1e3:.2f} ms",
                    f"{result.output_error:.1e}",
                    f"{result.gradient_error:.1e}",
                )
            )
    batch, heads, length, head_dim = query.shape
    where = "one CPU thread" if query.device.type == "cpu" else str(query.device)
    say(
        f"\nEach causal window, forward and backward, on the trained model's query, key and value:\n"
        f"N={batch} H={heads} L={length} E={head_dim}, {dtype_name(query.dtype)}, {where}; "
        f"errors against float64\n"
    )
    headings = ("window", "backend", "why", "time", "error", "gradient error")
    print_table(headings, rows, right=("window", "time", "error", "gradient error"))
    for message in refused:
        say(message)
    return measured
