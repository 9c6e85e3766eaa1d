"""From a problem to a plan: the choice, and what a call needs to run it.

Functions in ``attnreg.functional`` keep plans by the bare facts of a call; this module makes those that are missing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import isfinite
from typing import Any
from warnings import warn

import torch
from torch import Tensor

from attnreg.asking import asked_for, wish_of
from attnreg.backend import Function, facts_of_ability, why_refused
from attnreg.dispatch import Decision, choose, select
from attnreg.memory import empty_like, laid_out, strides_like
from attnreg.op import ROWS, Argument, Op
from attnreg.problem import Problem, check_argument_number, prepared_integers, size_class, typical, visible_window
from attnreg.registry import MOST_CLASSES, Implementation, keep, registry
from attnreg.request import Wish
from attnreg.window import Window

TABLE_KEY = b"ATTNREG_TABLE"

# A program whose lengths never repeat must not fill the memory with plans.
MOST_PLANS = 16384

# Where gradients are recorded, a function is run as torch runs its own kernels, for its results are new tensors and autograd need
# not see it: its operations record nothing, and each costs a quarter less. There is no public name for that.
_below_autograd = torch._C._AutoDispatchBelowADInplaceOrView
_is_grad_enabled = torch.is_grad_enabled

_is_alias_of: Callable[[Tensor, Tensor], bool] = torch._C._is_alias_of  # type: ignore[attr-defined]


# Not frozen, which would make each cost 2 us more: a new shape needs one.
@dataclass(slots=True, eq=False)
class Plan:
    """What one kind of call needs to know to run; never changed but for what it has seen of its backend's results.

    Attributes:
        op: the op.
        problem: the call.
        implementation: the chosen backend with its options.
        forward: its forward function; what to return where a tensor of the call has no element.
        backward: its backward function, likewise; None where it has none.
        differentiable: whether the forward function consists of torch operations that autograd differentiates.
        window: the window, without what lies outside the sequence on either side where nothing depends on it.
        options: the arguments that the functions get where the call gives none.
        given: of the arguments that the call gives, the place in the op's row, the name, and what prepares one, if anything.
        device_type: of the problem's device, which makes the string anew each time it is asked.
        dtype, device: of every tensor.
        is_recorded: whether the backward function has to be recorded for autograd.
        places: of the arguments that the call gives, those of tensors in the op's row.
        given_tensors: their names.
        incoming: the incoming gradients of results but the first that the backward function takes, by name, with their places.
        all_results: whether results but the first have gradients, too.
        result_shape: of the first result, once results of its backend were looked at; None before, and where sizes are open.
        are_gradients_checked: whether gradients of its backend were looked at.
    """

    op: Op
    problem: Problem
    implementation: Implementation
    forward: Function
    backward: Function | None
    differentiable: bool
    window: Window
    options: Mapping[str, Any]
    given: tuple[tuple[int, str, Callable[[Any], Any] | None], ...]
    device_type: str
    dtype: torch.dtype
    device: torch.device
    is_recorded: bool
    places: tuple[int, ...]
    given_tensors: tuple[str, ...]
    incoming: tuple[tuple[int, str], ...]
    all_results: bool
    result_shape: tuple[int, ...] | None = None
    are_gradients_checked: bool = False

    def _options_of(self, arguments: Sequence[Any]) -> Mapping[str, Any]:
        """The arguments that the functions get for a call with these."""
        options = {**self.options}
        for index, name, prepare in self.given:
            value = arguments[index]
            options[name] = value if prepare is None else prepare(value)
        return options

    def run(self, tensors: Sequence[Tensor], arguments: Sequence[Any]) -> tuple[Tensor, ...]:
        """The op's results, each in its order in memory."""
        options = self._options_of(arguments) if self.given else self.options
        first = tensors[0]
        are_contiguous = True
        for each in tensors:
            if not each.is_contiguous():
                are_contiguous = False
                tensors = [rows(each) for each in tensors]
                break
        try:
            if self.differentiable or not _is_grad_enabled():
                results = self.forward(*tensors, self.window, **options)
            else:
                with _below_autograd():
                    results = self.forward(*tensors, self.window, **options)
        except BaseException as error:
            self._name_backend(error, self.op.name)
            raise
        output = results[0] if results.__class__ is tuple and results else results
        # Of every call what is cheap to see; all of it where this shows something, and of the first.
        shape = self.result_shape
        if shape is None or output.__class__ is not Tensor or output.shape != shape or output.dtype is not self.dtype:
            self.check_results(results, tensors, arguments)
        if output is results:
            results = (output,)
        elif len(results) > 1 and not results[1].is_contiguous():
            results = (output, results[1].contiguous())
        if output.is_contiguous() and (are_contiguous or first.is_contiguous()):
            return results  # type: ignore[no-any-return]
        strides, wanted = output.stride(), strides_like(first, output.shape[-1])
        return results if strides == wanted else (in_order(output, wanted), *results[1:])

    def run_backward(
        self,
        grads: Sequence[Tensor | None],
        saved: Sequence[Tensor],
        arguments: Sequence[Any],
        needs_grad: frozenset[str],
    ) -> Mapping[str, Tensor]:
        """The gradients that are wanted, by name.

        Args:
            grads: the incoming gradients of the results; None, or left out, where there is none. The first is there.
            saved: the op's tensors, and its results where its backward gets them.
            arguments: as for :meth:`run`.
            needs_grad: what has to be differentiated.
        """
        if self.backward is None:
            raise NotImplementedError(
                f"backend {self.implementation.backend.name!r} has no {self.op.backward}; the call was made without gradients"
            )
        options = {**self._options_of(arguments), "needs_grad": needs_grad}
        for place, name in self.incoming:
            grad = grads[place] if place < len(grads) else None
            options[name] = None if grad is None else grad.contiguous()
        try:
            gradients: Mapping[str, Tensor] = self.backward(
                *[rows(each) for each in (*grads[:1], *saved) if each is not None], self.window, **options
            )
        except BaseException as error:
            self._name_backend(error, self.op.backward)
            raise
        if not isinstance(gradients, Mapping):
            raise self._wrong(self.op.backward, f"returned {type(gradients).__name__}, not the gradients by name")
        missing = needs_grad - gradients.keys()
        if missing:
            raise self._wrong(self.op.backward, f"left out the gradient of {', '.join(sorted(missing))}")
        if not self.are_gradients_checked:
            self._check_gradients(gradients, needs_grad, grads, saved, arguments)
            self.are_gradients_checked = True
        return gradients

    def gradient(self, name: str, tensor: Tensor, gradients: Mapping[str, Tensor]) -> Tensor:
        """One of the gradients, in its tensor's shape and order in memory."""
        found = gradients[name]
        if found.__class__ is not Tensor or found.shape != tensor.shape or found.dtype is not tensor.dtype:
            self._check_gradient(name, found, tensor)
            found = found.reshape(tensor.shape)
        strides = strides_like(tensor)
        return found if found.stride() == strides else in_order(found, strides)

    def _dims(self, name: str) -> str:
        return self.op.tensors.get(name) or next(row.dims or "" for row in self.op.arguments if row.name == name)

    def check_results(self, returned: Any, tensors: Sequence[Tensor], arguments: Sequence[Any]) -> None:
        """Raise unless what a backend returned is what the op's row says of it.

        Raises:
            RuntimeError: it is not; names the backend.
        """
        op, problem = self.op, self.problem
        results = returned if returned.__class__ is tuple else (returned,)
        if len(results) != len(op.results):
            what = f"{len(results)} results" if results is returned else type(returned).__name__
            raise self._wrong(op.name, f"returned {what}, not a tuple of {' and '.join(op.results)}")
        if not isinstance(problem.key_length, int) or not isinstance(problem.query_length, int):
            return
        given = [*tensors, *[each for each in arguments if isinstance(each, Tensor)]]
        types: set[Any] = {Tensor, *map(type, given)} - {torch.nn.Parameter}
        shapes = [tuple(problem.size(letter) for letter in row.dims) for row in op.results.values()]
        for result, shape, (name, row) in zip(results, shapes, op.results.items()):
            wrong = _unlike(result, shape, row.dtype(problem.dtype), problem.device, types)
            if wrong is None and result.requires_grad and not (self.differentiable and torch.is_grad_enabled()):
                wrong = "a tensor that requires gradients; expected none that does"
            if wrong is None and torch._C._functorch.peek_interpreter_stack() is None and _is_view(result, given):
                wrong = "a view of one of its inputs, not memory of its own"
            if wrong is not None:
                raise self._wrong(op.name, f"returned as {name} {wrong}")
        self.result_shape = shapes[0]

    def _check_gradients(
        self,
        gradients: Mapping[str, Any],
        names: frozenset[str],
        grads: Sequence[Tensor | None],
        saved: Sequence[Tensor],
        arguments: Sequence[Any],
    ) -> None:
        """Raise unless the gradients are tensors as the op's row has them, each in memory of its own."""
        given = [each for each in (*grads, *saved, *arguments) if isinstance(each, Tensor)]
        named = {argument.name: value for argument, value in zip(self.op.arguments, arguments)}
        named.update(zip(self.op.tensors, saved))
        for name in sorted(names):
            found = gradients[name]
            self._check_gradient(name, found, named[name])
            if _is_view(found, given):
                raise self._wrong(self.op.backward, f"returned as gradient of {name} a view of one of its inputs")
            for other in sorted(names):
                same = other < name and _is_view(found, [gradients[other]])
                if same and found.storage_offset() == gradients[other].storage_offset():
                    raise self._wrong(self.op.backward, f"returned one memory as gradients of {other} and {name}")

    def _check_gradient(self, name: str, found: Any, tensor: Tensor) -> None:
        """Raise unless ``found`` can be the gradient of ``tensor``."""
        # A bias has all its dimensions where a backend gets it.
        whole = (*(1,) * (len(self._dims(name)) - tensor.dim()), *tensor.shape)
        types: set[Any] = {Tensor, type(tensor)} - {torch.nn.Parameter}
        wrong = _unlike(found, whole, tensor.dtype, tensor.device, types)
        if wrong is not None:
            raise self._wrong(self.op.backward, f"returned as gradient of {name} {wrong}")

    def _wrong(self, function: str, what: str) -> RuntimeError:
        return RuntimeError(f"{self._who}: {function} {what}")

    def _name_backend(self, error: BaseException, function: str) -> None:
        # There are notes from Python 3.11 on; and an exception of one's own may do anything when it is asked to take one.
        with suppress(Exception):
            error.add_note(f"raised by {function} of {self._who}, for {self.problem}")

    @property
    def _who(self) -> str:
        backend = self.implementation.backend
        origin = next((each.distribution for each in registry.entries if each.backend is backend), "this process")
        return f"backend {backend.name!r} of {origin}"


