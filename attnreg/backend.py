"""What a backend is: a name, its capability as data, and plain functions for the ops that it has."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from math import isnan
from typing import Any, TypeVar

import torch
from torch import Tensor

from attnreg.op import ATTENTION, DOT_PRODUCT, OPS, ROWS, WEIGHTED_AVERAGE, Op
from attnreg.packages import package_version
from attnreg.printable import brief, message, plain, printable, report, trouble, type_name
from attnreg.problem import Problem

# What attention has and the products have not: a composition sees to it between them.
BETWEEN_PRODUCTS = ATTENTION.optional - DOT_PRODUCT.optional - WEIGHTED_AVERAGE.optional

Function = Callable[..., Any]
Gradients = Mapping[str, Tensor]

# The contract between core and backends that is written down in :class:`Backend`. It changes with what a backend must do, not
# with a new argument, which a backend gets only where it takes it.
CONTRACT = 2


class BackendError(ValueError):
    """No backend, or not the one asked for, can run a call; the message lists every reason."""


@dataclass(frozen=True, kw_only=True)
class Capability:
    """What a backend can do, as data. The dispatcher filters by it, ``attnreg.explain`` quotes it.

    Which ops a backend has, and which of them backward, is not repeated here: it is read off the
    functions that the :class:`Backend` holds.

    Attributes:
        dtypes: dtypes of query, key, value and weights.
        devices: torch device types, such as ``{"cuda"}``; None means every device.
        head_dims: admitted sizes of the last dimension of query, key and value; None means every size.
        window_sizes: admitted ``window.size``; None means every size.
        takes: the optional arguments that it handles, by name, such as ``{"bias", "key_lengths"}``, and incoming gradients of
            results but the first, ``"grad_log_sum_exp"``; a call that gives or needs another one is refused. None means those
            that its functions name.
        grouped_heads: whether there may be fewer key/value heads than query heads.
        unequal_lengths: whether the numbers of queries and keys may differ.

    Raises:
        TypeError, ValueError: a field is not what it should be; the message names it.
    """

    dtypes: Collection[torch.dtype]
    devices: Collection[str] | None = None
    head_dims: Collection[int] | None = None
    window_sizes: Collection[int] | None = None
    takes: Collection[str] | None = None
    grouped_heads: bool = True
    unequal_lengths: bool = True

    def __post_init__(self) -> None:
        for name, (kind, exact) in _COLLECTIONS.items():
            given = getattr(self, name)
            if given is None and name != "dtypes":
                continue
            if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Collection):
                raise TypeError(f"Capability: {name} must be a collection of {kind}, got {brief(given)}")
            # A copy: what is asked at every call must not change under it, nor have methods of its own.
            kept = []
            for each in (given[0], given[-1]) if isinstance(given, range) and given else given:
                found = exact(each)
                if found is None:
                    raise TypeError(f"Capability: {name} must be a collection of {kind}, got {brief(each)} in it")
                kept.append(found)
            if not kept and name != "takes":
                raise ValueError(f"Capability: {name} is empty; nothing could run")
            object.__setattr__(self, name, given if isinstance(given, range) else frozenset(kept))
        for name in ("grouped_heads", "unequal_lengths"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"Capability: {name} must be True or False, got {brief(getattr(self, name))}")
        known = {argument.name for op in ROWS.values() for argument in op.extras}
        for name in sorted(self.takes or ()):
            if name not in known:
                raise ValueError(f"Capability: takes has {name!r}; the ops' arguments are {', '.join(sorted(known))}")


def _size(given: object) -> int | None:
    size = int.__index__(given) if isinstance(given, int) and not isinstance(given, bool) else 0
    return size if size >= 1 else None


def _device_type(given: object) -> str | None:
    name = _string(given)
    return name if name is not None and name.isidentifier() else None


def _string(given: object) -> str | None:
    return plain(given) if isinstance(given, str) else None


def _dtype(given: object) -> torch.dtype | None:
    return given if isinstance(given, torch.dtype) and given.is_floating_point else None


# What each collection of a capability holds, in words, and what makes that of what is given, without a class of its own; None
# where it is something else.
_COLLECTIONS: Mapping[str, tuple[str, Callable[[object], object]]] = {
    "dtypes": ("floating-point torch.dtype", _dtype),
    "devices": ('device types such as "cuda", without an index', _device_type),
    "head_dims": ("ints of at least 1", _size),
    "window_sizes": ("ints of at least 1", _size),
    "takes": ("arguments' names", _string),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Backend:
    """One implementation of local attention, as the registry knows it.

    The functions take tensors and plain numbers and know nothing of autograd or autocast, which is off where they run. What
    they may rely on:

    - query (N, H, Lq, E), key (N, Hkv, Lk, E), value (N, Hkv, Lk, D) and weights (N, H, Lq, W) share one
      device and one dtype, both in the capability; H is a multiple of Hkv, and query head ``h`` belongs to
      key/value head ``h // (H // Hkv)``. No dimension is 0. The last dimension is contiguous (stride 1);
      the other strides are arbitrary, also 0 for an expanded tensor. This holds for incoming gradients too.
    - A function gets, of the optional arguments of its op, those that ``Capability.takes`` names, and no others; None where
      the call does not give one. Every function of an op that has a ``scale`` gets it, as a float.
    - ``bias`` is a floating-point tensor of four dimensions, each either the full one of
      (N, H, Lq, W) or 1 where it broadcasts, with arbitrary strides and a dtype of its own.
    - ``key_lengths``, ``key_starts`` and ``query_starts`` are contiguous int32 or int64 tensors (N,); ``cu_seqlens_q`` and
      ``cu_seqlens_k`` such tensors (S + 1,), of calls with N = 1 that give none of the other three. ``cu_seqlens_k`` is None
      where it is the same as ``cu_seqlens_q``. On an accelerator their values could not be checked: read a length, a key's
      start and an offset as ``min(max(value, 0), Lk)`` (or Lq); a query's start may be any number. Nothing is read on the host
      there. :mod:`attnreg.rows` says in torch operations which keys rows see.
    - ``seed`` is an int64 tensor (1,) on the tensors' device, and there where ``dropout_p`` is. :mod:`attnreg.dropout` says in
      torch operations which weights are kept.

    What they must keep:

    - Row ``i`` stands at key position ``p = start + i`` and sees keys from ``max(p - left, low)`` up to, not with,
      ``min(p + right + 1, high)``: start is ``Lk - Lq``, low 0 and high ``Lk``, or what ``query_starts``, ``key_starts`` and
      ``key_lengths`` say of its sequence. In a packed call a sequence's rows and keys lie between its offsets, its ends aligned:
      ``start = cu_seqlens_k[s + 1] - cu_seqlens_q[s + 1]``; a row past the last offset sees nothing.
    - Slot ``c`` of row ``i`` is key ``p - left + c``. It is *visible* if the row sees that key and the bias there is not -inf.
      What lies in an invisible slot of ``weights`` or of an incoming gradient, in a key or value that no row sees, and in a row
      that sees no key, is never used, not even multiplied by 0: it may be NaN. Gradients at invisible slots are 0.
    - fp16 and bf16 accumulate in fp32; fp32 is fp32-accurate unless :func:`attnreg.allow_tf32` says otherwise.
    - Results are new tensors that lie in memory as the tensors that they belong to, see :func:`attnreg.empty_like`: what is
      computed for rows as the query (or the weights), a gradient as its tensor. The same call gives the same bits.
    - ``needs_grad`` is a frozenset of the names of those tensors and arguments whose gradients are wanted; a backward function
      returns these gradients by name. A gradient has its input's shape and dtype; that of a broadcast bias is summed to the
      bias' own shape.

    Attributes:
        name: what users write: ``backend="name"``. Letters, digits, "_", "." and "-", which it must not begin with.
        capability: what it can do.
        summary: one line for ``attnreg backends``.
        local_dot_product: ``(query, key, window, *, bias, ..., scale) -> scores`` (N, H, Lq, W), in query's dtype:
            ``scale * query . key + bias``, -inf in invisible slots. ``...`` stands for the arguments of rows that it takes.
        local_dot_product_backward: ``(grad_scores, query, key, window, *, bias, ..., scale, needs_grad) -> gradients``.
        local_weighted_average: ``(weights, value, window, *, ...) -> output`` (N, H, Lq, D).
        local_weighted_average_backward: ``(grad_output, weights, value, window, *, ..., needs_grad) -> gradients``.
        local_attention: ``(query, key, value, window, *, bias, ..., scale, softcap, sinks, dropout_p, seed) -> (output,
            log_sum_exp)``, the output (N, H, Lq, D) and the natural log-sum-exp of each row's visible scores, and of its head's
            sink, (N, H, Lq), contiguous, in float32, or float64 for float64. A row without a visible key has output 0 and
            log-sum-exp -inf. ``S = scale * query . key``, then ``softcap * tanh(S / softcap)``, then ``+ bias``; ``sinks`` (H,)
            add ``exp(sinks[h])`` to the denominator; dropout comes last, and the log-sum-exp knows nothing of it.
        local_attention_backward: ``(grad_output, query, key, value, output, log_sum_exp, window, *, bias, ..., scale, softcap,
            sinks, dropout_p, seed, grad_log_sum_exp, needs_grad) -> gradients``; ``grad_log_sum_exp`` is contiguous, or None.
        differentiable: the forward functions consist of differentiable torch operations: gradients of any order come
            from autograd, and no backward functions are needed.
        unavailable: None where the backend can run on this machine, else the reason why not. Called often: keep it cheap.
        prepare: called before the first use, and only then: builds or loads what is needed. Returns None, or the reason
            why that failed; the backend is then refused with it from there on.
        refuse: a last filter for what the capability cannot say: the reason to refuse a problem, or None.
        options: what users may set, by name, as in ``backend="name:option=value"``: a function that makes the value of what
            was written, and raises ValueError saying what it takes. Every function of the backend gets the options that
            were given, and those alone, as keyword arguments.
        library: the distribution of a library that it calls and that is none of attnreg's own dependencies, as in
            "flash-attn-4": without it the backend cannot run, and its version is stamped on measured tables beside the
            backend's.
        rank: orders the backends that could run a problem where nothing was measured; the lowest is taken. A number or a
            function of the problem. The slow but always right reference is 100.
        workspace: how many bytes a problem needs at the most beside its tensors and results, gradients included where they are
            needed: an int; about is enough. One that needs more than its device can give is not chosen unless it is asked for.
            None for next to nothing.
        contract: the version of this contract that it was written for.

    Raises:
        TypeError, ValueError: a field has the wrong type, no op is there, a backward lacks its forward, a function lacks an
            argument that the capability takes, or the contract is another one than this attnreg's.
    """

    name: str
    capability: Capability
    summary: str = ""
    local_dot_product: Callable[..., Tensor] | None = None
    local_dot_product_backward: Callable[..., Gradients] | None = None
    local_weighted_average: Callable[..., Tensor] | None = None
    local_weighted_average_backward: Callable[..., Gradients] | None = None
    local_attention: Callable[..., tuple[Tensor, Tensor]] | None = None
    local_attention_backward: Callable[..., Gradients] | None = None
    differentiable: bool = False
    unavailable: Callable[[], str | None] | None = None
    prepare: Callable[[], str | None] | None = None
    refuse: Callable[[Problem], str | None] | None = None
    options: Mapping[str, Callable[[str], object]] = field(default_factory=dict)
    library: str | None = None
    rank: float | Callable[[Problem], float] = 50.0
    workspace: Callable[[Problem], int] | None = None
    contract: int = CONTRACT

    @property
    def own_ops(self) -> tuple[str, ...]:
        """The ops that it has a function for; others may be composed of them."""
        return tuple(op for op in OPS if getattr(self, op) is not None)

    def __post_init__(self) -> None:
        name = _string(self.name)
        if name is None or not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            raise ValueError(f"Backend: name must be letters, digits, '_', '-' and '.', got {brief(self.name)}")
        if name.startswith("-"):
            raise ValueError(f"Backend: name must not begin with '-', which excludes a backend, got {name!r}")
        # A class derived from it could check nothing, and answer anything later.
        if type(self.capability) is not Capability:
            raise TypeError(f"Backend {name!r}: capability must be a Capability, got {type_name(self.capability)}")
        for each in fields(self):
            given = getattr(self, each.name)
            if str(each.type).startswith("Callable") and not callable(given) and given is not None:
                raise TypeError(f"Backend {name!r}: {each.name} must be callable, got {brief(given)}")
        library = None if self.library is None else _distribution(self.library)
        if library is None and self.library is not None:
            raise TypeError(f"Backend {name!r}: library must be the name of a distribution, got {brief(self.library)}")
        rank = self.rank if callable(self.rank) else _number(self.rank)
        if rank is None:
            raise TypeError(f"Backend {name!r}: rank must be a number or callable, got {brief(self.rank)}")
        if not isinstance(self.differentiable, bool) or not isinstance(self.summary, str):
            raise TypeError(
                f"Backend {name!r}: differentiable must be True or False and summary a string, got "
                f"{brief(self.differentiable)} and {brief(self.summary)}"
            )
        options = _options(self.options)
        if options is None:
            raise TypeError(f"Backend {name!r}: options must map names to callables, got {brief(self.options)}")
        # Its own, as those of a capability are.
        own = {"name": name, "capability": made_anew(self.capability), "library": library, "rank": rank}
        for field_name, value in {**own, "options": options, "summary": printable(self.summary)}.items():
            object.__setattr__(self, field_name, value)
        if not self.own_ops:
            raise ValueError(f"Backend {self.name!r}: has no op; give at least one of {', '.join(OPS)}")
        for op in OPS:
            if op not in self.own_ops and getattr(self, f"{op}_backward") is not None:
                raise ValueError(f"Backend {self.name!r}: has {op}_backward without {op}")
        if type(self.contract) is not int or self.contract != CONTRACT:
            raise ValueError(
                f"Backend {self.name!r}: it is written for contract {brief(self.contract)}; this attnreg has {CONTRACT}"
            )
        for op in self.own_ops:
            self._check_signatures(ROWS[op])

    @cached_property
    def taken(self) -> Mapping[str, frozenset[str]]:
        """The optional arguments that it handles, by op.

        Of composed attention, those that its dot product takes and shows in the scores, where the average takes them too or does
        not have them; and all that lies between the two products.
        """
        own = {op: self._takes(ROWS[op]) for op in self.own_ops}
        if is_composed(self, ATTENTION):
            without = {argument.name for argument in WEIGHTED_AVERAGE.arguments} - own[WEIGHTED_AVERAGE.name]
            own[ATTENTION.name] = (ATTENTION.optional & own[DOT_PRODUCT.name] - without) | BETWEEN_PRODUCTS
        return own

    def _takes(self, op: Op) -> frozenset[str]:
        if self.capability.takes is not None:
            return op.optional & frozenset(self.capability.takes)
        named = {name: _named(function) for name, function in self._functions(op).items()}
        arguments = op.optional.intersection(*named.values())
        return arguments | {each.name for each in op.incoming if each.name in named.get(op.backward, ())}

    def _functions(self, op: Op) -> dict[str, Function]:
        return {name: function for name in (op.name, op.backward) if (function := getattr(self, name)) is not None}

    def _check_signatures(self, op: Op) -> None:
        of_all = self._takes(op) | {argument.name for argument in op.arguments if argument.for_all}
        for name, function in self._functions(op).items():
            needed = of_all - {argument.name for argument in op.incoming if name != op.backward}
            missing = sorted(needed - _accepted(function, needed))
            if missing:
                raise TypeError(
                    f"Backend {self.name!r}: {getattr(function, '__name__', function)!s} does not accept {', '.join(missing)}, "
                    f"which a function of {op.name} gets"
                )


def _distribution(given: object) -> str | None:
    name = _string(given)
    return name if name is not None and re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", name) else None


def _number(given: object) -> float | None:
    if isinstance(given, bool) or not isinstance(given, (int, float)):
        return None
    try:
        number = float(int.__index__(given)) if isinstance(given, int) else float.__float__(given)
    except OverflowError:
        return None
    return None if isnan(number) else number


def _options(given: object) -> dict[str, Callable[[str], object]] | None:
    if not isinstance(given, Mapping):
        return None
    options = {}
    for option, parse in given.items():
        name = _string(option)
        if name is None or not name.isidentifier() or not callable(parse):
            return None
        options[name] = parse
    return options


Given = TypeVar("Given", Backend, Capability)


def made_anew(given: Given) -> Given:
    """A copy of a backend or a capability, checked as when one is made: it may have been changed since, or never been checked.

    Raises:
        TypeError, ValueError: a field is not what it should be, or not there.
    """
    try:
        return replace(given)
    except AttributeError as error:
        raise TypeError(f"a {type_name(given)} must be made by {type_name(given)}(): {message(error)}") from None


def refusals(backend: Backend, problem: Problem) -> tuple[str, ...]:
    """Every reason why ``backend`` cannot run ``problem``, of which one is whatever is wrong with it; empty if it can."""
    try:
        return tuple(_refusals(backend, problem))
    except BaseException as error:
        return (f"it cannot be asked: {trouble(error)}",)


def is_able(backend: Backend, problem: Problem) -> bool:
    """Whether a backend's capability admits ``problem``, which :func:`facts_of_ability` are enough to tell."""
    try:
        return next(_by_capability(backend, problem), None) is None
    except BaseException as error:
        return not trouble(error)  # which refusals() tells


