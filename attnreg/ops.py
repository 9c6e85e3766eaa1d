"""The ops for torch, made from their rows: torch.library ops with fake kernels, and their autograd.

Each op has a ``_backward`` op beside it. In plain eager work, where nobody watches (see ``is_plain``), no op is called at
all: the autograd function calls the backend's function itself, at a third of the cost. Both paths share that function, and
the plan that runs a call.

An op takes its tensors, its arguments, the window, the backend that was asked for, whether gradients may be asked for, and
whether also of results but the first; it chooses when it runs, on the machine where it runs. Beside its results it returns a
*ticket*, by which the backward finds the backend of its forward: an empty tensor in a storage of as many bytes as the number of
the implementation in this process. A compiled graph carries that along on any device, and nothing has to be read from one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from time import monotonic
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from attnreg.asking import asked_for, wish_of
from attnreg.backend import Function
from attnreg.environ import variables
from attnreg.memory import strides_like
from attnreg.op import ROWS, Op
from attnreg.plan import (
    TABLE_KEY,
    Plan,
    empty_result,
    make_plan,
    plan_for,
    remember,
)
from attnreg.problem import Problem, check, problem_of
from attnreg.registry import registry
from attnreg.request import Wish
from attnreg.window import Window, window_of

# Torch's question for one of them is none that torch.compile can trace.
AUTOCAST_DEVICES = frozenset(
    device
    for device in (
        "cpu",
        "cuda",
        "xpu",
        "mps",
        "hpu",
        "mtia",
        "maia",
        "ipu",
        "xla",
        torch._C._get_privateuse1_backend_name(),
    )
    if torch.amp.is_autocast_available(device)
)
_is_any_autocast_enabled: Callable[[], bool] = torch._C._is_any_autocast_enabled
_is_grad_enabled = torch.is_grad_enabled


Traceable = TypeVar("Traceable", bound=Callable[..., Any])


def beside_graphs(function: Traceable) -> Traceable:
    """Let torch.compile leave ``function``, and all that it calls, as it is where it runs beside a graph.

    So it does where a graph broke. Else each function of a backend, down to its kernels' launches, would become a graph of
    its own. Inside a graph ``function`` is traced as any other.
    """
    dynamo: Any = torch._C._dynamo.eval_frame
    if hasattr(dynamo, "_FrameExecStrategy"):  # torch's own, and no promise
        skip = dynamo._FrameAction.SKIP
        dynamo.set_code_exec_strategy(function.__code__, dynamo._FrameExecStrategy(skip, skip))
    return function


class NotDifferentiable(NotImplementedError, RuntimeError):
    """A derivative or a transform was asked for that the backend of a call does not have; the message says which one does."""


# Running a plan


def find_plan(
    op: Op,
    tensors: Sequence[Tensor],
    window: Window,
    arguments: Sequence[Any],
    backend: str | None,
    needs_grad: bool,
    asked: str | bytes | None,
    all_results: bool = False,
) -> tuple[Plan, bool]:
    """The plan of a call that was checked, found by its problem or made; and whether it is kept.

    ``asked`` is what ``asked_for(backend)`` found.

    Raises:
        BackendError: as the op's public function.
    """
    problem = problem_of(op, tensors, window, arguments, needs_grad=needs_grad, all_results=all_results)
    dims = [value.dim() if isinstance(value, Tensor) else value is None for value in arguments]
    call = (problem, asked, variables.get(TABLE_KEY), *dims)
    try:
        plan: Plan | None = registry.plans.get(call)
    except TypeError:  # sizes without numbers, in a trace, have no hash
        return _plan_of_symbols(problem, wish_of(asked, backend), arguments), False
    return (plan, True) if plan is not None else remember(call, problem, wish_of(asked, backend), arguments)


def _plan_of_symbols(problem: Problem, wish: Wish | None, arguments: Sequence[Any]) -> Plan:
    """The plan of a call that is traced with open sizes: chosen by their numbers here, which it does not hold."""
    sizes = {field.name: _number(getattr(problem, field.name)) for field in fields(problem)}
    window = Window(_number(problem.window.left), _number(problem.window.right))
    given = tuple((name, replace(each, shape=tuple(map(_number, each.shape)))) for name, each in problem.given)
    with_numbers = replace(problem, **{**sizes, "window": window, "given": given})
    return plan_for(problem, make_plan(with_numbers, wish, arguments).implementation, arguments)


def _number(size: Any) -> Any:
    """The number that a symbolic size has in this trace, 1 where it has none; anything else as it is."""
    return size if not isinstance(size, torch.SymInt) else 1 if size.node.hint is None else int(size.node.hint)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Autocast off: it would cast what a backend computes in fp32."""
    if _is_any_autocast_enabled() and device_type in AUTOCAST_DEVICES:
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def run(plan: Plan, tensors: Sequence[Tensor], arguments: Sequence[Any]) -> tuple[Tensor, ...]:
    """The results of a call."""
    if _is_any_autocast_enabled():
        with without_autocast(plan.device_type):
            return plan.run(tensors, arguments)
    return plan.run(tensors, arguments)


