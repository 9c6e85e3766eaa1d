"""What a backend lacks is composed: attention from the two products, a backward from a differentiable forward.

The compositions hold no kernel of their own for the products; they call the backend's. What lies between them, scores and
weights, is in float32 or wider: rounded to 16 bits, scores of 64 would be off by an eighth before the softmax. There, too, are
made what attention has and the products have not: soft cap, sinks, dropout and the gradient of the log-sum-exp.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import fold, pad

from attnreg.backend import Backend, Function, is_composed
from attnreg.dropout import kept
from attnreg.memory import empty_like, laid_out, strides_like, with_gradient_laid_out
from attnreg.op import ATTENTION, DOT_PRODUCT, ROWS, ROWS_OF_CALL, WEIGHTED_AVERAGE, Op
from attnreg.printable import brief
from attnreg.problem import Problem
from attnreg.rows import rows_of
from attnreg.window import Window

# Bytes of scores that composed attention makes at a time, unless the queries of one key head alone have more. A forward holds
# two bands of that size, a backward four.
LARGEST_BAND = 2**30
# No machine has more bytes.
MOST_BYTES = 2**63 - 1


def workspace(backend: Backend, problem: Problem) -> int:
    """How many bytes ``backend`` needs for a problem beside its tensors and results, as it says or as a composition does.

    Raises:
        TypeError, ValueError: the backend's own function answers something else than an integer from 0 to ``MOST_BYTES``; a float
            and True are no integers.
        BaseException: whatever that function raises.
    """
    own = 0 if backend.workspace is None else _bytes(backend.workspace(problem))
    if not is_composed(backend, ROWS[problem.op]):
        return own
    rows = problem.batch * problem.heads * problem.query_length
    band = rows * problem.window.size * _wide(problem.dtype).itemsize
    # The queries of one key head are not divided.
    most = max(LARGEST_BAND, band // max(problem.batch * problem.kv_heads, 1))
    # A soft cap keeps its derivative, and dropout makes 64-bit words, four to four weights, and their products.
    bands = (4 if problem.needs_grad else 2) + (problem.gives("softcap") is not None)
    bands += 6 if problem.gives("dropout_p") is not None else 0
    return own + min(band, most) * bands


def _bytes(answer: Any) -> int:
    if isinstance(answer, bool):
        raise TypeError(f"a number of bytes is an int, got {brief(answer)}")
    found = operator.index(answer)
    if not 0 <= found <= MOST_BYTES:
        raise ValueError(f"a number of bytes is at least 0 and less than 2**63, got {brief(found)}")
    return found


def complete(backend: Backend) -> Mapping[str, Function]:
    """All functions of ``backend`` by name (``op`` and ``op_backward``): its own, then those that can be composed."""
    functions: dict[str, Function] = {}
    for op in ROWS.values():
        for name in (op.name, op.backward):
            own = getattr(backend, name)
            if own is not None:
                functions[name] = own
    products = (DOT_PRODUCT, WEIGHTED_AVERAGE)
    parts = _Products(functions, backend.taken, backend.differentiable)
    if functions.keys() >= {op.name for op in products}:
        composed = _attention_of_torch if backend.differentiable else _attention
        functions.setdefault(ATTENTION.name, functools.partial(composed, parts))
    if backend.differentiable:
        for op in ROWS.values():
            if op.name in functions:
                functions.setdefault(op.backward, functools.partial(_backward_by_autograd, op, functions[op.name]))
    if functions.keys() >= {op.backward for op in products}:
        functions.setdefault(ATTENTION.backward, functools.partial(_attention_backward, parts))
    return functions


@dataclass(frozen=True)
class _Products:
    """What attention is composed of.

    Attributes:
        functions: the backend's functions by name.
        taken: the optional arguments that they take, by op.
        differentiable: whether they consist of torch operations.
    """

    functions: Mapping[str, Function]
    taken: Mapping[str, frozenset[str]]
    differentiable: bool

    def options_of(self, op: Op, options: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
        """What the functions of ``op`` get: attention's arguments, and for those that attention does not have what none gives."""
        return {
            name: options.get(name, default)
            for name, default in op.defaults(head_dim).items()
            if name in self.taken[op.name] or name not in op.optional
        }


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
        """Of each tensor among the arguments its share."""
        return {
            argument.name: self.share(argument.dims, options[argument.name])
            for argument in ATTENTION.arguments
            if argument.name in options
        }

    def share(self, dims: str | None, value: Any) -> Any:
        """Of a tensor its share; a dimension of 1 broadcasts."""
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
    products: _Products, query: Tensor, key: Tensor, value: Tensor, window: Window, **options: Any
) -> tuple[Tensor, Tensor]:
    output = empty_like(query, value.shape[3])
    log_sum_exp = query.new_empty(query.shape[:3], dtype=_wide(query.dtype))
    for part in _parts(query, key, window):
        result, of_rows = _Call(part, products, query, key, value, window, options).results()
        part.of_queries(output).copy_(result)
        part.of_queries(log_sum_exp).copy_(of_rows)
    return output, log_sum_exp