def facts_of_ability(problem: Problem) -> tuple[object, ...]:
    """All that :func:`is_able` asks of a problem."""
    return (
        problem.op,
        problem.device,
        problem.dtype,
        problem.head_dim,
        problem.value_dim,
        problem.window.size,
        tuple(name for name, _ in problem.given),
        problem.heads == problem.kv_heads,
        problem.query_length == problem.key_length,
        problem.needs_grad,
    )


def why_refused(backend: Backend, problem: Problem) -> str | None:
    """What this machine, or a backend's own last filter, says against a problem that its capability admits."""
    reason = why_unavailable(backend)
    return reason if reason is not None or backend.refuse is None else _ask("refuse", backend.refuse, problem)


def _refusals(backend: Backend, problem: Problem) -> Iterator[str]:
    reasons = [say() for say in _by_capability(backend, problem)]
    yield from reasons
    answer = why_unavailable(backend) if reasons else why_refused(backend, problem)
    if answer is not None:
        yield answer


def _by_capability(backend: Backend, problem: Problem) -> Iterator[Callable[[], str]]:
    """What says each reason that the capability gives."""
    capability, op = backend.capability, ROWS[problem.op]
    for what, given, admitted in (
        ("the device", problem.device.type, capability.devices),
        ("the dtype", problem.dtype, capability.dtypes),
        ("the head_dim of query and key", problem.head_dim, capability.head_dims),
        ("the head_dim of value", problem.value_dim, capability.head_dims),
        ("the window's size", problem.window.size, capability.window_sizes),
    ):
        # A head dim of 0 is that of a tensor that the op does not have.
        if admitted is not None and given not in admitted and given != 0:
            yield partial(_not_admitted, what, given, admitted)
    if not has_op(backend, op):
        yield partial("it has no {}".format, op.name)
    else:
        if problem.needs_grad and not has_backward(backend, op):
            yield partial("gradients are needed and it has no {}".format, op.backward)
        if is_composed(backend, op) and problem.dtype.itemsize < 4 and torch.float32 not in capability.dtypes:
            yield partial("its products would have to run in float32, which it lacks, to make {}".format, op.name)
        taken = backend.taken[op.name]
        for name, _ in problem.given:
            if name not in taken:
                yield partial(_not_taken, name, taken)
    if not capability.grouped_heads and problem.heads != problem.kv_heads:
        yield partial("H = {} and Hkv = {} differ; it takes no grouped heads".format, problem.heads, problem.kv_heads)
    queries, keys = problem.query_length, problem.key_length
    if not capability.unequal_lengths and queries != keys:
        yield partial("Lq = {} and Lk = {} differ; it takes equal lengths only".format, queries, keys)


