"""A backend under test: registered for the while, its functions watched, and called as users call it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from attnreg import functional
from attnreg.backend import Backend, Function, has_backward, has_op, refusals, why_unavailable, with_options
from attnreg.op import OPS, ROWS, Op
from attnreg.problem import Problem
from attnreg.registry import register, registry
from attnreg.request import did_you_mean, parse_request
from attnreg.testing.case import Case
from attnreg.testing.inputs import Inputs, gradients_of

# What a backend is called while it is under test: its own name stays that of the registered one.
SUFFIX = "-under-test"
# The public function that gives all results of attention.
WITH_ALL_RESULTS = "local_attention_with_lse"
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class UnknownBackend(LookupError):
    """No backend of that name is registered."""


@dataclass(frozen=True, eq=False)
class Seen:
    """One call of a function of the backend.

    Attributes:
        op: the op.
        is_backward: whether it was its backward.
        inputs: the tensors that it got by their place, incoming gradient first in a backward; without the window.
        options: its keyword arguments.
        returned: what it returned.
    """

    op: Op
    is_backward: bool
    inputs: tuple[Tensor, ...]
    options: Mapping[str, Any]
    returned: Any

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those inputs that are the op's tensors, by name."""
        return dict(zip(self.op.tensors, self.inputs[1:] if self.is_backward else self.inputs))


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a call gave its user.

    Attributes:
        output: the result.
        gradients: of all that has one, by name; empty where none was asked for.
        further: the further results that were asked for, by name.
    """

    output: Tensor
    gradients: Mapping[str, Tensor]
    further: Mapping[str, Tensor] = field(default_factory=dict)

    def parts(self) -> dict[str, Tensor]:
        """All of it, by name."""
        gradients = {f"gradient of {name}": each for name, each in self.gradients.items()}
        return {"output": self.output, **self.further, **gradients}


@dataclass(frozen=True, eq=False)
class Subject:
    """A backend under test.

    Attributes:
        backend: as it is registered for the while: its functions are watched.
        title: what its author calls it, with the options that are tested.
        device: where it is tested.
    """

    backend: Backend
    title: str
    device: torch.device
    _watchers: list[list[Seen]]

    @property
    def ops(self) -> tuple[str, ...]:
        """The ops that it has, of its own or composed."""
        return tuple(op for op in OPS if has_op(self.backend, ROWS[op]))

    def has_gradients(self, op: str) -> bool:
        """Whether it has gradients of an op."""
        return has_backward(self.backend, ROWS[op])

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Those of its dtypes that are tested, the one for most properties first."""
        return tuple(dtype for dtype in DTYPES if dtype in self.backend.capability.dtypes)

    def refusals(self, problem: Problem) -> tuple[str, ...]:
        """Every reason that it has against a call."""
        return refusals(self.backend, problem)

    def call(self, case: Case, inputs: Inputs, **changes: Any) -> Tensor:
        """The result of a case's call with these tensors; ``changes`` are to what is given by keyword."""
        return self.results(case, inputs, **changes)[0]

    def results(self, case: Case, inputs: Inputs, **changes: Any) -> tuple[Tensor, ...]:
        """Likewise, with a result for each further gradient that comes in."""
        function = getattr(functional, WITH_ALL_RESULTS if inputs.incoming else case.problem.op)
        found = function(
            *inputs.tensors.values(),
            case.problem.window,
            **{**inputs.arguments, "backend": self.backend.name, **changes},
        )
        return found if isinstance(found, tuple) else (found,)

    def run(self, case: Case, inputs: Inputs) -> Outcome:
        """The result and, where the problem asks for them, all gradients."""
        if not case.problem.needs_grad:
            with torch.no_grad():
                return Outcome(self.call(case, inputs), {})
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.leaves.items()}
        results = self.results(case, with_leaves(inputs, leaves))
        return outcome_of(results, leaves, inputs)

    @contextmanager
    def watched(self) -> Iterator[list[Seen]]:
        """The calls of its functions from here on."""
        seen: list[Seen] = []
        self._watchers.append(seen)
        try:
            yield seen
        finally:
            self._watchers.remove(seen)


def outcome_of(
    results: tuple[Tensor, ...], leaves: Mapping[str, Tensor], inputs: Inputs, *, retain_graph: bool = False
) -> Outcome:
    """What a call gave that can be differentiated, and the gradients of its leaves, or of some of them."""
    gradients = gradients_of(results, list(leaves.values()), inputs, retain_graph=retain_graph)
    output, *further = [result.detach() for result in results]
    return Outcome(output, dict(zip(leaves, gradients)), dict(zip(inputs.incoming, further)))


def with_leaves(inputs: Inputs, leaves: Mapping[str, Tensor]) -> Inputs:
    """The same call of other tensors."""
    return replace(
        inputs,
        tensors={name: leaves[name] for name in inputs.tensors},
        arguments={name: leaves.get(name, given) for name, given in inputs.arguments.items()},
    )


@contextmanager
def under_test(backend: str | Backend, device: str | torch.device = "cpu") -> Iterator[Subject]:
    """A backend under test, registered while the block lasts.

    Args:
        backend: the name of a registered one, with options or without, as in ``backend=``; or a Backend, registered or not.
        device: where it is tested.

    Raises:
        UnknownBackend: none of that name is registered.
        ValueError: it does not take the options.
    """
    found, title = find(backend)
    watchers: list[list[Seen]] = []
    functions = {
        name: _watched(ROWS[op], name != op, function, watchers)
        for op in OPS
        for name in (op, f"{op}_backward")
        if (function := getattr(found, name)) is not None
    }
    observed = replace(found, name=f"{found.name}{SUFFIX}", **functions)  # type: ignore[arg-type]
    with register(observed):
        yield Subject(observed, title, torch.device(device), watchers)


def find(backend: str | Backend) -> tuple[Backend, str]:
    """A backend with the options that are asked for, and what it is called.

    Raises:
        UnknownBackend: none of that name is registered.
        ValueError: it does not take the options.
    """
    if isinstance(backend, Backend):
        return backend, backend.name
    request = parse_request(backend)
    for entry in registry.entries:
        if entry.backend.name == request.name:
            return with_options(entry.backend, request.options), str(request)
    names = sorted(entry.backend.name for entry in registry.entries)
    broken = "".join(f"\n  {fault}" for fault in registry.faults)
    raise UnknownBackend(
        f"no backend is called {request.name!r}{did_you_mean(request.name, names)}; "
        f"registered: {', '.join(names) or 'none'}{broken}"
    )


def why_not_here(backend: str | Backend, device: torch.device) -> str | None:
    """Why a backend cannot be tested on a device of this machine; None where it can.

    Raises:
        UnknownBackend, ValueError: as :func:`find`.
    """
    found, _ = find(backend)
    devices = found.capability.devices
    if devices is not None and device.type not in devices:
        return f"it takes {', '.join(sorted(devices))}, and is asked for on {device.type}"
    return why_unavailable(found)


def _watched(op: Op, is_backward: bool, function: Function, watchers: list[list[Seen]]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*inputs: Any, **options: Any) -> Any:
        returned = function(*inputs, **options)
        for seen in watchers:
            seen.append(Seen(op, is_backward, inputs[:-1], options, returned))
        return returned

    return call
