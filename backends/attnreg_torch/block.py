"""Blocks of queries against the keys that they see together: the algorithm of fast-transformers' local product.

A block of B query rows sees B + W - 1 consecutive keys. All blocks go through one batched matrix product; the band of W slots a
row is a skewed view of the block's dense result, whose row pitch P = B + W - 1 is taken as P + 1. Memory is O(L (B + W)), or
O(Lq Lk) where that is less and no tensor has a column per slot.

Where it can, attention on a CPU goes through torch's fused kernel instead, see :mod:`attnreg_torch.fused`.

Products are made and summed in the accumulator's dtype, at least float32; a result is rounded once, when it is written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnreg import Problem, Window, empty_like
from attnreg_torch import fused
from attnreg_torch.blocks import Blocks, block_rows
from attnreg_torch.hidden import Hidden, bytes_of_generator
from attnreg_torch.products import accumulator, operand
from attnreg_torch.rows import naming_rows


def workspace(problem: Problem) -> int:
    """Bytes: dense blocks of scores and of weights, with gradients those of these, too; what blocks see of the keys; masks.

    That is the most: torch's kernel needs a few megabytes for each thread, but which calls it takes hangs on their scores.
    """
    length, key_length = problem.query_length, problem.key_length
    rows = min(block_rows(problem.window), max(length, 1))
    keys, count = rows + problem.window.size - 1, -(-length // rows)
    if not _by_slot(problem) and keys >= key_length:
        rows, keys, count = length, key_length, 1
    elif problem.gives("cu_seqlens_k") is not None:
        # Sequences of a block's length, whose last blocks are mostly padding.
        count *= 2
    size = 8 if problem.dtype == torch.float64 else 4
    blocks = problem.batch * count
    slots = blocks * rows * keys
    dense = slots * problem.heads * size
    seen = blocks * problem.kv_heads * keys * (problem.head_dim + problem.value_dim) * size
    # Masks are bytes.
    masks = slots * (problem.heads if problem.gives("bias") is not None else 1)
    if problem.gives("dropout_p") is not None:
        masks += 2 * slots * problem.heads + bytes_of_generator(problem.device, slots * problem.heads)
    if not problem.needs_grad:
        return 2 * dense + seen + masks
    return (4 if problem.gives("softcap") is None else 5) * dense + 2 * seen + masks


def _by_slot(problem: Problem) -> bool:
    """Whether a tensor has a column for each slot."""
    bias = problem.gives("bias")
    return problem.op != "local_attention" or (bias is not None and bias.shape[-1] > 1)


@naming_rows
def local_dot_product(
    query: Tensor, key: Tensor, window: Window, *, bias: Tensor | None, scale: float, **rows: Tensor | None
) -> Tensor:
    """Scores (N, H, Lq, W), -inf in hidden slots and nowhere else."""
    hidden = Hidden(query, key, window, bias, rows, by_slot=True)
    blocks = hidden.blocks
    dense = blocks.product(blocks.split_rows(query, None), blocks.split_keys(key, None), scale)
    if bias is not None:
        blocks.add_bias(dense, bias)
    scores = blocks.join_rows(blocks.band(dense), query)
    return scores.clamp_(min=torch.finfo(scores.dtype).min).masked_fill_(hidden.band, -torch.inf)


@naming_rows
def local_dot_product_backward(
    grad_scores: Tensor,
    query: Tensor,
    key: Tensor,
    window: Window,
    *,
    bias: Tensor | None,
    scale: float,
    needs_grad: frozenset[str],
    **rows: Tensor | None,
) -> dict[str, Tensor]:
    """``dQ = scale dS K``, ``dK = scale dS^T Q``, and dS summed to the bias' shape."""
    hidden = Hidden(query, key, window, bias, rows, by_slot=True)
    blocks = hidden.blocks
    grad_scores = torch.where(hidden.band, 0.0, grad_scores)
    gradients = {}
    if bias is not None and "bias" in needs_grad:
        summed = grad_scores.to(accumulator(query)).sum_to_size(bias.shape)
        gradients["bias"] = empty_like(bias).copy_(summed)
    if not needs_grad.isdisjoint(("query", "key")):
        dense = blocks.dense_from_band(operand(grad_scores), 0.0)
        if "query" in needs_grad:
            gradients["query"] = blocks.join_rows(
                blocks.average(dense, blocks.split_keys(key, hidden.keys), scale), query
            )
        if "key" in needs_grad:
            query_rows = blocks.split_rows(query, hidden.rows)
            gradients["key"] = blocks.join_keys(blocks.average_transposed(dense, query_rows, scale), key)
    return gradients


