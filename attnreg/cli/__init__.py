"""The command ``attnreg``: which backends there are, which one a call would get, a demo, tuning, and a benchmark.

Only the command imports this module, so that ``import attnreg`` needs neither typer nor rich.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from attnreg import demo as demonstration
from attnreg.backend import BackendError
from attnreg.device import why_missing
from attnreg.drawing import MissingMatplotlib, check_picture
from attnreg.inspection import BackendStatus
from attnreg.inspection import backends as backend_statuses
from attnreg.plan import explain_problem
from attnreg.problem import OPS, Problem, attention_problem, dot_product_problem, dtype_name, weighted_average_problem
from attnreg.window import Window

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DEMO_WINDOWS = (2, 4, 8, 16, 32, 64, 128, 256, 512)
DEMO_LENGTH = 1024

# Plain help and errors: in rich's boxes a long message is broken up, and nobody can search for it.
app = typer.Typer(
    name="attnreg",
    help="Local (sliding-window) attention in PyTorch: the fastest correct kernel on this machine.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)

DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device", metavar="DEVICE", help="As torch names it: cpu, cuda, cuda:1. Default: cuda where there is one."
    ),
]
BackendOption = Annotated[
    str | None,
    typer.Option(
        "--backend", metavar="NAME", help="Force this backend. Default: that of ATTNREG_BACKEND, else attnreg chooses."
    ),
]


@app.command()
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
        table.add_row(*map(Text, _backend_row(status)))
    console = _console()
    if statuses:
        console.print(table)
        typer.echo(f"ops: all = {', '.join(OPS)}\n")
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


@app.command()
def explain(
    op: Annotated[str, typer.Option("--op", metavar="OP", help=f"One of {', '.join(OPS)}.")] = "local_attention",
    shape: Annotated[
        str, typer.Option("--shape", metavar="N,H,LQ,E", help="Query: batch, heads, length, head_dim.")
    ] = "1,8,4096,64",
    kv_heads: Annotated[
        int | None, typer.Option("--kv-heads", min=1, help="Heads of key and value. Default: H.")
    ] = None,
    key_length: Annotated[
        int | None, typer.Option("--key-length", min=0, help="Length of key and value. Default: LQ.")
    ] = None,
    value_dim: Annotated[
        int | None, typer.Option("--value-dim", min=0, help="Last dimension of value. Default: E.")
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="DTYPE", help="float32, float16, bfloat16 or float64.")
    ] = "float32",
    causal: Annotated[
        int | None,
        typer.Option("--causal", metavar="SIZE", help="Window of SIZE keys, the query's own last. Default: 64."),
    ] = None,
    centered: Annotated[
        int | None, typer.Option("--centered", metavar="SIZE", help="Window of SIZE keys around the query.")
    ] = None,
    window: Annotated[
        str | None,
        typer.Option("--window", metavar="LEFT,RIGHT", help="Window by its reach before and after the query."),
    ] = None,
    bias: Annotated[bool, typer.Option("--bias/--no-bias", help="With a bias of shape (H, 1, W).")] = False,
    key_lengths: Annotated[bool, typer.Option("--key-lengths/--no-key-lengths", help="With key lengths.")] = False,
    grad: Annotated[bool, typer.Option("--grad/--no-grad", help="Gradients are needed.")] = True,
    device: DeviceOption = None,
    backend: BackendOption = None,
) -> None:
    """Tell which backend a call would get, and why.

    Every other backend is listed with the reasons to refuse it. Nothing is run, and no tensor of that size is made.
    """
    if op not in OPS:
        raise typer.BadParameter(f"{op!r} is not one of {', '.join(OPS)}", param_hint="--op")
    on = _device(device)
    problem = _describe(
        op=op,
        query=_integers(shape, "--shape", ("N", "H", "LQ", "E")),
        kv_heads=kv_heads,
        key_length=key_length,
        value_dim=value_dim,
        dtype=_dtype(dtype),
        window=_window(causal, centered, window),
        bias=bias,
        key_lengths=key_lengths,
        grad=grad,
    )
    with _backend_errors():
        typer.echo(str(explain_problem(replace(problem, device=on), backend)))
    missing = why_missing(on)
    if missing is not None:
        typer.echo(f"note: this machine has no device {str(on)!r} to put tensors on: {missing}", err=True)


@app.command()
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
    steps: Annotated[int, typer.Option("--steps", min=1, help="Training steps.")] = 200,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=2**63 - 1, help="Of the model and of the order of the data.")
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
    on = _device(device)
    missing = why_missing(on)
    if missing is not None:
        raise typer.BadParameter(f"cannot put tensors on {str(on)!r}: {missing}", param_hint="--device")
    try:
        training, held_out = demonstration.split(demonstration.own_text() if text is None else text.read_bytes())
    except (ValueError, OSError) as error:
        raise typer.BadParameter(f"{text}: {error}", param_hint="--text") from None
    source = "attnreg's own README and source" if text is None else str(text)
    typer.echo(f"text: {source}, {len(training)} bytes to train on, {len(held_out)} held out")

    console = _console()
    with _one_cpu_thread(), _backend_errors():
        model = demonstration.LanguageModel(backend=backend, seed=seed).to(on)
        before, after, seconds = _train(model, training, held_out, steps, seed, console)
        sequence = torch.cat([training, held_out])[-DEMO_LENGTH:]
        measured = _measure(model, sequence, backend, console)

    typer.echo(
        f"\nIn {steps} steps ({seconds:.0f} s) the held-out loss went from {before:.2f} to {after:.2f} bits per byte."
    )
    if measured:
        used = ", ".join(sorted({each.decision.backend for each in measured}))
        worst = max(max(each.output_error, each.gradient_error) for each in measured)
        typer.echo(f"{len(measured)} of {len(DEMO_WINDOWS)} windows ran on {used}, at most {worst:.0e} off float64.")
    else:
        typer.echo("None of the windows that were to be measured could be run.")


@app.command()
def tune(
    op: Annotated[
        list[str] | None, typer.Option("--op", metavar="OP", help=f"Of {', '.join(OPS)}; repeatable. Default: all.")
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option("--dtype", metavar="DTYPE", help="Repeatable. Default: float32, bfloat16, on a GPU float16 too."),
    ] = None,
    head_dim: Annotated[
        list[int] | None, typer.Option("--head-dim", min=1, help="E = D; repeatable. Default: 64, 128.")
    ] = None,
    length: Annotated[
        list[int] | None, typer.Option("--length", min=1, help="Lq = Lk; repeatable. Default: 4096, on a CPU 1024.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="N.")] = 1,
    heads: Annotated[
        list[str] | None,
        typer.Option("--heads", metavar="H[,HKV]", help="Repeatable. Default: 64, on a CPU 8."),
    ] = None,
    window: Annotated[
        list[int] | None,
        typer.Option("--window", min=1, help="W; repeatable. Default: powers of two to 1024 and the steps between."),
    ] = None,
    grad: Annotated[
        bool | None, typer.Option("--grad/--no-grad", help="Only with gradients, or only without. Default: both.")
    ] = None,
    backend: Annotated[
        list[str] | None, typer.Option("--backend", metavar="NAME", help="Only this candidate; repeatable.")
    ] = None,
    device: DeviceOption = None,
    seconds: Annotated[float, typer.Option("--seconds", min=0.001, help="Sample each candidate so long.")] = 0.06,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            help="Measure nothing: draw the user's table, or the calls chosen of it, into this file (.png, ...).",
        ),
    ] = None,
    export: Annotated[
        Path | None, typer.Option("--export", metavar="FILE", help="Measure nothing: write the user's table to FILE.")
    ] = None,
    import_: Annotated[
        Path | None,
        typer.Option("--import", metavar="FILE", help="Measure nothing: merge the table in FILE into the user's."),
    ] = None,
) -> None:
    """Measure the backends on this machine, so that the fastest is chosen from then on.

    Each candidate runs in a child process, is compared with float64 first, and timed with a cold cache. The table lies in
    the user's cache directory (ATTNREG_CACHE_DIR). Ctrl-C keeps what was measured. ATTNREG_TABLE=FILE pins a table instead.
    """
    from attnreg.tuning import command

    on = _device(device)
    if sum(given is not None for given in (plot, export, import_)) > 1:
        raise typer.BadParameter("give only one of --plot, --export and --import")
    given: dict[str, Any] = {
        "ops": op,
        "dtypes": None if dtype is None else [_dtype(each) for each in dtype],
        "head_dims": head_dim,
        "lengths": length,
        "heads": None if heads is None else [_heads(each) for each in heads],
        "windows": window,
        "gradients": None if grad is None else (grad,),
        "backends": backend,
    }
    options = {name: value for name, value in given.items() if value is not None}
    if options and (import_ or export):
        raise typer.BadParameter(
            "--export and --import take whole tables; no choice of calls or backends goes with them"
        )
    if import_ is not None:
        with _bad_value_of("--import"):
            merged, not_used_here = command.import_table(import_)
        typer.echo(f"merged into {merged}")
        for reason in not_used_here:
            typer.echo(f"calls on this machine do not go by it: {reason}")
    elif export is not None:
        with _bad_value_of("--export"):
            command.export_table(on, export)
        typer.echo(f"table: {export}")
    elif plot is not None:
        try:
            with _bad_value_of("--plot"):
                command.plot_table(on, plot, batch=batch, **options)
        except MissingMatplotlib as error:
            _fail(str(error))
        typer.echo(f"plot: {plot}")
    else:
        missing = why_missing(on)
        if missing is not None:
            raise typer.BadParameter(f"cannot put tensors on {str(on)!r}: {missing}", param_hint="--device")
        with _bad_value_of(None):
            command.tune_table(on, batch=batch, seconds=seconds, console=_console(), **options)


@app.command()
def bench(
    workload: Annotated[
        list[str] | None,
        typer.Option(
            "--workload",
            metavar="GLOB",
            help="Only workloads whose name or group fits, such as 'fused-*' or '*/w64'; repeatable. See --list.",
        ),
    ] = None,
    op: Annotated[str | None, typer.Option("--op", metavar="OP", help=f"Only one of {', '.join(OPS)}.")] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            "--backend", metavar="NAME", help="Only this backend; repeatable. Default: all but the slow reference."
        ),
    ] = None,
    direction: Annotated[
        str | None, typer.Option("--direction", metavar="WAY", help="forward or backward. Default: both.")
    ] = None,
    device: DeviceOption = None,
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Other libraries that are installed, too.")] = True,
    repeat: Annotated[
        int, typer.Option("--repeat", min=1, help="Go through everything so many times; medians of all are shown.")
    ] = 1,
    json: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", help="Where the results go. Default: a file named after device and date."
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Draw latency against window into this file (.png, .svg, ...)."),
    ] = None,
    stored: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="Measure nothing: show, and with --plot draw, these results."),
    ] = None,
    only_list: Annotated[bool, typer.Option("--list", help="List the workloads, and measure nothing.")] = False,
) -> None:
    """Measure backends and other libraries against the physical limit.

    In the same run the copy bandwidth and the matmul rate of the device are measured; they give each workload its floor, the time
    that no kernel can beat. Every result is checked first: a wrong one gets no time. Backward is the backward alone.
    """
    # Not before it is asked for: the other commands do without.
    from attnreg_benchmarks import results
    from attnreg_benchmarks.backends import backends as backends_to_measure
    from attnreg_benchmarks.command import benchmark
    from attnreg_benchmarks.peers import PEERS
    from attnreg_benchmarks.plot import plot_results
    from attnreg_benchmarks.report import print_results
    from attnreg_benchmarks.workloads import DIRECTIONS, select

    if op is not None and op not in OPS:
        raise typer.BadParameter(f"{op!r} is not one of {', '.join(OPS)}", param_hint="--op")
    if direction is not None and direction not in DIRECTIONS:
        raise typer.BadParameter(f"{direction!r} is neither forward nor backward", param_hint="--direction")
    directions = DIRECTIONS if direction is None else (direction,)
    if plot is not None:
        try:
            check_picture(plot)
        except MissingMatplotlib as error:
            _fail(str(error))
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--plot") from None

    console = _console()
    if stored is not None:
        with _bad_value_of("--from"):
            found = results.load(stored)
        with _bad_value_of("--workload"):
            found = results.narrow(found, workload or (), op, directions)
        print_results(found, console)
    else:
        on = _device(device)
        with _bad_value_of("--workload"):
            workloads = select(on.type, workload or (), op)
        if only_list:
            for each in workloads:
                typer.echo(f"{each.name:24} {each}")
            return
        missing = why_missing(on)
        if missing is not None:
            raise typer.BadParameter(f"cannot put tensors on {str(on)!r}: {missing}", param_hint="--device")
        with _bad_value_of("--backend"):
            contenders = (*backends_to_measure(backend or ()), *(PEERS if peers else ()))
        found = benchmark(workloads, contenders, directions, on, repeat, console)
        print_results(found, console)
        path = results.default_path(found) if json is None else json
        with _bad_value_of("--json"):
            results.save(found, path)
        typer.echo(f"results: {path}")
    if plot is not None:
        with _bad_value_of("--plot"):
            plot_results(found, plot)
        typer.echo(f"plot: {plot}")


def _train(
    model: demonstration.LanguageModel,
    training: torch.Tensor,
    held_out: torch.Tensor,
    steps: int,
    seed: int,
    console: Console,
) -> tuple[float, float, float]:
    """Train and report; the held-out loss before and after, and the seconds it took."""
    start = time.perf_counter()
    before = after = demonstration.evaluate(model, held_out)
    console.print("\n steps   train   held out   (bits per byte)", highlight=False)
    console.print(f"{0:6d}       -   {before:8.4f}", highlight=False)
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    interval = max(steps // 8, 1)
    recent: list[float] = []
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("training", total=steps)
        for step, loss in enumerate(demonstration.train(model, training, steps=steps, seed=seed), start=1):
            recent.append(loss)
            progress.advance(bar)
            if step % interval == 0 or step == steps:
                after = demonstration.evaluate(model, held_out)
                mean = sum(recent) / len(recent)
                progress.console.print(f"{step:6d}   {mean:5.4f}   {after:7.4f}", highlight=False)
                recent.clear()
    return before, after, time.perf_counter() - start


def _measure(
    model: demonstration.LanguageModel, sequence: torch.Tensor, backend: str | None, console: Console
) -> list[demonstration.Measurement]:
    """Measure every window on the trained model's own query, key and value, and print the table."""
    query, key, value = demonstration.first_layer(model, sequence)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("window", justify="right")
    table.add_column("backend", overflow="fold")
    table.add_column("why", overflow="fold")
    for heading in ("time", "error", "gradient error"):
        table.add_column(heading, justify="right")
    measured, refused = [], []
    with console.status("measuring"):
        for size in DEMO_WINDOWS:
            try:
                result = demonstration.measure(query, key, value, Window.causal(size), backend=backend)
            except BackendError as error:
                table.add_row(str(size), "-", "refused, see below", "-", "-", "-")
                refused.append(str(error))
                continue
            measured.append(result)
            table.add_row(
                str(size),
                Text(result.decision.backend),
                Text(re.split(r"\W", result.decision.reason)[0]),
                f"{result.seconds * 1e3:.2f} ms",
                f"{result.output_error:.1e}",
                f"{result.gradient_error:.1e}",
            )
    batch, heads, length, head_dim = query.shape
    where = "one CPU thread" if query.device.type == "cpu" else str(query.device)
    typer.echo(
        f"\nEach causal window, forward and backward, on the trained model's query, key and value:\n"
        f"N={batch} H={heads} L={length} E={head_dim}, {str(query.dtype).removeprefix('torch.')}, {where}; "
        f"errors against float64"
    )
    console.print(table)
    for message in refused:
        typer.echo(message)
    return measured


