"""From a problem to a plan: who asked for which backend, the choice, and what a call needs to run it.

Functions in ``attnreg.functional`` keep plans by the bare facts of a call; this module makes those that are missing.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

from attnreg.backend import BackendError, option_values
from attnreg.composition import Function, below_autograd
from attnreg.dispatch import Decision, Entry, Forced, choose, unknown_backend
from attnreg.measured import Measured
from attnreg.problem import Problem
from attnreg.registry import registry
from attnreg.request import Request, parse_request
from attnreg.window import Window

# What the enclosing `use_backend` blocks ask for, innermost last.
requested: ContextVar[tuple[str, ...] | None] = ContextVar("attnreg_backend", default=None)

# os.environ.get() encodes and decodes at every call, 0.7 us. The dictionary under it answers in 0.02 us and sees every
# change that is made through os.environ; on POSIX its keys are bytes.
environment: dict[Any, Any] = os.environ._data  # type: ignore[attr-defined]
ENVIRONMENT_KEY = b"ATTNREG_BACKEND"
TABLE_KEY = b"ATTNREG_TABLE"

# A program whose lengths never repeat must not fill the memory with plans.
MOST_PLANS = 16384

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Plan:
    """What one kind of call needs to know to run.

    Attributes:
        backend: the chosen backend, as its request says.
        forward: the backend's forward function; None where a tensor of the call has no element, which the op settles.
        differentiable: whether the forward function consists of torch operations that autograd differentiates.
        needs_grad: whether any gradient may be asked for.
        window: the window, without what lies outside the sequence on either side where nothing depends on it.
        scale: the op's default scale.
        problem: the call.
        device_type: of the problem's device, which makes the string anew each time it is asked.
    """

    backend: str
    forward: Function | None
    differentiable: bool
    needs_grad: bool
    window: Window
    scale: float
    problem: Problem
    device_type: str


class use_backend:
    """Ask for a backend in a ``with`` block or in a decorated (also async) function.

    ``use_backend("name", option=value)`` is the same as ``use_backend("name:option=value")``.

    The request belongs to the current context: other threads and asyncio tasks do not see it. The innermost block
    counts; the argument ``backend=`` of a call goes before it.

    Raises:
        TypeError: the name is no string.
        ValueError: an option is given twice, or the name is neither ``NAME`` nor ``NAME:OPTION=VALUE,...``.
        BackendError: on entry, when no backend of that name is registered, or it does not take the options.
    """

    def __init__(self, name: str, **options: object) -> None:
        if not isinstance(name, str):
            raise TypeError(f"use_backend: the backend's name must be a string, got {name!r} ({type(name).__name__})")
        request = parse_request(name)
        given = tuple((option, str(value)) for option, value in options.items())
        self.request = parse_request(str(Request(request.name, (*request.options, *given))))
        self.name = str(self.request)

    def __enter__(self) -> use_backend:
        entries = registry.entries
        backend = next((entry.backend for entry in entries if entry.backend.name == self.request.name), None)
        if backend is None:
            raise BackendError(unknown_backend(Forced(self.request, "use_backend"), entries, registry.faults))
        _, wrong = option_values(backend, self.request.options)
        if wrong:
            raise BackendError(f"backend {self.name!r}, asked for by use_backend: {'; '.join(wrong)}")
        requested.set((*(requested.get() or ()), self.name))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        requested.set((requested.get() or ())[:-1] or None)

    def __call__(self, function: Decorated) -> Decorated:
        """Decorate a function or coroutine function: its body runs inside the block."""
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(
                f"use_backend cannot decorate the generator function {function.__qualname__}, whose body runs in "
                f"pieces between its caller's; open a `with use_backend({self.name!r}):` block inside it"
            )

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        @functools.wraps(function)
        async def await_call(*args: Any, **kwargs: Any) -> Any:
            with self:
                return await function(*args, **kwargs)

        return await_call if inspect.iscoroutinefunction(function) else call  # type: ignore[return-value]


def forced(selector: object) -> Forced | None:
    """Who asks for which backend: ``selector`` is the argument's string, the context's tuple or the environment's bytes."""
    if selector is None or selector == b"":
        return None
    if isinstance(selector, tuple):
        return _forced(selector[-1], "use_backend")
    if isinstance(selector, bytes):
        return _forced(os.fsdecode(selector), "the environment variable ATTNREG_BACKEND")
    if not isinstance(selector, str):
        raise TypeError(f"backend must be a backend's name or None, got {selector!r} ({type(selector).__name__})")
    return _forced(selector, "the argument backend=")


