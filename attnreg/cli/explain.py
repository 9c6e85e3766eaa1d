"""``attnreg explain``."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import torch
import typer

from attnreg.cli.shared import (
    ALL_OPS,
    BackendOption,
    DeviceOption,
    JsonOption,
    backend_errors,
    check_op,
    complete_dtype,
    complete_op,
    parse_device,
    parse_dtype,
    parse_integers,
    print_json,
    say,
)
from attnreg.device import why_unusable
from attnreg.dispatch import Candidate, Decision
from attnreg.op import ROWS
from attnreg.plan import explain_problem
from attnreg.problem import Problem, check, problem_of
from attnreg.tables.call import call_to_json
from attnreg.window import Window


def explain(
    op: Annotated[
        str, typer.Option("--op", metavar="OP", help=f"One of {ALL_OPS}.", autocompletion=complete_op)
    ] = "local_attention",
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
        str,
        typer.Option(
            "--dtype",
            metavar="DTYPE",
            help="float32, float16, bfloat16 or float64.",
            autocompletion=complete_dtype,
        ),
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
    json: JsonOption = False,
) -> None:
    """Tell which backend a call would get, and why.

    Every other backend is listed with the reasons to refuse it. Nothing is run, and no tensor of that size is made.
    """
    check_op(op)
    on = parse_device(device)
    problem = _describe(
        op=op,
        query=parse_integers(shape, "--shape", ("N", "H", "LQ", "E")),
        kv_heads=kv_heads,
        key_length=key_length,
        value_dim=value_dim,
        dtype=parse_dtype(dtype),
        window=_window(causal, centered, window),
        bias=bias,
        key_lengths=key_lengths,
        grad=grad,
    )
    with backend_errors():
        decision = explain_problem(replace(problem, device=on), backend)
    if json:
        print_json(_to_json(decision))
    else:
        say(str(decision))
    missing = why_unusable(on)
    if missing is not None:
        say(f"note: this machine has no device {str(on)!r} to put tensors on: {missing}", err=True)


def _to_json(decision: Decision) -> dict[str, Any]:
    return {
        "call": {**call_to_json(decision.problem), "device": str(decision.problem.device)},
        "backend": decision.backend,
        "options": dict(decision.options),
        "source": decision.source,
        "reason": decision.reason,
        "candidates": [_candidate_to_json(candidate) for candidate in decision.candidates],
        "faults": [str(fault) for fault in decision.faults],
        "remarks": decision.remarks,
    }


def _candidate_to_json(candidate: Candidate) -> dict[str, Any]:
    figure = candidate.figure
    return {
        "name": candidate.name,
        "distribution": candidate.distribution,
        "rank": candidate.rank,
        "refusals": candidate.refusals,
        "seconds": None if figure is None else figure.seconds,
        "why_not_timed": None if figure is None else figure.reason,
        "measured": None if figure is None else figure.measured,
    }


def _window(causal: int | None, centered: int | None, window: str | None) -> Window:
    if sum(given is not None for given in (causal, centered, window)) > 1:
        raise typer.BadParameter("give only one of --causal, --centered and --window")
    try:
        if window is not None:
            return Window(*parse_integers(window, "--window", ("LEFT", "RIGHT")))
        if centered is not None:
            return Window.centered(centered)
        return Window.causal(64 if causal is None else causal)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


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
    sizes = {
        "N": batch,
        "H": heads,
        "G": heads if kv_heads is None else kv_heads,
        "Q": query_length,
        "K": query_length if key_length is None else key_length,
        "E": head_dim,
        "D": head_dim if value_dim is None else value_dim,
        "W": window.size,
    }

    def tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    row = ROWS[op]
    try:
        tensors = [tensor(dtype, *(sizes[letter] for letter in dims)) for dims in row.tensors.values()]
        # A number decides nothing, whichever it is.
        given: dict[str, object] = {argument.name: 1.0 for argument in row.arguments if argument.required}
        if bias:
            given["bias"] = tensor(dtype, heads, 1, window.size)
        if key_lengths:
            given["key_lengths"] = tensor(torch.int64, batch)
        arguments = [given.pop(argument.name, None) for argument in row.arguments]
        if given:
            raise ValueError(f"{op} takes no {' and no '.join(given)}")
        check(row, tensors, window, arguments)
    # torch's own RuntimeError is about sizes whose product overflows.
    except (TypeError, ValueError, RuntimeError) as error:
        raise typer.BadParameter(str(error)) from None
    return problem_of(row, tensors, window, arguments, needs_grad=grad)
