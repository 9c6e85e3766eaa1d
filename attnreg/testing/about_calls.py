"""Properties of a call's surroundings: autocast, torch.compile, derivatives, refusals, CUDA graphs and streams."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnreg.backend import BackendError
from attnreg.memory import strides_like
from attnreg.op import OPS
from attnreg.testing.case import Case, make_case
from attnreg.testing.cases import TABLE, cases_named
from attnreg.testing.inputs import Inputs
from attnreg.testing.judging import difference, expected, fault_of_outcome
from attnreg.testing.property import REFUSALS, calls, holds, narrow, one
from attnreg.testing.subject import DTYPES, Outcome, Subject, with_leaves
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
            "causal", "key_lengths_with_bias", *([] if quick else ["everything", "grouped_heads", "bias_full"])
        ),
        dtypes=[torch.float32],
    ),
    unless=_no_autocast,
)
def autocast(subject: Subject, case: Case) -> str | None:
    """Bit by bit, and nothing more is cast: neither a bias nor gradients that are taken under autocast."""
    device, drawn = subject.device.type, case.draw()
    with _left_as_found():
        for dtype in narrow(subject):
            by_hand = Inputs(
                {name: tensor.to(dtype) for name, tensor in drawn.tensors.items()},
                drawn.arguments,
                drawn.upstream.to(dtype),
            )
            expected = subject.run(case, by_hand)
            with torch.autocast(device, dtype=dtype):
                found = subject.run(case, Inputs(drawn.tensors, drawn.arguments, by_hand.upstream))
            if found.output.dtype != dtype:
                return f"output: {found.output.dtype} under autocast to {dtype}"
            cast = {name: gradient.to(found.gradients[name].dtype) for name, gradient in expected.gradients.items()}
            fault = difference(found, Outcome(expected.output, cast))
            if fault is not None:
                return f"{fault} under autocast to {dtype}"
        if not case.problem.needs_grad:
            return None
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in drawn.leaves.items()}
        output = subject.call(case, with_leaves(drawn, leaves))
        tensors = list(leaves.values())
        outside = torch.autograd.grad(output, tensors, drawn.upstream, retain_graph=True)
        with torch.autocast(device, dtype=narrow(subject)[0]):
            inside = torch.autograd.grad(output, tensors, drawn.upstream)
        fault = difference(Outcome(output, dict(zip(leaves, inside))), Outcome(output, dict(zip(leaves, outside))))
        return None if fault is None else f"{fault} where it is taken under autocast"


@holds(
    "compile",
    "a compiled call is right",
    lambda subject, quick: calls(
        subject,
        cases_named(*(["causal"] if quick else ["causal", "everything", "transposed", "key_lengths_with_bias"])),
        dtypes=one(subject),
        ops=list(reversed(subject.ops))[: 1 if quick else 3],
    ),
)
def compiled_call(subject: Subject, case: Case) -> str | None:
    """Within the budget, in the same order in memory, in one graph, with torch.compile(backend="aot_eager").

    A graph may give a function tensors with other strides, and that one other kernels.
    """
    drawn = case.draw()

    def run(function: Callable[..., Tensor]) -> Outcome:
        leaves = {
            name: tensor.detach().requires_grad_(case.problem.needs_grad) for name, tensor in drawn.leaves.items()
        }
        output = function(*leaves.values())
        if not case.problem.needs_grad:
            return Outcome(output, {})
        found = torch.autograd.grad(output, list(leaves.values()), drawn.upstream)
        return Outcome(output.detach(), dict(zip(leaves, found)))

    def call(*given: Tensor) -> Tensor:
        return subject.call(case, with_leaves(drawn, dict(zip(drawn.leaves, given))))

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
    "a call leaves torch's settings and random numbers as they were",
    lambda subject, quick: calls(
        subject, cases_named("causal", "grouped_heads", "key_lengths_with_bias"), dtypes=one(subject)
    ),
)
def settings(subject: Subject, case: Case) -> str | None:
    """Threads, default dtype, precision, gradient mode, autocast, determinism, generators."""
    inputs = case.draw()
    with _left_as_found():
        before = _settings(subject.device)
        subject.run(case, inputs)
        after = _settings(subject.device)
    for name, value in before.items():
        same = torch.equal(value, after[name]) if isinstance(value, Tensor) else value == after[name]
        if not same:
            return f"{name}: another one after the call"
    return None


def _settings(device: torch.device) -> dict[str, Any]:
    found = {
        "the number of threads": torch.get_num_threads(),
        "the default dtype": torch.get_default_dtype(),
        "the default device": torch.get_default_device(),
        "the precision of float32 products": torch.get_float32_matmul_precision(),
        "gradient mode": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled(device.type) if device.type in ("cpu", "cuda") else None,
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "torch's generator": torch.get_rng_state(),
        "Python's generator": random.getstate(),
    }
    if device.type == "cuda":
        found["the current device"] = torch.cuda.current_device()
        found["the current stream"] = torch.cuda.current_stream()
        found["the device's generator"] = torch.cuda.get_rng_state(device)
    return found


@contextmanager
def _left_as_found() -> Iterator[None]:
    """Whatever a backend does to these settings is undone: the next property must not suffer for it."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    precision, autocast = torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.set_float32_matmul_precision(precision)
        torch.set_autocast_enabled("cpu", autocast)


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

    def function(*given: Tensor) -> Tensor:
        output = subject.call(case, with_leaves(inputs, dict(zip(leaves, given))))
        return output.where(output != -torch.inf, 0.0)

    given = tuple(leaves.values())
    if not torch.autograd.gradcheck(function, given, raise_exception=False):
        return "a first derivative is not that of differences"
    if not torch.autograd.gradgradcheck(function, given, raise_exception=False):
        return "a second derivative is not that of differences"
    return None


