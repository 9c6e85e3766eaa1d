"""What is true: the three ops and their gradients written down densely, in any dtype, with no backend in it.

In float64 this is the truth; in a lower precision it is the naive computation by which the error budget is set.

Of a long sequence :func:`strips` are enough: a few heads and the keys around a few rows. A strip is made so large that the
gradients of its inner keys are complete: it holds every query that sees one of them, and every key that one of those queries
sees. Memory is bounded by the strip, whatever the sequence's length.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnreg.op import ATTENTION, DOT_PRODUCT, ROWS, WEIGHTED_AVERAGE, Op
from attnreg.problem import Problem
from attnreg.testing import philox
from attnreg.testing.inputs import Inputs
from attnreg.testing.placing import OF_ROWS, Placing, placing
from attnreg.window import Window

# The optional arguments that are written down here.
KNOWN = ("bias", *OF_ROWS, "scale", "softcap", "sinks", "dropout_p", "seed")
# The inner keys of a strip: a few tiles of any kernel.
STRIP_KEYS = 200
# A call of so many (query, key) pairs, visible or not, is one strip.
MOST_PAIRS = 2**21
# The same weights are dropped in every dtype in which a call is computed.
_kept = functools.lru_cache(maxsize=4)(philox.kept)


@dataclass(frozen=True, eq=False)
class Truth:
    """What an op computes.

    Attributes:
        results: by the names in the op's row.
        gradients: of all that has one, by name; empty where no gradient came in.
        terms: of those gradients that are sums over whole rows, by name, how large the terms are that may cancel: the root of the
            sum of their squares.
    """

    results: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    terms: Mapping[str, Tensor] = field(default_factory=dict)


def knows(problem: Problem) -> bool:
    """Whether every optional argument that a call gives is written down here."""
    known = {*KNOWN, *(argument.name for argument in ROWS[problem.op].incoming)}
    return all(name in known for name, _ in problem.given)


def truth(
    op: Op,
    tensors: Mapping[str, Tensor],
    window: Window,
    arguments: Mapping[str, Any] | None = None,
    upstream: Mapping[str, Tensor] | None = None,
) -> Truth:
    """The results and gradients of a call, computed densely in the dtype of its tensors.

    What no row sees has no part in it: a hidden key, value, weight, or incoming gradient may be NaN.

    Args:
        op: its row.
        tensors: by name, of any strides.
        window: which keys a row sees.
        arguments: the optional arguments that are given, by name, as users give them.
        upstream: incoming gradients by the result's name; None for the results alone.

    Raises:
        ValueError: an argument is none that is written down here, or no seed says what is dropped.
    """
    first, last = (tensors[name] for name in (next(iter(op.tensors)), list(op.tensors)[-1]))
    given = _given(arguments or {})
    rows, keys = first.shape[2], last.shape[2]
    whole = {"N": range(first.shape[0]), "H": range(first.shape[1]), "Q": range(rows), "K": range(keys)}
    return _Call(op, tensors, placing(rows, keys, window, given, first.device), given, whole).truth(upstream)


def _given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in arguments.items() if value is not None}
    unknown = given.keys() - set(KNOWN)
    if unknown:
        raise ValueError(f"the oracle does not know {', '.join(sorted(unknown))}")
    if given.get("dropout_p") and "seed" not in given:
        raise ValueError("dropout_p is given, and no seed that says which weights are dropped")
    return given


class _Call:
    """A call, or a part of one.

    Args:
        op: its row.
        tensors: the op's tensors by name.
        place: where its rows stand.
        given: the other arguments, those of rows too: ``place`` says all that they do.
        within: which sequences, query heads, rows and keys of the whole call these are, by letter.
    """

    def __init__(
        self,
        op: Op,
        tensors: Mapping[str, Tensor],
        place: Placing,
        given: Mapping[str, Any],
        within: Mapping[str, range],
    ) -> None:
        self.op, self.place, self.given, self.within = op, place, given, within
        self.leaves = {
            name: value.detach().clone().requires_grad_()
            for name, value in {**tensors, **given}.items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }
        self.visible = place.visible
        # What a row has of its own of something that all rows have.
        self.of_rows: dict[str, Tensor] = {}

    def truth(self, upstream: Mapping[str, Tensor] | None) -> Truth:
        """Its results, and with incoming gradients its own."""
        results = self._results()
        detached = {name: result.detach() for name, result in results.items()}
        return Truth(detached) if upstream is None else Truth(detached, *self._gradients(results, upstream))

    def _results(self) -> dict[str, Tensor]:
        if self.op is DOT_PRODUCT:
            return {"scores": _banded(self.place, self.scores(), -torch.inf)}
        value = self.leaves["value"]
        if self.op is WEIGHTED_AVERAGE:
            weights = _dense(self.place, self.leaves["weights"])
            return {"output": _average(weights.where(self.visible, 0), value, self.visible)}
        assert self.op is ATTENTION
        scores = self.scores()
        some = self.visible.any(-1, keepdim=True)
        scores = scores.where(some, 0)
        weights = scores.softmax(-1).where(self.visible, 0)
        log_sum_exp = scores.to(self.op.results["log_sum_exp"].dtype(scores.dtype)).logsumexp(-1)
        if "sinks" in self.leaves:
            # Of the whole of a row, the sink has its share; it gives nothing to the output.
            self.of_rows["sinks"] = self.leaves["sinks"][:, None].expand(log_sum_exp.shape)
            with_sink = torch.logaddexp(log_sum_exp, self.of_rows["sinks"].to(log_sum_exp.dtype))
            weights = weights * (log_sum_exp - with_sink).exp()[..., None].to(weights.dtype)
            log_sum_exp = with_sink
        dropout_p = self.given.get("dropout_p")
        if dropout_p:
            places = [self.within[letter] for letter in "NHQK"]
            kept = _kept(int(self.given["seed"]), dropout_p, *places).to(weights.device)
            weights = weights.where(kept, 0) / (1 - dropout_p)
        return {
            "output": _average(weights, value, self.visible),
            "log_sum_exp": log_sum_exp.masked_fill(~some[..., 0], -torch.inf),
        }

    def scores(self) -> Tensor:
        """(N, H, Lq, Lk): ``scale * q . k``, capped, and the bias; -inf where hidden. Then ``visible`` knows of the bias, too."""
        query = self.leaves["query"]
        key = _for_heads(self.leaves["key"], query.shape[1])
        bias = self.leaves.get("bias")
        if bias is not None:
            bias = _dense(self.place, bias.reshape((1,) * (4 - bias.dim()) + bias.shape))
            self.visible = self.visible & (bias != -torch.inf)
        self.visible = self.visible.expand(*query.shape[:3], key.shape[2])
        query = query.where(self.visible.any(-1)[..., None], 0)
        key = key.where(self.visible.any(-2)[..., None], 0)
        scale = self.given.get("scale", self.op.defaults(query.shape[-1])["scale"])
        scores: Tensor = scale * _product(query, key, self.visible)
        softcap = self.given.get("softcap")
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        if bias is not None:
            scores = scores + bias.where(bias != -torch.inf, 0).to(scores.dtype)
        return scores.masked_fill(~self.visible, -torch.inf)

    def _gradients(
        self, results: Mapping[str, Tensor], upstream: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        # Nothing comes in through a row that sees no key, or a slot that is hidden.
        incoming = []
        for name, gradient in upstream.items():
            dims = self.op.results[name].dims
            if "W" in dims:
                visible = self.visible.expand(*gradient.shape[:2], *self.visible.shape[2:])
                seen = _banded(self.place, visible, False)
            else:
                seen = self.visible.any(-1)[..., None] if len(dims) == 4 else self.visible.any(-1)
            incoming.append(gradient.where(seen, 0).to(results[name].dtype))
        outputs = [
            (results[name], gradient) for name, gradient in zip(upstream, incoming) if results[name].requires_grad
        ]
        if not outputs:  # there is no key
            return {name: torch.zeros_like(leaf) for name, leaf in self.leaves.items()}, {}
        found = torch.autograd.grad(
            [result for result, _ in outputs],
            [*self.leaves.values(), *self.of_rows.values()],
            [gradient for _, gradient in outputs],
            allow_unused=True,
            materialize_grads=True,
        )
        gradients = dict(zip(self.leaves, found))
        terms = {name: each.square().sum((0, 2)).sqrt() for name, each in zip(self.of_rows, found[len(gradients) :])}
        return gradients, terms


def _dense(place: Placing, band: Tensor) -> Tensor:
    """(N or 1, H or 1, Lq or 1, W or 1) -> (N or 1, H or 1, Lq, Lk); whatever where no slot is."""
    slot = place.slot_of_key
    shape = (*torch.broadcast_shapes(band.shape[:-1], slot.shape[:-1]), place.keys)
    if band.shape[-1] == 1:
        return band.expand(shape)
    return band.expand(*shape[:-1], -1).gather(-1, slot.clamp(0, place.window.size - 1).expand(shape))


def _banded(place: Placing, dense: Tensor, fill: float) -> Tensor:
    """(..., Lq, Lk) -> (..., Lq, W), with ``fill`` where no key is."""
    shape = (*dense.shape[:-1], place.window.size)
    if place.keys == 0:
        return torch.full(shape, fill, dtype=dense.dtype, device=dense.device)
    key = place.key_of_slot
    there = (key >= 0) & (key < place.keys)
    return dense.gather(-1, key.clamp(0, place.keys - 1).expand(shape)).masked_fill(~there, fill)


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


def strips(problem: Problem, inputs: Inputs) -> Iterator[Strip]:
    """The whole of a small call; else both ends and the middle of its first and its last sequence, in its first and last head.

    Where sequences are packed, these are those of the pack.
    """
    rows, keys = problem.query_length, problem.key_length
    if problem.batch * problem.heads * rows * keys <= MOST_PAIRS:
        yield Strip(range(problem.batch), range(problem.kv_heads), range(keys), range(rows), range(keys))
        return
    place = _placing(problem, inputs)
    for batch, kv_head in sorted({(0, 0), (problem.batch - 1, problem.kv_heads - 1)}):
        n = min(batch, place.first.shape[0] - 1)
        first, last = place.first[n].cpu(), place.last[n].cpu()
        for begin in dict.fromkeys((0, max((keys - STRIP_KEYS) // 2, 0), max(keys - STRIP_KEYS, 0))):
            inner = range(begin, min(begin + STRIP_KEYS, keys))
            # Of rows that see one of these keys those between see none, or other ones of these. At the ends, also rows beyond.
            see = ((first < last) & (first < inner.stop) & (last > inner.start)).nonzero()
            seeing = range(int(see[0]), int(see[-1]) + 1) if len(see) else range(1)
            before = STRIP_KEYS if inner.start == 0 else 0
            after = STRIP_KEYS if inner.stop == keys else 0
            seeing = range(max(seeing.start - before, 0), min(seeing.stop + after, rows))
            low, high = (bound[seeing.start : seeing.stop] for bound in (first, last))
            seen = low < high
            some = bool(seen.any())
            around = range(
                min(int(low[seen].min()) if some else keys, inner.start),
                max(int(high[seen].max()) if some else 0, inner.stop),
            )
            yield Strip(range(batch, batch + 1), range(kv_head, kv_head + 1), inner, seeing, around)


def _placing(problem: Problem, inputs: Inputs) -> Placing:
    return placing(problem.query_length, problem.key_length, problem.window, inputs.arguments, inputs.upstream.device)


def _part(problem: Problem, strip: Strip, inputs: Inputs, dtype: torch.dtype) -> _Call:
    """A strip as a call, in ``dtype``."""
    op = ROWS[problem.op]
    places = _places(problem, strip, strip.keys)
    tensors = {name: _cut(inputs.tensors[name], dims, places).to(dtype) for name, dims in op.tensors.items()}
    given = _given(inputs.arguments)
    for argument in op.arguments:
        value = given.get(argument.name)
        if isinstance(value, Tensor) and value.is_floating_point():
            given[argument.name] = _cut(value, argument.dims or "", places).to(dtype)
    place = _placing(problem, inputs).part(strip.batch, strip.rows, strip.keys)
    return _Call(op, tensors, place, given, places)


def scores_of(problem: Problem, strip: Strip, inputs: Inputs) -> Tensor:
    """The scores of a strip in float64, (N, H, Lq, Lk): those that a softmax is taken of, -inf where hidden."""
    return _part(problem, strip, inputs, torch.float64).scores().detach()


def truth_of(
    problem: Problem, strip: Strip, inputs: Inputs, dtype: torch.dtype
) -> tuple[dict[str, Tensor], Mapping[str, Tensor]]:
    """The complete parts of a strip, computed in ``dtype``: "output", and the gradient of each leaf by its name; and the terms.

    Those are the terms of ``Truth``.
    """
    op = ROWS[problem.op]
    result = next(iter(op.results))
    places = _places(problem, strip, strip.keys)
    upstream = {
        name: _cut(gradient, op.results[name].dims, places).to(op.results[name].dtype(dtype))
        for name, gradient in {result: inputs.upstream, **inputs.incoming}.items()
    }
    found = _part(problem, strip, inputs, dtype).truth(upstream)
    inner = range(strip.inner.start - strip.keys.start, strip.inner.stop - strip.keys.start)
    gradients = {
        name: _cut(gradient, dims, {"K": inner})
        for name, (gradient, dims) in _with_dims(op, found.gradients).items()
        if _is_complete(problem, strip, dims, inputs.leaves[name])
    }
    return {"output": found.results[result], **gradients}, found.terms


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
    """Whether the strip holds all that the gradient is a sum of.

    A dimension that broadcasts is summed over, and one that a tensor lacks; but the rows that see a key are all in the strip.
    """
    places = _places(problem, strip, strip.inner)
    shape = (1,) * (len(dims) - leaf.dim()) + tuple(leaf.shape)
    summed = [letter for letter, size in zip(dims, shape) if size == 1 and letter in places]
    if "K" not in dims:
        summed += [letter for letter in "NQ" if letter not in dims]
    return all(len(places[letter]) == problem.size(letter) for letter in summed)
