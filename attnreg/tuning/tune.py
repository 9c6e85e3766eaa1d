"""Tuning: every candidate that can run a call is measured, for a grid of calls, and the figures are kept."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch

from attnreg.backend import THIS_PROCESS, Entry, refusals
from attnreg.device import why_unusable
from attnreg.measured import Figure
from attnreg.measuring.sizes import square_problem, with_given
from attnreg.measuring.steadiness import WAITED_FROM, disturbed, usual_copy_seconds
from attnreg.op import ATTENTION, OPS, ROWS
from attnreg.problem import Problem
from attnreg.registry import registry
from attnreg.tables.call import as_measured
from attnreg.tables.environment import Environment, environment
from attnreg.tables.table import Table
from attnreg.tuning.candidate import Measurement, failed, forget_stage, measure_candidate
from attnreg.tuning.worker import Worker, python
from attnreg.tuning.writing import check_writable, hold, save, write
from attnreg.window import Window

# Powers of two and the steps between.
WINDOWS = (2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
HEAD_DIMS = (64, 128)
SAMPLING_SECONDS = 0.06
# What is measured goes into the file this often.
SAVING_SECONDS = 3.0


@dataclass(frozen=True)
class Step:
    """One candidate on one call, measured.

    Attributes:
        problem: the call; with gradients forward and backward were measured together, otherwise the forward alone.
        backend: the candidate's name.
        figure: what was found.
        copy_seconds: what a copy took right after; longer than after others where something else used the device. None where
            there is no time.
        done: how many steps are done.
        total: how many steps there are.
        waited: for what part of the time threads waited for a core, or None; see ``attnreg.tuning.candidate``.
    """

    problem: Problem
    backend: str
    figure: Figure
    copy_seconds: float | None
    done: int
    total: int
    waited: float | None = None


@dataclass(frozen=True)
class Tuned:
    """What a tuning found.

    Attributes:
        table: the figures of this tuning alone.
        path: the file that they were merged into; None where nothing was measured, or nothing was to be kept, or could be.
        interrupted: whether it was ended with Ctrl-C: the table then holds what was measured until there.
        disturbed: call and candidate of the figures that were measured while something else used the device, as copies tell.
        fault: why the last writing of the figures failed; they then serve this process alone. None where it did not fail.
        rescued: where the figures could not be written, a file that holds them, for ``attnreg tune --import``; else None.
    """

    table: Table
    path: Path | None
    interrupted: bool = False
    disturbed: tuple[tuple[Problem, str], ...] = ()
    fault: str | None = None
    rescued: Path | None = None


def tune(
    *,
    ops: Sequence[str] = OPS,
    dtypes: Sequence[torch.dtype] | None = None,
    head_dims: Sequence[int] = HEAD_DIMS,
    lengths: Sequence[int] | None = None,
    batch: int = 1,
    heads: Sequence[tuple[int, int]] | None = None,
    windows: Sequence[int] = WINDOWS,
    gradients: Sequence[bool] = (False, True),
    given: Sequence[Sequence[str]] = ((),),
    backends: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    seconds: float = SAMPLING_SECONDS,
    keep: bool = True,
    progress: Callable[[Step], object] | None = None,
) -> Tuned:
    """Measure every candidate on a grid of calls, and remember the figures: the dispatcher chooses by them from then on.

    A candidate runs in a child process, so that one that raises, runs out of memory, spoils its device, dies or hangs costs
    only itself; it is recorded with its reason. Backends that were registered in this process alone run in it. A result
    is compared with float64 first, and a wrong one gets no time. What seems to have been measured while something else used
    the device is measured once more, and named where that does not help. Figures are saved every few seconds, and at the
    end, also after an error or Ctrl-C. Where they cannot be saved, they serve this process, and a temporary file holds them.
    Candidates are measured with this process' number of threads and precision of float32 products, and the table records both.

    Args:
        ops: which ops.
        dtypes: of the tensors; None for float32 and bfloat16, and float16 on a GPU.
        head_dims: E = D.
        lengths: Lq = Lk; None for 4096 on a GPU, 1024 on a CPU.
        batch: the batch size, N
        heads: pairs (H, Hkv); None for (64, 64) on a GPU, (8, 8) on a CPU.
        windows: sizes W; ``Window.causal`` for attention, ``Window.centered`` for the two products. Those larger than twice a
            length are left out.
        gradients: False for the forward alone, True for forward and backward together.
        given: for each class of calls the names of the optional arguments that they give, such as ``["bias"]``, or of incoming
            gradients of results but the first, such as ``["grad_log_sum_exp"]``; none of them by default. Ops that do not have
            all of them are left out, and so is the forward alone with an incoming gradient.
        backends: the candidates' names; None for all that can run.
        device: where; None for a GPU if there is one.
        seconds: about how long to sample each candidate.
        keep: whether the figures go into the user's table.
        progress: called after each candidate.

    Returns:
        The figures, and where they are kept. Ctrl-C ends the tuning, not the program.

    Raises:
        ValueError: an argument is bad, or no backend has such a name.
        OSError: the table cannot be written; nothing is measured then.
        NoPython: no process can be started to measure in, as in a frozen program.
    """
    on = _device(device)
    on_gpu = on.type == "cuda"
    problems = grid(
        device=on,
        ops=ops,
        dtypes=dtypes
        if dtypes is not None
        else ((torch.float32, torch.bfloat16, torch.float16) if on_gpu else (torch.float32, torch.bfloat16)),
        head_dims=head_dims,
        lengths=lengths if lengths is not None else ((4096,) if on_gpu else (1024,)),
        batch=batch,
        heads=heads if heads is not None else (((64, 64),) if on_gpu else ((8, 8),)),
        windows=windows,
        gradients=gradients,
        given=given,
    )
    here = environment(on, registry.entries)
    if keep:
        check_writable(here)
    usual = _usual_copy_seconds(on, here)
    steps: list[Step] = []
    interrupted = False

    def found() -> Table:
        marks = disturbed([step.copy_seconds for step in steps], usual)
        rows: dict[Problem, dict[str, Figure]] = {}
        for step, mark in zip(steps, marks):
            figure = replace(step.figure, disturbed=True) if mark else step.figure
            rows.setdefault(as_measured(step.problem), {})[step.backend] = figure
        copies = [step.copy_seconds for step in steps if step.copy_seconds is not None]
        return Table(here, rows, min(copies, default=None))

    path, last = None, time.monotonic()
    try:
        for step in measure_all(problems, seconds=seconds, backends=backends, usual=usual):
            steps.append(step)
            if keep and time.monotonic() > last + SAVING_SECONDS:
                # What is in the way now may be gone at the end.
                with suppress(OSError):
                    path = save(found(), seconds=0)
                last = time.monotonic()
            if progress is not None:
                progress(step)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        table, fault, rescued = found(), None, None
        if keep and table.rows:
            path, fault, rescued = _keep(table)
    named = tuple((call, name) for call, row in table.rows.items() for name, each in row.items() if each.disturbed)
    return Tuned(table, path, interrupted, named, fault, rescued)


def _keep(table: Table) -> tuple[Path | None, str | None, Path | None]:
    """Save a table. Where it cannot be, it serves this process, and lies among the temporary files, if there is room."""
    try:
        return save(table), None, None
    except OSError as error:
        fault = error.strerror or str(error)
    hold(table)
    rescued: Path | None = None
    try:
        # Of a name that nobody can have foreseen: in a folder of everybody's, a link may lie where one was.
        handle, name = tempfile.mkstemp(prefix="attnreg-", suffix=f"-{table.environment.file_name}")
        os.close(handle)
        rescued = Path(name)
        write(table, rescued)
    except OSError:
        if rescued is not None:
            rescued.unlink(missing_ok=True)
        return None, fault, None
    return None, fault, rescued


def _usual_copy_seconds(device: torch.device, here: Environment) -> float | None:
    """What a copy is known to take at most where nothing else uses the device, from tables of it or from its memory's clock."""
    stored, _ = registry.tables.stored(here, of_float32=False)
    known = [each.table.copy_seconds for each in stored if each.table.environment.device == here.device]
    usual = usual_copy_seconds(device)
    # A table in which a copy takes less than memory of that clock needs for it says nothing.
    least = 0.0 if usual is None else usual / 2
    return min((seconds for seconds in (usual, *known) if seconds is not None and seconds >= least), default=None)