def _forced(text: str, by: str) -> Forced:
    try:
        return Forced(parse_request(text), by)
    except ValueError as error:
        raise BackendError(f"{by}: {error}") from None


def selector(backend: str | None) -> object:
    """What asks for a backend, first come first: the argument, the context, the environment; or None."""
    return backend if backend is not None else requested.get() or environment.get(ENVIRONMENT_KEY)


def explain_problem(problem: Problem, backend: str | None) -> Decision:
    """The decision for ``problem``; nothing is prepared or run."""
    entries = registry.entries
    measured, remarks = _measured(problem, entries)
    return choose(
        problem,
        entries,
        forced=forced(selector(backend)),
        failed=registry.failed,
        faults=registry.faults,
        measured=measured,
        remarks=remarks,
    )


def _measured(problem: Problem, entries: Sequence[Entry]) -> tuple[tuple[Measured, ...], tuple[str, ...]]:
    """What the tables say of ``problem``, and what is wrong with them."""
    # Tables are looked at when a plan is made, and then only: importing attnreg does not pay for them.
    from attnreg.tuning.environment import environment as describe
    from attnreg.tuning.lookup import measured
    from attnreg.tuning.store import report, stamp, tables

    registry.tables_are(stamp())
    here = describe(problem.device, entries)
    stored, wrong = tables(here)
    report(wrong)
    return measured(problem, stored), wrong


def make_plan(problem: Problem, backend: str | None) -> Plan:
    """Choose and prepare a backend for ``problem``.

    Raises:
        BackendError: the backend that was asked for cannot run it, or none can.
    """
    while True:
        decision = explain_problem(problem, backend)
        if registry.prepare(decision.backend):
            break
    (chosen,) = (entry.backend for entry in registry.entries if entry.backend.name == decision.backend)
    request = str(decision.request)
    forward = registry.functions(request)[problem.op]
    if not chosen.differentiable:
        forward = below_autograd(forward)
    return Plan(
        backend=request,
        forward=None if is_empty(problem) else forward,
        differentiable=chosen.differentiable,
        needs_grad=problem.needs_grad,
        window=_visible_part(problem),
        scale=problem.head_dim**-0.5 if problem.op == "local_attention" else 1.0,
        problem=problem,
        device_type=problem.device.type,
    )


def remember(call: Hashable, problem: Problem, backend: str | None) -> Plan:
    """Make the plan for ``problem`` and keep it under the bare facts of the call; see :func:`make_plan` for errors."""
    if registry.autotunes and selector(backend) in (None, b"") and not is_empty(problem):
        from attnreg.tuning.autotune import tune_on_first_use

        if not tune_on_first_use(problem):
            return make_plan(problem, backend)
    return _keep(call, make_plan(problem, backend))


def _keep(call: Hashable, plan: Plan) -> Plan:
    plans = registry.plans
    if len(plans) >= MOST_PLANS:
        plans.clear()
    with suppress(
        TypeError
    ):  # symbolic sizes, while a call is traced, have no hash: such a plan serves this call alone
        plans[call] = plan
    return plan


def chosen_backend(problem: Problem, backend: str | None) -> str:
    """The request of the backend for ``problem``, remembered by the problem itself."""
    call = (problem, selector(backend), environment.get(TABLE_KEY))
    plan: Plan | None = registry.plans.get(call)
    # Nothing is tuned here: what asks for a backend by its problem is a compiled graph, or one that is traced.
    return (plan or _keep(call, make_plan(problem, backend))).backend


def is_empty(problem: Problem) -> bool:
    """Whether a tensor of the call has no element: the result then holds no number that a backend would compute."""
    sizes = (problem.batch, problem.heads, problem.query_length, problem.key_length)
    return 0 in sizes or (problem.value_dim == 0 and problem.op != "local_dot_product")


def _visible_part(problem: Problem) -> Window:
    """The window cut to what a sequence of this length can show; only where no tensor has a column per offset."""
    window = problem.window
    if problem.op != "local_attention" or (problem.bias_shape is not None and problem.bias_shape[3] != 1):
        return window
    # The last query stands at the last key and sees Lk - 1 keys before it; the first one sees Lq - 1 keys after it.
    return Window(min(window.left, max(problem.key_length - 1, 0)), min(window.right, max(problem.query_length - 1, 0)))