@naming_rows
def local_weighted_average(weights: Tensor, value: Tensor, window: Window, **rows: Tensor | None) -> Tensor:
    """Output (N, H, Lq, D), over visible slots."""
    hidden = Hidden(weights, value, window, None, rows, by_slot=True)
    blocks = hidden.blocks
    dense = blocks.dense_from_band(torch.where(hidden.band, 0.0, operand(weights)), 0.0)
    return blocks.join_rows(blocks.average(dense, blocks.split_keys(value, hidden.keys)), weights)


@naming_rows
def local_weighted_average_backward(
    grad_output: Tensor,
    weights: Tensor,
    value: Tensor,
    window: Window,
    *,
    needs_grad: frozenset[str],
    **rows: Tensor | None,
) -> dict[str, Tensor]:
    """``dW = dO V^T`` in visible slots, ``dV = W^T dO``."""
    hidden = Hidden(weights, value, window, None, rows, by_slot=True)
    blocks = hidden.blocks
    grad_rows = blocks.split_rows(grad_output, hidden.rows)
    gradients = {}
    if "weights" in needs_grad:
        dense = blocks.product(grad_rows, blocks.split_keys(value, None))
        gradients["weights"] = blocks.join_rows(blocks.band(dense), weights).masked_fill_(hidden.band, 0.0)
    if "value" in needs_grad:
        dense = blocks.dense_from_band(torch.where(hidden.band, 0.0, operand(weights)), 0.0)
        gradients["value"] = blocks.join_keys(blocks.average_transposed(dense, grad_rows), value)
    return gradients


