"""What is true: the three ops and their gradients written down densely, in any dtype, with no backend in it.

In float64 this is the truth; in a lower precision it is the naive computation by which the error budget is set.

Of a long sequence :func:`strips` are enough: a few heads and the keys around a few rows. A strip is made so large that the
gradients of its inner keys are complete: it holds every query that sees one of them, and every key that one of those queries
sees. Memory is bounded by the strip, whatever the sequence's length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnreg.op import ATTENTION, DOT_PRODUCT, ROWS, WEIGHTED_AVERAGE, Op
from attnreg.problem import Problem
from attnreg.testing.inputs import Inputs
from attnreg.window import Window

# The optional arguments that are written down here.
KNOWN = ("bias", "key_lengths", "scale")
# The inner keys of a strip: a few tiles of any kernel.
STRIP_KEYS = 200
# A call of so many (query, key) pairs, visible or not, is one strip.
MOST_PAIRS = 2**21


@dataclass(frozen=True, eq=False)
class Truth:
    """What an op computes.

    Attributes:
        results: by the names in the op's row.
        gradients: of all that has one, by name; empty where no gradient came in.
    """

    results: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]


def knows(problem: Problem) -> bool:
    """Whether every optional argument that a call gives is written down here."""
    return all(name in KNOWN for name, _ in problem.given)


def truth(
    op: Op,
    tensors: Mapping[str, Tensor],
    window: Window,
    arguments: Mapping[str, Any] | None = None,
    upstream: Mapping[str, Tensor] | None = None,
    *,
    start: int | None = None,
) -> Truth:
    """The results and gradients of a call, computed densely in the dtype of its tensors.

    What no row sees has no part in it: a hidden key, value, weight, or incoming gradient may be NaN.

    Args:
        op: its row.
        tensors: by name, of any strides.
        window: which keys a row sees.
        arguments: the optional arguments that are given, by name, as users give them.
        upstream: incoming gradients by the result's name; None for the results alone.
        start: the position of the first row among the keys; None for that of the contract, Lk - Lq.

    Raises:
        ValueError: an argument is none that is written down here.
    """
    given = {name: value for name, value in (arguments or {}).items() if value is not None}
    unknown = given.keys() - set(KNOWN)
    if unknown:
        raise ValueError(f"the oracle does not know {', '.join(sorted(unknown))}")
    leaves = {
        name: value.detach().clone().requires_grad_()
        for name, value in {**tensors, **given}.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    first, last = (leaves[name] for name in (next(iter(op.tensors)), list(op.tensors)[-1]))
    place = _Place(first.shape[2], last.shape[2], window, start, first.device)
    visible = place.visible(given.get("key_lengths"))
    if op is DOT_PRODUCT:
        scores, visible = _scores(op, place, visible, leaves, given)
        results = {"scores": place.banded(scores.masked_fill(~visible, -torch.inf), -torch.inf)}
    elif op is WEIGHTED_AVERAGE:
        weights = place.dense(leaves["weights"])
        results = {"output": _average(weights.where(visible, 0), leaves["value"], visible)}
    else:
        assert op is ATTENTION
        scores, visible = _scores(op, place, visible, leaves, given)
        some = visible.any(-1, keepdim=True)
        scores = scores.masked_fill(~visible, -torch.inf).where(some, 0)
        weights = scores.softmax(-1).where(visible, 0)
        dtype = op.results["log_sum_exp"].dtype(first.dtype)
        results = {
            "output": _average(weights, leaves["value"], visible),
            "log_sum_exp": scores.to(dtype).logsumexp(-1).masked_fill(~some[..., 0], -torch.inf),
        }
    return Truth(
        {name: result.detach() for name, result in results.items()},
        {} if upstream is None else _gradients(op, place, visible, results, leaves, upstream),
    )


def _gradients(
    op: Op,
    place: _Place,
    visible: Tensor,
    results: Mapping[str, Tensor],
    leaves: Mapping[str, Tensor],
    upstream: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    # Nothing comes in through a row that sees no key, or a slot that is hidden.
    incoming = []
    for name, gradient in upstream.items():
        dims = op.results[name].dims
        if "W" in dims:
            seen = place.banded(visible.expand(*gradient.shape[:2], *visible.shape[2:]), False)
        else:
            seen = visible.any(-1)[..., None] if len(dims) == 4 else visible.any(-1)
        incoming.append(gradient.where(seen, 0).to(results[name].dtype))
    outputs = [(results[name], gradient) for name, gradient in zip(upstream, incoming) if results[name].requires_grad]
    if not outputs:  # there is no key
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    found = torch.autograd.grad(
        [result for result, _ in outputs],
        list(leaves.values()),
        [gradient for _, gradient in outputs],
        allow_unused=True,
    )
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found)
    }


class _Place:
    """Where the rows stand among the keys, and so which key a slot of the band is: slot c at position p is key p - left + c."""

    def __init__(self, rows: int, keys: int, window: Window, start: int | None, device: torch.device) -> None:
        start = keys - rows if start is None else start
        self.window = window
        self._keys = keys
        self._position = start + torch.arange(rows, device=device)[:, None]
        # (Lq, Lk): the slot of each key.
        self._slot = torch.arange(keys, device=device) - self._position + window.left

    def visible(self, key_lengths: Tensor | None) -> Tensor:
        """(N or 1, 1, Lq, Lk): which keys a row sees by the window and the lengths."""
        seen = ((self._slot >= 0) & (self._slot < self.window.size))[None, None]
        if key_lengths is None:
            return seen
        return seen & (torch.arange(self._keys, device=seen.device) < key_lengths.view(-1, 1, 1, 1))

    def dense(self, band: Tensor) -> Tensor:
        """(..., Lq, W) -> (..., Lq, Lk); whatever where no slot is."""
        slot = self._slot.clamp(0, self.window.size - 1)
        return band.gather(-1, slot.expand(*band.shape[:-1], self._keys))

    def banded(self, dense: Tensor, fill: float) -> Tensor:
        """(..., Lq, Lk) -> (..., Lq, W), with ``fill`` where no key is."""
        shape = (*dense.shape[:-1], self.window.size)
        if self._keys == 0:
            return torch.full(shape, fill, dtype=dense.dtype, device=dense.device)
        key = self._position - self.window.left + torch.arange(self.window.size, device=dense.device)
        there = (key >= 0) & (key < self._keys)
        return dense.gather(-1, key.clamp(0, self._keys - 1).expand(shape)).masked_fill(~there, fill)


def _scores(
    op: Op, place: _Place, visible: Tensor, leaves: Mapping[str, Tensor], given: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """The scores, scale * q . k + bias, and which of them are visible; both (N, H, Lq, Lk)."""
    query = leaves["query"]
    key = _for_heads(leaves["key"], query.shape[1])
    hidden_by_bias = bias = None
    if "bias" in leaves:
        bias = leaves["bias"]
        bias = bias.reshape((1,) * (4 - bias.dim()) + bias.shape)
        bias = place.dense(bias.expand(*bias.shape[:2], query.shape[2], place.window.size))
        hidden_by_bias = bias == -torch.inf
        visible = visible & ~hidden_by_bias
    visible = visible.expand(*query.shape[:3], key.shape[2])
    query = query.where(visible.any(-1)[..., None], 0)
    key = key.where(visible.any(-2)[..., None], 0)
    scores = given.get("scale", op.defaults(query.shape[-1])["scale"]) * _product(query, key, visible)
    if bias is not None and hidden_by_bias is not None:
        scores = scores + bias.where(~hidden_by_bias, 0).to(scores.dtype)
    return scores, visible


def _product(query: Tensor, key: Tensor, visible: Tensor) -> Tensor:
    """The products q . k, where what is not finite reaches those alone that see it."""
    strange = [~tensor.isfinite().all(-1) for tensor in (query, key)]
    if not any(bool(each.any()) for each in strange):
        return query @ key.mT
    query, key = (tensor.where(tensor.isfinite(), 0) for tensor in (query, key))
    spoilt = visible & (strange[0][..., :, None] | strange[1][..., None, :])
    return query @ key.mT + torch.where(spoilt, torch.nan, 0.0).to(query.dtype)


def _average(weights: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """The sum of a row's visible values, by weight, where what is not finite reaches those alone that see it."""
    value = _for_heads(value, weights.shape[1])
    visible = visible.expand(weights.shape)
    value = value.where(visible.any(-2)[..., None], 0)
    strange = ~value.isfinite().all(-1)
    if not bool(strange.any()):
        return weights @ value
    spoilt = (visible & strange[..., None, :]).any(-1, keepdim=True)
    return weights @ value.where(value.isfinite(), 0) + torch.where(spoilt, torch.nan, 0.0).to(value.dtype)


