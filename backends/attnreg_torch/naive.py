"""The definition of the three ops, as plain as it can be written: every other backend is measured against it.

For each query the keys of its window are gathered side by side, (N, H, Lq, W, E), and multiplied. That is far too much memory
for real work, and nothing in it can go wrong at a border. Autograd differentiates it, any number of times.

What is invisible may be NaN or inf: ``where`` selects it away, and the derivative of ``where`` does so with its gradient. The
arguments of rows, as every function gets them, are those of ``attnreg.rows.rows_of``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnreg import Problem, Window
from attnreg.dropout import kept
from attnreg.memory import laid_out, strides_like, with_gradient_laid_out
from attnreg.rows import rows_of


def local_dot_product(
    query: Tensor, key: Tensor, window: Window, *, bias: Tensor | None, scale: float, **rows: Tensor | None
) -> Tensor:
    """``scores[n, h, i, c] = scale * query[n, h, i] . key[n, h', j] + bias[n, h, i, c]``, where slot c of row i is key j."""
    slots = _slots(query, key, window, rows, of_window=True)
    scores, visible = _scores(query, key, slots, bias, scale, None)
    scores = _clamped(scores.to(query.dtype)).where(visible, -torch.inf)
    return laid_out(scores, strides_like(query, window.size))


def local_weighted_average(weights: Tensor, value: Tensor, window: Window, **rows: Tensor | None) -> Tensor:
    """``output[n, h, i] = sum over c of weights[n, h, i, c] * value[n, h', j]``, over visible slots."""
    slots = _slots(weights, value, window, rows, of_window=True)
    output = _average(_accumulated(with_gradient_laid_out(weights)), value, slots, slots.visible)
    return laid_out(output.to(weights.dtype), strides_like(weights, value.shape[3]))


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window,
    *,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    dropout_p: float | None,
    seed: Tensor | None,
    **rows: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``output[n, h, i] = sum over c of softmax(scores[n, h, i])[c] * value[n, h', j]``, over visible slots."""
    slots = _slots(query, key, window, rows, of_window=bias is not None and bias.shape[3] > 1)
    scores, visible = _scores(query, key, slots, bias, scale, softcap)
    # A row without a visible key gets finite scores, so that softmax stays finite; its weights are then 0 as a whole.
    sees = visible.any(-1, keepdim=True)
    scores = scores.where(visible, -torch.inf).where(sees, 0.0)
    if sinks is not None:
        sink = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], -1)
    weights = scores.softmax(-1)[..., : visible.shape[-1]]
    # Its derivative is then the softmax. That of torch's own is exp(scores - log_sum_exp), in which large ones have lost digits.
    highest = scores.detach().amax(-1, keepdim=True)
    log_sum_exp = ((scores - highest).exp().sum(-1, keepdim=True).log() + highest).where(sees, -torch.inf).squeeze(-1)
    if dropout_p is not None and seed is not None:
        weights = weights.where(_kept(seed, dropout_p, slots, weights.shape), 0.0) / (1.0 - dropout_p)
    output = _average(weights, value, slots, visible).to(query.dtype)
    return laid_out(output, strides_like(query, value.shape[3])), log_sum_exp


class _Slots(NamedTuple):
    """The keys that are gathered for each row.

    Attributes:
        positions: theirs, (N or 1, Lq, W), or fewer than W where that is all a row can see; a position may lie outside.
        visible: which of them the row sees, (N or 1, 1, Lq, W).
    """

    positions: Tensor
    visible: Tensor


def _slots(
    rows_like: Tensor, keys_like: Tensor, window: Window, rows: dict[str, Tensor | None], *, of_window: bool
) -> _Slots:
    """The slots of the window, or where no tensor has them those from the first key that each row sees."""
    query_length, key_length = rows_like.shape[2], keys_like.shape[2]
    place = rows_of(query_length, key_length, keys_like.device, **rows)
    first, last = place.seen(query_length, window)
    begin, size = place.position(query_length) - window.left, window.size
    if not of_window and isinstance(key_length, int):
        begin, size = first, min(size, key_length)
    positions = begin.unsqueeze(-1) + torch.arange(size, device=keys_like.device)
    visible = (positions >= first.unsqueeze(-1)) & (positions < last.unsqueeze(-1))
    return _Slots(positions, visible.unsqueeze(1))


