"""Blocks of queries against the keys that they see together: the algorithm of fast-transformers' local product.

A block of B query rows sees B + W - 1 consecutive keys. All blocks go through one batched matrix product; the band of W slots a
row is a skewed view of the block's dense result, whose row pitch P = B + W - 1 is taken as P + 1. Memory is O(L (B + W)).

Shapes here: G = H / Hkv query heads share a key head, so a block's product has G B rows: (N, Hkv, blocks, G, B, P).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnreg import Window


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

    def split_rows(self, tensor: Tensor) -> Tensor:
        """(N, H, Lq, X) -> (N, Hkv, blocks, G, B, X); padded rows are 0."""
        padding = self.count * self.rows - self.query_length
        padded = pad(tensor, (0, 0, 0, padding)) if padding else tensor
        blocks = padded.reshape(self.batch, self.kv_heads, self.group, self.count, self.rows, tensor.shape[-1])
        return blocks.transpose(2, 3)

    def join_rows(self, blocks: Tensor) -> Tensor:
        """(N, Hkv, blocks, G, B, X) -> (N, H, Lq, X)."""
        heads = (self.batch, self.kv_heads * self.group, self.count * self.rows, blocks.shape[-1])
        return blocks.transpose(2, 3).reshape(heads)[:, :, : self.query_length].contiguous()

    def split_keys(self, tensor: Tensor, key_lengths: Tensor | None) -> Tensor:
        """(N, Hkv, Lk, X) -> (N, Hkv, blocks, P, X), overlapping; keys that do not exist or are past the length are 0."""
        if key_lengths is not None:
            positions = torch.arange(self.key_length, device=tensor.device)
            tensor = tensor.where((positions < key_lengths[:, None])[:, None, :, None], 0.0)
        end = self.first_key + self.count * self.rows + self.window.size - 1
        # Negative padding cuts off keys that no query sees.
        padded = pad(tensor, (0, 0, -self.first_key, end - self.key_length))
        return padded.unfold(2, self.keys, self.rows).transpose(-1, -2)

    def join_keys(self, blocks: Tensor) -> Tensor:
        """(N, Hkv, blocks, P, X) -> (N, Hkv, Lk, X): each key sums up the blocks that see it, always in the same order."""
        spread = -(-self.keys // self.rows)
        dtype = torch.float32 if blocks.dtype.itemsize < 4 else blocks.dtype
        shape = (self.batch, self.kv_heads, self.count + spread, self.rows, blocks.shape[-1])
        sums = blocks.new_zeros(shape, dtype=dtype)
        for part in range(spread):
            piece = blocks[:, :, :, part * self.rows : (part + 1) * self.rows]
            sums[:, :, part : part + self.count, : piece.shape[3]] += piece
        sums = sums.flatten(2, 3)
        before, after = self.first_key, self.key_length - self.first_key - sums.shape[2]
        return pad(sums, (0, 0, before, after))

    def product(self, rows: Tensor, keys: Tensor) -> Tensor:
        """Every row of a block against every key of it: (…, G, B, E) x (…, P, E) -> (…, G, B, P)."""
        return (rows.flatten(3, 4) @ keys.transpose(-1, -2)).view(*rows.shape[:-1], keys.shape[3])

    def average(self, dense: Tensor, keys: Tensor) -> Tensor:
        """(…, G, B, P) x (…, P, X) -> (…, G, B, X)."""
        return (dense.flatten(3, 4) @ keys).view(*dense.shape[:-1], keys.shape[4])

    def average_transposed(self, dense: Tensor, rows: Tensor) -> Tensor:
        """(…, G, B, P) x (…, G, B, X) -> (…, P, X)."""
        return dense.flatten(3, 4).transpose(-1, -2) @ rows.flatten(3, 4)

    def band(self, dense: Tensor) -> Tensor:
        """The band (…, G, B, W) as a view of contiguous dense blocks (…, G, B, P): slot c of row r is column r + c."""
        *outer, _, _ = dense.stride()
        shape = (*dense.shape[:-1], self.window.size)
        return dense.as_strided(shape, (*outer, self.keys + 1, 1))

    def dense_from_band(self, band: Tensor) -> Tensor:
        """(N, H, Lq, W) -> (N, Hkv, blocks, G, B, P), 0 outside the band."""
        blocks = self.split_rows(band)
        dense = band.new_zeros((*blocks.shape[:-1], self.keys))
        self.band(dense).copy_(blocks)
        return dense

    def visible(self, bias: Tensor | None, key_lengths: Tensor | None, device: torch.device) -> Tensor:
        """Which slots of the band are visible, broadcasting to (N, H, Lq, W)."""
        rows = torch.arange(self.query_length, device=device)[:, None]
        positions = rows + self.first_key + torch.arange(self.window.size, device=device)
        visible = ((positions >= 0) & (positions < self.key_length))[None, None]
        if key_lengths is not None:
            visible = visible & (positions < key_lengths[:, None, None, None])
        if bias is not None:
            visible = visible & (bias != -torch.inf)
        return visible

    def visible_dense(self, key_lengths: Tensor | None, device: torch.device) -> Tensor:
        """Which keys of a block each of its rows sees, broadcasting to (N, Hkv, blocks, G, B, P); the bias is left out."""
        columns = torch.arange(self.keys, device=device)
        slots = columns - torch.arange(self.rows, device=device)[:, None]
        in_window = (slots >= 0) & (slots < self.window.size)
        positions = columns + (self.first_key + self.rows * torch.arange(self.count, device=device)[:, None])
        exists = ((positions >= 0) & (positions < self.key_length))[None]
        if key_lengths is not None:
            exists = exists & (positions < key_lengths[:, None, None])
        return in_window & exists[:, None, :, None, None, :]


def block_rows(window: Window) -> int:
    """B, query rows a block: as many as the window has slots, within what makes a matrix product worth its call."""
    return min(max(1 << (window.size - 1).bit_length(), 32), 128)


def local_dot_product(
    query: Tensor, key: Tensor, window: Window, *, bias: Tensor | None, key_lengths: Tensor | None, scale: float
) -> Tensor:
    """Scores (N, H, Lq, W), -inf in invisible slots."""
    blocks = Blocks.of(query, key, window)
    dense = blocks.product(blocks.split_rows(_operand(query)), blocks.split_keys(_operand(key), key_lengths))
    scores = scale * blocks.join_rows(blocks.band(dense)).to(_accumulator(query))
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    visible = blocks.visible(bias, key_lengths, query.device)
    return scores.masked_fill_(~visible, -torch.inf).to(query.dtype)


def local_dot_product_backward(
    grad_scores: Tensor,
    query: Tensor,
    key: Tensor,
    window: Window,
    *,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    scale: float,
    needs_grad: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``dQ = scale dS K``, ``dK = scale dS^T Q``, and dS summed to the bias' shape."""
    needs_query, needs_key, needs_bias = needs_grad
    blocks = Blocks.of(query, key, window)
    grad_scores = grad_scores.where(blocks.visible(bias, key_lengths, query.device), 0.0)
    grad_query = grad_key = grad_bias = None
    if needs_bias and bias is not None:
        grad_bias = grad_scores.to(_accumulator(query)).sum_to_size(bias.shape).to(bias.dtype)
    if needs_query or needs_key:
        dense = blocks.dense_from_band(_operand(grad_scores))
        if needs_query:
            keys = blocks.split_keys(_operand(key), key_lengths)
            grad_query = (scale * blocks.join_rows(blocks.average(dense, keys))).to(query.dtype)
        if needs_key:
            rows = blocks.split_rows(_operand(query))
            grad_key = (scale * blocks.join_keys(blocks.average_transposed(dense, rows))).to(key.dtype)
    return grad_query, grad_key, grad_bias