def _for_heads(tensor: Tensor, heads: int) -> Tensor:
    return tensor if tensor.shape[1] == heads else tensor.repeat_interleave(heads // max(tensor.shape[1], 1), 1)


@dataclass(frozen=True)
class Strip:
    """A part of a call, in which gradients are complete for some keys.

    Attributes:
        batch: the sequences.
        kv_heads: the key and value heads; all query heads that read them belong to the strip.
        inner: the keys whose gradients are complete.
        rows: the queries; their results and gradients are complete.
        keys: the keys that any of the rows sees, and the inner ones.
    """

    batch: range
    kv_heads: range
    inner: range
    rows: range
    keys: range

    def __str__(self) -> str:
        return f"queries {self.rows.start} to {self.rows.stop - 1} of sequence {self.batch.start}" + (
            f" to {self.batch.stop - 1}" if len(self.batch) > 1 else ""
        )


def strips(problem: Problem) -> Iterator[Strip]:
    """The whole of a small call; else both ends and the middle of its first and its last sequence, in its first and last head."""
    rows, keys, window = problem.query_length, problem.key_length, problem.window
    if problem.batch * problem.heads * rows * keys <= MOST_PAIRS:
        yield Strip(range(problem.batch), range(problem.kv_heads), range(keys), range(rows), range(keys))
        return
    start = keys - rows
    for batch, kv_head in sorted({(0, 0), (problem.batch - 1, problem.kv_heads - 1)}):
        for first in dict.fromkeys((0, max((keys - STRIP_KEYS) // 2, 0), max(keys - STRIP_KEYS, 0))):
            inner = range(first, min(first + STRIP_KEYS, keys))
            # A row at position p sees key j if -left <= j - p <= right. At the ends, also rows that see nothing.
            before = STRIP_KEYS if inner.start == 0 else 0
            after = STRIP_KEYS if inner.stop == keys else 0
            seeing = _clipped(
                inner.start - window.right - start - before, inner.stop + window.left - start + after, rows
            )
            seen = _clipped(seeing.start + start - window.left, seeing.stop + start + window.right, keys)
            around = range(min(seen.start, inner.start), max(seen.stop, inner.stop))
            yield Strip(range(batch, batch + 1), range(kv_head, kv_head + 1), inner, seeing, around)


def truth_of(problem: Problem, strip: Strip, inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """The complete parts of a strip, computed in ``dtype``: "output", and the gradient of each leaf by its name."""
    op = ROWS[problem.op]
    result = next(iter(op.results))
    places = _places(problem, strip, strip.keys)
    tensors = {name: _cut(inputs.tensors[name], dims, places).to(dtype) for name, dims in op.tensors.items()}
    arguments = dict(inputs.arguments)
    for argument in op.arguments:
        given = arguments.get(argument.name)
        if given is None or argument.dims is None:
            continue
        arguments[argument.name] = given = _cut(given, argument.dims, places)
        if given.is_floating_point():
            arguments[argument.name] = given.to(dtype)
        elif argument.at_most == "K":
            arguments[argument.name] = given - strip.keys.start
    upstream = _cut(inputs.upstream, op.results[result].dims, places).to(dtype)
    start = strip.rows.start + problem.key_length - problem.query_length - strip.keys.start
    found = truth(op, tensors, problem.window, arguments, {result: upstream}, start=start)
    inner = range(strip.inner.start - strip.keys.start, strip.inner.stop - strip.keys.start)
    gradients = {
        name: _cut(gradient, dims, {"K": inner})
        for name, (gradient, dims) in _with_dims(op, found.gradients).items()
        if _is_complete(problem, strip, dims, inputs.leaves[name])
    }
    return {"output": found.results[result], **gradients}


def parts_of(
    problem: Problem, strip: Strip, inputs: Inputs, output: Tensor | None, gradients: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The same parts of a whole result, or of whole gradients."""
    op = ROWS[problem.op]
    places = _places(problem, strip, strip.inner)
    parts = {}
    if output is not None:
        parts["output"] = _cut(output, next(iter(op.results.values())).dims, places)
    for name, (gradient, dims) in _with_dims(op, gradients).items():
        if _is_complete(problem, strip, dims, inputs.leaves[name]):
            parts[name] = _cut(gradient, dims, places)
    return parts


def _with_dims(op: Op, gradients: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, str]]:
    dims = {**op.tensors, **{argument.name: argument.dims or "" for argument in op.arguments}}
    return {name: (gradient, dims[name]) for name, gradient in gradients.items()}


def _places(problem: Problem, strip: Strip, keys: range) -> dict[str, range]:
    group = problem.heads // max(problem.kv_heads, 1)
    heads = range(strip.kv_heads.start * group, strip.kv_heads.stop * group)
    return {"N": strip.batch, "H": heads, "G": strip.kv_heads, "Q": strip.rows, "K": keys}


def _cut(tensor: Tensor, dims: str, places: Mapping[str, range]) -> Tensor:
    """The part of a tensor at these places; a dimension of one element, which may broadcast, stays."""
    own = dims[len(dims) - tensor.dim() :]
    return tensor[
        tuple(
            slice(places[letter].start, places[letter].stop) if letter in places and size != 1 else slice(None)
            for letter, size in zip(own, tensor.shape)
        )
    ]


def _is_complete(problem: Problem, strip: Strip, dims: str, leaf: Tensor) -> bool:
    """Whether the strip holds all that the gradient is a sum of: a dimension that broadcasts is one that is summed over."""
    places = _places(problem, strip, strip.inner)
    shape = (1,) * (len(dims) - leaf.dim()) + tuple(leaf.shape)
    return all(
        size != 1 or letter not in places or len(places[letter]) == problem.size(letter)
        for letter, size in zip(dims, shape)
    )


def _clipped(start: int, stop: int, length: int) -> range:
    """The part that lies in 0 to ``length``; never empty, as what a strip is cut out of has one row at least."""
    start = min(max(start, 0), max(length - 1, 0))
    return range(start, min(max(stop, start + 1), length))
