"""Looking without running: which backends there are, and which one a call would get."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from attnreg.backend import Backend, has_backward, has_op, why_unavailable
from attnreg.dispatch import Decision
from attnreg.functional import (
    arguments_of,
    autocast,
    local_attention,
    local_attention_with_lse,
    local_dot_product,
    local_weighted_average,
    needs_gradients,
)
from attnreg.op import ATTENTION, ROWS
from attnreg.plan import explain_problem
from attnreg.problem import check, problem_of
from attnreg.registry import registry
from attnreg.request import written
from attnreg.unknown import bound, names_of, unknown_arguments

_FUNCTIONS = {
    function.__name__: function
    for function in (local_dot_product, local_weighted_average, local_attention, local_attention_with_lse)
}


@dataclass(frozen=True)
class BackendStatus:
    """One registered backend, or one plug-in that could not be used.

    Attributes:
        name: the backend's name, or the broken plug-in's.
        distribution: the distribution it comes from.
        backend: the backend; None for a broken plug-in.
        ops: the ops that it has, its own and those composed of its products.
        backward_ops: those of them whose gradients it has.
        reason: why it cannot run on this machine, or what broke the plug-in; None where it runs.
    """

    name: str
    distribution: str
    backend: Backend | None
    ops: tuple[str, ...]
    backward_ops: tuple[str, ...]
    reason: str | None

    @property
    def runs_here(self) -> bool:
        """Whether nothing stands against the backend on this machine."""
        return self.reason is None


def backends() -> tuple[BackendStatus, ...]:
    """What is registered, in order of registration, with the reason where one cannot run here; broken plug-ins last."""
    failed = registry.failed
    statuses = [
        BackendStatus(
            entry.backend.name,
            entry.distribution,
            entry.backend,
            tuple(op.name for op in ROWS.values() if has_op(entry.backend, op)),
            tuple(op.name for op in ROWS.values() if has_backward(entry.backend, op)),
            failed.get(entry.backend.name) or why_unavailable(entry.backend),
        )
        for entry in registry.entries
    ]
    statuses += [
        BackendStatus(fault.plugin, fault.distribution, None, (), (), f"broken plug-in: {fault.error}")
        for fault in registry.faults
    ]
    return tuple(statuses)


def explain(*args: Any, op: str | Callable[..., Any] | None = None, **kwargs: Any) -> Decision:
    """The decision that an op's call with these arguments would be given, without running it.

    Args:
        *args: the op's arguments, as its function takes them.
        **kwargs: likewise.
        op: the function, or its name. It can be left out where the arguments tell: three tensors are
            ``local_attention``; of two tensors, at least one is to be named (``query=``, ``key=`` or ``weights=``).

    Returns:
        The decision, which holds the problem, the chosen backend, why, and every other candidate with the reasons to refuse it.
        Its ``str()`` is the readable trace. Nothing is built. A backend that is built on first use counts as usable until its
        build has failed.

    Raises:
        TypeError, ValueError, BackendError: as the op itself.
    """
    name = _function_name(op, args, kwargs)
    row, all_results = ROWS.get(name, ATTENTION), name not in ROWS
    given = bound(_FUNCTIONS[name], args, kwargs)
    tensors = autocast(tuple(given[name] for name in row.tensors))
    arguments = arguments_of(row, given)
    backend, window = written(given["backend"]), given["window"]
    check(row, tensors, window, arguments)
    needs_grad = needs_gradients(each for each in (*tensors, *arguments) if isinstance(each, Tensor))
    problem = problem_of(row, tensors, window, arguments, needs_grad=needs_grad, all_results=all_results)
    return explain_problem(problem, backend)


def _function_name(op: str | Callable[..., Any] | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    if op is not None:
        name = op if isinstance(op, str) else getattr(op, "__name__", "")
        if name not in _FUNCTIONS or not (op is name or op is _FUNCTIONS[name]):
            raise ValueError(f"op must be one of {', '.join(_FUNCTIONS)}, or one of these functions; got {op!r}")
        return name
    if "weights" in kwargs:
        return "local_weighted_average"
    tensors = sum(isinstance(argument, Tensor) for argument in args)
    if "value" in kwargs or tensors == 3 or (tensors == 2 and "key" in kwargs):
        return "local_attention"
    if "query" in kwargs or "key" in kwargs:
        return "local_dot_product"
    known = list(dict.fromkeys(name for function in _FUNCTIONS.values() for name in names_of(function)))
    unknown = [name for name in kwargs if name not in known]
    if unknown:
        raise unknown_arguments("explain", known, unknown)
    raise TypeError(
        "explain cannot tell local_dot_product from local_weighted_average by two tensors; say which with op="
    )