def _unlike(
    found: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, types: Collection[type]
) -> str | None:
    """What ``found`` is and what it should be; None where it is that."""
    if not isinstance(found, Tensor):
        return f"{type(found).__name__}, not a tensor"
    if type(found) not in types:
        return f"a {type(found).__name__}, not a plain tensor"
    if found.layout is not torch.strided or found.is_nested:
        return f"a tensor of layout {found.layout}{', nested' if found.is_nested else ''}; expected a dense one"
    if tuple(found.shape) != shape or found.dtype != dtype or found.device != device:
        return (
            f"a tensor of shape {tuple(found.shape)}, {found.dtype} on {found.device}; "
            f"expected {shape}, {dtype} on {device}"
        )
    if found.is_neg() or found.is_conj():
        return "a tensor that is still to be negated or conjugated when it is read; expected resolve_neg() of it"
    if found.is_inference() and not torch.is_inference_mode_enabled():
        return "a tensor made in inference mode, outside of it"
    return None


def _is_view(found: Tensor, of: Sequence[Tensor]) -> bool:
    """Whether ``found`` lies in the memory of one of these."""
    return any(found is each or _is_alias_of(found, each) for each in of)


def rows(tensor: Tensor) -> Tensor:
    """``tensor`` with a contiguous last dimension, as the contract promises to backends."""
    return tensor if tensor.is_contiguous() or tensor.stride()[-1] == 1 else tensor.contiguous()