def run_backward(
    plan: Plan,
    grads: Sequence[Tensor | None],
    saved: Sequence[Tensor],
    arguments: Sequence[Any],
    needs_grad: Sequence[str],
) -> list[Tensor]:
    """The wanted gradients in the order of ``needs_grad``, each of its input's shape and in its order in memory."""
    op = plan.op
    with without_autocast(plan.device_type):
        gradients = plan.run_backward(grads, saved, arguments, frozenset(needs_grad))
    inputs = inputs_of(op, saved, arguments)
    return [plan.gradient(name, inputs[name], gradients) for name in needs_grad]


def inputs_of(op: Op, tensors: Sequence[Tensor], arguments: Sequence[Any]) -> dict[str, Any]:
    """Tensors and arguments by name."""
    named = {argument.name: value for argument, value in zip(op.arguments, arguments)}
    return {**dict(zip(op.tensors, tensors)), **named}


# Who watches


def is_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether nobody but autograd watches a call of these tensors.

    Then the backend's function can be called as it is. The op, which all others need to see, would cost as much as
    all the rest of a call: about 3 us in a tight loop, and up to 20 where the caches hold other work.
    """
    return not is_watched() and _jit_tracing() is None and are_plain(tensors)


def is_watched() -> bool:
    """Whether there is a dispatch mode, a transform of torch.func or a level of forward-mode AD.

    A trace of torch.jit needs no question on a call whose plan is known: its sizes are tensors, by which none is found.
    """
    return bool(_dispatch_modes()) or _functorch_transforms() is not None or forward_ad._current_level >= 0


def are_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether these are tensors of torch itself, none to be negated when it is read: torch's own ops see to that alone."""
    return PLAIN_TYPES.issuperset(map(type, tensors)) and not any(map(Tensor.is_neg, tensors))


# There is no public question for any of these.
_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_functorch_transforms: Callable[[], object] = torch._C._functorch.peek_interpreter_stack
_jit_tracing: Callable[[], object] = torch._C._get_tracing_state
PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter})


def refuse_transforms(op: Op, tensors: Sequence[Any]) -> None:
    """Raise where torch.func or forward-mode AD asks something of a call that its backend does not have.

    For a backend whose forward consists of torch operations there is no need to ask.
    """
    if _is_transformed():
        raise NotDifferentiable(
            f"{op.name}: transforms of torch.func (grad, vjp, jvp, jacrev, jacfwd, vmap) do not reach into this call's backend; "
            f"{_who_has_it()}. For first derivatives torch.autograd.grad works with every backend"
        )
    if has_tangents(tensors):
        _refuse_forward_mode(op)


def refuse_watchers(op: Op, tensors: Sequence[Any]) -> None:
    """Raise where torch.jit or DTensor asks for a call, which no backend has."""
    if _jit_tracing() is not None:
        raise NotDifferentiable(f"{op.name}: torch.jit.trace is not supported; use torch.export or torch.compile")
    refuse_sharded(op, tensors)


