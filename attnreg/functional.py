"""Local attention: the public functions. Read this file first.

A call becomes a plan, which names the backend and runs the call. Plans of earlier calls are kept in ``registry.plans`` by
kind: op, window and what is given. Where a guard finds that the tensors are like those of such a call, its plan serves, and
nothing else happens; else ``attnreg.plan`` makes one. Where somebody watches, a tracer or a dispatch mode, the op of
``attnreg.ops`` is called instead, which finds its plan when it runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnreg.asking import asked_for
from attnreg.dropout import blank_seed, draw_seed, fill_seed
from attnreg.environ import variables
from attnreg.guard import guard
from attnreg.op import ATTENTION, DOT_PRODUCT, DROPOUT, WEIGHTED_AVERAGE, Op
from attnreg.ops import (
    AUTOCAST_DEVICES,
    are_transformed,
    beside_graphs,
    call_op,
    differentiated,
    find_plan,
    is_plain,
    is_watched,
    refuse_sharded,
    refuse_transforms,
    refuse_watchers,
    run,
)
from attnreg.plan import MOST_PLANS, TABLE_KEY, Plan
from attnreg.problem import check, check_alone
from attnreg.registry import keep, registry
from attnreg.request import written
from attnreg.unknown import answers, wrong_call
from attnreg.window import Window

if TYPE_CHECKING:
    from typing_extensions import Never

# Bound once: an attribute look-up on torch at each call would be a tenth of what the look-up of a plan costs.
_is_tracing = torch.compiler.is_dynamo_compiling
_is_grad_enabled = torch.is_grad_enabled
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled

# What the key of a call keeps of a number is that it is given.
_NUMBERS = frozenset({float, int})
# Calls of one kind that are kept, newest first; the plans of all others are found by their problem.
MOST_CALLS = 8
# What a look-up raises for bad arguments, which the checks then name.
_BAD = (TypeError, AttributeError, RuntimeError)


@answers
def local_dot_product(
    query: Tensor,
    key: Tensor,
    window: Window,
    *_more: Never,
    bias: Tensor | None = None,
    key_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    query_starts: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float = 1.0,
    backend: str | Sequence[str] | None = None,
    **_unknown: Never,
) -> Tensor:
    """The scores of each query against the keys in its window: ``scale * query . key + bias``.

    Column ``c`` of row ``i`` belongs to key ``p - window.left + c``, where ``p = i + (Lk - Lq)`` is the key position at which
    the row stands, unless the arguments of rows say another. A slot without a visible key (outside the sequence, hidden by these
    arguments or by a bias of -inf) is -inf and passes no gradient on. The arguments of rows are int32 or int64 tensors on the
    query's device; a GPU's are never read on the host, so that their values are not checked there.

    Args:
        query: (N, H, Lq, E), of a floating-point dtype.
        key: (N, Hkv, Lk, E), of query's dtype and device; H is a multiple of Hkv, and query head ``h`` reads key head
            ``h // (H // Hkv)``.
        window: which keys a query sees.
        bias: broadcasts to (N, H, Lq, W), any floating-point dtype, added after scaling; ``-inf`` hides a slot. Its gradient
            has its own shape.
        key_lengths: (N,), integers in 0..Lk; keys at or past its length are invisible to a sequence's queries.
        key_starts: (N,), integers in 0..Lk; keys before its start are invisible to a sequence's queries, as left padding.
        query_starts: (N,), integers; the key position at which a sequence's first query stands, instead of ``Lk - Lq``.
        cu_seqlens_q: (S + 1,), integers from 0 up to Lq: of S sequences packed one after the other into (1, H, Lq, E), where each
            begins and the last ends. Ends of queries and keys are aligned in each. Rows past the last offset see nothing. Not
            together with the three above.
        cu_seqlens_k: (S + 1,), likewise of the keys; None means ``cu_seqlens_q``.
        scale: factor of the dot products.
        backend: the backend to use, by name; a list asks for the first that can run the call, and ``"-name"`` in it for any
            other; None lets attnreg choose.

    Returns:
        Scores (N, H, Lq, W) in query's dtype, with W = ``window.size``.

    Raises:
        TypeError, ValueError: an argument is bad; the message names it, what it was and what was expected.
        BackendError: the backend asked for cannot run this call, or none can; a ValueError that lists every reason.
    """
    if _unknown or _more:
        raise wrong_call(local_dot_product, _unknown, _more)
    rows = (key_lengths, key_starts, query_starts, cu_seqlens_q, _other(cu_seqlens_k, cu_seqlens_q))
    return _call(DOT_PRODUCT, (query, key), window, (bias, *rows, scale), backend)[0]


@answers
def local_weighted_average(
    weights: Tensor,
    value: Tensor,
    window: Window,
    *_more: Never,
    key_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    query_starts: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    backend: str | Sequence[str] | None = None,
    **_unknown: Never,
) -> Tensor:
    """The average of the values in each query's window, with the given weights: the counterpart of ``local_dot_product``.

    A slot without a visible key is never read: whatever its weight is, NaN included, it adds nothing and gets gradient 0.

    Args:
        weights: (N, H, Lq, W), of a floating-point dtype; column ``c`` as in ``local_dot_product``.
        value: (N, Hkv, Lk, D), of the weights' dtype and device; H is a multiple of Hkv.
        window: which keys a query sees; its size is W.
        key_lengths: (N,), integers in 0..Lk; keys at or past its length are invisible to a sequence's queries.
        key_starts: (N,), integers in 0..Lk; keys before its start are invisible to a sequence's queries, as left padding.
        query_starts: (N,), integers; the key position at which a sequence's first query stands, instead of ``Lk - Lq``.
        cu_seqlens_q: (S + 1,), integers from 0 up to Lq: of S sequences packed one after the other into (1, H, Lq, E), where each
            begins and the last ends. Ends of queries and keys are aligned in each. Rows past the last offset see nothing. Not
            together with the three above.
        cu_seqlens_k: (S + 1,), likewise of the keys; None means ``cu_seqlens_q``.
        backend: the backend to use, by name; a list asks for the first that can run the call, and ``"-name"`` in it for any
            other; None lets attnreg choose.

    Returns:
        Output (N, H, Lq, D) in the weights' dtype; the row of a query without a visible key is 0.

    Raises:
        TypeError, ValueError, BackendError: as ``local_dot_product``.
    """
    if _unknown or _more:
        raise wrong_call(local_weighted_average, _unknown, _more)
    rows = (key_lengths, key_starts, query_starts, cu_seqlens_q, _other(cu_seqlens_k, cu_seqlens_q))
    return _call(WEIGHTED_AVERAGE, (weights, value), window, rows, backend)[0]


@answers
def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window,
    *_more: Never,
    bias: Tensor | None = None,
    key_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    query_starts: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: str | Sequence[str] | None = None,
    **_unknown: Never,
) -> Tensor:
    """Softmax attention inside a window: ``softmax(scale * query . key + bias) . value`` over each query's visible keys.

    Fused where the backend fuses it: no tensor of size Lq x W is then in memory.

    Args:
        query: (N, H, Lq, E), of a floating-point dtype.
        key: (N, Hkv, Lk, E), of query's dtype and device; H is a multiple of Hkv, and query head ``h`` reads key and value
            head ``h // (H // Hkv)``.
        value: (N, Hkv, Lk, D), likewise.
        window: which keys a query sees.
        bias: broadcasts to (N, H, Lq, W), any floating-point dtype, added after scaling and soft cap; ``-inf`` hides a slot. Its
            gradient has its own shape. ``band_from_dense`` makes one of an (Lq, Lk) mask.
        key_lengths: (N,), integers in 0..Lk; keys at or past its length are invisible to a sequence's queries.
        key_starts: (N,), integers in 0..Lk; keys before its start are invisible to a sequence's queries, as left padding.
        query_starts: (N,), integers; the key position at which a sequence's first query stands, instead of ``Lk - Lq``.
        cu_seqlens_q: (S + 1,), integers from 0 up to Lq: of S sequences packed one after the other into (1, H, Lq, E), where each
            begins and the last ends. Ends of queries and keys are aligned in each. Rows past the last offset see nothing. Not
            together with the three above.
        cu_seqlens_k: (S + 1,), likewise of the keys; None means ``cu_seqlens_q``.
        scale: factor of the dot products; None means ``1 / sqrt(E)``.
        softcap: a number greater than 0: scores become ``softcap * tanh(score / softcap)``, as in Gemma 2. None leaves them.
        sinks: (H,), any floating-point dtype: ``exp(sinks[h])`` is added to the denominator of the softmax in every row of head
            ``h``, and to no output, as in gpt-oss; finite, or -inf for none. It has a gradient.
        dropout_p: the share of weights that are dropped, at least 0 and less than 1; kept weights are divided by
            ``1 - dropout_p``. Every backend drops the same weights for the same seed.
        seed: an int64 tensor of one element on query's device, the key of the dropout's generator; None draws one from torch's
            generator of that device, so that ``torch.manual_seed`` repeats a call.
        backend: the backend to use, by name; a list asks for the first that can run the call, and ``"-name"`` in it for any
            other; None lets attnreg choose.

    Returns:
        Output (N, H, Lq, D) in query's dtype; the row of a query without a visible key is 0.

    Raises:
        TypeError, ValueError, BackendError: as ``local_dot_product``.
    """
    if _unknown or _more:
        raise wrong_call(local_attention, _unknown, _more)
    rows = (key_lengths, key_starts, query_starts, cu_seqlens_q, _other(cu_seqlens_k, cu_seqlens_q))
    dropout_p, seed, blank = _dropout(query, dropout_p, seed)
    arguments = (bias, *rows, scale, softcap, sinks, dropout_p, seed)
    return _call(ATTENTION, (query, key, value), window, arguments, backend, blank=blank)[0]


@answers
def local_attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window,
    *_more: Never,
    bias: Tensor | None = None,
    key_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    query_starts: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: str | Sequence[str] | None = None,
    **_unknown: Never,
) -> tuple[Tensor, Tensor]:
    """``local_attention``, whose arguments it takes, and the log-sum-exp of each row's scores; both are differentiable.

    Two calls over different keys of one query are so merged into one: with ``total = logaddexp(lse_1, lse_2)`` the output is
    ``exp(lse_1 - total) * output_1 + exp(lse_2 - total) * output_2``.

    Returns:
        The output (N, H, Lq, D) in query's dtype; and the natural logarithm of the sum of the exponentials of each row's visible
        scores and its head's sink, before dropout: (N, H, Lq), in float32, or float64 for float64. A query without a visible key
        has 0 and -inf.

    Raises:
        TypeError, ValueError, BackendError: as ``local_dot_product``.
    """
    if _unknown or _more:
        raise wrong_call(local_attention_with_lse, _unknown, _more)
    rows = (key_lengths, key_starts, query_starts, cu_seqlens_q, _other(cu_seqlens_k, cu_seqlens_q))
    dropout_p, seed, blank = _dropout(query, dropout_p, seed)
    arguments = (bias, *rows, scale, softcap, sinks, dropout_p, seed)
    output, log_sum_exp = _call(
        ATTENTION, (query, key, value), window, arguments, backend, all_results=True, blank=blank
    )
    return output, log_sum_exp


def _other(cu_seqlens_k: Tensor | None, cu_seqlens_q: Tensor | None) -> Tensor | None:
    """The offsets of the keys where they are other ones than those of the queries."""
    return None if cu_seqlens_k is cu_seqlens_q else cu_seqlens_k


def _dropout(query: Any, dropout_p: Any, seed: Any) -> tuple[Any, Any, Tensor | None]:
    """Both as the op takes them, None where nothing is dropped; and the seed once more where it is still to be drawn."""
    if isinstance(dropout_p, (float, int)) and dropout_p == 0 and dropout_p is not False:
        # A seed beside it is of no use then.
        if seed is not None and isinstance(query, Tensor):
            check_alone(DROPOUT[1], seed, "query", query)
        return None, None, None
    blank = blank_seed(query.device) if seed is None and isinstance(query, Tensor) else None
    return dropout_p, seed if blank is None else blank, blank


def arguments_of(op: Op, given: Mapping[str, Any]) -> tuple[Any, ...]:
    """What the op gets of a call with these arguments by name, as the functions above make it; no seed is drawn."""
    told = dict(given)
    if "cu_seqlens_k" in told:
        told["cu_seqlens_k"] = _other(told["cu_seqlens_k"], told["cu_seqlens_q"])
    if "dropout_p" in told:
        told["dropout_p"], told["seed"], _ = _dropout(told["query"], told["dropout_p"], told["seed"])
    return tuple(told[argument.name] for argument in op.arguments)


@beside_graphs
def _call(
    op: Op,
    tensors: tuple[Tensor, ...],
    window: Window,
    arguments: tuple[Any, ...],
    backend: str | Sequence[str] | None,
    all_results: bool = False,
    blank: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The results of a call.

    Args:
        op: which.
        tensors: its tensors.
        window: which keys a query sees.
        arguments: one for each that its row has.
        backend: as the functions above have it.
        all_results: whether gradients of results but the first are asked for, too.
        blank: the one of the arguments that is a seed still to be drawn; a call that is refused draws none.
    """
    if backend is not None and backend.__class__ is not str:
        backend = written(backend)
    if _is_tracing():
        return _watched(op, tensors, window, arguments, backend, all_results, blank)
    if monotonic() > registry.next_look:
        registry.look_at_tables()
    casts = _is_any_autocast_enabled()
    if casts:
        tensors = autocast(tensors)
    kind: tuple[object, ...] | None = None
    asked, given, plan = None, tensors, None
    try:
        asked = asked_for(backend)
        table = variables.get(TABLE_KEY) if asked is None else None
        kind = (op, window.left, window.right, window.__class__, asked, table, _is_grad_enabled(), all_results)
        for place, value in enumerate(arguments):
            if value is None:
                continue
            if value.__class__ in _NUMBERS:
                kind = (*kind, place)
            else:
                kind, given = (*kind, place, Tensor), (*given, value)
        calls = registry.plans.get(kind)
        if calls is not None:
            for tensor in given:
                if tensor.is_nested:  # a guard would end the process
                    break
            else:
                for are_alike, of_that in calls:
                    if are_alike(*given):
                        plan = of_that
                        break
    except _BAD:
        kind = None
    if plan is None:
        plan = _find(op, tensors, window, arguments, backend, asked, kind, all_results)
    if plan is None or is_watched():
        return _watched(op, tensors, window, arguments, backend, all_results, blank)
    if blank is not None:
        fill_seed(blank)
    if plan.is_recorded:
        return differentiated(plan, given, arguments)
    return run(plan, tensors, arguments) if casts else plan.run(tensors, arguments)


