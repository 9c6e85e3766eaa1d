"""Properties of a call's surroundings: autocast, torch.compile, settings, threads, derivatives, refusals, CUDA."""

from __future__ import annotations

import io
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnreg.backend import BackendError
from attnreg.memory import strides_like
from attnreg.op import OPS, ROWS
from attnreg.testing.case import Case, make_case
from attnreg.testing.cases import TABLE, cases_named
from attnreg.testing.inputs import Inputs, copy_into
from attnreg.testing.judging import difference, expected, fault_of_outcome
from attnreg.testing.property import REFUSALS, calls, holds, narrow, one, two
from attnreg.testing.subject import DTYPES, Outcome, Subject, outcome_of, with_leaves
from attnreg.testing.surroundings import SETTINGS, as_at_first, changed, left_as_found, other_random_numbers, state
from attnreg.window import Window


def _no_autocast(subject: Subject) -> str | None:
    if torch.float32 not in subject.dtypes or not narrow(subject):
        return "it lacks float32 or a dtype of 16 bits"
    return None


@holds(
    "autocast",
    "under autocast a call is the call with tensors cast by hand",
    lambda subject, quick: calls(
        subject,
        cases_named(
            *("causal", "key_lengths_with_bias"),
            *([] if quick else ["everything", "grouped_heads", "bias_full", "packed_softmax", "all_padded"]),
        ),
        dtypes=[torch.float32],
    ),
    unless=_no_autocast,
)
def autocast(subject: Subject, case: Case) -> str | None:
    """Bit by bit, and nothing more is cast: neither a bias nor gradients that are taken under autocast."""
    device, drawn = subject.device.type, case.draw()
    with left_as_found():
        for dtype in narrow(subject):
            by_hand = replace(
                drawn,
                tensors={name: tensor.to(dtype) for name, tensor in drawn.tensors.items()},
                upstream=drawn.upstream.to(dtype),
            )
            expected = subject.run(case, by_hand)
            with torch.autocast(device, dtype=dtype):
                found = subject.run(case, replace(drawn, upstream=by_hand.upstream))
            if found.output.dtype != dtype:
                return f"output: {found.output.dtype} under autocast to {dtype}"
            cast = {name: gradient.to(found.gradients[name].dtype) for name, gradient in expected.gradients.items()}
            fault = difference(found, replace(expected, gradients=cast))
            if fault is not None:
                return f"{fault} under autocast to {dtype}"
        if not case.problem.needs_grad:
            return None
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in drawn.leaves.items()}
        results = subject.results(case, with_leaves(drawn, leaves))
        outside = outcome_of(results, leaves, drawn, retain_graph=True)
        with torch.autocast(device, dtype=narrow(subject)[0]):
            inside = outcome_of(results, leaves, drawn)
        fault = difference(inside, outside)
        return None if fault is None else f"{fault} where it is taken under autocast"


@holds(
    "compile",
    "a compiled call is right",
    lambda subject, quick: calls(
        subject,
        cases_named(
            *("causal", "all_packed"),
            *([] if quick else ["everything", "transposed", "key_lengths_with_bias"]),
        ),
        dtypes=one(subject),
        ops=list(reversed(subject.ops))[: 1 if quick else 3],
    ),
)
def compiled_call(subject: Subject, case: Case) -> str | None:
    """Within the budget, in the same order in memory, in one graph, with torch.compile(backend="aot_eager").

    A graph may give a function tensors with other strides, and that one other kernels.
    """
    drawn = case.draw()

    def run(function: Callable[..., tuple[Tensor, ...]]) -> Outcome:
        leaves = {
            name: tensor.detach().requires_grad_(case.problem.needs_grad) for name, tensor in drawn.leaves.items()
        }
        results = function(*leaves.values())
        return outcome_of(results, leaves, drawn) if case.problem.needs_grad else Outcome(results[0], {})

    def call(*given: Tensor) -> tuple[Tensor, ...]:
        return subject.results(case, with_leaves(drawn, dict(zip(drawn.leaves, given))))

    torch._dynamo.reset()
    try:
        compiled = run(torch.compile(call, backend="aot_eager", fullgraph=True))
    finally:
        torch._dynamo.reset()
    fault = fault_of_outcome(compiled, expected(case))
    if fault is not None:
        return f"{fault}, compiled"
    first = next(iter(drawn.tensors.values()))
    wanted = strides_like(first, compiled.output.shape[-1])
    if compiled.output.stride() != wanted:
        return f"output: has strides {compiled.output.stride()}, compiled; expected {wanted}"
    return None