def in_order(result: Tensor, strides: tuple[int, ...]) -> Tensor:
    """``result`` with these strides, copied only where a dimension of more than one element is elsewhere."""
    same = all(own == wanted or size == 1 for own, wanted, size in zip(result.stride(), strides, result.shape))
    if same:
        return result.as_strided(result.shape, strides)
    return laid_out(result, strides)


def explain_problem(problem: Problem, backend: str | None) -> Decision:
    """The decision for ``problem``; nothing is prepared or run."""
    wish = wish_of(asked_for(backend), backend)
    registry.look_at_tables()
    entries = registry.entries
    like = typical(problem)
    measured, remarks = registry.tables.measured(like, entries, registry.stamp, of=problem)
    return choose(
        problem,
        entries,
        like=like,
        wish=wish,
        failed=registry.failed,
        faults=registry.faults,
        measured=measured,
        remarks=remarks,
    )


def make_plan(problem: Problem, wish: Wish | None, arguments: Sequence[Any]) -> Plan:
    """Choose and prepare a backend for ``problem``, and for calls that give the same of the optional arguments.

    Raises:
        BackendError: the backend that was asked for cannot run it, or none can.
    """
    while True:
        # Taken before the backends are looked at: a change replaces it.
        memory = registry.chosen
        entries, failed = registry.entries, registry.failed
        facts = facts_of_ability(problem)
        passing = [
            entry
            for entry in registry.able(problem, facts, entries)
            if entry.backend.name not in failed
            and (wish is None or entry.backend.name not in wish.excluded)
            and why_refused(entry.backend, problem) is None
        ]
        kind = None
        if wish is None or not wish.preferred:
            kind = (
                facts,
                problem.given,
                problem.window.left,
                problem.heads,
                problem.kv_heads,
                size_class(problem.batch),
                size_class(problem.query_length),
                size_class(problem.key_length),
                *[entry.backend.name for entry in passing],
            )
            chosen = memory.get(kind)
            if chosen is not None:
                return plan_for(problem, chosen, arguments)
        like = typical(problem)
        selected = select(
            problem,
            entries,
            passing,
            like=like,
            wish=wish,
            failed=failed,
            faults=registry.faults,
            measured=registry.tables.measured(like, entries, registry.stamp)[0] if kind is not None else (),
        )
        (backend,) = (entry.backend for entry in entries if entry.backend.name == selected.name)
        if registry.prepare(backend):
            implementation = registry.implementation(backend, selected)
            if kind is not None:
                keep(memory, kind, implementation, MOST_CLASSES)
            return plan_for(problem, implementation, arguments)
        if kind is not None:
            warn(
                f"attnreg: {backend.name} would have been chosen, and cannot be prepared: {registry.failed.get(backend.name)}",
                RuntimeWarning,
                stacklevel=2,
            )