def _attention_of_torch(
    products: _Products, query: Tensor, key: Tensor, value: Tensor, window: Window, **options: Any
) -> tuple[Tensor, Tensor]:
    """The same of products that are differentiated: nothing is written into, which autograd would keep and vmap cannot do."""
    query, key, value = map(with_gradient_laid_out, (query, key, value))
    for argument in ATTENTION.arguments:
        if argument.differentiable and options.get(argument.name) is not None:
            options[argument.name] = with_gradient_laid_out(options[argument.name])
    parts = [*_parts(query, key, window)]
    results = [_Call(part, products, query, key, value, window, options).results() for part in parts]
    output, log_sum_exp = (_joined(parts, each) for each in zip(*results))
    return laid_out(output.to(query.dtype), strides_like(query, value.shape[3])), log_sum_exp


def _joined(parts: Sequence[_Part], results: Sequence[Tensor]) -> Tensor:
    """The results of all parts, in their order, as one."""
    if len(parts) == 1:
        return results[0]
    of_sequences = itertools.groupby(zip(parts, results), lambda each: each[0].batch)
    return torch.cat([torch.cat([result for _, result in of_heads], 1) for _, of_heads in of_sequences])


def _attention_backward(
    products: _Products,
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    window: Window,
    *,
    grad_log_sum_exp: Tensor | None,
    needs_grad: frozenset[str],
    **options: Any,
) -> dict[str, Tensor]:
    del output, log_sum_exp  # The weights are made anew, at no more rounding than the forward's.
    tensors = {"query": query, "key": key, "value": value}
    gradients = {name: empty_like(tensors[name]) for name in needs_grad & tensors.keys()}
    given = {
        argument.name: argument
        for argument in ATTENTION.arguments
        if argument.name in needs_grad and options.get(argument.name) is not None
    }
    for name in given:
        # What the parts give of one gradient is added up in fp32 or wider, and rounded once.
        gradients[name] = torch.zeros_like(options[name], dtype=_wide(options[name].dtype))
    for part in _parts(query, key, window):
        call = _Call(part, products, query, key, value, window, options)
        of_sums = None if grad_log_sum_exp is None else part.of_queries(grad_log_sum_exp)
        found = call.gradients(part.of_queries(grad_output), of_sums, needs_grad)
        del call  # Its bands would stay until the next one has made its own.
        for name, gradient in found.items():
            if name in given:
                part.share(given[name].dims, gradients[name]).add_(gradient)
            elif name == "query":
                part.of_queries(gradients[name]).copy_(gradient)
            else:
                part.of_keys(gradients[name]).copy_(gradient)
    return gradients | {name: gradients[name].to(options[name].dtype) for name in given}


