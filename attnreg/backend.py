"""What a backend is: a name, its capability as data, and plain functions for the ops that it has."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnreg.packages import package_version
from attnreg.problem import OPS, Problem

GradDotProduct = tuple[Tensor | None, Tensor | None, Tensor | None]
GradWeightedAverage = tuple[Tensor | None, Tensor | None]
GradAttention = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


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
        bias: whether a bias is accepted (and, with backward, has its gradient).
        key_lengths: whether per-sequence key lengths are accepted.
        grouped_heads: whether there may be fewer key/value heads than query heads.
        unequal_lengths: whether the numbers of queries and keys may differ.
    """

    dtypes: Collection[torch.dtype]
    devices: Collection[str] | None = None
    head_dims: Collection[int] | None = None
    window_sizes: Collection[int] | None = None
    bias: bool = True
    key_lengths: bool = True
    grouped_heads: bool = True
    unequal_lengths: bool = True


@dataclass(frozen=True, kw_only=True, eq=False)
class Backend:
    """One implementation of local attention, as the registry knows it.

    The functions take tensors and plain numbers and know nothing of autograd. What they may rely on:

    - query (N, H, Lq, E), key (N, Hkv, Lk, E), value (N, Hkv, Lk, D) and weights (N, H, Lq, W) share one
      device and one dtype, both in the capability; H is a multiple of Hkv, and query head ``h`` belongs to
      key/value head ``h // (H // Hkv)``. No dimension is 0. The last dimension is contiguous (stride 1);
      the other strides are arbitrary, also 0 for an expanded tensor. This holds for incoming gradients too.
    - ``bias`` is None or a floating-point tensor of four dimensions, each either the full one of
      (N, H, Lq, W) or 1 where it broadcasts, with arbitrary strides and a dtype of its own.
    - ``key_lengths`` is None or a contiguous int32 or int64 tensor (N,). On an accelerator its values could not be
      checked: read it as ``min(max(length, 0), Lk)``.

    What they must keep:

    - Slot ``c`` of row ``i`` is key ``j = i + (Lk - Lq) - left + c``. It is *visible* if ``0 <= j < Lk``, ``j`` is under
      the sequence's key length, and the bias there is not -inf. What lies in an invisible slot of ``weights`` or of
      an incoming gradient is never used, not even multiplied by 0: it may be NaN. Gradients at invisible slots are 0.
    - fp16 and bf16 accumulate in fp32; fp32 is fp32-accurate unless :func:`attnreg.allow_tf32` says otherwise.
    - Results are new contiguous tensors, and the same call gives the same bits.
    - ``needs_grad`` says which gradients are wanted, in the order in which they are returned; an unwanted one is None.
      A gradient has its input's shape and dtype; that of a broadcast bias is summed to the bias' own shape.

    Attributes:
        name: what users write: ``backend="name"``.
        capability: what it can do.
        summary: one line for ``attnreg backends``.
        local_dot_product: ``(query, key, window, *, bias, key_lengths, scale) -> scores`` (N, H, Lq, W), in query's dtype:
            ``scale * query . key + bias``, -inf in invisible slots.
        local_dot_product_backward: ``(grad_scores, query, key, window, *, bias, key_lengths, scale, needs_grad) ->
            (grad_query, grad_key, grad_bias)``.
        local_weighted_average: ``(weights, value, window, *, key_lengths) -> output`` (N, H, Lq, D).
        local_weighted_average_backward: ``(grad_output, weights, value, window, *, key_lengths, needs_grad) ->
            (grad_weights, grad_value)``.
        local_attention: ``(query, key, value, window, *, bias, key_lengths, scale) -> (output, log_sum_exp)``, the output
            (N, H, Lq, D) and the natural log-sum-exp of each row's visible scores (N, H, Lq), in float32, or float64 for
            float64. A row without a visible key has output 0 and log-sum-exp -inf.
        local_attention_backward: ``(grad_output, query, key, value, output, log_sum_exp, window, *, bias, key_lengths, scale,
            needs_grad) -> (grad_query, grad_key, grad_value, grad_bias)``.
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

    Raises:
        TypeError, ValueError: a field has the wrong type, no op is there, or a backward lacks its forward.
    """

    name: str
    capability: Capability
    summary: str = ""
    local_dot_product: Callable[..., Tensor] | None = None
    local_dot_product_backward: Callable[..., GradDotProduct] | None = None
    local_weighted_average: Callable[..., Tensor] | None = None
    local_weighted_average_backward: Callable[..., GradWeightedAverage] | None = None
    local_attention: Callable[..., tuple[Tensor, Tensor]] | None = None
    local_attention_backward: Callable[..., GradAttention] | None = None
    differentiable: bool = False
    unavailable: Callable[[], str | None] | None = None
    prepare: Callable[[], str | None] | None = None
    refuse: Callable[[Problem], str | None] | None = None
    options: Mapping[str, Callable[[str], object]] = field(default_factory=dict)
    library: str | None = None
    rank: float | Callable[[Problem], float] = 50.0

    @property
    def own_ops(self) -> tuple[str, ...]:
        """The ops that it has a function for; others may be composed of them."""
        return tuple(op for op in OPS if getattr(self, op) is not None)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]+", self.name):
            raise ValueError(f"Backend: name must be letters, digits, '_', '-' and '.', got {self.name!r}")
        if not isinstance(self.capability, Capability):
            raise TypeError(
                f"Backend {self.name!r}: capability must be a Capability, got {type(self.capability).__name__}"
            )
        for each in fields(self):
            given = getattr(self, each.name)
            if str(each.type).startswith("Callable") and not callable(given) and given is not None:
                raise TypeError(f"Backend {self.name!r}: {each.name} must be callable, got {given!r}")
        if self.library is not None and not isinstance(self.library, str):
            raise TypeError(f"Backend {self.name!r}: library must be the name of a distribution, got {self.library!r}")
        if not callable(self.rank) and not isinstance(self.rank, (int, float)):
            raise TypeError(f"Backend {self.name!r}: rank must be a number or callable, got {self.rank!r}")
        if not isinstance(self.options, Mapping) or not all(
            isinstance(option, str) and option.isidentifier() and callable(parse)
            for option, parse in self.options.items()
        ):
            raise TypeError(f"Backend {self.name!r}: options must map names to callables, got {self.options!r}")
        if not any(getattr(self, op) for op in OPS):
            raise ValueError(f"Backend {self.name!r}: has no op; give at least one of {', '.join(OPS)}")
        for op in OPS:
            if getattr(self, f"{op}_backward") and not getattr(self, op):
                raise ValueError(f"Backend {self.name!r}: has {op}_backward without {op}")