def grid(
    *,
    device: torch.device,
    ops: Sequence[str],
    dtypes: Sequence[torch.dtype],
    head_dims: Sequence[int],
    lengths: Sequence[int],
    batch: int,
    heads: Sequence[tuple[int, int]],
    windows: Sequence[int],
    gradients: Sequence[bool],
    given: Sequence[Sequence[str]] = ((),),
) -> list[Problem]:
    """The calls of a tuning.

    Raises:
        ValueError: an argument is bad.
    """
    for name, each in (
        ("ops", ops),
        ("dtypes", dtypes),
        ("head_dims", head_dims),
        ("lengths", lengths),
        ("heads", heads),
        ("windows", windows),
        ("given", given),
    ):
        if not each:
            raise ValueError(f"tune: {name} is empty")
    for dtype in dtypes:
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"tune: dtypes must be floating-point dtypes of torch; got {dtype!r}")
    for op in ops:
        if op not in OPS:
            raise ValueError(f"tune: ops must be of {', '.join(OPS)}; got {op!r}")
    for name, sizes in (("head_dims", head_dims), ("lengths", lengths), ("windows", windows), ("batch", (batch,))):
        if not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError(f"tune: {name} must be whole numbers of at least 1; got {sizes!r}")
    for query_heads, kv_heads in heads:
        if kv_heads < 1 or query_heads < 1 or query_heads % kv_heads:
            raise ValueError(f"tune: heads must be pairs (H, Hkv), H a multiple of Hkv; got {(query_heads, kv_heads)}")
    if not gradients or not all(isinstance(each, bool) for each in gradients):
        raise ValueError(f"tune: gradients must be one or both of False and True; got {gradients!r}")
    return [
        with_given(
            square_problem(
                op,
                device,
                dtype,
                (batch, query_heads, kv_heads, length, head_dim),
                Window.causal(size) if op == ATTENTION.name else Window.centered(size),
                needs_grad=needs_grad,
            ),
            names,
        )
        for op, names, dtype, head_dim, length, (query_heads, kv_heads), size, needs_grad in product(
            ops, _checked_names(given, ops), dtypes, head_dims, lengths, heads, windows, gradients
        )
        if size <= 2 * length and _has_all(op, names, needs_grad)
    ]