def _not_admitted(what: str, given: object, admitted: Collection[object]) -> str:
    return printable(f"{what} is {_text(given)}; it takes {_text(admitted)}")


def _not_taken(name: str, taken: frozenset[str]) -> str:
    return f"{name} is given; it takes {_text(taken) or 'none'}"


def option_values(backend: Backend, options: tuple[tuple[str, str], ...]) -> tuple[dict[str, object], tuple[str, ...]]:
    """The values of the options that were asked for, and what is wrong with the others."""
    values: dict[str, object] = {}
    wrong = []
    for option, written in options:
        if option not in backend.options:
            wrong.append(f"it has no option {option!r}; it has {_text(backend.options) or 'none'}")
            continue
        try:
            values[option] = backend.options[option](written)
        except BaseException as error:
            # A ValueError says what the option takes.
            reason = message(error) if issubclass(type(error), ValueError) else trouble(error)
            wrong.append(f"the option {option} is {printable(repr(written))}: {reason}")
    return values, tuple(wrong)


def with_options(backend: Backend, options: tuple[tuple[str, str], ...]) -> Backend:
    """``backend`` with these options given to each of its functions.

    Raises:
        ValueError: the backend does not have them so.
    """
    values, wrong = option_values(backend, options)
    if wrong:
        raise ValueError(f"backend {backend.name!r}: {'; '.join(wrong)}")
    if not values:
        return backend
    functions = {name: getattr(backend, name) for op in OPS for name in (op, f"{op}_backward")}
    bound: dict[str, Any] = {name: partial(function, **values) for name, function in functions.items() if function}
    return replace(backend, **bound)


