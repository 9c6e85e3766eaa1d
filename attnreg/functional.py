"""Local attention: the three public functions. Read this file first.

A call becomes a plan, found by the call's bare facts in ``registry.plans`` or else made by ``attnreg.plan``. The plan names
the backend, and the op in ``attnreg.ops`` runs it. On a call whose kind was seen before, nothing else happens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnreg import ops
from attnreg.ops import is_plain, rows
from attnreg.plan import ENVIRONMENT_KEY, TABLE_KEY, Plan, environment, remember, requested
from attnreg.problem import (
    attention_problem,
    check_scale,
    check_window,
    dot_product_problem,
    prepare_key_lengths,
    weighted_average_problem,
)
from attnreg.registry import registry
from attnreg.window import Window

# Bound once: an attribute look-up on torch at each call would be a tenth of what the look-up of a plan costs.
_is_tracing = torch.compiler.is_dynamo_compiling
_is_grad_enabled = torch.is_grad_enabled
_is_autocast_enabled = torch.is_autocast_enabled

# What a look-up raises for a kind of call not seen yet, or for bad arguments, which the checks then name.
_NOT_KNOWN = (KeyError, TypeError, AttributeError)


def local_dot_product(
    query: Tensor,
    key: Tensor,
    window: Window,
    *,
    bias: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """The scores of each query against the keys in its window: ``scale * query . key + bias``.

    Column ``c`` of row ``i`` belongs to key ``i + (Lk - Lq) - window.left + c``. A slot without a visible key (outside the
    sequence, at or past the key length, or hidden by a bias of -inf) is -inf and passes no gradient on.

    Args:
        query: (N, H, Lq, E), of a floating-point dtype.
        key: (N, Hkv, Lk, E), of query's dtype and device; H is a multiple of Hkv, and query head ``h`` reads key head
            ``h // (H // Hkv)``.
        window: which keys a query sees.
        bias: broadcasts to (N, H, Lq, W), any floating-point dtype, added after scaling; -inf hides a slot. Its gradient
            has its own shape.
        key_lengths: (N,), integers in 0..Lk; keys at or past its length are invisible to a sequence's queries.
        scale: factor of the dot products.
        backend: the backend to use, by name; None lets attnreg choose.

    Returns:
        Scores (N, H, Lq, W) in query's dtype, with W = ``window.size``.

    Raises:
        TypeError, ValueError: an argument is bad; the message names it, what it was and what was expected.
        BackendError: the backend asked for cannot run this call, or none can; a ValueError that lists every reason.
    """
    if _is_tracing():
        return _traced_dot_product(query, key, window, bias, key_lengths, scale, backend)
    plan: Plan | None = None
    try:
        call = (
            query.shape,
            key.shape,
            query.dtype,
            query.device,
            window.left,
            window.right,
            None if bias is None and key_lengths is None else _extras(bias, key_lengths),
            backend if backend is not None else requested.get() or environment.get(ENVIRONMENT_KEY),
            environment.get(TABLE_KEY),
            (query.requires_grad or key.requires_grad or (bias is not None and bias.requires_grad))
            and _is_grad_enabled(),
        )
        plan = registry.plans[call]
    except _NOT_KNOWN:
        pass
    if plan is None or not _agree(plan, key, key, bias, key_lengths):
        cast = _autocast(query, key)
        if cast is not None:
            query, key = cast
            return local_dot_product(
                query, key, window, bias=bias, key_lengths=key_lengths, scale=scale, backend=backend
            )
        needs_grad = _needs_grad(query, key, bias)
        problem = dot_product_problem(query, key, window, bias=bias, key_lengths=key_lengths, needs_grad=needs_grad)
        if plan is None:
            plan = remember(call, problem, backend)
    if scale != 1.0:
        scale = check_scale(scale)
    if bias is not None:
        bias = _four_dimensional(bias)
    if key_lengths is not None:
        key_lengths = prepare_key_lengths(key_lengths, plan.problem.key_length)
    scores: Tensor
    run = plan.forward if plan.differentiable or is_plain(query, key) else None
    if run is not None and plan.needs_grad and not plan.differentiable:
        return ops.run_dot_product(
            query, key, bias, key_lengths, run, (window.left, window.right, scale, plan.backend, True)
        )
    if run is not None:
        scores = run(rows(query), rows(key), window, bias=bias, key_lengths=key_lengths, scale=scale)
        return scores
    scores = ops.local_dot_product(
        query, key, bias, key_lengths, window.left, window.right, scale, plan.backend, True, plan.needs_grad
    )
    return scores


def local_weighted_average(
    weights: Tensor,
    value: Tensor,
    window: Window,
    *,
    key_lengths: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The average of the values in each query's window, with the given weights: the counterpart of ``local_dot_product``.

    A slot without a visible key is never read: whatever its weight is, NaN included, it adds nothing and gets gradient 0.

    Args:
        weights: (N, H, Lq, W), of a floating-point dtype; column ``c`` as in ``local_dot_product``.
        value: (N, Hkv, Lk, D), of the weights' dtype and device; H is a multiple of Hkv.
        window: which keys a query sees; its size is W.
        key_lengths: (N,), integers in 0..Lk; keys at or past its length are invisible to a sequence's queries.
        backend: the backend to use, by name; None lets attnreg choose.

    Returns:
        Output (N, H, Lq, D) in the weights' dtype; the row of a query without a visible key is 0.

    Raises:
        TypeError, ValueError, BackendError: as ``local_dot_product``.
    """
    if _is_tracing():
        return _traced_weighted_average(weights, value, window, key_lengths, backend)
    plan: Plan | None = None
    try:
        call = (
            weights.shape,
            value.shape,
            weights.dtype,
            weights.device,
            window.left,
            window.right,
            None if key_lengths is None else (key_lengths.shape, key_lengths.dtype),
            "average",
            backend if backend is not None else requested.get() or environment.get(ENVIRONMENT_KEY),
            environment.get(TABLE_KEY),
            (weights.requires_grad or value.requires_grad) and _is_grad_enabled(),
        )
        plan = registry.plans[call]
    except _NOT_KNOWN:
        pass
    if plan is None or not _agree(plan, value, value, None, key_lengths):
        cast = _autocast(weights, value)
        if cast is not None:
            weights, value = cast
            return local_weighted_average(weights, value, window, key_lengths=key_lengths, backend=backend)
        needs_grad = _needs_grad(weights, value)
        problem = weighted_average_problem(weights, value, window, key_lengths=key_lengths, needs_grad=needs_grad)
        if plan is None:
            plan = remember(call, problem, backend)
    if key_lengths is not None:
        key_lengths = prepare_key_lengths(key_lengths, plan.problem.key_length)
    output: Tensor
    run = plan.forward if plan.differentiable or is_plain(weights, value) else None
    if run is not None and plan.needs_grad and not plan.differentiable:
        return ops.run_weighted_average(
            weights, value, key_lengths, run, (window.left, window.right, plan.backend, True)
        )
    if run is not None:
        output = run(rows(weights), rows(value), window, key_lengths=key_lengths)
        return output
    output = ops.local_weighted_average(
        weights, value, key_lengths, window.left, window.right, plan.backend, True, plan.needs_grad
    )
    return output


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window,
    *,
    bias: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention inside a window: ``softmax(scale * query . key + bias) . value`` over each query's visible keys.

    Fused where the backend fuses it: no tensor of size Lq x W is then in memory.

    Args:
        query: (N, H, Lq, E), of a floating-point dtype.
        key: (N, Hkv, Lk, E), of query's dtype and device; H is a multiple of Hkv, and query head ``h`` reads key and value
            head ``h // (H // Hkv)``.
        value: (N, Hkv, Lk, D), likewise.
        window: which keys a query sees.
        bias: broadcasts to (N, H, Lq, W), any floating-point dtype, added after scaling; -inf hides a slot. Its gradient
            has its own shape. ``band_from_dense`` makes one of an (Lq, Lk) mask.
        key_lengths: (N,), integers in 0..Lk; keys at or past its length are invisible to a sequence's queries.
        scale: factor of the dot products; None means ``1 / sqrt(E)``.
        backend: the backend to use, by name; None lets attnreg choose.

    Returns:
        Output (N, H, Lq, D) in query's dtype; the row of a query without a visible key is 0.

    Raises:
        TypeError, ValueError, BackendError: as ``local_dot_product``.
    """
    if _is_tracing():
        return _traced_attention(query, key, value, window, bias, key_lengths, scale, backend)
    plan: Plan | None = None
    try:
        call = (
            query.shape,
            key.shape,
            value.shape,
            query.dtype,
            query.device,
            window.left,
            window.right,
            None if bias is None and key_lengths is None else _extras(bias, key_lengths),
            backend if backend is not None else requested.get() or environment.get(ENVIRONMENT_KEY),
            environment.get(TABLE_KEY),
            (
                query.requires_grad
                or key.requires_grad
                or value.requires_grad
                or (bias is not None and bias.requires_grad)
            )
            and _is_grad_enabled(),
        )
        plan = registry.plans[call]
    except _NOT_KNOWN:
        pass
    if plan is None or not _agree(plan, key, value, bias, key_lengths):
        cast = _autocast(query, key, value)
        if cast is not None:
            query, key, value = cast
            return local_attention(
                query, key, value, window, bias=bias, key_lengths=key_lengths, scale=scale, backend=backend
            )
        needs_grad = _needs_grad(query, key, value, bias)
        problem = attention_problem(
            query, key, value, window, bias=bias, key_lengths=key_lengths, needs_grad=needs_grad
        )
        if plan is None:
            plan = remember(call, problem, backend)
    scale = plan.scale if scale is None else check_scale(scale)
    window = plan.window
    if bias is not None:
        bias = _four_dimensional(bias)
    if key_lengths is not None:
        key_lengths = prepare_key_lengths(key_lengths, plan.problem.key_length)
    output: Tensor
    run = plan.forward if plan.differentiable or is_plain(query, key, value) else None
    if run is not None and plan.needs_grad and not plan.differentiable:
        return ops.run_attention(
            query, key, value, bias, key_lengths, run, (window.left, window.right, scale, plan.backend, True)
        )
    if run is not None:
        output, _ = run(rows(query), rows(key), rows(value), window, bias=bias, key_lengths=key_lengths, scale=scale)
        return output
    output, _ = ops.local_attention(
        query, key, value, bias, key_lengths, window.left, window.right, scale, plan.backend, True, plan.needs_grad
    )
    return output


# Under torch.compile a call is traced once for many: the op itself chooses the backend when the graph runs.


def _traced_dot_product(
    query: Tensor,
    key: Tensor,
    window: Window,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    scale: float,
    backend: str | None,
) -> Tensor:
    check_window(window)
    query, key = _autocast(query, key) or (query, key)
    needs_grad = _needs_grad(query, key, bias)
    if bias is not None:
        bias = _four_dimensional(bias)
    return ops.local_dot_product(
        query, key, bias, key_lengths, window.left, window.right, scale, backend, False, needs_grad
    )


def _traced_weighted_average(
    weights: Tensor, value: Tensor, window: Window, key_lengths: Tensor | None, backend: str | None
) -> Tensor:
    check_window(window)
    weights, value = _autocast(weights, value) or (weights, value)
    needs_grad = _needs_grad(weights, value)
    return ops.local_weighted_average(
        weights, value, key_lengths, window.left, window.right, backend, False, needs_grad
    )


def _traced_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    scale: float | None,
    backend: str | None,
) -> Tensor:
    check_window(window)
    query, key, value = _autocast(query, key, value) or (query, key, value)
    needs_grad = _needs_grad(query, key, value, bias)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    if bias is not None:
        bias = _four_dimensional(bias)
    output, _ = ops.local_attention(
        query, key, value, bias, key_lengths, window.left, window.right, scale, backend, False, needs_grad
    )
    return output


def _extras(bias: Tensor | None, key_lengths: Tensor | None) -> tuple[object, ...]:
    """What a plan is found by of the tensors that few calls give."""
    return (
        None if bias is None else (bias.shape, bias.dtype),
        None if key_lengths is None else (key_lengths.shape, key_lengths.dtype),
    )


def _agree(plan: Plan, key: Tensor, value: Tensor, bias: Tensor | None, key_lengths: Tensor | None) -> bool:
    """Whether what a plan is not found by is as it was when the plan was made: one dtype, one device, no autocast."""
    dtype, device = plan.problem.dtype, plan.problem.device
    return (
        key.dtype is dtype
        and value.dtype is dtype
        and key.device == device
        and value.device == device
        and (bias is None or bias.device == device)
        and (key_lengths is None or key_lengths.device == device)
        and not _is_autocast_enabled(plan.device_type)
    )


def _needs_grad(*tensors: Tensor | None) -> bool:
    return _is_grad_enabled() and any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...] | None:
    """The tensors in autocast's dtype; None where there is nothing to cast. Like torch, it leaves float64 alone."""
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        return None
    device_type = tensors[0].device.type
    if not _is_autocast_enabled(device_type):
        return None
    dtype = torch.get_autocast_dtype(device_type)
    cast = [tensor.is_floating_point() and tensor.dtype not in (dtype, torch.float64) for tensor in tensors]
    return tuple(tensor.to(dtype) if due else tensor for tensor, due in zip(tensors, cast)) if any(cast) else None


def _four_dimensional(bias: Tensor) -> Tensor:
    return bias if bias.dim() == 4 else bias.reshape((1,) * (4 - bias.dim()) + bias.shape)