def _checked_names(given: Sequence[Sequence[str]], ops: Sequence[str]) -> Sequence[Sequence[str]]:
    """``given``; a ValueError where it is no sequence of names, or no op has all of one."""
    for names in given:
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"tune: given must be sequences of arguments' names; got {names!r}")
        if not any(_has_all(op, names, True) for op in ops):
            known = sorted({name for op in ops for name in ROWS[op].optional})
            raise ValueError(
                f"tune: none of {', '.join(ops)} has {', '.join(names)}; their arguments are {', '.join(known)}"
            )
    return given


def _has_all(op: str, names: Sequence[str], needs_grad: bool) -> bool:
    """Whether an op has all of these, and a call with or without gradients may give them."""
    row = ROWS[op]
    return row.optional.issuperset(names) and (needs_grad or not any(each.name in names for each in row.incoming))


def _device(given: torch.device | str | None) -> torch.device:
    if given is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    missing = why_unusable(given)
    if missing is not None:
        raise ValueError(f"tune: device {str(given)!r} is not to be had: {missing}")
    return torch.device(given)


def measure_all(
    problems: Sequence[Problem],
    *,
    seconds: float,
    backends: Sequence[str] | None = None,
    usual: float | None = None,
) -> Iterator[Step]:
    """Measure every candidate on every call; one step for each.

    What was disturbed is measured once more; ``usual`` is what a copy is known to take where nothing else uses the device.

    Raises:
        ValueError: no backend has a name of ``backends``.
        NoPython: no process can be started to measure in.
    """
    entries = {entry.backend.name: entry for entry in registry.entries}
    for name in backends or ():
        if name not in entries:
            raise ValueError(f"no backend is called {name!r}; registered: {', '.join(sorted(entries))}")
    chosen = [entries[name] for name in (entries if backends is None else backends)]
    plan = [(problem, entry) for problem in problems for entry in chosen if not refusals(entry.backend, problem)]
    if any(not _is_local(entry) for _, entry in plan):
        python()
    unusable: str | None = None
    with ExitStack() as stack:
        worker = stack.enter_context(Worker())
        stack.callback(forget_stage)

        def measure_once(problem: Problem, entry: Entry) -> Measurement:
            nonlocal unusable
            name = entry.backend.name
            if not _is_local(entry):
                return worker.measure(problem, name, seconds)
            if unusable is not None:
                return failed(f"not run: {unusable}", passing=True)
            found = measure_candidate(problem, name, seconds)
            fault = why_unusable(problem.device) if found.figure.reason is not None else None
            unusable = None if fault is None else f"{name} left the device unusable in this process ({fault})"
            return found

        copies: list[float | None] = []

        def is_disturbed(found: Measurement) -> bool:
            return disturbed((*copies, found.copy_seconds), usual)[-1] or (found.waited or 0.0) >= WAITED_FROM

        for done, (problem, entry) in enumerate(plan, start=1):
            found = measure_once(problem, entry)
            if is_disturbed(found):
                again = measure_once(problem, entry)
                found = min(found, again, key=lambda each: (each.copy_seconds or math.inf, each.waited or 0.0))
            figure = replace(found.figure, disturbed=is_disturbed(found))
            copies.append(found.copy_seconds)
            yield Step(problem, entry.backend.name, figure, found.copy_seconds, done, len(plan), found.waited)


def _is_local(entry: Entry) -> bool:
    """Whether a backend was registered in this process alone: a child would not find it."""
    return entry.distribution == THIS_PROCESS
