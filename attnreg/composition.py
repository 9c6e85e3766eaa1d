"""What a backend lacks is composed: attention from the two products, a backward from a differentiable forward.

The compositions hold no kernel of their own for the products; they call the backend's. What lies between them, scores and
weights, is in float32 or wider: rounded to 16 bits, scores of 64 would be off by an eighth before the softmax.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnreg.backend import Backend, Function
from attnreg.memory import empty_like
from attnreg.op import ATTENTION, DOT_PRODUCT, ROWS, WEIGHTED_AVERAGE, Op
from attnreg.window import Window

# Bytes of scores that composed attention makes at a time, unless the queries of one key head alone have more. A forward holds
# two bands of that size, a backward four.
LARGEST_BAND = 2**30


def complete(backend: Backend) -> Mapping[str, Function]:
    """All functions of ``backend`` by name (``op`` and ``op_backward``): its own, then those that can be composed."""
    functions: dict[str, Function] = {}
    for op in ROWS.values():
        for name in (op.name, op.backward):
            own = getattr(backend, name)
            if own is not None:
                functions[name] = own
    products = (DOT_PRODUCT, WEIGHTED_AVERAGE)
    if functions.keys() >= {op.name for op in products}:
        functions.setdefault(ATTENTION.name, functools.partial(_attention, functions))
    if backend.differentiable:
        for op in ROWS.values():
            if op.name in functions:
                functions.setdefault(op.backward, functools.partial(_backward_by_autograd, op, functions[op.name]))
    if functions.keys() >= {op.backward for op in products}:
        functions.setdefault(ATTENTION.backward, functools.partial(_attention_backward, functions))
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

    def of(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Of each tensor among the arguments its share; a dimension of 1 broadcasts."""
        return {
            argument.name: self._share(argument.dims, options[argument.name])
            for argument in ATTENTION.arguments
            if argument.name in options
        }

    def share(self, bias: Tensor) -> Tensor:
        shares: Tensor = self._share("NH", bias)
        return shares

    def _share(self, dims: str | None, value: Any) -> Any:
        if dims is None or value is None:
            return value
        slices = {"N": self.batch, "H": self.heads}
        return value[
            tuple(
                slice(None) if size == 1 else slices.get(letter, slice(None)) for letter, size in zip(dims, value.shape)
            )
        ]