def refuse_sharded(op: Op, tensors: Sequence[Any]) -> None:
    """Raise where a DTensor is given."""
    for tensor in tensors:
        # Dynamo knows the types of both, and not where a parameter's is defined.
        if not isinstance(tensor, Tensor) or type(tensor) is Tensor or type(tensor) is torch.nn.Parameter:
            continue
        if type(tensor).__module__.startswith("torch.distributed.tensor"):
            raise NotDifferentiable(
                f"{op.name}: a {type(tensor).__name__} is given; batch and heads are independent: shard by these, and call "
                f"inside torch.distributed.tensor.experimental.local_map, or on tensor.to_local()"
            )


def are_transformed(tensors: Sequence[Any]) -> bool:
    """Whether :func:`refuse_transforms` has something to say of a call whose backend is not made of torch operations."""
    return _is_transformed() or has_tangents(tensors)


def _is_transformed() -> bool:
    """Whether there is a transform of torch.func but functionalization, which takes the op as it is."""
    if _functorch_transforms() is None:
        return False
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(each.key() != torch._C._functorch.TransformType.Functionalize for each in stack)


_BATCHED: Any = torch._C._parse_dispatch_key("Batched")


def _is_batched(grad: Tensor) -> bool:
    """Whether this gradient is one of a batch, which torch.autograd.grad(is_grads_batched=True) maps over."""
    return bool(torch._C._dispatch_keys(grad).has(_BATCHED))


def has_tangents(tensors: Sequence[Any]) -> bool:
    """Whether a tensor is a dual number of forward-mode AD."""
    return forward_ad._current_level >= 0 and any(
        isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )


def _who_has_it() -> str:
    """What to do. One that has every op, made of torch operations, has all that torch's autograd and transforms have."""
    made_of_torch = [entry.backend for entry in registry.entries if entry.backend.differentiable]
    names = [backend.name for backend in made_of_torch if len(backend.own_ops) == len(ROWS)]
    if not names:
        return "a backend that makes every op of torch operations would have it, and none is registered"
    return f'backend="{names[0]}" has it in eager calls: attnreg.use_backend("{names[0]}"), or backend="{names[0]}" in the call'


def _refuse_forward_mode(op: Op) -> NoReturn:
    raise NotDifferentiable(
        f"{op.name}: forward-mode derivatives (jvp, jacfwd, make_dual) are not there for this call's backend; {_who_has_it()}"
    )


def _refuse_second_derivative(op: Op) -> NoReturn:
    raise NotDifferentiable(
        f"{op.name}: second derivatives are not there for this call's backend (once_differentiable); {_who_has_it()}"
    )


# Autograd


class Differentiated(torch.autograd.Function):
    """``apply(call, *inputs) -> results``: ``inputs`` are the op's tensors, then those among the arguments."""

    @staticmethod
    @beside_graphs
    def forward(ctx: Any, call: Direct | Traced, *inputs: Tensor) -> Any:
        ctx.call = call
        returned, kept = call.forward(ctx, inputs)
        ctx.save_for_backward(*inputs, *kept)
        if returned.__class__ is tuple:
            # Who asks for one result alone has no gradient of the others, which zeros would cost time to say.
            ctx.set_materialize_grads(False)
        return returned

    @staticmethod
    @beside_graphs
    def backward(ctx: Any, *grads: Any) -> Any:
        call: Direct | Traced = ctx.call
        needed = ctx.needs_input_grad[1:]
        needs_grad = [name for name, wanted in zip((*call.op.tensors, *call.given), needed) if wanted]
        count = len(call.op.tensors) + len(call.given)
        held = ctx.saved_tensors
        grads = grads[: 1 + len(call.op.incoming)]
        if grads[0] is None:
            if all(grad is None for grad in grads):
                return (None,) * (1 + count)
            # An op with more than one result keeps them.
            grads = (torch.zeros_like(held[count]), *grads[1:])
        gradients = iter(call.backward(grads, held[:count], held[count:], needs_grad))
        return (None, *[next(gradients) if wanted else None for wanted in needed])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        _refuse_forward_mode(ctx.call.op)


# What `Differentiated.apply` runs after it has looked for transforms of torch.func: half of its cost, where there are none.
_apply: Callable[..., Any] = super(torch.autograd.Function, Differentiated).apply


def differentiated(plan: Plan, inputs: Sequence[Tensor], arguments: Sequence[Any]) -> tuple[Tensor, ...]:
    """The results of a call that nobody watches, with their gradients; the first alone where no others have one."""
    results = _apply(Direct(plan, arguments), *inputs)
    return results if results.__class__ is tuple else (results,)