def plan_for(problem: Problem, implementation: Implementation, arguments: Sequence[Any]) -> Plan:
    """The plan that runs ``problem``, with these arguments given, by an implementation that can."""
    op, backend = ROWS[problem.op], implementation.backend
    # A symbolic size has no hash.
    defaults = _defaults if isinstance(problem.head_dim, int) else _defaults.__wrapped__
    forward, backward = implementation.functions[op.name], implementation.functions.get(op.backward)
    differentiable = backend.differentiable
    if problem.is_empty:
        forward = functools.partial(_nothing, op, backend.differentiable)
        backward = functools.partial(_no_gradients, op)
    places = tuple(
        place for place, row in enumerate(op.arguments) if row.dims is not None and arguments[place] is not None
    )
    return Plan(
        op=op,
        problem=problem,
        implementation=implementation,
        forward=forward,
        backward=backward,
        differentiable=differentiable,
        window=visible_window(op, problem),
        options=defaults(op, backend.taken[op.name], problem.head_dim),
        given=tuple(
            (index, argument.name, _preparation(argument, problem, arguments[index]))
            for index, argument in enumerate(op.arguments)
            if arguments[index] is not None
        ),
        device_type=problem.device.type,
        dtype=problem.dtype,
        device=problem.device,
        is_recorded=problem.needs_grad and not differentiable,
        places=places,
        given_tensors=tuple(op.arguments[place].name for place in places),
        incoming=tuple(
            (place, argument.name)
            for place, argument in enumerate(op.incoming, 1)
            if argument.name in backend.taken[op.name]
        ),
        all_results=any(problem.gives(argument.name) is not None for argument in op.incoming),
    )