def _parts(query: Tensor, key: Tensor, window: Window) -> Iterator[_Part]:
    """All of a call as one part, or as parts of ``LARGEST_BAND`` at most: whole sequences, or else heads of one."""
    batch, heads, rows = query.shape[:3]
    kv_heads = key.shape[1]
    row_bytes = window.size * _wide(query.dtype).itemsize
    if batch * heads * rows * row_bytes <= LARGEST_BAND:
        yield _Part(slice(batch), slice(heads), slice(kv_heads))
        return
    group = heads // kv_heads
    fitting = max(LARGEST_BAND // (group * rows * row_bytes), 1)
    per_batch, per_kv_head = max(fitting // kv_heads, 1), min(fitting, kv_heads)
    for n in range(0, batch, per_batch):
        for h in range(0, kv_heads, per_kv_head):
            yield _Part(slice(n, n + per_batch), slice(h * group, (h + per_kv_head) * group), slice(h, h + per_kv_head))


def _attention(
    functions: Mapping[str, Function], query: Tensor, key: Tensor, value: Tensor, window: Window, **options: Any
) -> tuple[Tensor, Tensor]:
    output = empty_like(query, value.shape[3])
    log_sum_exp = query.new_empty(query.shape[:3], dtype=_wide(query.dtype))
    for part in _parts(query, key, window):
        call = _Call(
            functions, part.of_queries(query), part.of_keys(key), part.of_keys(value), window, part.of(options)
        )
        part.of_queries(output).copy_(call.output())
        part.of_queries(log_sum_exp).copy_(call.log_sum_exp())
    return output, log_sum_exp


def _attention_backward(
    functions: Mapping[str, Function],
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    window: Window,
    *,
    needs_grad: frozenset[str],
    **options: Any,
) -> dict[str, Tensor]:
    del output, log_sum_exp  # The weights are made anew, at no more rounding than the forward's.
    of = {"query": query, "key": key, "value": value}
    gradients = {name: empty_like(of[name]) for name in needs_grad & of.keys()}
    bias = options.get("bias")
    if "bias" in needs_grad and bias is not None:
        # What the parts give of one gradient is added up in fp32 or wider, and rounded once.
        gradients["bias"] = torch.zeros(
            bias.shape, dtype=torch.promote_types(torch.float32, bias.dtype), device=bias.device
        )
    for part in _parts(query, key, window):
        call = _Call(
            functions, part.of_queries(query), part.of_keys(key), part.of_keys(value), window, part.of(options)
        )
        for name, gradient in call.gradients(part.of_queries(grad_output), needs_grad).items():
            if name == "bias":
                total = part.share(gradients[name])
                total += gradient
            elif name == "query":
                part.of_queries(gradients[name]).copy_(gradient)
            else:
                part.of_keys(gradients[name]).copy_(gradient)
    if bias is not None and "bias" in gradients:
        gradients["bias"] = gradients["bias"].to(bias.dtype)
    return gradients


class _Call:
    """Attention of one part, from its products.

    ``S = scale * Q K^T + bias``, ``P = softmax(S)``, ``O = P V``.
    """

    def __init__(
        self,
        functions: Mapping[str, Function],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window: Window,
        options: Mapping[str, Any],
    ) -> None:
        wide = _wide(query.dtype)
        self.functions = functions
        self.window = window
        self.query, self.key, self.value = query.to(wide), key.to(wide), value.to(wide)
        self.of_dot = _of(DOT_PRODUCT, options)
        self.of_average = _of(WEIGHTED_AVERAGE, options)
        bias = options.get("bias")
        self.is_biased = bias is not None
        if bias is not None and bias.dtype.itemsize < wide.itemsize:
            self.of_dot["bias"] = bias.to(wide)
        every_row_sees_a_key = (
            bias is None and options.get("key_lengths") is None and (key.shape[2] - query.shape[2] + window.right >= 0)
        )
        self.scores: Tensor = functions[DOT_PRODUCT.name](self.query, self.key, window, **self.of_dot)
        self.highest = self.scores.amax(-1, keepdim=True)
        # A row without a visible key has scores of -inf alone, of which softmax would make NaN: its weights are 0.
        self.unseeing = None if every_row_sees_a_key else self.highest == -torch.inf
        if self.unseeing is None:
            self.weights: Tensor = self.scores.softmax(-1)
        else:
            self.weights = self.scores.masked_fill(self.unseeing, 0.0).softmax(-1).masked_fill(self.unseeing, 0.0)
        self.hidden = self.scores == -torch.inf if self.is_biased else None
        if self.hidden is not None:
            self.value = self._seen(self.value)

    def output(self) -> Tensor:
        result: Tensor = self.functions[WEIGHTED_AVERAGE.name](self.weights, self.value, self.window, **self.of_average)
        return result

    def log_sum_exp(self) -> Tensor:
        """The largest weight is ``exp(max(S) - log-sum-exp)``."""
        log_sum_exp: Tensor = self.highest - self.weights.amax(-1, keepdim=True).log()
        if self.unseeing is not None:
            log_sum_exp = log_sum_exp.masked_fill(self.unseeing, -torch.inf)
        return log_sum_exp.squeeze(-1)

    def gradients(self, grad_output: Tensor, needs_grad: frozenset[str]) -> dict[str, Tensor]:
        grad_output = grad_output.to(self.weights.dtype)
        if self.unseeing is not None:
            grad_output = grad_output.masked_fill(self.unseeing, 0.0)
        of_dot = needs_grad & frozenset(DOT_PRODUCT.differentiable)
        # dP = dO . V and dV = P^T dO
        found = dict(
            self.functions[WEIGHTED_AVERAGE.backward](
                grad_output,
                self.weights,
                self.value,
                self.window,
                **self.of_average,
                needs_grad=(needs_grad & {"value"}) | ({"weights"} if of_dot else frozenset()),
            )
        )
        if not of_dot:
            return found
        grad_weights = found.pop("weights")
        if self.hidden is not None:
            grad_weights = grad_weights.masked_fill(self.hidden, 0.0)
        # dS = P * (dP - rowsum(P * dP)), one kernel of torch. The row sum equals rowsum(dO * O), but cancels to the last bit.
        grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, self.weights, -1, self.weights.dtype)
        return found | dict(
            self.functions[DOT_PRODUCT.backward](
                grad_scores, self.query, self.key, self.window, **self.of_dot, needs_grad=of_dot
            )
        )

    def _seen(self, value: Tensor) -> Tensor:
        """``value`` with zeros where the bias hides a key from every row: the average does not know of the bias.

        How many rows see a key is ``A^T 1``, with A = 1 in visible slots.
        """
        assert self.hidden is not None
        visible = (~self.hidden).to(value.dtype)
        one = value.new_ones(()).expand(*visible.shape[:3], 1).contiguous()
        width = value[..., :1].contiguous()
        count = self.functions[WEIGHTED_AVERAGE.backward](
            one, visible, width, self.window, **self.of_average, needs_grad=frozenset({"value"})
        )["value"]
        return value.where(count > 0, 0.0)


def _of(op: Op, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that are arguments of ``op``."""
    return {argument.name: options[argument.name] for argument in op.arguments if argument.name in options}


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(torch.float32, dtype)


def _backward_by_autograd(op: Op, forward: Function, *inputs: Any, needs_grad: frozenset[str], **options: Any) -> Any:
    """The gradients that are wanted; the forward is computed again to be differentiated."""
    count = len(op.tensors)
    grads, tensors, window = inputs[:1], inputs[1 : 1 + count], inputs[-1]
    leaves = dict(zip(op.tensors, tensors)) | {
        name: options.pop(name) for name in op.differentiable[count:] if name in options
    }
    leaves = {
        name: None if given is None else given.detach().requires_grad_(name in needs_grad)
        for name, given in leaves.items()
    }
    positional = [leaves[name] for name in op.tensors]
    named = {name: leaf for name, leaf in leaves.items() if name not in op.tensors}
    with torch.enable_grad(), _autograd_included():
        results = forward(*positional, window, **named, **options)
        result = results[0] if isinstance(results, tuple) else results
    names = sorted(needs_grad)
    wanted = [leaves[name] for name in names]
    found = torch.autograd.grad(result, wanted, grads, allow_unused=True, materialize_grads=True)
    return dict(zip(names, found))


def _autograd_included() -> AbstractContextManager[None]:
    """Let autograd record here although this code runs inside an op, below the layer at which torch records.

    Torch has no public way to include that layer again where a dispatch mode or a plan excludes it.
    """
    excluded = torch._C._dispatch_tls_local_exclude_set().remove(torch._C.DispatchKey.AutogradFunctionality)
    guard: AbstractContextManager[None] = torch._C._ForceDispatchKeyGuard(
        torch._C._dispatch_tls_local_include_set(), excluded
    )
    return guard
