"""The three ops for torch: torch.library ops with fake kernels, and their autograd.

Each op has a ``_backward`` op beside it, which is its registered autograd formula. In plain eager work, where nobody
watches (see ``is_plain``), the op is not called at all: the autograd functions at the end call the backend's function
themselves, at a third of the cost.

Every op takes ``backend`` and ``chosen``. ``chosen`` says that the backend's filter has passed this very call;
otherwise the op chooses here, ``backend`` being the name asked for, or None. That is how a compiled graph, whose calls
never pass the plan cache, still gets a backend for the tensors that it really runs on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnreg.composition import Function
from attnreg.plan import chosen_backend
from attnreg.problem import attention_problem, dot_product_problem, prepare_key_lengths, weighted_average_problem
from attnreg.registry import registry
from attnreg.window import Window

_library = torch.library.Library("attnreg", "DEF")

_COMMON = "str? backend, bool chosen"
_BAND = "Tensor? key_lengths, SymInt left, SymInt right"
for schema in (
    f"local_dot_product(Tensor query, Tensor key, Tensor? bias, {_BAND}, float scale, {_COMMON}, bool needs_grad) -> Tensor",
    f"local_dot_product_backward(Tensor grad_scores, Tensor query, Tensor key, Tensor? bias, {_BAND}, float scale, "
    f"{_COMMON}, bool[] needs_grad) -> Tensor[]",
    f"local_weighted_average(Tensor weights, Tensor value, {_BAND}, {_COMMON}, bool needs_grad) -> Tensor",
    f"local_weighted_average_backward(Tensor grad_output, Tensor weights, Tensor value, {_BAND}, {_COMMON}, "
    f"bool[] needs_grad) -> Tensor[]",
    f"local_attention(Tensor query, Tensor key, Tensor value, Tensor? bias, {_BAND}, float scale, {_COMMON}, "
    f"bool needs_grad) -> (Tensor, Tensor)",
    f"local_attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor output, "
    f"Tensor log_sum_exp, Tensor? bias, {_BAND}, float scale, {_COMMON}, bool[] needs_grad) -> Tensor[]",
):
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def _local_dot_product(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    left: int,
    right: int,
    scale: float,
    backend: str | None,
    chosen: bool,
    needs_grad: bool,
) -> Tensor:
    window = _window(left, right)
    if not chosen:
        backend = chosen_backend(
            dot_product_problem(query, key, window, bias=bias, key_lengths=key_lengths, needs_grad=needs_grad), backend
        )
        key_lengths = _prepared(key_lengths, key)
    if not query.numel() or not key.numel():
        return query.new_full((*query.shape[:3], window.size), -torch.inf)
    scores: Tensor = _function(backend, "local_dot_product")(
        rows(query), rows(key), window, bias=bias, key_lengths=key_lengths, scale=scale
    )
    return scores


def _local_dot_product_backward(
    grad_scores: Tensor,
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    left: int,
    right: int,
    scale: float,
    backend: str | None,
    chosen: bool,
    needs_grad: Sequence[bool],
) -> list[Tensor]:
    window = _window(left, right)
    if not chosen:
        backend = chosen_backend(
            dot_product_problem(query, key, window, bias=bias, key_lengths=key_lengths, needs_grad=True), backend
        )
        key_lengths = _prepared(key_lengths, key)
    if not query.numel() or not key.numel():
        return _zeros((query, key, bias), needs_grad)
    gradients = _function(backend, "local_dot_product_backward")(
        rows(grad_scores),
        rows(query),
        rows(key),
        window,
        bias=bias,
        key_lengths=key_lengths,
        scale=scale,
        needs_grad=tuple(needs_grad),
    )
    return _wanted(gradients, needs_grad)


def _local_weighted_average(
    weights: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    left: int,
    right: int,
    backend: str | None,
    chosen: bool,
    needs_grad: bool,
) -> Tensor:
    window = _window(left, right)
    if not chosen:
        backend = chosen_backend(
            weighted_average_problem(weights, value, window, key_lengths=key_lengths, needs_grad=needs_grad), backend
        )
        key_lengths = _prepared(key_lengths, value)
    if not weights.numel() or not value.numel():
        return weights.new_zeros((*weights.shape[:3], value.shape[3]))
    output: Tensor = _function(backend, "local_weighted_average")(
        rows(weights), rows(value), window, key_lengths=key_lengths
    )
    return output


def _local_weighted_average_backward(
    grad_output: Tensor,
    weights: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    left: int,
    right: int,
    backend: str | None,
    chosen: bool,
    needs_grad: Sequence[bool],
) -> list[Tensor]:
    window = _window(left, right)
    if not chosen:
        backend = chosen_backend(
            weighted_average_problem(weights, value, window, key_lengths=key_lengths, needs_grad=True), backend
        )
        key_lengths = _prepared(key_lengths, value)
    if not weights.numel() or not value.numel():
        return _zeros((weights, value), needs_grad)
    gradients = _function(backend, "local_weighted_average_backward")(
        rows(grad_output),
        rows(weights),
        rows(value),
        window,
        key_lengths=key_lengths,
        needs_grad=tuple(needs_grad),
    )
    return _wanted(gradients, needs_grad)


def _local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    left: int,
    right: int,
    scale: float,
    backend: str | None,
    chosen: bool,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    window = _window(left, right)
    if not chosen:
        backend = chosen_backend(
            attention_problem(query, key, value, window, bias=bias, key_lengths=key_lengths, needs_grad=needs_grad),
            backend,
        )
        key_lengths = _prepared(key_lengths, key)
    if not query.numel() or not value.numel():
        log_sum_exp = query.new_full(query.shape[:3], -torch.inf, dtype=_log_sum_exp_dtype(query))
        return query.new_zeros((*query.shape[:3], value.shape[3])), log_sum_exp
    result: tuple[Tensor, Tensor] = _function(backend, "local_attention")(
        rows(query), rows(key), rows(value), window, bias=bias, key_lengths=key_lengths, scale=scale
    )
    return result


def _local_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    left: int,
    right: int,
    scale: float,
    backend: str | None,
    chosen: bool,
    needs_grad: Sequence[bool],
) -> list[Tensor]:
    window = _window(left, right)
    if not chosen:
        backend = chosen_backend(
            attention_problem(query, key, value, window, bias=bias, key_lengths=key_lengths, needs_grad=True), backend
        )
        key_lengths = _prepared(key_lengths, key)
    if not query.numel() or not value.numel():
        return _zeros((query, key, value, bias), needs_grad)
    gradients = _function(backend, "local_attention_backward")(
        rows(grad_output),
        rows(query),
        rows(key),
        rows(value),
        output,
        log_sum_exp,
        window,
        bias=bias,
        key_lengths=key_lengths,
        scale=scale,
        needs_grad=tuple(needs_grad),
    )
    return _wanted(gradients, needs_grad)


def _fake_dot_product(
    query: Tensor, key: Tensor, bias: Any, key_lengths: Any, left: int, right: int, *_: Any
) -> Tensor:
    return query.new_empty((*query.shape[:3], left + right + 1))


def _fake_dot_product_backward(_: Tensor, query: Tensor, key: Tensor, bias: Tensor | None, *rest: Any) -> list[Tensor]:
    return _zeros((query, key, bias), rest[-1])


def _fake_weighted_average(weights: Tensor, value: Tensor, *_: Any) -> Tensor:
    return weights.new_empty((*weights.shape[:3], value.shape[3]))


def _fake_weighted_average_backward(_: Tensor, weights: Tensor, value: Tensor, *rest: Any) -> list[Tensor]:
    return _zeros((weights, value), rest[-1])


def _fake_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    log_sum_exp = query.new_empty(query.shape[:3], dtype=_log_sum_exp_dtype(query))
    return query.new_empty((*query.shape[:3], value.shape[3])), log_sum_exp


def _fake_attention_backward(
    _: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, log_sum_exp: Tensor, bias: Any, *rest: Any
) -> list[Tensor]:
    return _zeros((query, key, value, bias), rest[-1])


for name, implementation, fake in (
    ("local_dot_product", _local_dot_product, _fake_dot_product),
    ("local_dot_product_backward", _local_dot_product_backward, _fake_dot_product_backward),
    ("local_weighted_average", _local_weighted_average, _fake_weighted_average),
    ("local_weighted_average_backward", _local_weighted_average_backward, _fake_weighted_average_backward),
    ("local_attention", _local_attention, _fake_attention),
    ("local_attention_backward", _local_attention_backward, _fake_attention_backward),
):
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"attnreg::{name}", fake, lib=_library)


def is_plain(*tensors: Tensor) -> bool:
    """Whether nobody but autograd watches these tensors: no subclass, no dispatch mode, no functorch transform.

    Then the backend's function can be called as it is. The op, which all those watchers need to see, would cost as much as
    all the rest of a call: about 3 us in a tight loop, and up to 20 where the caches hold other work.
    """
    return not _dispatch_modes() and _functorch_transforms() is None and _PLAIN_TYPES.issuperset(map(type, tensors))


_PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter})
# There is no public question for either.
_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_functorch_transforms: Callable[[], object] = torch._C._functorch.peek_interpreter_stack


local_dot_product: Callable[..., Tensor] = torch.ops.attnreg.local_dot_product.default
local_weighted_average: Callable[..., Tensor] = torch.ops.attnreg.local_weighted_average.default
local_attention: Callable[..., tuple[Tensor, Tensor]] = torch.ops.attnreg.local_attention.default


def _backward(name: str, implementation: Function, tensors: Sequence[Tensor], *arguments: Any) -> list[Tensor]:
    """The wanted gradients: by the op, or by what it is made of where nobody watches."""
    function = implementation if is_plain(*tensors[:2]) else getattr(torch.ops.attnreg, name).default
    gradients: list[Tensor] = function(*tensors, *arguments)
    return gradients


def _differentiate_dot_product(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
    needs_grad = ctx.needs_input_grad[:3]
    tensors = (grad_outputs[0], *ctx.saved_tensors)
    gradients = _backward("local_dot_product_backward", _local_dot_product_backward, tensors, *ctx.rest, needs_grad)
    return _in_place(gradients, needs_grad, ctx)


def _differentiate_weighted_average(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
    needs_grad = ctx.needs_input_grad[:2]
    tensors = (grad_outputs[0], *ctx.saved_tensors)
    gradients = _backward(
        "local_weighted_average_backward", _local_weighted_average_backward, tensors, *ctx.rest, needs_grad
    )
    return _in_place(gradients, needs_grad, ctx)


def _differentiate_attention(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
    needs_grad = ctx.needs_input_grad[:4]
    tensors = (grad_outputs[0], *ctx.saved_tensors)
    gradients = _backward("local_attention_backward", _local_attention_backward, tensors, *ctx.rest, needs_grad)
    return _in_place(gradients, needs_grad, ctx)


def _remember_dot_product(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.rest = inputs[4:-1]


def _remember_weighted_average(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.rest = inputs[3:-1]


def _remember_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, bias, key_lengths, *rest, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, *output, bias, key_lengths)
    ctx.rest = rest


for name, differentiate, remember in (
    ("local_dot_product", _differentiate_dot_product, _remember_dot_product),
    ("local_weighted_average", _differentiate_weighted_average, _remember_weighted_average),
    ("local_attention", _differentiate_attention, _remember_attention),
):
    torch.library.register_autograd(
        f"attnreg::{name}", once_differentiable(differentiate), setup_context=remember, lib=_library
    )


class LocalDotProduct(torch.autograd.Function):
    """``apply(query, key, bias, key_lengths, run, (left, right, scale, backend, True)) -> scores``, ``run`` computing them.

    The numbers are one argument because torch looks at each: in five they would cost another microsecond.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        bias: Tensor | None,
        key_lengths: Tensor | None,
        run: Function,
        rest: tuple[Any, ...],
    ) -> Tensor:
        left, right, scale, *_ = rest
        window = _window(left, right)
        scores: Tensor = run(rows(query), rows(key), window, bias=bias, key_lengths=key_lengths, scale=scale)
        ctx.save_for_backward(query, key, bias, key_lengths)
        ctx.rest = rest
        return scores

    backward: Any = staticmethod(once_differentiable(_differentiate_dot_product))