@holds(
    "settings",
    "a call leaves torch's settings and random numbers, and those of the process, as they were",
    lambda subject, quick: calls(
        subject, cases_named("causal", "grouped_heads", "key_lengths_with_bias"), dtypes=two(subject)
    ),
)
def settings(subject: Subject, case: Case) -> str | None:
    """Of a second call: a first one may load modules."""
    inputs = case.draw()
    with left_as_found():
        subject.run(case, inputs)
        with as_at_first(), other_random_numbers():
            before = state(subject.device)
            subject.run(case, inputs)
            name = changed(before, state(subject.device))
    return None if name is None else f"{name}: another one after the call"


@holds(
    "other_settings",
    "a call is right whatever torch's default dtype and number of threads are",
    lambda subject, quick: calls(subject, cases_named("causal", "key_lengths_with_bias"), dtypes=one(subject)),
)
def other_settings(subject: Subject, case: Case) -> str | None:
    """What a backend makes has the dtype that it names."""
    inputs, wanted = case.draw(), expected(case)
    for name, value in (("the default dtype", torch.float64), ("the number of threads", OTHER_THREADS)):
        with left_as_found():
            SETTINGS[name].put(value)
            fault = fault_of_outcome(subject.run(case, inputs), wanted)
        if fault is not None:
            return f"{fault}, where {name} is {value}"
    return None


@holds(
    "quiet",
    "a call that was made before prints nothing and warns of nothing",
    lambda subject, quick: calls(subject, cases_named("causal", "key_lengths_with_bias"), dtypes=two(subject)),
)
def quiet(subject: Subject, case: Case) -> str | None:
    """A first one may load or compile something, and tell."""
    inputs, written = case.draw(), io.StringIO()
    with (
        left_as_found(),
        redirect_stdout(written),
        redirect_stderr(written),
        warnings.catch_warnings(record=True) as said,
    ):
        warnings.simplefilter("always")
        subject.run(case, inputs)
        said.clear()
        written.truncate(0)
        subject.run(case, inputs)
    # NumPy tells so of numbers that are not finite, as in Triton's interpreter: no fault of the backend's.
    warned = [each.message for each in said if not issubclass(each.category, RuntimeWarning)]
    if warned:
        return f"warned: {warned[0]}"
    return f"wrote {written.getvalue()[:40]!r}" if written.getvalue() else None


@holds(
    "inference_mode",
    "a call under torch.inference_mode() is right, and so is one with gradients after it",
    # Of a shape of their own: what a first call keeps is made in that mode.
    lambda subject, quick: calls(
        subject,
        [
            make_case("of_inference", query_length=11, window=Window(4, 1)),
            make_case("of_inference_with_bias", query_length=12, window=Window(4, 1), bias="H1W", key_lengths=(9, 5)),
        ],
        dtypes=one(subject),
    ),
)
def inference_mode(subject: Subject, case: Case) -> str | None:
    """With tensors that were made in that mode, and with others."""
    inputs, wanted = case.draw(), expected(case)
    without = case if not case.problem.needs_grad else case.changed(needs_grad=False)
    with torch.inference_mode():
        for given in (inputs, case.draw()):
            fault = fault_of_outcome(subject.run(without, given), wanted)
            if fault is not None:
                return f"{fault} under torch.inference_mode()"
    fault = fault_of_outcome(subject.run(case, inputs), wanted)
    return None if fault is None else f"{fault} after a call under torch.inference_mode()"


# So many threads call at once, so often, and with so many threads of torch's a call is tried.
THREADS, ROUNDS, OTHER_THREADS = 4, 4, 3


def _one_thread_alone(subject: Subject) -> str | None:
    """Whether Triton's interpreter, which keeps the place in the grid for all threads, runs a call of the backend."""
    if os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        return None
    for case in calls(subject, cases_named("one_query_one_key"), dtypes=one(subject), gradients=False):
        if subject.refusals(case.problem):
            continue
        with suppress(Exception):  # the properties find that
            subject.run(case, case.draw())
            builder = getattr(sys.modules.get("triton.runtime.interpreter"), "interpreter_builder", None)
            if builder is not None:
                builder.grid_dim = None
                subject.run(case, case.draw())
                if builder.grid_dim is not None:
                    return "Triton's interpreter runs it, in one thread at a time"
    return None


