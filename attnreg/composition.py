"""What a backend lacks is composed: attention from the two products, a backward from a differentiable forward.

The compositions hold no kernel of their own for the products; they call the backend's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnreg.backend import Backend, GradAttention
from attnreg.problem import OPS
from attnreg.window import Window

Function = Callable[..., Any]

# Bytes of scores that composed attention makes at a time, unless the queries of one key head alone have more. A forward holds
# two bands of that size, a backward four.
LARGEST_BAND = 2**30


def complete(backend: Backend) -> dict[str, Function]:
    """All functions of ``backend`` by name (``op`` and ``op_backward``): its own, then those that can be composed."""
    functions: dict[str, Function] = {}
    for name in (*OPS, *(f"{op}_backward" for op in OPS)):
        own = getattr(backend, name)
        if own is not None:
            functions[name] = own
    if {"local_dot_product", "local_weighted_average"} <= functions.keys():
        attention = functools.partial(_attention, functions)
        functions.setdefault("local_attention", functools.partial(_attention_in_parts, attention))
    if backend.differentiable:
        for op in OPS:
            if op in functions:
                functions.setdefault(f"{op}_backward", functools.partial(_BACKWARD_BY_AUTOGRAD[op], functions[op]))
    if {"local_dot_product_backward", "local_weighted_average_backward"} <= functions.keys():
        backward = functools.partial(_attention_backward, functions)
        functions.setdefault("local_attention_backward", functools.partial(_attention_backward_in_parts, backward))
    return functions


@dataclass(frozen=True)
class _Part:
    """The sequences and heads that composed attention works on at a time."""

    batch: slice
    heads: slice
    kv_heads: slice

    def of_queries(self, tensor: Tensor) -> Tensor:
        return tensor[self.batch, self.heads]

    def of_keys(self, tensor: Tensor) -> Tensor:
        return tensor[self.batch, self.kv_heads]

    def of_bias(self, bias: Tensor | None) -> Tensor | None:
        if bias is None:
            return None
        everything = slice(None)
        batch, heads = bias.shape[:2]
        return bias[self.batch if batch > 1 else everything, self.heads if heads > 1 else everything]

    def of_options(self, options: dict[str, Any]) -> dict[str, Any]:
        lengths = options["key_lengths"]
        return {
            **options,
            "bias": self.of_bias(options["bias"]),
            "key_lengths": None if lengths is None else lengths[self.batch],
        }


def _parts(query: Tensor, key: Tensor, window: Window) -> list[_Part]:
    """All of a call as one part, or as parts of ``LARGEST_BAND`` at most: whole sequences, or else heads of one."""
    batch, heads, rows = query.shape[:3]
    kv_heads = key.shape[1]
    if batch * heads * rows * window.size * query.element_size() <= LARGEST_BAND:
        return [_Part(slice(batch), slice(heads), slice(kv_heads))]
    group = heads // kv_heads
    fitting = max(LARGEST_BAND // (group * rows * window.size * query.element_size()), 1)
    per_batch, per_kv_head = max(fitting // kv_heads, 1), min(fitting, kv_heads)
    return [
        _Part(slice(n, n + per_batch), slice(h * group, (h + per_kv_head) * group), slice(h, h + per_kv_head))
        for n in range(0, batch, per_batch)
        for h in range(0, kv_heads, per_kv_head)
    ]


def _joined(parts: list[_Part], tensors: Sequence[Tensor]) -> Tensor:
    """One tensor (N, heads, ...) of those of the parts."""
    rows: dict[int, list[Tensor]] = {}
    for part, tensor in zip(parts, tensors):
        rows.setdefault(part.batch.start, []).append(tensor)
    return torch.cat([torch.cat(row, 1) for row in rows.values()])


def _attention_in_parts(
    attention: Function, query: Tensor, key: Tensor, value: Tensor, window: Window, **options: Any
) -> tuple[Tensor, Tensor]:
    parts = _parts(query, key, window)
    if len(parts) == 1:
        whole: tuple[Tensor, Tensor] = attention(query, key, value, window, **options)
        return whole
    found = [
        attention(part.of_queries(query), part.of_keys(key), part.of_keys(value), window, **part.of_options(options))
        for part in parts
    ]
    outputs, log_sum_exps = zip(*found)
    return _joined(parts, outputs), _joined(parts, log_sum_exps)


def _attention_backward_in_parts(
    backward: Function,
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    window: Window,
    **options: Any,
) -> GradAttention:
    parts = _parts(query, key, window)
    if len(parts) == 1:
        whole: GradAttention = backward(grad_output, query, key, value, output, log_sum_exp, window, **options)
        return whole
    bias, grad_bias = options["bias"], None
    if bias is not None and options["needs_grad"][3]:
        # What the parts give of one gradient is added up in fp32 or wider, and rounded once.
        options["bias"] = bias.to(torch.promote_types(torch.float32, bias.dtype))
        grad_bias = torch.zeros_like(options["bias"], memory_format=torch.contiguous_format)
    found = []
    for part in parts:
        *gradients, grad_part = backward(
            part.of_queries(grad_output),
            part.of_queries(query),
            part.of_keys(key),
            part.of_keys(value),
            part.of_queries(output),
            part.of_queries(log_sum_exp),
            window,
            **part.of_options(options),
        )
        found.append(gradients)
        total = part.of_bias(grad_bias)
        if total is not None:
            total += grad_part
    grad_query, grad_key, grad_value = (
        None if gradients[0] is None else _joined(parts, gradients) for gradients in zip(*found)
    )
    return grad_query, grad_key, grad_value, None if grad_bias is None else grad_bias.to(bias.dtype)


def _attention(
    functions: dict[str, Function],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window,
    *,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    scores = functions["local_dot_product"](query, key, window, bias=bias, key_lengths=key_lengths, scale=scale)
    weights, no_key = _softmax(scores, _every_row_sees_a_key(query, key, window, bias, key_lengths))
    # The largest weight is exp(max(S) - log-sum-exp).
    log_sum_exp = scores.amax(-1) - weights.amax(-1).log()
    if no_key is not None:
        log_sum_exp = log_sum_exp.masked_fill(no_key.squeeze(-1), -torch.inf)
    weights = weights.to(scores.dtype)
    return functions["local_weighted_average"](weights, value, window, key_lengths=key_lengths), log_sum_exp


def _attention_backward(
    functions: dict[str, Function],
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    window: Window,
    *,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    scale: float,
    needs_grad: tuple[bool, bool, bool, bool],
) -> GradAttention:
    scores = functions["local_dot_product"](query, key, window, bias=bias, key_lengths=key_lengths, scale=scale)
    weights = _softmax(scores, _every_row_sees_a_key(query, key, window, bias, key_lengths))[0].to(scores.dtype)
    del output, log_sum_exp
    needs_query, needs_key, needs_value, needs_bias = needs_grad
    needs_scores = needs_query or needs_key or needs_bias
    # dP = dO . V and dV = P^T dO
    grad_weights, grad_value = functions["local_weighted_average_backward"](
        grad_output, weights, value, window, key_lengths=key_lengths, needs_grad=(needs_scores, needs_value)
    )
    if not needs_scores:
        return None, None, grad_value, None
    # dS = P * (dP - rowsum(P * dP)), one kernel of torch. The row sum equals rowsum(dO * O), but cancels to the last bit.
    grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, scores.dtype)
    grad_query, grad_key, grad_bias = functions["local_dot_product_backward"](
        grad_scores,
        query,
        key,
        window,
        bias=bias,
        key_lengths=key_lengths,
        scale=scale,
        needs_grad=(needs_query, needs_key, needs_bias),
    )
    return grad_query, grad_key, grad_value, grad_bias


def _softmax(scores: Tensor, every_row_sees_a_key: bool) -> tuple[Tensor, Tensor | None]:
    """``softmax(S)`` in float32 or wider, 0 in a row without a visible key; and which rows these are, if there may be any."""
    accumulator = torch.float64 if scores.dtype == torch.float64 else torch.float32
    if every_row_sees_a_key:
        return scores.softmax(-1, dtype=accumulator), None
    no_key = scores.amax(-1, keepdim=True) == -torch.inf
    weights = scores.masked_fill(no_key, 0.0).softmax(-1, dtype=accumulator)
    return weights.masked_fill(no_key, 0.0), no_key


def _every_row_sees_a_key(
    query: Tensor, key: Tensor, window: Window, bias: Tensor | None, key_lengths: Tensor | None
) -> bool:
    """Whether that is certain: nothing hides keys, and the first query, which may stand before all of them, sees one."""
    return bias is None and key_lengths is None and key.shape[2] - query.shape[2] + window.right >= 0


def _dot_product_backward_by_autograd(
    forward: Function, grad_scores: Tensor, query: Tensor, key: Tensor, window: Window, **options: Any
) -> tuple[Tensor | None, ...]:
    needs_grad = options.pop("needs_grad")
    bias = options.pop("bias")
    return _gradients(
        lambda query, key, bias: forward(query, key, window, bias=bias, **options),
        (query, key, bias),
        needs_grad,
        grad_scores,
    )


def _weighted_average_backward_by_autograd(
    forward: Function, grad_output: Tensor, weights: Tensor, value: Tensor, window: Window, **options: Any
) -> tuple[Tensor | None, ...]:
    needs_grad = options.pop("needs_grad")
    return _gradients(
        lambda weights, value: forward(weights, value, window, **options), (weights, value), needs_grad, grad_output
    )


def _attention_backward_by_autograd(
    forward: Function,
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    window: Window,
    **options: Any,
) -> tuple[Tensor | None, ...]:
    needs_grad = options.pop("needs_grad")
    bias = options.pop("bias")
    return _gradients(
        lambda query, key, value, bias: forward(query, key, value, window, bias=bias, **options)[0],
        (query, key, value, bias),
        needs_grad,
        grad_output,
    )


_BACKWARD_BY_AUTOGRAD: dict[str, Function] = {
    "local_dot_product": _dot_product_backward_by_autograd,
    "local_weighted_average": _weighted_average_backward_by_autograd,
    "local_attention": _attention_backward_by_autograd,
}


def _gradients(
    forward: Function, inputs: tuple[Tensor | None, ...], needs_grad: tuple[bool, ...], grad_output: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of ``forward(*inputs)`` that are wanted; the forward is computed again to be differentiated."""
    leaves = [
        None if given is None else given.detach().requires_grad_(needed) for given, needed in zip(inputs, needs_grad)
    ]
    wanted = [leaf for leaf, needed in zip(leaves, needs_grad) if leaf is not None and needed]
    with torch.enable_grad(), _autograd_included():
        output = forward(*leaves)
    found = iter(torch.autograd.grad(output, wanted, grad_output, allow_unused=True, materialize_grads=True))
    return tuple(next(found) if leaf is not None and needed else None for leaf, needed in zip(leaves, needs_grad))


def below_autograd(function: Function) -> Function:
    """``function`` run as torch runs its own kernels: its operations record nothing, and each costs a quarter less.

    For a forward that autograd need not see, whose results are new tensors. There is no public name for it.
    """

    def call(*arguments: Any, **options: Any) -> Any:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return function(*arguments, **options)

    return call


def _autograd_included() -> AbstractContextManager[None]:
    """Let autograd record here although this code runs inside an op, below the layer at which torch records.

    Torch has no public way to include that layer again where a dispatch mode or ``below_autograd`` excludes it.
    """
    excluded = torch._C._dispatch_tls_local_exclude_set().remove(torch._C.DispatchKey.AutogradFunctionality)
    guard: AbstractContextManager[None] = torch._C._ForceDispatchKeyGuard(
        torch._C._dispatch_tls_local_include_set(), excluded
    )
    return guard