def local_weighted_average(weights: Tensor, value: Tensor, window: Window, *, key_lengths: Tensor | None) -> Tensor:
    """Output (N, H, Lq, D), over visible slots."""
    blocks = Blocks.of(weights, value, window)
    visible = blocks.visible(None, key_lengths, value.device)
    dense = blocks.dense_from_band(_operand(weights.where(visible, 0.0)))
    return blocks.join_rows(blocks.average(dense, blocks.split_keys(_operand(value), key_lengths))).to(value.dtype)


def local_weighted_average_backward(
    grad_output: Tensor,
    weights: Tensor,
    value: Tensor,
    window: Window,
    *,
    key_lengths: Tensor | None,
    needs_grad: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """``dW = dO V^T`` in visible slots, ``dV = W^T dO``."""
    needs_weights, needs_value = needs_grad
    blocks = Blocks.of(weights, value, window)
    visible = blocks.visible(None, key_lengths, value.device)
    grad_rows = blocks.split_rows(_operand(grad_output))
    grad_weights = grad_value = None
    if needs_weights:
        dense = blocks.product(grad_rows, blocks.split_keys(_operand(value), key_lengths))
        grad_weights = blocks.join_rows(blocks.band(dense)).masked_fill_(~visible, 0.0).to(weights.dtype)
    if needs_value:
        dense = blocks.dense_from_band(_operand(weights.where(visible, 0.0)))
        grad_value = blocks.join_keys(blocks.average_transposed(dense, grad_rows)).to(value.dtype)
    return grad_weights, grad_value


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
    weights, log_sum_exp = _dense_weights(blocks, query, key, bias, key_lengths, scale)
    values = blocks.split_keys(_operand(value), key_lengths)
    output = blocks.join_rows(blocks.average(weights.to(values.dtype), values))
    return output.to(query.dtype), blocks.join_rows(log_sum_exp).squeeze(-1)


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
    needs_grad: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """``P = softmax(S)``, ``dV = P^T dO``, ``dS = P * (dP - rowsum(P * dP))`` with ``dP = dO V^T``; then as for scores."""
    del output, log_sum_exp  # both are made again here, at no more rounding than the forward's
    needs_query, needs_key, needs_value, needs_bias = needs_grad
    blocks = Blocks.of(query, key, window)
    weights, _ = _dense_weights(blocks, query, key, bias, key_lengths, scale)
    grad_rows = blocks.split_rows(_operand(grad_output))
    grad_query = grad_key = grad_value = grad_bias = None
    if needs_value:
        grad_value = blocks.join_keys(blocks.average_transposed(weights.to(grad_rows.dtype), grad_rows)).to(value.dtype)
    if needs_query or needs_key or needs_bias:
        values = blocks.split_keys(_operand(value), key_lengths)
        grad_weights = blocks.product(grad_rows, values).to(_accumulator(query))
        # Summed here rather than taken as rowsum(dO * O), which is the same but for rounding: so dS cancels exactly.
        row_sum = (weights * grad_weights).sum(-1, keepdim=True)
        grad_scores = weights.mul_(grad_weights.sub_(row_sum))
        if needs_bias and bias is not None:
            band = blocks.join_rows(blocks.band(grad_scores))
            grad_bias = band.sum_to_size(bias.shape).to(bias.dtype)
        dense = grad_scores.to(grad_rows.dtype)
        if needs_query:
            keys = blocks.split_keys(_operand(key), key_lengths)
            grad_query = (scale * blocks.join_rows(blocks.average(dense, keys))).to(query.dtype)
        if needs_key:
            rows = blocks.split_rows(_operand(query))
            grad_key = (scale * blocks.join_keys(blocks.average_transposed(dense, rows))).to(key.dtype)
    return grad_query, grad_key, grad_value, grad_bias


def _dense_weights(
    blocks: Blocks, query: Tensor, key: Tensor, bias: Tensor | None, key_lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """``P = softmax(S)`` on dense blocks and the log-sum-exp of S, in the accumulator's dtype; P is 0 where invisible."""
    keys = blocks.split_keys(_operand(key), key_lengths)
    scores = blocks.product(blocks.split_rows(_operand(query)), keys).to(_accumulator(query)).mul_(scale)
    if bias is not None:
        shape = (blocks.batch, query.shape[1], blocks.query_length, blocks.window.size)
        blocks.band(scores).add_(blocks.split_rows(bias.to(scores.dtype).expand(shape)))
    scores.masked_fill_(~blocks.visible_dense(key_lengths, query.device), -torch.inf)
    # A row without a visible key has no highest score; with 0 in its place its weights become 0 and its sum too.
    highest = scores.amax(-1, keepdim=True)
    highest.masked_fill_(highest == -torch.inf, 0.0)
    weights = scores.sub_(highest).exp_()
    total = weights.sum(-1, keepdim=True)
    return weights.div_(total.where(total > 0, 1.0)), highest + total.log()


def _operand(tensor: Tensor) -> Tensor:
    """What goes into a matrix product: 16 bit as it is on an accelerator, in float32 on a CPU, which has no units for it."""
    return tensor.float() if tensor.dtype.itemsize < 4 and tensor.device.type == "cpu" else tensor


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype.itemsize < 4 else tensor.dtype