@holds(
    "threads",
    "calls of several threads at once are right",
    lambda subject, quick: calls(
        subject,
        cases_named(*(["several_sequences"] if quick else ["several_sequences", "key_lengths_with_bias"])),
        dtypes=one(subject),
    ),
    unless=_one_thread_alone,
)
def threads(subject: Subject, case: Case) -> str | None:
    """Each with other numbers; within the budget, as torch's own products may be cut otherwise where cores are busy."""
    cases = [_with_seed(case, seed) for seed in range(THREADS)]
    work = [(each, each.draw(), expected(each)) for each in cases]
    subject.run(case, work[0][1])
    together = threading.Barrier(THREADS)

    def call(each: Case, inputs: Inputs, wanted: Any) -> str | None:
        together.wait()
        faults = [fault_of_outcome(subject.run(each, inputs), wanted) for _ in range(ROUNDS)]
        return next((fault for fault in faults if fault is not None), None)

    with ThreadPoolExecutor(THREADS) as pool:
        found = [future.result() for future in [pool.submit(call, *each) for each in work]]
    fault = next((fault for fault in found if fault is not None), None)
    return None if fault is None else f"{fault}, where {THREADS} threads call at once"


@holds(
    "second_derivatives",
    "torch operations are differentiable twice",
    lambda subject, quick: (
        calls(
            subject,
            [
                make_case("twice", batch=1, query_length=4, head_dim=2, value_dim=3, window=Window(2, 1)),
                make_case(
                    "twice_with_all",
                    batch=1,
                    kv_heads=1,
                    query_length=4,
                    key_length=5,
                    head_dim=2,
                    value_dim=3,
                    window=Window(2, 1),
                    bias="H1W",
                    key_lengths=(4,),
                ),
                make_case(
                    "twice_packed",
                    heads=1,
                    query_length=4,
                    head_dim=1,
                    window=Window(2, 1),
                    cu_seqlens_q=(0, 1, 3),
                    softcap=2.0,
                    sinks=(),
                    dropout_p=0.3,
                    grad_log_sum_exp=True,
                ),
            ],
            dtypes=[torch.float64],
        )
        if not quick
        else ()
    ),
    unless=lambda subject: (
        "it does not say that it is differentiable by autograd"
        if not subject.backend.differentiable
        else None
        if torch.float64 in subject.dtypes
        else "it has no float64, in which they are tried"
    ),
)
def second_derivatives(subject: Subject, case: Case) -> str | None:
    """First and second derivatives against differences."""
    inputs = case.draw()
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.leaves.items()}

    def function(*given: Tensor) -> tuple[Tensor, ...]:
        found = subject.results(case, with_leaves(inputs, dict(zip(leaves, given))))
        return tuple(result.where(result != -torch.inf, 0.0) for result in found)

    given = tuple(leaves.values())
    if not torch.autograd.gradcheck(function, given, raise_exception=False):
        return "a first derivative is not that of differences"
    if not torch.autograd.gradgradcheck(function, given, raise_exception=False):
        return "a second derivative is not that of differences"
    return None


def _all_calls(subject: Subject, quick: bool) -> Iterable[Case]:
    # Neither a layout nor a magnitude is a matter of what a backend is asked; and no band has so many slots as far rows.
    skipped = ("large", "layout", "magnitude", "far_rows")
    cases = [row.case for row in TABLE if row.group not in skipped and (row.quick or not quick)]
    for dtype in DTYPES:
        for op in OPS:
            for case in cases:
                yield case.of(op, dtype, subject.device)
    # Nobody takes that.
    yield make_case("eight_bits", dtype=torch.float8_e5m2, device=subject.device)