class _Call:
    """One call's arguments, without the tensors among them, which autograd keeps.

    Attributes:
        op: the op.
        places: of the arguments that are tensors.
        given: their names.
        rest: the arguments, None in those places.
    """

    __slots__ = ("given", "op", "places", "rest")

    op: Op
    places: Sequence[int]
    given: Sequence[str]
    rest: Sequence[Any]

    def split(self, inputs: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Any]]:
        """The op's tensors, and all arguments as they were given."""
        if not self.places:
            return inputs, self.rest
        count = len(self.op.tensors)
        arguments = [*self.rest]
        for place, tensor in zip(self.places, inputs[count:]):
            arguments[place] = tensor
        return inputs[:count], arguments


def _without(arguments: Sequence[Any], places: Sequence[int]) -> Sequence[Any]:
    """``arguments`` with None in these places."""
    rest = [*arguments]
    for place in places:
        rest[place] = None
    return rest


class Direct(_Call):
    """A call by its plan, where nobody watches."""

    __slots__ = ("plan",)

    def __init__(self, plan: Plan, arguments: Sequence[Any]) -> None:
        self.plan, self.op, self.places, self.given = plan, plan.op, plan.places, plan.given_tensors
        self.rest = arguments

    def forward(self, ctx: Any, inputs: Sequence[Tensor]) -> tuple[Any, Sequence[Tensor]]:
        if self.places:
            results = run(self.plan, inputs[: len(self.op.tensors)], self.rest)
            self.rest = _without(self.rest, self.places)
        else:
            results = run(self.plan, inputs, self.rest)
        return results if self.plan.all_results else results[0], results if self.op.keeps_results else ()

    def backward(
        self, grads: Sequence[Any], inputs: Sequence[Tensor], kept: Sequence[Tensor], needs_grad: list[str]
    ) -> list[Tensor]:
        tensors, arguments = self.split(inputs)
        given = [grad for grad in grads if grad is not None]
        # Where grad mode is on, somebody means to differentiate the gradients: the op's own autograd refuses that.
        if not _is_grad_enabled() and is_plain((*given, *inputs, *kept)) and not any(map(_is_batched, given)):
            return run_backward(self.plan, grads, (*tensors, *kept), arguments, needs_grad)
        refuse_watchers(self.op, (*given, *inputs))
        plan, window = self.plan, self.plan.problem.window
        rest = (window.left, window.right, str(plan.implementation.request), _ticket(tensors[0], plan), needs_grad)
        grads = _padded(self.op, grads)
        gradients: list[Tensor] = _OVERLOADS[self.op.backward](*grads, *tensors, *kept, *arguments, *rest)
        return gradients


class Traced(_Call):
    """A call of the op, for whoever watches."""

    __slots__ = ("how",)

    def __init__(self, op: Op, arguments: Sequence[Any], how: tuple[Any, ...]) -> None:
        self.op, self.how = op, how
        self.places = [place for place, each in enumerate(arguments) if isinstance(each, Tensor)]
        self.given = [op.arguments[place].name for place in self.places]
        self.rest = _without(arguments, self.places)

    def forward(self, ctx: Any, inputs: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Sequence[Tensor]]:
        tensors, arguments = self.split(inputs)
        with torch._C._AutoDispatchBelowAutograd():
            results: tuple[Tensor, ...] = _OVERLOADS[self.op.name](*tensors, *arguments, *self.how)
        # The last result is the ticket.
        all_results = self.how[-1]
        ctx.mark_non_differentiable(*(results[-1:] if all_results else results[1:]))
        return results, results if self.op.keeps_results else results[-1:]

    def backward(
        self, grads: Sequence[Any], inputs: Sequence[Tensor], kept: Sequence[Tensor], needs_grad: list[str]
    ) -> list[Tensor]:
        tensors, arguments = self.split(inputs)
        left, right, backend, *_ = self.how
        *results, ticket = kept
        gradients: list[Tensor] = _OVERLOADS[self.op.backward](
            *_padded(self.op, grads), *tensors, *results, *arguments, left, right, backend, ticket, needs_grad
        )
        return gradients