@naming_rows
def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window,
    *,
    bias: Tensor | None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float | None = None,
    seed: Tensor | None = None,
    **rows: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output (N, H, Lq, D) and log-sum-exp (N, H, Lq): softmax on the dense blocks, so that no band is ever copied."""
    if fused.takes(query, value, scale, bias, softcap, dropout_p):
        found = fused.local_attention(query, key, value, window, scale, sinks, rows)
        if found is not None:
            return found
    hidden = Hidden(query, key, window, bias, rows, by_slot=bias is not None and bias.shape[3] > 1)
    blocks = hidden.blocks
    query_rows, keys = blocks.split_rows(query, None), blocks.split_keys(key, None)
    weights, scores, _ = _softmax(blocks, query_rows, keys, bias, hidden, scale, softcap)
    # The highest score's weight is 1 over the sum of all exp(S - highest).
    highest, largest = scores.amax(-1, keepdim=True), weights.amax(-1, keepdim=True)
    log_sum_exp = highest - largest.log()
    if sinks is not None:
        sink = _of_heads(sinks, scores)
        log_sum_exp = torch.logaddexp(log_sum_exp, sink)
        weights.mul_(_sink_logit(sink, highest, largest).neg_().sigmoid_())
    if not hidden.all_seen:
        log_sum_exp = torch.where(highest == -torch.inf, highest, log_sum_exp)
    del scores
    dropped, kept_scale = _dropped(hidden, dropout_p, seed)
    if dropped is not None:
        weights.masked_fill_(dropped, 0.0)
    values = blocks.split_keys(value, hidden.keys)
    output = blocks.join_rows(blocks.average(weights.to(values.dtype), values, kept_scale), query)
    return output, blocks.join_rows(log_sum_exp, log_sum_exp.new_empty((*query.shape[:3], 1))).squeeze(-1)


@naming_rows
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
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float | None = None,
    seed: Tensor | None = None,
    grad_log_sum_exp: Tensor | None = None,
    needs_grad: frozenset[str],
    **rows: Tensor | None,
) -> dict[str, Tensor]:
    """``P = softmax(S)``, ``dV = P^T dO``, ``dS = P * (dP - rowsum(P * dP) + dLSE)`` with ``dP = dO V^T``; then as for scores.

    A sink is a score whose value is 0. Where weights are dropped, dV is that of those that are left, and dP is 0 at the others.
    """
    # A softmax of one number is constant: the kernel's derivative is but nearly 0.
    wide = min(query.shape[3], value.shape[3]) >= fused.SMALLEST_HEAD_DIM
    if wide and window.size > 1 and fused.takes(query, value, scale, bias, softcap, dropout_p, grad_log_sum_exp):
        given = (grad_output, query, key, value, output, log_sum_exp)
        gradients_of_kernel = fused.local_attention_backward(*given, window, scale, sinks, rows, needs_grad)
        if gradients_of_kernel is not None:
            return gradients_of_kernel
    del output, log_sum_exp  # both are made again here, at no more rounding than the forward's
    hidden = Hidden(query, key, window, bias, rows, by_slot=bias is not None and bias.shape[3] > 1)
    blocks = hidden.blocks
    query_rows, keys = blocks.split_rows(query, hidden.rows), blocks.split_keys(key, hidden.keys)
    weights, scores, slope = _softmax(blocks, query_rows, keys, bias, hidden, scale, softcap, with_slope=True)
    of_sink: Tensor | None = None
    if sinks is not None:
        highest, largest = scores.amax(-1, keepdim=True), weights.amax(-1, keepdim=True)
        logit = _sink_logit(_of_heads(sinks, scores), highest, largest)
        weights.mul_(logit.neg().sigmoid_())
        of_sink = logit.sigmoid_()
    del scores
    dropped, kept_scale = _dropped(hidden, dropout_p, seed)
    grad_rows = blocks.split_rows(grad_output, hidden.rows)
    gradients = {}
    if "value" in needs_grad:
        kept = weights if dropped is None else weights.masked_fill(dropped, 0.0)
        pieces = blocks.average_transposed(kept.to(grad_rows.dtype), grad_rows, kept_scale)
        gradients["value"] = blocks.join_keys(pieces, value)
        del kept, pieces
    if not needs_grad.isdisjoint(("query", "key", "bias", "sinks")):
        values = blocks.split_keys(value, hidden.keys)
        grad_weights = blocks.product_for_softmax(grad_rows, values, kept_scale)
        if not hidden.all_seen:
            hidden.fill(grad_weights, 0.0)
        if dropped is not None:
            grad_weights.masked_fill_(dropped, 0.0)
        # Summed here rather than taken as rowsum(dO * O), which is the same but for rounding: so dS cancels exactly.
        row_sum = (weights * grad_weights).sum(-1, keepdim=True)
        if grad_log_sum_exp is not None:
            row_sum.sub_(blocks.split_rows(grad_log_sum_exp.unsqueeze(-1), hidden.rows))
        if of_sink is not None and sinks is not None and "sinks" in needs_grad:
            of_heads = (of_sink * row_sum).sum((0, 2, 4, 5)).flatten()
            gradients["sinks"] = empty_like(sinks).copy_(of_heads.neg_())
        grad_scores = weights.mul_(grad_weights.sub_(row_sum))
        del grad_weights
        if bias is not None and "bias" in needs_grad:
            gradients["bias"] = blocks.bias_gradient(grad_scores, bias)
        if slope is not None:
            grad_scores.mul_(slope)
            # A hidden slot's may be NaN.
            hidden.fill(grad_scores, 0.0)
        # float16 ends at 65504, which the product of two of its numbers may pass.
        dense = grad_scores if query.dtype == torch.float16 else grad_scores.to(query_rows.dtype)
        if "query" in needs_grad:
            gradients["query"] = blocks.join_rows(blocks.average(dense, keys, scale), query)
        if "key" in needs_grad:
            gradients["key"] = blocks.join_keys(blocks.average_transposed(dense, query_rows, scale), key)
    return gradients


def _softmax(
    blocks: Blocks,
    rows: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    hidden: Hidden,
    scale: float,
    softcap: float | None,
    *,
    with_slope: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``P = softmax(S)``, 0 where hidden, and S, -inf there, on dense blocks in the accumulator's dtype.

    The third is how S changes with the capped score, arbitrary where hidden; None without a cap.
    """
    scores = blocks.product_for_softmax(rows, keys, scale)
    slope: Tensor | None = None
    if softcap is not None:
        # A cap that the dtype cannot hold caps nothing, or all.
        finfo = torch.finfo(scores.dtype)
        cap = min(max(softcap, finfo.tiny), finfo.max)
        shares = scores.div_(cap).tanh_()
        if with_slope:
            slope = (1.0 - shares).mul_(1.0 + shares)
        scores = shares.mul_(cap)
    if bias is not None:
        blocks.add_bias(scores, bias)
    hidden.hide(scores)
    weights = scores.softmax(-1)
    if blocks.padded or not hidden.all_seen:
        hidden.clear(weights)
    return weights, scores, slope


def _of_heads(sinks: Tensor, scores: Tensor) -> Tensor:
    """(H,) as it stands beside dense scores (N, Hkv, blocks, G, B, P), in their dtype."""
    return sinks.to(scores.dtype).view(1, scores.shape[1], 1, scores.shape[3], 1, 1)


def _sink_logit(sink: Tensor, highest: Tensor, largest: Tensor) -> Tensor:
    """The log of a sink's weight over that of all keys together; -inf where a row sees no key.

    Made of the highest score and the largest weight of softmax without the sink: their difference from the sink is exact where
    it is small, and the log-sum-exp's own would not be.
    """
    return (sink - highest).add_(largest.log()).masked_fill_(highest == -torch.inf, -torch.inf)


def _dropped(hidden: Hidden, dropout_p: float | None, seed: Tensor | None) -> tuple[Tensor | None, float]:
    """Which dense weights are dropped, and by what the others are to be multiplied."""
    if not dropout_p or seed is None:
        return None, 1.0
    return hidden.dropped(seed, dropout_p), 1.0 / (1.0 - dropout_p)