def _find(
    op: Op,
    tensors: tuple[Tensor, ...],
    window: Window,
    arguments: tuple[Any, ...],
    backend: str | None,
    asked: str | bytes | None,
    kind: object,
    all_results: bool,
) -> Plan | None:
    """The plan of a call that is like none before, kept for those like it; None where somebody watches."""
    check(op, tensors, window, arguments)
    given = (*tensors, *[value for value in arguments if isinstance(value, Tensor)])
    if not is_plain(given):
        return None
    # Taken before the plan is found: whatever changes meanwhile replaces it.
    plans = registry.plans
    plan, is_kept = find_plan(op, tensors, window, arguments, backend, needs_gradients(given), asked, all_results)
    if is_kept and kind is not None:
        keep(plans, kind, ((guard(given), plan), *plans.get(kind, ())[: MOST_CALLS - 1]), MOST_PLANS)
    return plan


def _watched(
    op: Op,
    tensors: tuple[Tensor, ...],
    window: Window,
    arguments: tuple[Any, ...],
    backend: str | None,
    all_results: bool,
    blank: Tensor | None,
) -> tuple[Tensor, ...]:
    """The results of a call that somebody watches: a tracer, a mode, a transform, a subclass of tensors."""
    if _is_tracing():
        refuse_sharded(op, (*tensors, *arguments))
    else:
        refuse_watchers(op, (*tensors, *arguments))
    tensors = autocast(tensors)
    check(op, tensors, window, arguments)
    if blank is not None:
        # Tracers write down better what makes a tensor than what fills one.
        drawn = draw_seed(blank.device)
        arguments = tuple(drawn if value is blank else value for value in arguments)
    needs_grad = needs_gradients((*tensors, *[each for each in arguments if isinstance(each, Tensor)]))
    if not _is_tracing() and are_transformed((*tensors, *arguments)):
        plan, _ = find_plan(op, tensors, window, arguments, backend, needs_grad, asked_for(backend), all_results)
        if plan.differentiable:
            return run(plan, tensors, arguments)
        refuse_transforms(op, (*tensors, *arguments))
    return call_op(op, tensors, window, arguments, backend, needs_grad, all_results)


def needs_gradients(tensors: Iterable[Tensor]) -> bool:
    """Whether a gradient of one of these may be asked for."""
    return _is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def autocast(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """An op's tensors in autocast's dtype, where it is on. Like torch, it leaves float64 alone."""
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        return tensors
    device_type = tensors[0].device.type
    if device_type not in AUTOCAST_DEVICES or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    cast = [tensor.is_floating_point() and tensor.dtype not in (dtype, torch.float64) for tensor in tensors]
    return tuple(tensor.to(dtype) if due else tensor for tensor, due in zip(tensors, cast)) if any(cast) else tensors