def _padded(op: Op, grads: Sequence[Any]) -> tuple[Any, ...]:
    """An incoming gradient for each result, None where there is none."""
    return (*grads, *[None] * (1 + len(op.incoming) - len(grads)))


class _Once(torch.autograd.Function):
    """The backward op, whose results cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, op: Op, *inputs: Any) -> tuple[Tensor, ...]:
        ctx.op = op
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(_OVERLOADS[op.backward](*inputs))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        _refuse_second_derivative(ctx.op)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        _refuse_forward_mode(ctx.op)


# The ops


# By name.
_OVERLOADS: dict[str, Callable[..., Any]] = {}


def call_op(
    op: Op,
    tensors: Sequence[Tensor],
    window: Window,
    arguments: Sequence[Any],
    backend: str | None,
    needs_grad: bool,
    all_results: bool,
) -> tuple[Tensor, ...]:
    """The op's results, by way of torch's dispatcher."""
    results: tuple[Tensor, ...] = _OVERLOADS[op.name](
        *tensors, *arguments, window.left, window.right, backend, needs_grad, all_results
    )
    return results[: len(op.results)]


def _ticket(like: Tensor, plan: Plan) -> Tensor:
    number = registry.ticket(plan.implementation)
    ticket = _empty_ticket(like, number)
    return ticket.fill_(number) if ticket.numel() else ticket


def _empty_ticket(like: Tensor, number: int = 0) -> Tensor:
    if like.device.type == "cpu":
        return like.new_empty(1, dtype=torch.int64)
    return like.new_empty(number, dtype=torch.uint8)[:0]


def _number_of(ticket: Tensor) -> int:
    return int(ticket.item()) if ticket.numel() else ticket.untyped_storage().nbytes()


def _checked_plan(
    op: Op,
    tensors: Sequence[Tensor],
    window: Window,
    arguments: Sequence[Any],
    backend: str | None,
    needs_grad: bool,
    all_results: bool,
) -> Plan:
    """The plan of a call that may come from anywhere."""
    check(op, tensors, window, arguments)
    if monotonic() > registry.next_look:
        registry.look_at_tables()
    return find_plan(op, tensors, window, arguments, backend, needs_grad, asked_for(backend), all_results)[0]


@beside_graphs
def _kernel(op: Op, *inputs: Any) -> tuple[Tensor, ...]:
    tensors, arguments, (left, right, backend, needs_grad, all_results) = _split(op, inputs)
    plan = _checked_plan(op, tensors, window_of(left, right), arguments, backend, needs_grad, all_results)
    results = run(plan, tensors, arguments)
    # A compiled graph reads them as its fake kernel said that they are: what is wrong with them would be read as numbers.
    plan.check_results(results if len(results) > 1 else results[0], tensors, arguments)
    return (*results, _ticket(tensors[0], plan))


@beside_graphs
def _backward_kernel(op: Op, *inputs: Any) -> list[Tensor]:
    grads, saved, arguments, (left, right, backend, ticket, needs_grad) = _split_backward(op, inputs)
    tensors, window = saved[: len(op.tensors)], window_of(left, right)
    all_results = any(grad is not None for grad in grads[1:])
    implementation = registry.by_ticket(_number_of(ticket))
    if implementation is None:
        plan = _checked_plan(op, tensors, window, arguments, backend, True, all_results)
    else:
        problem = problem_of(op, tensors, window, arguments, needs_grad=True, all_results=all_results)
        plan = plan_for(problem, implementation, arguments)
    return run_backward(plan, grads, saved, arguments, needs_grad)


def _fake(op: Op, *inputs: Any) -> tuple[Tensor, ...]:
    tensors, _, (left, right, *_) = _split(op, inputs)
    size = left + right + 1
    return (*(empty_result(op, name, tensors, size) for name in op.results), _empty_ticket(tensors[0]))


def _fake_backward(op: Op, *inputs: Any) -> list[Tensor]:
    _, saved, arguments, (*_, needs_grad) = _split_backward(op, inputs)
    named = inputs_of(op, saved, arguments)
    return [_empty_gradient(named[name]) for name in needs_grad]


def _empty_gradient(tensor: Tensor) -> Tensor:
    strides = strides_like(tensor)
    return tensor.new_empty_strided(tensor.shape, strides)


def _autograd(op: Op, *inputs: Any) -> tuple[Tensor, ...]:
    _refuse_here(op, inputs)
    if _is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in inputs):
        tensors, arguments, rest = _split(op, inputs)
        given = [each for each in arguments if isinstance(each, Tensor)]
        # A program that was exported without gradients may be differentiated all the same: its `needs_grad` does not count.
        call = Traced(op, arguments, (*rest[:-2], True, rest[-1]))
        results: tuple[Tensor, ...] = Differentiated.apply(call, *tensors, *given)  # type: ignore[no-untyped-call]
        return results
    with torch._C._AutoDispatchBelowAutograd():
        return _OVERLOADS[op.name](*inputs)  # type: ignore[no-any-return]


def _autograd_of_backward(op: Op, *inputs: Any) -> list[Tensor]:
    _refuse_here(op, inputs)
    if _is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in inputs):
        return list(_Once.apply(op, *inputs))  # type: ignore[no-untyped-call]
    with torch._C._AutoDispatchBelowAutograd():
        gradients: list[Tensor] = _OVERLOADS[op.backward](*inputs)
    return gradients


def _refuse_here(op: Op, inputs: Sequence[Any]) -> None:
    if are_transformed(inputs):
        refuse_transforms(op, inputs)


def _batched(op: Op, *inputs: Any) -> NoReturn:
    raise NotDifferentiable(
        f"{op.name}: vmap, which is_grads_batched and vectorize ask for too, does not reach into this call's backend; "
        f"{_who_has_it()}"
    )


def _split(op: Op, inputs: Sequence[Any]) -> tuple[Sequence[Tensor], Sequence[Any], Sequence[Any]]:
    count = len(op.tensors)
    end = count + len(op.arguments)
    return inputs[:count], inputs[count:end], inputs[end:]


def _split_backward(
    op: Op, inputs: Sequence[Any]
) -> tuple[Sequence[Any], Sequence[Tensor], Sequence[Any], Sequence[Any]]:
    """Incoming gradients, what was saved, the arguments, and the rest."""
    first = 1 + len(op.incoming)
    second = first + len(op.tensors) + (len(op.results) if op.keeps_results else 0)
    third = second + len(op.arguments)
    return inputs[:first], inputs[first:second], inputs[second:third], inputs[third:]


def _schemas(op: Op) -> Iterator[str]:
    tensors = [f"Tensor {name}" for name in op.tensors]
    arguments = [f"{argument.schema} {argument.name}" for argument in op.arguments]
    window = ["SymInt left", "SymInt right", "str? backend"]
    results = ", ".join(["Tensor"] * (len(op.results) + 1))
    yield f"{op.name}({', '.join([*tensors, *arguments, *window, 'bool needs_grad', 'bool all_results'])}) -> ({results})"
    kept = [f"Tensor {name}" for name in op.results] if op.keeps_results else []
    grads = [f"Tensor grad_{next(iter(op.results))}", *[f"Tensor? {argument.name}" for argument in op.incoming]]
    inputs = [*grads, *tensors, *kept, *arguments, *window, "Tensor ticket", "str[] needs_grad"]
    yield f"{op.backward}({', '.join(inputs)}) -> Tensor[]"


_library = torch.library.Library("attnreg", "DEF")


def _define(op: Op) -> None:
    for schema in _schemas(op):
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    kernels: Mapping[str, tuple[Function, Function, Function]] = {
        op.name: (_kernel, _fake, _autograd),
        op.backward: (_backward_kernel, _fake_backward, _autograd_of_backward),
    }
    for name, (kernel, fake, autograd) in kernels.items():
        _library.impl(name, functools.partial(kernel, op), "CompositeExplicitAutograd")
        _library.impl(name, functools.partial(autograd, op), "Autograd")
        for key in ("FuncTorchBatched", "Batched"):
            _library.impl(name, functools.partial(_batched, op), key)
        torch.library.register_fake(f"attnreg::{name}", functools.partial(fake, op), lib=_library)
        _OVERLOADS[name] = getattr(torch.ops.attnreg, name).default


for row in ROWS.values():
    _define(row)