def why_unavailable(backend: Backend) -> str | None:
    """The reason why ``backend`` cannot run on this machine, or None."""
    reason = None if backend.unavailable is None else _ask("unavailable", backend.unavailable)
    if reason is None and backend.library is not None and package_version(backend.library) is None:
        return f"{backend.library} is not installed"
    return reason


def why_not_prepared(backend: Backend) -> str | None:
    """Prepare ``backend`` for its first use: None, or the reason why that failed."""
    return None if backend.prepare is None else _ask("prepare", backend.prepare)


def has_op(backend: Backend, op: Op) -> bool:
    """Whether ``backend`` has ``op``, of its own or composed of its two products."""
    return getattr(backend, op.name) is not None or (op is ATTENTION and _has_products(backend, ""))


def has_backward(backend: Backend, op: Op) -> bool:
    """Whether ``backend`` has the gradients of ``op``: its own, by autograd, or composed of those of its products."""
    if getattr(backend, op.backward) is not None or (backend.differentiable and getattr(backend, op.name) is not None):
        return True
    return op is ATTENTION and _has_products(backend, "" if backend.differentiable else "_backward")


def is_composed(backend: Backend, op: Op) -> bool:
    """Whether ``backend`` has ``op`` through its products alone."""
    return getattr(backend, op.name) is None and has_op(backend, op)