def _all_calls(subject: Subject, quick: bool) -> Iterable[Case]:
    # Neither a layout nor a magnitude is a matter of what a backend is asked.
    skipped = ("large", "layout", "magnitude")
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
    lambda subject, quick: calls(subject, cases_named("causal", "everything", "key_lengths_with_bias")),
    unless=_no_cuda,
)
def cuda_graph(subject: Subject, case: Case) -> str | None:
    """Forward and backward in one graph; key lengths too are other ones."""
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
    _copy(inputs, static)
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
        _copy(inputs, late)
        found = subject.run(case, late)
    side.synchronize()
    fault = difference(found, expected)
    return None if fault is None else f"{fault} on a side stream"


@holds(
    "unchecked_lengths",
    "key lengths out of range, which nobody can check, are clamped",
    lambda subject, quick: calls(subject, cases_named("key_lengths", "key_lengths_int32"), dtypes=one(subject)),
    unless=_no_cuda,
)
def unchecked_lengths(subject: Subject, case: Case) -> str | None:
    """Read as ``min(max(length, 0), Lk)``."""
    inputs, most = case.draw(), case.problem.key_length
    lengths = inputs.arguments["key_lengths"]
    wild, clamped = lengths.clone(), lengths.clone()
    wild[0], clamped[0] = 2**31 - 1, most
    wild[-1], clamped[-1] = -5, 0
    outcomes = [
        subject.run(case, Inputs(inputs.tensors, {**inputs.arguments, "key_lengths": given}, inputs.upstream))
        for given in (wild, clamped)
    ]
    fault = difference(*outcomes)
    return None if fault is None else f"{fault} where lengths are out of range"


def _with_seed(case: Case, seed: int) -> Case:
    return replace(case, seed=case.seed + seed)


def _copy(source: Inputs, target: Inputs) -> None:
    for name, tensor in target.tensors.items():
        tensor.copy_(source.tensors[name])
    for name, given in target.arguments.items():
        if isinstance(given, Tensor):
            given.copy_(source.arguments[name])
    target.upstream.copy_(source.upstream)