def refusals(backend: Backend, problem: Problem) -> tuple[str, ...]:
    """Every reason why ``backend`` cannot run ``problem``; empty if it can."""
    capability = backend.capability
    reasons = []

    def admit(admitted: Collection[object] | None, given: object, what: str) -> None:
        if admitted is not None and given not in admitted:
            reasons.append(f"{what} is {_text(given)}; it takes {_text(admitted)}")

    if not has_op(backend, problem.op):
        reasons.append(f"it has no {problem.op}")
    elif problem.needs_grad and not has_backward(backend, problem.op):
        reasons.append(f"gradients are needed and it has no {problem.op}_backward")
    admit(capability.devices, problem.device.type, "the device")
    admit(capability.dtypes, problem.dtype, "the dtype")
    for what, size in (
        ("the head_dim of query and key", problem.head_dim),
        ("the head_dim of value", problem.value_dim),
    ):
        if size:
            admit(capability.head_dims, size, what)
    admit(capability.window_sizes, problem.window.size, "the window's size")
    if problem.bias_shape is not None and not capability.bias:
        reasons.append("a bias is given; it takes none")
    if problem.has_key_lengths and not capability.key_lengths:
        reasons.append("key_lengths are given; it takes none")
    if problem.heads != problem.kv_heads and not capability.grouped_heads:
        reasons.append(f"H = {problem.heads} and Hkv = {problem.kv_heads} differ; it takes no grouped heads")
    if problem.query_length != problem.key_length and not capability.unequal_lengths:
        reasons.append(f"Lq = {problem.query_length} and Lk = {problem.key_length} differ; it takes equal lengths only")
    reasons += filter(None, [why_unavailable(backend)])
    if backend.refuse is not None and not reasons:
        reasons += filter(None, [_ask(backend.refuse, problem)])
    return tuple(reasons)


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
        except Exception as error:
            wrong.append(f"the option {option} is {written!r}: {error}")
    return values, tuple(wrong)


def with_options(backend: Backend, options: tuple[tuple[str, str], ...]) -> Backend:
    """``backend`` with these options given to each of its functions.

    Raises:
        ValueError: the backend does not have them so.
    """
    values, wrong = option_values(backend, options)
    if wrong:
        raise ValueError(f"backend {backend.name!r}: {'; '.join(wrong)}")
    functions = {name: getattr(backend, name) for op in OPS for name in (op, f"{op}_backward")}
    bound: dict[str, Any] = {name: partial(function, **values) for name, function in functions.items() if function}
    return replace(backend, **bound)


def why_unavailable(backend: Backend) -> str | None:
    """The reason why ``backend`` cannot run on this machine, or None."""
    reason = None if backend.unavailable is None else _ask(backend.unavailable)
    if reason is None and backend.library is not None and package_version(backend.library) is None:
        return f"{backend.library} is not installed"
    return reason


def why_not_prepared(backend: Backend) -> str | None:
    """Prepare ``backend`` for its first use: None, or the reason why that failed."""
    return None if backend.prepare is None else _ask(backend.prepare)


def has_op(backend: Backend, op: str) -> bool:
    """Whether ``backend`` has ``op``, of its own or composed of its two products."""
    return bool(getattr(backend, op)) or (op == "local_attention" and _has_products(backend, ""))


def has_backward(backend: Backend, op: str) -> bool:
    """Whether ``backend`` has the gradients of ``op``: its own, by autograd, or composed of those of its products."""
    if getattr(backend, f"{op}_backward") or (backend.differentiable and getattr(backend, op)):
        return True
    return op == "local_attention" and _has_products(backend, "" if backend.differentiable else "_backward")


def _has_products(backend: Backend, suffix: str) -> bool:
    return all(getattr(backend, f"{op}{suffix}") for op in ("local_dot_product", "local_weighted_average"))


def _ask(question: Callable[..., str | None], *arguments: object) -> str | None:
    """The answer of a backend's own function; one that raises is a reason, not an exception."""
    try:
        return question(*arguments)
    except Exception as error:
        return f"its {getattr(question, '__name__', 'filter')}() raised {type(error).__name__}: {error}"


def _text(given: object) -> str:
    if isinstance(given, range) and given.step == 1:
        return f"{given.start} to {given.stop - 1}"
    if isinstance(given, Collection) and not isinstance(given, str):
        return ", ".join(sorted(_text(each) for each in given))
    return str(given).removeprefix("torch.")