@holds(REFUSALS, "calls that are not declared are refused, with a reason and by no exception", _all_calls)
def refusals(subject: Subject, case: Case) -> str | None:
    """Before the backend sees them; its own filters answer for any call."""
    backend, problem = subject.backend, case.problem
    asked: list[tuple[str, Callable[[], object]]] = []
    if backend.refuse is not None:
        refuse = backend.refuse
        asked.append(("refuse", lambda: refuse(problem)))
    if backend.unavailable is not None:
        asked.append(("unavailable", backend.unavailable))
    for name, question in asked:
        answer = question()
        if answer is not None and not (isinstance(answer, str) and answer):
            return f"{name}: answered {answer!r}, neither a reason nor None"
    if callable(backend.rank):
        backend.rank(problem)
    reasons = subject.refusals(problem)
    if not reasons and backend.workspace is not None:
        needed = backend.workspace(problem)
        if not isinstance(needed, (int, float)) or needed < 0:
            return f"workspace: answered {needed!r}, no number of bytes"
    if not reasons or problem.is_empty:
        return None
    with subject.watched() as seen:
        try:
            subject.run(case, case.draw())
        except BackendError as error:
            missing = [reason for reason in reasons if reason not in str(error)]
            return f"the error does not tell: {missing[0]}" if missing else None
    return f"it ran, {len(seen)} functions were called" if seen else "it was not refused"


# Where there is a CUDA device


def _no_cuda(subject: Subject) -> str | None:
    return None if subject.device.type == "cuda" else f"it is tested on {subject.device.type}"


@holds(
    "cuda_graph",
    "a captured call replays with other values",
    lambda subject, quick: calls(
        subject,
        cases_named(
            *("causal", "everything", "key_lengths_with_bias", "query_starts_far_away"),
            *("packed_unequal", "packed_softmax", "all_packed", "all_padded"),
        ),
    ),
    unless=_no_cuda,
)
def cuda_graph(subject: Subject, case: Case) -> str | None:
    """Forward and backward in one graph; lengths, starts, offsets and seeds too are other ones."""
    inputs, static = case.draw(), _with_seed(case, 1).draw()
    for given in static.arguments.values():
        if isinstance(given, Tensor) and not given.is_floating_point():
            given.zero_()
    expected = subject.run(case, inputs)
    side = torch.cuda.Stream(subject.device)
    side.wait_stream(torch.cuda.current_stream(subject.device))
    with torch.cuda.stream(side):
        subject.run(case, static)
    torch.cuda.current_stream(subject.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = subject.run(case, static)
    copy_into(static, inputs)
    graph.replay()
    torch.cuda.synchronize(subject.device)
    fault = difference(found, expected)
    return None if fault is None else f"{fault}, replayed"


@holds(
    "side_stream",
    "work goes to the current stream",
    lambda subject, quick: calls(
        subject,
        [make_case("stream", batch=4, heads=8, query_length=512, head_dim=64, window=Window.causal(64))],
    ),
    unless=_no_cuda,
)
def side_stream(subject: Subject, case: Case) -> str | None:
    """A long kernel fills the inputs on a side stream: a launch on any other one would read them too early."""
    inputs, late = case.draw(), _with_seed(case, 2).draw()
    expected = subject.run(case, inputs)
    torch.cuda.synchronize(subject.device)
    side = torch.cuda.Stream(subject.device)
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        copy_into(late, inputs)
        found = subject.run(case, late)
    side.synchronize()
    fault = difference(found, expected)
    return None if fault is None else f"{fault} on a side stream"


@holds(
    "unchecked_lengths",
    "lengths, starts of keys and offsets out of range, which nobody can check, are clamped",
    lambda subject, quick: calls(
        subject,
        cases_named("key_lengths", "key_lengths_int32", "key_starts_int32", "packed_int32", "packed_unequal"),
        dtypes=one(subject),
    ),
    unless=_no_cuda,
)
def unchecked_lengths(subject: Subject, case: Case) -> str | None:
    """Read as ``min(max(length, 0), Lk)``."""
    inputs = case.draw()
    for argument in ROWS[case.problem.op].arguments:
        given = inputs.arguments.get(argument.name)
        if given is None or argument.at_most is None:
            continue
        wild, clamped = given.clone(), given.clone()
        # Offsets ascend even so.
        low, high = (0, -1) if argument.ascends else (-1, 0)
        wild[high], clamped[high] = 2**31 - 1, case.problem.size(argument.at_most)
        wild[low], clamped[low] = -5, 0
        outcomes = [
            subject.run(case, replace(inputs, arguments={**inputs.arguments, argument.name: each}))
            for each in (wild, clamped)
        ]
        fault = difference(*outcomes)
        if fault is not None:
            return f"{fault} where {argument.name} are out of range"
    return None


def _with_seed(case: Case, seed: int) -> Case:
    return replace(case, seed=case.seed + seed)
