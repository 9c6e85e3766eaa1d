"""Blocks of queries against the keys that they see together: the algorithm of fast-transformers' local product.

A block of B query rows sees B + W - 1 consecutive keys. All blocks go through one batched matrix product; the band of W slots a
row is a skewed view of the block's dense result, whose row pitch P = B + W - 1 is taken as P + 1. Memory is O(L (B + W)).

Shapes here: G = H / Hkv query heads share a key head, so a block's product has G B rows: (N, Hkv, blocks, G, B, P).

Products are made and summed in the accumulator's dtype, at least float32; a result is rounded once, when it is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnreg import Problem, Window, empty_like
from attnreg.memory import strides_like

# How many terms of q . k (or dO . v) are summed up in one go. A matrix product adds them one after the other, so that its error
# grows with their number. Softmax takes the error of a score, not its relative error: large scores need small ones.
TERMS = 128
TERMS_FOR_SOFTMAX = 32

# Multiplications up to which products for a softmax are made in float64: their time is that of the calls, and few numbers do not
# average their errors.
FEW_MULTIPLICATIONS = 2**16


@dataclass(frozen=True)
class Blocks:
    """How one problem is cut into blocks.

    Attributes:
        batch, kv_heads, group: N, Hkv and G.
        query_length, key_length: Lq and Lk.
        window: the window.
        rows: B, query rows a block.
        count: blocks a sequence; the last one may be padded.
        keys: P, the keys that a block sees, ``B + W - 1``.
        first_key: the position of the first block's first key; negative where it lies before the sequence.
    """

    batch: int
    kv_heads: int
    group: int
    query_length: int
    key_length: int
    window: Window
    rows: int
    count: int
    keys: int
    first_key: int

    @staticmethod
    def of(rows_like: Tensor, keys_like: Tensor, window: Window) -> Blocks:
        """Cut up (N, H, Lq, ·) against (N, Hkv, Lk, ·)."""
        batch, heads, query_length, _ = rows_like.shape
        kv_heads, key_length = keys_like.shape[1:3]
        rows = min(block_rows(window), query_length)
        return Blocks(
            batch=batch,
            kv_heads=kv_heads,
            group=heads // kv_heads,
            query_length=query_length,
            key_length=key_length,
            window=window,
            rows=rows,
            count=-(-query_length // rows),
            keys=rows + window.size - 1,
            first_key=key_length - query_length - window.left,
        )

    @property
    def padded(self) -> bool:
        """Whether the last block has more rows than the sequence has left."""
        return self.count * self.rows > self.query_length

    def split_rows(self, tensor: Tensor, unseeing: Tensor | None) -> Tensor:
        """(N, H, Lq, X) -> (N, Hkv, blocks, G, B, X), operands of products; padded and ``unseeing`` rows are 0."""
        rows = _operand(tensor) if unseeing is None else torch.where(unseeing, 0.0, _operand(tensor))
        padding = self.count * self.rows - self.query_length
        padded = pad(rows, (0, 0, 0, padding)) if padding else rows
        blocks = padded.reshape(self.batch, self.kv_heads, self.group, self.count, self.rows, tensor.shape[-1])
        return blocks.transpose(2, 3)

    def split_keys(self, tensor: Tensor, unseen: Tensor | None) -> Tensor:
        """(N, Hkv, Lk, X) -> (N, Hkv, blocks, P, X), operands of products; not existing and ``unseen`` keys are 0."""
        end = self.first_key + self.count * self.rows + self.window.size - 1
        # Negative padding cuts off keys that no query sees.
        padded = pad(_operand(tensor), (0, 0, -self.first_key, end - self.key_length))
        blocks = padded.unfold(2, self.keys, self.rows).transpose(-1, -2)
        return blocks if unseen is None else torch.where(unseen, 0.0, blocks)

    def join_rows(self, blocks: Tensor, like: Tensor) -> Tensor:
        """(N, Hkv, blocks, G, B, X) -> (N, H, Lq, X) of the dtype of ``like``, in memory as ``like``."""
        shape = (*like.shape[:-1], blocks.shape[-1])
        as_they_lie = not self.padded and (self.group == 1 or self.count == 1)
        if as_they_lie and blocks.dtype == like.dtype and blocks.is_contiguous():
            joined = blocks.view(shape)
            if joined.stride() == strides_like(like, shape[-1]):
                return joined
        joined = empty_like(like, shape[-1])
        for in_blocks, in_rows in self.pairs(blocks, joined):
            in_rows.copy_(in_blocks)
        return joined

    def join_keys(self, blocks: Tensor, like: Tensor) -> Tensor:
        """(N, Hkv, blocks, P, X) -> (N, Hkv, Lk, X) of the dtype of ``like``, in memory as ``like``.

        Each key sums up the blocks that see it, always in the same order.
        """
        spread = -(-self.keys // self.rows)
        sums = blocks.new_zeros((self.batch, self.kv_heads, self.count + spread, self.rows, blocks.shape[-1]))
        for part in range(spread):
            piece = blocks[:, :, :, part * self.rows : (part + 1) * self.rows]
            sums[:, :, part : part + self.count, : piece.shape[3]].add_(piece)
        joined = empty_like(like)
        unseen = max(self.first_key, 0)
        if unseen:
            joined[:, :, :unseen].zero_()
        seen = slice(unseen - self.first_key, self.key_length - self.first_key)
        joined[:, :, unseen:].copy_(sums.flatten(2, 3)[:, :, seen])
        return joined

    def pairs(self, blocks: Tensor, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of (N, Hkv, blocks, G, B, X) and of (N, H, Lq, X) that belong together: all full blocks, then the padded one.

        Either tensor may have one sequence or one head for all.
        """
        batch, heads, length, size = rows.shape
        group = self.group if heads > 1 else 1
        full, rest = divmod(length, self.rows)
        blocks = blocks.transpose(2, 3)
        in_full = rows.narrow(2, 0, length - rest) if rest else rows
        in_full = in_full.view(batch, heads // group, group, full, self.rows, size)
        yield blocks.narrow(3, 0, full) if rest else blocks, in_full
        if rest:
            in_padded = rows.narrow(2, length - rest, rest).view(batch, heads // group, group, rest, size)
            yield blocks.select(3, full).narrow(3, 0, rest), in_padded

    def product(self, rows: Tensor, keys: Tensor, scale: float = 1.0) -> Tensor:
        """Every row of a block against every key of it: (…, G, B, E) x (…, P, E) -> (…, G, B, P), times ``scale``."""
        dense = _product(self.matrices(rows), self.matrices(keys).transpose(1, 2), scale, TERMS)
        return dense.view(*rows.shape[:-1], self.keys)

    def product_for_softmax(self, rows: Tensor, keys: Tensor, scale: float = 1.0) -> Tensor:
        """The same with a smaller error."""
        left, right = self.matrices(rows), self.matrices(keys).transpose(1, 2)
        few = rows.numel() * self.keys <= FEW_MULTIPLICATIONS
        # Other devices may have no float64.
        if few and rows.dtype == torch.float32 and rows.device.type in ("cpu", "cuda"):
            dense = _product(left.double(), right.double(), scale).float()
        else:
            dense = _product(left, right, scale, TERMS_FOR_SOFTMAX)
        return dense.view(*rows.shape[:-1], self.keys)

    def average(self, dense: Tensor, keys: Tensor, scale: float = 1.0) -> Tensor:
        """(…, G, B, P) x (…, P, X) -> (…, G, B, X), times ``scale``."""
        rows = _product(self.matrices(dense), self.matrices(keys), scale)
        return rows.view(*dense.shape[:-1], keys.shape[-1])

    def average_transposed(self, dense: Tensor, rows: Tensor, scale: float = 1.0) -> Tensor:
        """(…, G, B, P) x (…, G, B, X) -> (…, P, X), times ``scale``."""
        keys = _product(self.matrices(dense).transpose(1, 2), self.matrices(rows), scale)
        return keys.view(*dense.shape[:3], self.keys, rows.shape[-1])

    def matrices(self, blocks: Tensor) -> Tensor:
        """(…, G, B, X) or (…, P, X) as a batch of matrices, (N Hkv blocks, G B, X) or (N Hkv blocks, P, X)."""
        return blocks.reshape(self.batch * self.kv_heads * self.count, -1, blocks.shape[-1])

    def band(self, dense: Tensor) -> Tensor:
        """The band (…, G, B, W) as a view of contiguous dense blocks (…, G, B, P): slot c of row r is column r + c."""
        *outer, _, _ = dense.stride()
        shape = (*dense.shape[:-1], self.window.size)
        return dense.as_strided(shape, (*outer, self.keys + 1, 1))

    def beside_band(self, dense: Tensor) -> Tensor:
        """All that lies outside the band, as a view (…, G, B - 1, B): from one row's last slot to the next one's first."""
        *outer, _, _ = dense.stride()
        shape = (*dense.shape[:-2], self.rows - 1, self.rows)
        return dense.as_strided(shape, (*outer, self.keys + 1, 1), dense.storage_offset() + self.window.size)

    def at_the_ends(self) -> tuple[range, range]:
        """The blocks that see positions before the first key, and those that see some past the last."""
        first_inside = min(max(-(self.first_key // self.rows), 0), self.count)
        inside = (self.key_length - self.keys - self.first_key) // self.rows + 1
        return range(first_inside), range(min(max(inside, first_inside), self.count), self.count)

    def dense_from_band(self, band: Tensor, outside: float) -> Tensor:
        """(N, H, Lq, W) -> (N, Hkv, blocks, G, B, P), ``outside`` the band and in padded rows."""
        batch, heads = band.shape[:2]
        heads_of_blocks = (self.kv_heads, self.count, self.group) if heads > 1 else (1, self.count, 1)
        dense = band.new_full((batch, *heads_of_blocks, self.rows, self.keys), outside)
        for in_blocks, in_rows in self.pairs(self.band(dense), band):
            in_blocks.copy_(in_rows)
        return dense

    def add_bias(self, dense: Tensor, bias: Tensor) -> None:
        """Add ``bias`` to dense scores, -inf as a finite number."""
        lowest, highest = torch.finfo(dense.dtype).min, torch.finfo(dense.dtype).max
        # A bias in a wider dtype may be beyond this one's range.
        band = bias.to(dense.dtype).clamp(lowest, highest).expand(-1, -1, self.query_length, self.window.size)
        for in_blocks, in_rows in self.pairs(self.band(dense), band):
            in_blocks.add_(in_rows)

    def bias_gradient(self, dense: Tensor, bias: Tensor) -> Tensor:
        """The gradient of the scores in dense blocks, summed to the shape of ``bias``."""
        shape = (self.batch, self.kv_heads * self.group, self.query_length, self.window.size)
        band = dense.new_empty(shape)
        for in_blocks, in_rows in self.pairs(self.band(dense), band):
            in_rows.copy_(in_blocks)
        return empty_like(bias).copy_(band.sum_to_size(bias.shape))


class Hidden:
    """What positions, lengths and the bias hide; True where hidden.

    What is hidden may be NaN or inf. Slots are selected away after a product that makes them. But a product that sums over rows
    or keys multiplies those that nobody sees by 0, and 0 x NaN is NaN: they are selected away before it.
    """

    def __init__(self, blocks: Blocks, bias: Tensor | None, key_lengths: Tensor | None, device: torch.device) -> None:
        self.blocks, self.bias, self.key_lengths, self.device = blocks, bias, key_lengths, device
        first_row_is_blind = blocks.first_key + blocks.window.size <= 0
        self.all_seen = bias is None and key_lengths is None and not first_row_is_blind

    @cached_property
    def band(self) -> Tensor:
        """Slots, broadcasting to (N, H, Lq, W)."""
        first = self.blocks.first_key
        rows = torch.arange(first, first + self.blocks.query_length, device=self.device).unsqueeze(1)
        hidden = self._missing(rows + torch.arange(self.blocks.window.size, device=self.device))
        return hidden if self.bias is None else hidden | (self.bias == -torch.inf)

    @cached_property
    def dense(self) -> Tensor:
        """The same in blocks, broadcasting to (N, Hkv, blocks, G, B, P)."""
        if self.bias is not None:
            return self.blocks.dense_from_band(self.band, True)
        columns = torch.arange(self.blocks.keys, device=self.device)
        slots = columns - torch.arange(self.blocks.rows, device=self.device)[:, None]
        outside = slots != slots.clamp(0, self.blocks.window.size - 1)
        first_columns = self.blocks.first_key + self.blocks.rows * torch.arange(self.blocks.count, device=self.device)
        missing = self._missing(first_columns[:, None] + columns)
        return outside | missing[..., None, None, :]

    @cached_property
    def ends(self) -> tuple[slice, ...] | None:
        """The blocks in which more is hidden than what lies beside the band; None where they are not worth telling apart."""
        if self.bias is not None or self.key_lengths is not None:
            return None
        ends = self.blocks.at_the_ends()
        are_few = 2 * sum(map(len, ends)) < self.blocks.count
        return tuple(slice(end.start, end.stop) for end in ends if end) if are_few else None

    def hide(self, scores: Tensor) -> None:
        """-inf in hidden slots of dense scores, and nowhere else: what is below the range is its lowest number."""
        lowest = torch.finfo(scores.dtype).min
        if self.ends is None:
            scores.clamp_(min=lowest).masked_fill_(self.dense, -torch.inf)
            return
        # The same through half of the memory.
        self.blocks.beside_band(scores).fill_(-torch.inf)
        self.blocks.band(scores).clamp_(min=lowest)
        for end in self.ends:
            scores[:, :, end].masked_fill_(self.dense[end], -torch.inf)

    def clear(self, weights: Tensor) -> None:
        """Zeros in the rows of dense weights that see no key, of which softmax made NaN."""
        if self.ends is None:
            weights.masked_fill_(self.dense, 0.0)
            return
        for end in self.ends:
            weights[:, :, end].masked_fill_(self.dense[end], 0.0)

    def _missing(self, positions: Tensor) -> Tensor:
        """Which of these positions (·, ·) have no key, broadcasting to (N, 1, ·, ·)."""
        end = self.blocks.key_length
        missing = positions != positions.clamp(0, end - 1)
        return missing if self.key_lengths is None else missing | (positions >= self.key_lengths[:, None, None, None])

    @cached_property
    def rows(self) -> Tensor | None:
        """The rows that see no key, broadcasting to (N, H, Lq, 1); None if there can be none."""
        return None if self.all_seen else self.band.all(-1, keepdim=True)

    @cached_property
    def keys(self) -> Tensor | None:
        """The keys that no row of a block sees, broadcasting to (N, Hkv, blocks, P, 1); None if there can be none."""
        return None if self.all_seen else self.dense.flatten(-3, -2).all(-2).unsqueeze(-1)


def block_rows(window: Window) -> int:
    """B, query rows a block: as many as the window has slots, within what makes a matrix product worth its call."""
    return min(max(1 << (window.size - 1).bit_length(), 32), 128)


def workspace(problem: Problem) -> int:
    """Bytes: dense blocks of scores and of weights, with gradients those of these, too; and what blocks see of the keys."""
    rows = min(block_rows(problem.window), max(problem.query_length, 1))
    blocks = problem.batch * -(-problem.query_length // rows)
    keys = rows + problem.window.size - 1
    size = 8 if problem.dtype == torch.float64 else 4
    dense = blocks * problem.heads * rows * keys * size
    seen = blocks * problem.kv_heads * keys * (problem.head_dim + problem.value_dim) * size
    return 4 * dense + 2 * seen if problem.needs_grad else 2 * dense + seen


def local_dot_product(
    query: Tensor, key: Tensor, window: Window, *, bias: Tensor | None, key_lengths: Tensor | None, scale: float
) -> Tensor:
    """Scores (N, H, Lq, W), -inf in hidden slots and nowhere else."""
    blocks = Blocks.of(query, key, window)
    hidden = Hidden(blocks, bias, key_lengths, query.device)
    dense = blocks.product(blocks.split_rows(query, None), blocks.split_keys(key, None), scale)
    if bias is not None:
        blocks.add_bias(dense, bias)
    scores = blocks.join_rows(blocks.band(dense), query)
    return scores.clamp_(min=torch.finfo(scores.dtype).min).masked_fill_(hidden.band, -torch.inf)


def local_dot_product_backward(
    grad_scores: Tensor,
    query: Tensor,
    key: Tensor,
    window: Window,
    *,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    scale: float,
    needs_grad: frozenset[str],
) -> dict[str, Tensor]:
    """``dQ = scale dS K``, ``dK = scale dS^T Q``, and dS summed to the bias' shape."""
    blocks = Blocks.of(query, key, window)
    hidden = Hidden(blocks, bias, key_lengths, query.device)
    grad_scores = torch.where(hidden.band, 0.0, grad_scores)
    gradients = {}
    if bias is not None and "bias" in needs_grad:
        summed = grad_scores.to(_accumulator(query)).sum_to_size(bias.shape)
        gradients["bias"] = empty_like(bias).copy_(summed)
    if not needs_grad.isdisjoint(("query", "key")):
        dense = blocks.dense_from_band(_operand(grad_scores), 0.0)
        if "query" in needs_grad:
            gradients["query"] = blocks.join_rows(
                blocks.average(dense, blocks.split_keys(key, hidden.keys), scale), query
            )
        if "key" in needs_grad:
            rows = blocks.split_rows(query, hidden.rows)
            gradients["key"] = blocks.join_keys(blocks.average_transposed(dense, rows, scale), key)
    return gradients


def local_weighted_average(weights: Tensor, value: Tensor, window: Window, *, key_lengths: Tensor | None) -> Tensor:
    """Output (N, H, Lq, D), over visible slots."""
    blocks = Blocks.of(weights, value, window)
    hidden = Hidden(blocks, None, key_lengths, value.device)
    dense = blocks.dense_from_band(torch.where(hidden.band, 0.0, _operand(weights)), 0.0)
    return blocks.join_rows(blocks.average(dense, blocks.split_keys(value, hidden.keys)), weights)


def local_weighted_average_backward(
    grad_output: Tensor,
    weights: Tensor,
    value: Tensor,
    window: Window,
    *,
    key_lengths: Tensor | None,
    needs_grad: frozenset[str],
) -> dict[str, Tensor]:
    """``dW = dO V^T`` in visible slots, ``dV = W^T dO``."""
    blocks = Blocks.of(weights, value, window)
    hidden = Hidden(blocks, None, key_lengths, value.device)
    grad_rows = blocks.split_rows(grad_output, hidden.rows)
    gradients = {}
    if "weights" in needs_grad:
        dense = blocks.product(grad_rows, blocks.split_keys(value, None))
        gradients["weights"] = blocks.join_rows(blocks.band(dense), weights).masked_fill_(hidden.band, 0.0)
    if "value" in needs_grad:
        dense = blocks.dense_from_band(torch.where(hidden.band, 0.0, _operand(weights)), 0.0)
        gradients["value"] = blocks.join_keys(blocks.average_transposed(dense, grad_rows), value)
    return gradients


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window,
    *,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output (N, H, Lq, D) and log-sum-exp (N, H, Lq): softmax on the dense blocks, so that no band is ever copied."""
    blocks = Blocks.of(query, key, window)
    hidden = Hidden(blocks, bias, key_lengths, query.device)
    rows, keys = blocks.split_rows(query, None), blocks.split_keys(key, None)
    weights, scores = _softmax(blocks, rows, keys, bias, hidden, scale)
    # The highest score's weight is 1 over the sum of all exp(S - highest).
    highest = scores.amax(-1, keepdim=True)
    log_sum_exp = highest - weights.amax(-1, keepdim=True).log()
    if not hidden.all_seen:
        log_sum_exp = torch.where(highest == -torch.inf, highest, log_sum_exp)
    del scores
    values = blocks.split_keys(value, hidden.keys)
    output = blocks.join_rows(blocks.average(weights.to(values.dtype), values), query)
    return output, blocks.join_rows(log_sum_exp, log_sum_exp.new_empty((*query.shape[:3], 1))).squeeze(-1)


def local_attention_backward(
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
    needs_grad: frozenset[str],
) -> dict[str, Tensor]:
    """``P = softmax(S)``, ``dV = P^T dO``, ``dS = P * (dP - rowsum(P * dP))`` with ``dP = dO V^T``; then as for scores."""
    del output, log_sum_exp  # both are made again here, at no more rounding than the forward's
    blocks = Blocks.of(query, key, window)
    hidden = Hidden(blocks, bias, key_lengths, query.device)
    rows, keys = blocks.split_rows(query, hidden.rows), blocks.split_keys(key, hidden.keys)
    weights = _softmax(blocks, rows, keys, bias, hidden, scale)[0]
    grad_rows = blocks.split_rows(grad_output, hidden.rows)
    gradients = {}
    if "value" in needs_grad:
        pieces = blocks.average_transposed(weights.to(grad_rows.dtype), grad_rows)
        gradients["value"] = blocks.join_keys(pieces, value)
    if not needs_grad.isdisjoint(("query", "key", "bias")):
        grad_weights = blocks.product_for_softmax(grad_rows, blocks.split_keys(value, hidden.keys))
        if not hidden.all_seen:
            grad_weights.masked_fill_(hidden.dense, 0.0)
        # Summed here rather than taken as rowsum(dO * O), which is the same but for rounding: so dS cancels exactly.
        row_sum = (weights * grad_weights).sum(-1, keepdim=True)
        grad_scores = weights.mul_(grad_weights.sub_(row_sum))
        if bias is not None and "bias" in needs_grad:
            gradients["bias"] = blocks.bias_gradient(grad_scores, bias)
        # float16 ends at 65504, which the product of two of its numbers may pass.
        dense = grad_scores if query.dtype == torch.float16 else grad_scores.to(rows.dtype)
        if "query" in needs_grad:
            gradients["query"] = blocks.join_rows(blocks.average(dense, keys, scale), query)
        if "key" in needs_grad:
            gradients["key"] = blocks.join_keys(blocks.average_transposed(dense, rows, scale), key)
    return gradients


def _softmax(
    blocks: Blocks, rows: Tensor, keys: Tensor, bias: Tensor | None, hidden: Hidden, scale: float
) -> tuple[Tensor, Tensor]:
    """``P = softmax(S)``, 0 where hidden, and S, -inf there, on dense blocks in the accumulator's dtype."""
    scores = blocks.product_for_softmax(rows, keys, scale)
    if bias is not None:
        blocks.add_bias(scores, bias)
    hidden.hide(scores)
    weights = scores.softmax(-1)
    if blocks.padded or not hidden.all_seen:
        hidden.clear(weights)
    return weights, scores


def _product(left: Tensor, right: Tensor, scale: float, most_terms: int | None = None) -> Tensor:
    """``scale left right`` for batches of matrices, in the accumulator's dtype; ``most_terms`` are summed up in one go."""
    if left.dtype != right.dtype:
        left, right = left.to(_accumulator(left)), right.to(_accumulator(right))
    dtype = _accumulator(left)
    if abs(scale) > torch.finfo(dtype).max:
        scale = math.copysign(math.inf, scale)
    parts: Iterable[tuple[Tensor, Tensor]] = [(left, right)]
    if most_terms is not None and left.shape[2] > most_terms:
        parts = zip(left.split(most_terms, 2), right.split(most_terms, 1))
    sums = left.new_empty((left.shape[0], left.shape[1], right.shape[2]), dtype=dtype)
    beta = 0.0
    for part in parts:
        if left.dtype == dtype:
            sums.baddbmm_(*part, beta=beta, alpha=scale)
        else:
            torch.baddbmm(sums, *part, beta=beta, alpha=scale, out_dtype=dtype, out=sums)
        beta = 1.0
    return sums


def _operand(tensor: Tensor) -> Tensor:
    """What goes into a matrix product: 16 bit as it is where torch's products sum it up in float32, else in float32."""
    return tensor.float() if tensor.dtype.itemsize < 4 and tensor.device.type != "cuda" else tensor


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype.itemsize < 4 else tensor.dtype
