"""``attnreg explain``."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any

import torch
import typer

from attnreg.cli.shared import (
    ALL_OPS,
    GIVEN,
    BackendOption,
    DeviceOption,
    JsonOption,
    as_option,
    backend_errors,
    bad_value_of,
    check_op,
    check_wish,
    complete_dtype,
    complete_given,
    complete_op,
    integer,
    parse_device,
    parse_dtype,
    parse_given,
    parse_integers,
    print_json,
    say,
)
from attnreg.device import why_unusable
from attnreg.dispatch import Candidate, Decision
from attnreg.measuring.sizes import with_given
from attnreg.op import ROWS
from attnreg.plan import explain_problem
from attnreg.problem import Problem, check, problem_of
from attnreg.tables.call import call_to_json
from attnreg.window import Window

# A window reaches so far at most; torch counts in 64 bits.
LARGEST = 2**62 - 1


def explain(
    op: Annotated[
        str, typer.Option("--op", metavar="OP", help=f"One of {ALL_OPS}.", autocompletion=complete_op)
    ] = "local_attention",
    shape: Annotated[
        str, typer.Option("--shape", metavar="N,H,LQ,E", help="Query: batch, heads, length, head_dim.")
    ] = "1,8,4096,64",
    kv_heads: Annotated[
        int | None,
        typer.Option("--kv-heads", parser=integer(1), metavar="HKV", help="Heads of key and value. Default: H."),
    ] = None,
    key_length: Annotated[
        int | None,
        typer.Option("--key-length", parser=integer(0), metavar="LK", help="Length of key and value. Default: LQ."),
    ] = None,
    value_dim: Annotated[
        int | None,
        typer.Option("--value-dim", parser=integer(0), metavar="D", help="Last dimension of value. Default: E."),
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
        typer.Option(
            "--causal",
            parser=integer(1, LARGEST),
            metavar="SIZE",
            help="Window of SIZE keys, the query's own last. Default: 64.",
        ),
    ] = None,
    centered: Annotated[
        int | None,
        typer.Option(
            "--centered", parser=integer(1, LARGEST), metavar="SIZE", help="Window of SIZE keys around the query."
        ),
    ] = None,
    window: Annotated[
        str | None,
        typer.Option("--window", metavar="LEFT,RIGHT", help="Window by its reach before and after the query."),
    ] = None,
    bias: Annotated[bool, typer.Option("--bias/--no-bias", help="With a bias of shape (H, 1, W).")] = False,
    key_lengths: Annotated[bool, typer.Option("--key-lengths/--no-key-lengths", help="With key lengths.")] = False,
    with_: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="NAME,...",
            help=f"With these optional arguments, or incoming gradients; repeatable. Of {', '.join(GIVEN)}.",
            autocompletion=complete_given,
        ),
    ] = None,
    grad: Annotated[bool, typer.Option("--grad/--no-grad", help="Gradients are needed.")] = True,
    device: DeviceOption = None,
    backend: BackendOption = None,
    json: JsonOption = False,
) -> None:
    """Tell which backend a call would get, and why.

    Every other backend is listed with the reasons to refuse it. Nothing is run, and no tensor of that size is made.
    """
    check_op(op)
    check_wish(backend)
    on = parse_device(device)
    query = parse_integers(shape, "--shape", ("N", "H", "LQ", "E"))
    if kv_heads is not None and query[1] % kv_heads:
        raise typer.BadParameter(
            f"the heads of the query, H of --shape, must be a multiple of those of key and value; got H={query[1]}, "
            f"HKV={kv_heads}",
            param_hint="--kv-heads",
        )
    problem = _describe(
        op=op,
        query=query,
        kv_heads=kv_heads,
        key_length=key_length,
        value_dim=value_dim,
        dtype=parse_dtype(dtype),
        window=_window(causal, centered, window),
        given={
            **({"bias": "--bias"} if bias else {}),
            **({"key_lengths": "--key-lengths"} if key_lengths else {}),
            **{name: "--with" for each in with_ or () for name in parse_given(each)},
        },
        grad=grad,
    )
    with backend_errors(), _no_log():
        decision = _as_option(explain_problem(replace(problem, device=on), backend))
    if json:
        print_json(_to_json(decision))
    else:
        say(str(decision))
    missing = why_unusable(on)
    if missing is not None:
        say(f"note: this machine has no device {str(on)!r} to put tensors on: {missing}", err=True)


@contextmanager
def _no_log() -> Iterator[None]:
    """Without warnings of what keeps a table from being used: the decision says it, too."""
    logger, nowhere = logging.getLogger("attnreg"), logging.NullHandler()
    logger.addHandler(nowhere)
    try:
        yield
    finally:
        logger.removeHandler(nowhere)


def _as_option(decision: Decision) -> Decision:
    candidates = [replace(each, refusals=tuple(map(as_option, each.refusals))) for each in decision.candidates]
    return replace(
        decision,
        reason=as_option(decision.reason),
        candidates=tuple(candidates),
        remarks=tuple(map(as_option, decision.remarks)),
    )


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
    if window is not None:
        with bad_value_of("--window"):
            return Window(*parse_integers(window, "--window", ("LEFT", "RIGHT")))
    if centered is not None:
        return Window.centered(centered)
    return Window.causal(64 if causal is None else causal)


def _describe(
    *,
    op: str,
    query: tuple[int, ...],
    kv_heads: int | None,
    key_length: int | None,
    value_dim: int | None,
    dtype: torch.dtype,
    window: Window,
    given: Mapping[str, str],
    grad: bool,
) -> Problem:
    """The problem of a call with these shapes. The op's own checks are made, on tensors that have no memory.

    ``given`` says of each optional argument that the call gives which option of the command said so.
    """
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
    for name, option in given.items():
        if name not in row.optional:
            raise typer.BadParameter(f"{op} takes no {name}", param_hint=option)
    try:
        if max(sizes.values()) >= 2**63:
            raise RuntimeError
        tensors = [tensor(dtype, *(sizes[letter] for letter in dims)) for dims in row.tensors.values()]
        # A number decides nothing, whichever it is.
        arguments = [1.0 if argument.required else None for argument in row.arguments]
        check(row, tensors, window, arguments)
        problem = problem_of(row, tensors, window, arguments, needs_grad=grad)
    except RuntimeError:  # torch's own, of tensors that are too large
        told = ", ".join(f"{letter}={size}" for letter, size in sizes.items())
        raise typer.BadParameter(f"expected tensors of less than 2**63 bytes; got sizes {told}") from None
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--shape") from None
    with bad_value_of("--with"):
        return with_given(problem, given)