def _has_products(backend: Backend, suffix: str) -> bool:
    return all(getattr(backend, f"{op.name}{suffix}") is not None for op in (DOT_PRODUCT, WEIGHTED_AVERAGE))


def _named(function: Function) -> frozenset[str]:
    """The parameters that a function names; none where it cannot be told."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return frozenset()
    return frozenset(each.name for each in parameters if each.kind in (each.KEYWORD_ONLY, each.POSITIONAL_OR_KEYWORD))


def _accepted(function: Function, names: frozenset[str]) -> frozenset[str]:
    """Those of ``names`` that a function can be given; all where it cannot be told."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return names
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    return names if takes_any else names & parameters.keys()


# Where a backend that was registered at run time comes from.
THIS_PROCESS = "this process"


@dataclass(frozen=True)
class Entry:
    """A registered backend, and where it comes from.

    Attributes:
        backend: the backend.
        distribution: the distribution whose plug-in offered it, or where it was registered from.
    """

    backend: Backend
    distribution: str


@dataclass(frozen=True)
class Fault:
    """A plug-in that could not be used, or not wholly.

    Attributes:
        plugin: the entry point's name.
        distribution: the distribution that published it.
        error: what went wrong.
    """

    plugin: str
    distribution: str
    error: str

    def __str__(self) -> str:
        return f"plug-in {self.plugin!r} of {self.distribution}: {self.error}"


def _ask(name: str, question: Callable[..., str | None], *arguments: object) -> str | None:
    """The answer of a backend's own function; one that raises, or answers anything else, is a reason, not an exception."""
    try:
        answer = question(*arguments)
        if answer is None:
            return None
        reason = report(answer) if isinstance(answer, str) else ""
        return reason or f"its {name}() answered {brief(answer)}, no reason or None"
    except BaseException as error:
        return f"its {name}() raised {trouble(error)}"


def _text(given: object) -> str:
    if isinstance(given, range):
        steps = "" if given.step == 1 else f" in steps of {given.step}"
        return f"{given[0]} to {given[-1]}{steps}"
    if isinstance(given, Collection) and not isinstance(given, str):
        return ", ".join(sorted(_text(each) for each in given))
    return str(given).removeprefix("torch.")