def _describe(
    *,
    op: str,
    query: tuple[int, ...],
    kv_heads: int | None,
    key_length: int | None,
    value_dim: int | None,
    dtype: torch.dtype,
    window: Window,
    bias: bool,
    key_lengths: bool,
    grad: bool,
) -> Problem:
    """The problem of a call with these shapes. The op's own checks are made, on tensors that have no memory."""
    batch, heads, query_length, head_dim = query
    key = (batch, heads if kv_heads is None else kv_heads, query_length if key_length is None else key_length, head_dim)
    value = (*key[:3], head_dim if value_dim is None else value_dim)

    def tensor(shape: tuple[int, ...], dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    try:
        lengths = tensor((batch,), torch.int64) if key_lengths else None
        if op == "local_weighted_average":
            if bias:
                raise ValueError("local_weighted_average takes no bias")
            weights = tensor((batch, heads, query_length, window.size))
            return weighted_average_problem(weights, tensor(value), window, key_lengths=lengths, needs_grad=grad)
        table = tensor((heads, 1, window.size)) if bias else None
        if op == "local_dot_product":
            return dot_product_problem(
                tensor(query), tensor(key), window, bias=table, key_lengths=lengths, needs_grad=grad
            )
        return attention_problem(
            tensor(query), tensor(key), tensor(value), window, bias=table, key_lengths=lengths, needs_grad=grad
        )
    # torch's own RuntimeError is about sizes whose product overflows.
    except (TypeError, ValueError, RuntimeError) as error:
        raise typer.BadParameter(str(error)) from None


def _integers(given: str, option: str, names: tuple[str, ...]) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in given.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != len(names) or min(numbers) < 0:
        raise typer.BadParameter(
            f"expected {','.join(names)}, {len(names)} integers of at least 0; got {given!r}", param_hint=option
        )
    return numbers


def _heads(given: str) -> tuple[int, int]:
    names = ("H", "HKV") if "," in given else ("H",)
    numbers = _integers(given, "--heads", names)
    return numbers[0], numbers[-1]


def _dtype(name: str) -> torch.dtype:
    known = {dtype_name(dtype): dtype for dtype in DTYPES}
    if name.removeprefix("torch.") not in known:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(known)}", param_hint="--dtype")
    return known[name.removeprefix("torch.")]