class LocalWeightedAverage(torch.autograd.Function):
    """``apply(weights, value, key_lengths, run, (left, right, backend, True)) -> output``, ``run`` computing it."""

    @staticmethod
    def forward(
        ctx: Any, weights: Tensor, value: Tensor, key_lengths: Tensor | None, run: Function, rest: tuple[Any, ...]
    ) -> Tensor:
        output: Tensor = run(rows(weights), rows(value), _window(*rest[:2]), key_lengths=key_lengths)
        ctx.save_for_backward(weights, value, key_lengths)
        ctx.rest = rest
        return output

    backward: Any = staticmethod(once_differentiable(_differentiate_weighted_average))


class LocalAttention(torch.autograd.Function):
    """``apply(query, key, value, bias, key_lengths, run, (left, right, scale, backend, True)) -> output``, by ``run``."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        key_lengths: Tensor | None,
        run: Function,
        rest: tuple[Any, ...],
    ) -> Tensor:
        left, right, scale, *_ = rest
        window = _window(left, right)
        output: Tensor
        output, log_sum_exp = run(
            rows(query), rows(key), rows(value), window, bias=bias, key_lengths=key_lengths, scale=scale
        )
        ctx.save_for_backward(query, key, value, output, log_sum_exp, bias, key_lengths)
        ctx.rest = rest
        return output

    backward: Any = staticmethod(once_differentiable(_differentiate_attention))


run_dot_product: Callable[..., Tensor] = LocalDotProduct.apply
run_weighted_average: Callable[..., Tensor] = LocalWeightedAverage.apply
run_attention: Callable[..., Tensor] = LocalAttention.apply


@functools.lru_cache(maxsize=4096)
def _window(left: int, right: int) -> Window:
    return Window(left, right)


def _prepared(key_lengths: Tensor | None, key: Tensor) -> Tensor | None:
    return None if key_lengths is None else prepare_key_lengths(key_lengths, key.shape[2])


def _function(backend: str | None, name: str) -> Function:
    assert backend is not None
    return registry.functions(backend)[name]


def rows(tensor: Tensor) -> Tensor:
    """``tensor`` with a contiguous last dimension, as the contract promises to backends."""
    if tensor.is_contiguous() or tensor.stride()[-1] == 1:
        return tensor
    if tensor.layout is not torch.strided:  # a dense call of the same shapes has passed the checks before
        raise TypeError(f"every tensor must be a dense (strided) one, got layout {tensor.layout}")
    return tensor.contiguous()


def _log_sum_exp_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _zeros(inputs: Sequence[Tensor | None], needs_grad: Sequence[bool]) -> list[Tensor]:
    return [given.new_zeros(given.shape) for given, needed in zip(inputs, needs_grad) if given is not None and needed]


def _wanted(gradients: Sequence[Tensor | None], needs_grad: Sequence[bool]) -> list[Tensor]:
    wanted = [gradient for gradient, needed in zip(gradients, needs_grad) if needed and gradient is not None]
    if len(wanted) != sum(needs_grad):
        raise RuntimeError(f"a backend's backward function left out a gradient that was asked for: {needs_grad}")
    return wanted


def _in_place(gradients: Sequence[Tensor], needs_grad: Sequence[bool], ctx: Any) -> tuple[Tensor | None, ...]:
    """The wanted gradients, each in the place of its input; None elsewhere."""
    remaining = iter(gradients)
    found = (next(remaining) if needed else None for needed in needs_grad)
    return (*found, *(None,) * (len(ctx.needs_input_grad) - len(needs_grad)))