@functools.lru_cache(maxsize=1024)
def _defaults(op: Op, taken: frozenset[str], head_dim: int) -> Mapping[str, Any]:
    """What functions get that take these of the optional arguments, where a call gives none."""
    defaults = op.defaults(head_dim)
    return {name: default for name, default in defaults.items() if name in taken or name not in op.optional}


def _preparation(argument: Argument, problem: Problem, value: Any) -> Callable[[Any], Any] | None:
    """What makes an argument, as it is given in such a call, what backends get; None where it is that."""
    if argument.dims is None:
        return functools.partial(_admitted, argument)
    if argument.kind == "integer":
        # Offsets of the queries are those of the keys, too, where no others are given.
        stands_for = [argument, *(row for row in ROWS[problem.op].arguments if row.needs == argument.name)]
        bounds = [row.at_most for row in stands_for if row is argument or problem.gives(row.name) is None]
        letter = min((letter for letter in bounds if letter is not None), key=problem.size, default=None)
        bound = None if letter is None or problem.device.type != "cpu" else (letter, problem.size(letter))
        return functools.partial(prepared_integers, argument, bound)
    given = problem.gives(argument.name)
    assert given is not None
    return None if value.dim() == len(given.shape) else functools.partial(_broadcastable, given.shape)


def _admitted(argument: Argument, value: Any) -> float:
    if value.__class__ is float and isfinite(value) and argument.admits is None:
        return value
    return check_argument_number(argument, value)


def _broadcastable(shape: tuple[int, ...], value: Tensor) -> Tensor:
    """With all its dimensions."""
    return value.view(shape)


def remember(call: Hashable, problem: Problem, wish: Wish | None, arguments: Sequence[Any]) -> tuple[Plan, bool]:
    """Make the plan for ``problem``, and keep it under the facts of the call unless the choice is still open."""
    registry.discover()
    tuner = registry.tuner
    settled = True
    if tuner is not None and wish is None and registry.autotunes and not problem.is_empty:
        settled = tuner(problem)
    # Taken before the backends are looked at: one that comes meanwhile replaces it, and the plan serves this call alone.
    plans = registry.plans
    plan = make_plan(problem, wish, arguments)
    if settled:
        with suppress(TypeError):  # symbolic sizes, while a call is traced, have no hash
            keep(plans, call, plan, MOST_PLANS)
    return plan, settled


def _nothing(op: Op, differentiable: bool, *inputs: Any, **options: Any) -> tuple[Tensor, ...]:
    """The results of a call in which a tensor has no element: no key is visible.

    Those of a differentiable backend hang on everything, with derivatives of 0.
    """
    tensors, window = inputs[:-1], inputs[-1]
    results = tuple(empty_result(op, name, tensors, window.size).fill_(row.fill) for name, row in op.results.items())
    if differentiable:
        given = [*tensors, *[value for value in options.values() if isinstance(value, Tensor)]]
        zeros = [each.new_zeros(()).where(each.new_ones((), dtype=torch.bool), each.sum()) for each in given]
        zero = torch.stack([each.to(tensors[0].dtype) for each in zeros if each.is_floating_point()]).sum()
        results = tuple(result + zero.to(result.dtype) for result in results)
    return results


def _no_gradients(op: Op, *inputs: Any, needs_grad: frozenset[str], **options: Any) -> dict[str, Tensor]:
    """Its gradients: zeros."""
    tensors = dict(zip(op.tensors, inputs[1:]))
    return {name: torch.zeros_like(tensors[name] if name in tensors else options[name]) for name in needs_grad}


def empty_result(op: Op, name: str, tensors: Sequence[Tensor], window_size: Any) -> Tensor:
    """A result of ``op`` by its row, not initialised."""
    row, first = op.results[name], tensors[0]
    if row.of_rows:
        return first.new_empty(first.shape[:3], dtype=row.dtype(first.dtype))
    last = window_size if row.dims[-1] == "W" else tensors[list(op.tensors.values()).index("NGKD")].shape[-1]
    return empty_like(first, last)