def _window(causal: int | None, centered: int | None, window: str | None) -> Window:
    if sum(given is not None for given in (causal, centered, window)) > 1:
        raise typer.BadParameter("give only one of --causal, --centered and --window")
    try:
        if window is not None:
            return Window(*_integers(window, "--window", ("LEFT", "RIGHT")))
        if centered is not None:
            return Window.centered(centered)
        return Window.causal(64 if causal is None else causal)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise typer.BadParameter(str(error).splitlines()[0], param_hint="--device") from None


def _backend_row(status: BackendStatus) -> tuple[str, ...]:
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


def _console() -> Console:
    """Made anew for each command: it keeps the stream and the width that it finds."""
    return Console()


@contextmanager
def _backend_errors() -> Iterator[None]:
    """A refusal is an answer: its message, and exit code 1."""
    try:
        yield
    except BackendError as error:
        _fail(str(error))


@contextmanager
def _bad_value_of(option: str | None) -> Iterator[None]:
    """What cannot be done with an option's value is told as the option's fault."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def _fail(message: str) -> NoReturn:
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(1)


@contextmanager
def _one_cpu_thread() -> Iterator[None]:
    """One thread: in operations as small as the demo's, several spend their time waiting for each other.

    On a machine that is busy with something else as well, two were measured ten times slower than one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