class _Call:
    """Attention of one part, from its products.

    ``S = scale * Q K^T``, ``S = softcap * tanh(S / softcap)``, ``S = S + bias``; ``P = exp(S) / (sum(exp(S)) + exp(sink))``;
    ``O = (M * P) V``, where M is 0 for weights that are dropped and ``1 / (1 - dropout_p)`` for all others.

    What the average is not told, that a bias hides, is hidden from it here: with zeros for weights, for values that no row sees
    and for what is returned to rows that see nothing.
    """

    def __init__(
        self,
        part: _Part,
        products: _Products,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window: Window,
        options: Mapping[str, Any],
    ) -> None:
        wide = _wide(query.dtype)
        query, key, value, options = part.of_queries(query), part.of_keys(key), part.of_keys(value), part.of(options)
        self.part, self.products, self.window = part, products, window
        self.query, self.key, self.value = query.to(wide), key.to(wide), value.to(wide)
        self.rows = {row.name: options[row.name] for row in ROWS_OF_CALL if options.get(row.name) is not None}
        self.softcap, self.dropout_p, self.seed = (options.get(name) for name in ("softcap", "dropout_p", "seed"))
        of_dot = products.options_of(DOT_PRODUCT, options, query.shape[3])
        self.of_dot = {name: _widened(each, wide) for name, each in of_dot.items()}
        self.of_average = products.options_of(WEIGHTED_AVERAGE, options, 0)
        bias = self.of_dot.get("bias")
        # Behind a soft cap, the bias is added here; the product gets of it what it hides.
        self.added = None
        if self.softcap is not None and bias is not None:
            self.added = bias
            self.of_dot["bias"] = torch.zeros_like(bias).masked_fill(bias == -torch.inf, -torch.inf)
        self.slope: Tensor | None = None
        self.scores = self._scores()
        self.highest = self.scores.detach().amax(-1, keepdim=True)
        # A row without a visible key has scores of -inf alone, of which softmax would make NaN: its weights are 0.
        every_row_sees_a_key = bias is None and not self.rows and key.shape[2] - query.shape[2] + window.right >= 0
        self.unseeing = None if every_row_sees_a_key else self.highest == -torch.inf
        self.hidden = None if bias is None else self.scores == -torch.inf
        if self.unseeing is None:
            self.weights: Tensor = self.scores.softmax(-1)
        else:
            without = self.unseeing if self.hidden is None else self.hidden
            self.weights = self.scores.masked_fill(self.unseeing, 0.0).softmax(-1).masked_fill(without, 0.0)
        self.log_sum_exp = self._log_sum_exp()
        # The share of the denominator that a row's sink has, and what it leaves.
        self.share: Tensor | None = None
        if options.get("sinks") is not None:
            sink = _widened(options["sinks"], wide)[:, None, None].to(wide)
            total = torch.logaddexp(self.log_sum_exp, sink)
            self.share = (sink - total).exp()
            self.weights = self.weights * (self.log_sum_exp - total).exp()
            self.log_sum_exp = total
        if self.hidden is not None:
            self.value = self.value.where(self._is_seen(self.hidden), 0.0)

    def _scores(self) -> Tensor:
        """S, -inf where hidden."""
        scores: Tensor = self.products.functions[DOT_PRODUCT.name](self.query, self.key, self.window, **self.of_dot)
        if self.softcap is None:
            return scores
        hidden = scores == -torch.inf
        ratio = (scores / self.softcap).tanh()
        if not self.products.differentiable:
            self.slope = 1.0 - ratio.square()
        scores = self.softcap * ratio
        if self.added is not None:
            lowest, highest = torch.finfo(scores.dtype).min, torch.finfo(scores.dtype).max
            # What a wider dtype has beyond this one's range hides nothing.
            scores = scores + self.added.to(scores.dtype).clamp(lowest, highest)
        return scores.masked_fill(hidden, -torch.inf)

    def _log_sum_exp(self) -> Tensor:
        """That of the scores, (N, H, Lq, 1); 0 in rows without a visible key."""
        if self.products.differentiable:
            scores, highest = self.scores, self.highest
            if self.unseeing is not None:
                scores, highest = scores.masked_fill(self.unseeing, 0.0), highest.masked_fill(self.unseeing, 0.0)
            # The derivative of torch's own is exp(S - log-sum-exp), in which large ones have lost digits.
            found = (scores - highest).exp().sum(-1, keepdim=True).log() + highest
        else:
            # The largest weight is exp(max(S) - log-sum-exp).
            found = self.highest - self.weights.amax(-1, keepdim=True).log()
        return found if self.unseeing is None else found.masked_fill(self.unseeing, 0.0)

    @functools.cached_property
    def origins(self) -> Tensor:
        """The key of slot 0 of each row, (N or 1, Lq)."""
        lengths = self.query.shape[2], self.key.shape[2]
        return rows_of(*lengths, self.query.device, **self.rows).position(lengths[0]) - self.window.left

    @functools.cached_property
    def factors(self) -> Tensor | None:
        """M, or None."""
        if self.dropout_p is None or self.seed is None:
            return None
        batch, heads, rows, size = self.weights.shape
        n, h, i = (torch.arange(each, device=self.seed.device) for each in (batch, heads, rows))
        n, h = n + (self.part.batch.start or 0), h + (self.part.heads.start or 0)
        is_kept = kept(self.seed, self.dropout_p, n[:, None, None], h[:, None], i, self.origins[:, None], size)
        scale: float = 1.0 - self.dropout_p
        return is_kept.to(self.weights.dtype) / scale

    def _dropped(self) -> Tensor:
        """M * P."""
        return self.weights if self.factors is None else self.weights * self.factors

    def results(self) -> tuple[Tensor, Tensor]:
        """The output and the log-sum-exp."""
        average = self.products.functions[WEIGHTED_AVERAGE.name]
        output: Tensor = average(self._dropped(), self.value, self.window, **self.of_average)
        log_sum_exp = self.log_sum_exp
        if self.unseeing is not None:
            log_sum_exp = log_sum_exp.masked_fill(self.unseeing, -torch.inf)
            if self.products.differentiable:
                # It is 0 there; so is then what autograd brings back.
                output = output.masked_fill(self.unseeing, 0.0)
        return output, log_sum_exp.squeeze(-1)

    def gradients(
        self, grad_output: Tensor, grad_log_sum_exp: Tensor | None, needs_grad: frozenset[str]
    ) -> dict[str, Tensor]:
        grad_output = grad_output.to(self.weights.dtype)
        of_sums = None if grad_log_sum_exp is None else grad_log_sum_exp.unsqueeze(-1)
        if self.unseeing is not None:
            grad_output = grad_output.masked_fill(self.unseeing, 0.0)
            of_sums = None if of_sums is None else of_sums.masked_fill(self.unseeing, 0.0)
        functions = self.products.functions
        of_scores = needs_grad - {"value"}
        # dP = M * (dO . V) and dV = (M * P)^T dO
        found = dict(
            functions[WEIGHTED_AVERAGE.backward](
                grad_output,
                self._dropped(),
                self.value,
                self.window,
                **self.of_average,
                needs_grad=(needs_grad & {"value"}) | ({"weights"} if of_scores else frozenset()),
            )
        )
        if not of_scores:
            return found
        grad_weights = found.pop("weights")
        if self.factors is not None:
            grad_weights = grad_weights * self.factors
        if self.hidden is not None:
            grad_weights = grad_weights.masked_fill(self.hidden, 0.0)
        if self.share is not None and "sinks" in needs_grad:
            # dsink = P_sink * (dLSE - rowsum(P * dP)), P_sink the sink's share.
            surplus = -(self.weights * grad_weights).sum(-1, keepdim=True)
            of_rows = self.share * (surplus if of_sums is None else surplus + of_sums)
            if self.unseeing is not None:
                of_rows = of_rows.masked_fill(self.unseeing, 0.0)
            found["sinks"] = of_rows.sum((0, 2, 3))
        # dS = P * (dP - rowsum(P * dP)), one kernel of torch. The row sum equals rowsum(dO * O), but cancels to the last bit.
        grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, self.weights, -1, self.weights.dtype)
        if of_sums is not None:
            # + P * dLSE
            grad_scores = torch.addcmul(grad_scores, self.weights, of_sums.to(grad_scores.dtype))
        if self.added is not None and "bias" in needs_grad:
            found["bias"] = grad_scores.sum_to_size(self.added.shape)
        if self.slope is not None:
            # d tanh = 1 - tanh^2
            grad_scores = grad_scores * self.slope
        of_dot = needs_grad & frozenset(DOT_PRODUCT.differentiable) - found.keys()
        if not of_dot:
            return found
        return found | dict(
            functions[DOT_PRODUCT.backward](
                grad_scores, self.query, self.key, self.window, **self.of_dot, needs_grad=of_dot
            )
        )

    def _is_seen(self, hidden: Tensor) -> Tensor:
        """Which keys a row sees, (N, Hkv, Lk, 1): the average does not know of the bias."""
        batch, heads, rows, size = hidden.shape
        keys, kv_heads = self.value.shape[2], self.value.shape[1]
        of_kv_heads = (~hidden).view(batch, kv_heads, heads // kv_heads, rows, size).any(2)
        if not self.rows.keys().isdisjoint(("query_starts", "cu_seqlens_q")):
            # A slot whose key no row sees goes to one key more than there are.
            slots = self.origins[:, None, :, None] + torch.arange(size, device=hidden.device)
            slots = slots.clamp(0, keys).where(of_kv_heads, keys).flatten(2)
            nothing = torch.zeros((batch, kv_heads, keys + 1), dtype=torch.bool, device=hidden.device)
            return nothing.scatter(2, slots, True)[..., :keys, None]
        # Slot ``c`` of row ``i`` is key ``i + c + Lk - Lq - left``: rows that see a key are summed as ``fold`` sums windows.
        windows = of_kv_heads.flatten(0, 1).mT.to(torch.float32, memory_format=torch.contiguous_format)
        count = fold(windows, output_size=(1, rows + size - 1), kernel_size=(1, size))
        of_keys = pad(count, (keys - rows - self.window.left, -self.window.right))
        return of_keys.view(batch, kv_heads, keys, 1) > 0


def _widened(value: Any, dtype: torch.dtype) -> Any:
    """A floating-point tensor that is narrower than ``dtype`` in it, anything else as it is."""
    is_narrow = isinstance(value, Tensor) and value.is_floating_point() and value.dtype.itemsize < dtype.itemsize
    return value.to(dtype) if is_narrow else value


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(torch.float32, dtype)


def _backward_by_autograd(op: Op, forward: Function, *inputs: Any, needs_grad: frozenset[str], **options: Any) -> Any:
    """The gradients that are wanted; the forward is computed again to be differentiated."""
    count = len(op.tensors)
    grads = [inputs[0], *[options.pop(each.name, None) for each in op.incoming]]
    tensors, window = inputs[1 : 1 + count], inputs[-1]
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
        results = results if isinstance(results, tuple) else (results,)
    names = sorted(needs_grad)
    wanted = [leaves[name] for name in names]
    asked = [(result, grad) for result, grad in zip(results, grads) if grad is not None]
    found = torch.autograd.grad(
        [result for result, _ in asked], wanted, [grad for _, grad in asked], allow_unused=True, materialize_grads=True
    )
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