def _scores(
    query: Tensor, key: Tensor, slots: _Slots, bias: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Scores, arbitrary in invisible slots, in float32 or float64; and which slots are visible."""
    visible = slots.visible
    if bias is not None:
        visible = visible & (bias != -torch.inf)
    keys = _gathered(key, query.shape[1], slots, visible)
    scores = scale * (_accumulated(with_gradient_laid_out(query)).unsqueeze(-2) * keys).sum(-1)
    if softcap is not None:
        # The derivative of tanh would make NaN of 0 where it is NaN.
        scores = softcap * torch.tanh(scores.where(visible, 0.0) / softcap)
    if bias is not None:
        # A bias in a wider dtype may be beyond this one's range.
        scores = scores + _clamped(
            with_gradient_laid_out(bias).to(scores.dtype, copy=True), torch.finfo(scores.dtype).max
        )
    return _clamped(scores), visible.expand(scores.shape)


def _clamped(scores: Tensor, highest: float = torch.inf) -> Tensor:
    """``scores``, a new tensor, from its dtype's lowest number on: -inf means hidden, which a visible slot never is.

    As with any rounding, the derivative is that of what was rounded.
    """
    with torch.no_grad():
        return scores.clamp_min_(torch.finfo(scores.dtype).min).clamp_max_(highest)


def _average(weights: Tensor, value: Tensor, slots: _Slots, visible: Tensor) -> Tensor:
    values = _gathered(value, weights.shape[1], slots, visible)
    return (weights.where(visible, 0.0).unsqueeze(-1) * values).sum(-2)


def _gathered(key: Tensor, heads: int, slots: _Slots, visible: Tensor) -> Tensor:
    """The keys of each query's slots side by side, (N, H, Lq, W, E), 0 in invisible slots."""
    batch, _, key_length, _ = key.shape
    positions = slots.positions.clamp(0, key_length - 1)
    of_query_heads = _accumulated(with_gradient_laid_out(key)).repeat_interleave(heads // key.shape[1], dim=1)
    alike = positions.shape[0] == 1
    if not alike:
        # All sequences one after the other.
        positions = positions + key_length * torch.arange(batch, device=key.device)[:, None, None]
        of_query_heads = of_query_heads.transpose(0, 1).flatten(1, 2)[None]
    else:
        positions = positions[0]
    if key.device.type == "cpu" and torch._C._functorch.peek_interpreter_stack() is None:
        # Its gradient is added up in order. That of an indexed tensor is so on a GPU; here threads add as they come. But vmap,
        # traced with open sizes, would keep those of the trace.
        gathered: Tensor = of_query_heads.index_select(2, positions.flatten()).unflatten(2, positions.shape)
    else:
        gathered = of_query_heads[:, :, positions]
    if not alike:
        gathered = gathered[0].transpose(0, 1)
    visible_keys: Tensor = gathered.where(visible.unsqueeze(-1), 0.0)
    return visible_keys


def _kept(seed: Tensor, dropout_p: float, slots: _Slots, shape: torch.Size) -> Tensor:
    """Which weights (N, H, Lq, W) are kept."""
    n, h, i = (torch.arange(size, device=seed.device) for size in shape[:3])
    begin = slots.positions[:, None, :, 0]
    return kept(seed, dropout_p, n[:, None, None], h[:, None], i, begin, shape[3])


def _accumulated(tensor: Tensor) -> Tensor:
    """float64 as it is, anything else in float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def workspace(problem: Problem) -> int:
    """Bytes: the gathered keys or values and their products, (N, H, Lq, W, E) each; with gradients those of both stay."""
    size = 8 if problem.dtype == torch.float64 else 4
    slots = problem.window.size if problem.op != "local_attention" else min(problem.window.size, problem.key_length)
    elements = problem.batch * problem.heads * problem.query_length * slots
    # A generator's words and what they are made of.
    words = elements * 24 if problem.gives("dropout_p") is not None else 0
    return elements * max(problem.head_dim, problem.value_dim) * size * (5 if problem.needs_grad else 2) + words
