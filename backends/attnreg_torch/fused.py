"""Attention by the fused kernel that torch has for CPUs, over blocks of queries against the keys that each block sees.

The kernel takes batches of dense attention with a mask that is added to the scores. Blocks whose windows lie inside a sequence
are such a batch, as views of the tensors, and share one mask, the band. Those at an end of the sequence see fewer keys: each is
a call with a part of the band. A key that no row sees is in no block, and a row that sees no key in none, so that they may be
NaN.

Blocks go through the kernel a few at a time: what it returns of them is put in its place before it leaves the caches.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnreg import Window, empty_like
from attnreg.memory import strides_like
from attnreg_torch.rows import given

DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})
# The kernel's backward takes weights as exp(S - log-sum-exp): they are known to within a rounding step of the latter.
LARGEST_LOG_SUM_EXP = 32.0
LARGEST_SCALE = 1e30
# Of gradients: where fewer terms make them, what the kernel rounds is more of them than the error budget has.
SMALLEST_HEAD_DIM = 16
# Multiplications below which one call for all rows takes less time than several for their blocks.
FEW_MULTIPLICATIONS = 2**20
# Rows of all heads that a sequence of its own must have on average: shorter ones take less time side by side.
FEWEST_ROWS = 16
# Bytes that the kernel returns at a time, for each thread, about.
BYTES_AT_A_TIME = 2**21
# Elements of the largest mask that is kept for later calls.
MOST_KEPT = 2**15


@dataclass(frozen=True)
class Piece:
    """Consecutive rows that see keys of one range: row r of them sees the keys [begin + r, end + r) that exist.

    Attributes:
        batch: the sequences that it is of, [first, last).
        first_row, rows: which rows these are; each of them sees a key.
        first_key, keys: the keys that exist; each is seen by one of the rows, and the first is key 0.
        begin, end: what the first row sees.
    """

    batch: tuple[int, int]
    first_row: int
    rows: int
    first_key: int
    keys: int
    begin: int
    end: int

    @property
    def sees_all(self) -> bool:
        """Whether every row sees every key."""
        return self.begin + self.rows <= 1 and self.end >= self.keys


@dataclass(frozen=True)
class Lot:
    """Blocks that go through the kernel in one call.

    Attributes:
        batch: the sequences that they are of, [first, last).
        blocks: how many of each sequence, ``rows`` apart.
        first_row, rows: of the first block.
        first_key, keys: likewise.
        mask: (rows, keys), added to the scores; None where all is seen.
        head: which of the query heads that share a key head.
        group: how many share one.
    """

    batch: tuple[int, int]
    blocks: int
    first_row: int
    rows: int
    first_key: int
    keys: int
    mask: Tensor | None
    head: int = 0
    group: int = 1

    def of_rows(self, tensor: Tensor) -> Tensor:
        """Its rows of (N, H, Lq, X), (·, ·, B, X)."""
        return self._view(tensor, self.first_row, self.rows, self.head, self.group)

    def of_keys(self, tensor: Tensor) -> Tensor:
        """Its keys of (N, Hkv, Lk, X), (·, ·, P, X)."""
        return self._view(tensor, self.first_key, self.keys, 0, 1)

    def add_to_keys(self, total: Tensor, found: Tensor) -> None:
        """Add what the blocks have for their keys (·, ·, P, X) to (N, Hkv, Lk, X): to each key in the order of the blocks."""
        if self.blocks == 1:
            self.of_keys(total).add_(found)
            return
        for begin in reversed(range(0, self.keys, self.rows)):
            size = min(self.rows, self.keys - begin)
            self._view(total, self.first_key + begin, size, 0, 1).add_(found.narrow(2, begin, size))

    def _view(self, tensor: Tensor, first: int, size: int, head: int, group: int) -> Tensor:
        of_sequence, of_head, of_row, _ = tensor.stride()
        sequence, end = self.batch
        heads = tensor.shape[1] // group
        outer, inner = (of_sequence, of_head * group)
        shape = (end - sequence, heads, size, tensor.shape[3])
        if self.blocks > 1:
            outer, inner = of_row * self.rows, of_sequence if heads == 1 else inner
            shape = (self.blocks, (end - sequence) * heads, *shape[2:])
        start = tensor.storage_offset() + sequence * of_sequence + head * of_head + first * of_row
        return tensor.as_strided(shape, (outer, inner, of_row, 1), start)


@dataclass(frozen=True)
class AtOnce:
    """A whole problem in one call of the kernel; the query heads that share a key head are more rows of it.

    Attributes:
        group: how many share one.
        first_key, keys: the keys that some row sees.
        mask: (group * Lq, keys), added to the scores; None where all is seen.
    """

    group: int
    first_key: int
    keys: int
    mask: Tensor | None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, scale: float, like: Tensor) -> tuple[Tensor, Tensor]:
        """Output in float32, in memory as ``like``, and log-sum-exp."""
        inputs = (self._of_rows(query), self._of_keys(key), self._of_keys(value))
        found, of_found = _kernel()(*inputs, attn_mask=self.mask, scale=scale)
        return self._joined(found, like), of_found.contiguous().view(query.shape[:3])

    def backward(
        self,
        grad_output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        log_sum_exp: Tensor,
        scale: float,
        like: tuple[Tensor, Tensor, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of query, key and value in float32, in memory as ``like``."""
        grad_output, query, output = (self._of_rows(tensor) for tensor in (grad_output, query, output))
        statistics = self._of_rows(log_sum_exp.unsqueeze(-1)).squeeze(-1)
        inputs = (grad_output, query, self._of_keys(key), self._of_keys(value), output, statistics)
        of_query, of_key, of_value = _kernel_of_backward()(*inputs, 0.0, False, attn_mask=self.mask, scale=scale)
        return self._joined(of_query, like[0]), self._spread(of_key, like[1]), self._spread(of_value, like[2])

    def _of_rows(self, tensor: Tensor) -> Tensor:
        """(N, H, Lq, X) -> (N, Hkv, G Lq, X)."""
        return tensor if self.group == 1 else tensor.unflatten(1, (-1, self.group)).flatten(2, 3)

    def _of_keys(self, tensor: Tensor) -> Tensor:
        return tensor if self.keys == tensor.shape[2] else tensor.narrow(2, self.first_key, self.keys)

    def _joined(self, found: Tensor, like: Tensor) -> Tensor:
        """(N, Hkv, G Lq, X) -> (N, H, Lq, X)."""
        if self.group > 1:
            found = found.unflatten(2, (self.group, -1)).flatten(1, 2)
        return _in_memory_as(found, like)

    def _spread(self, found: Tensor, like: Tensor) -> Tensor:
        """Of the keys that are seen, and 0 for the others."""
        if self.keys == like.shape[2]:
            return _in_memory_as(found, like)
        spread = empty_like(like, dtype=torch.float32).zero_()
        self._of_keys(spread).copy_(found)
        return spread


def _in_memory_as(found: Tensor, like: Tensor) -> Tensor:
    if found.stride() == strides_like(like):
        return found
    return empty_like(like, dtype=found.dtype).copy_(found)


def takes(query: Tensor, value: Tensor, scale: float, *others: object) -> bool:
    """Whether a call is for the kernel; ``others`` are arguments that it does not know, None or 0 where they say nothing."""
    return (
        query.dtype in DTYPES
        and query.device.type == "cpu"
        and query.shape[3] == value.shape[3]
        and abs(scale) <= LARGEST_SCALE
        and all(other is None or (isinstance(other, float) and other == 0.0) for other in others)
        and _is_there()
    )


@functools.cache
def _is_there() -> bool:
    """Whether this release of torch has the kernel."""
    name = "_scaled_dot_product_flash_attention_for_cpu"
    return hasattr(torch.ops.aten, name) and hasattr(torch.ops.aten, f"{name}_backward")


def _kernel() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def _kernel_of_backward() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def block_rows(slots: int) -> int:
    """Rows of a block, for windows of so many slots: measured; the kernel itself takes 32 at a time, or 64 of 192 and more."""
    return 32 if slots <= 256 else 64 if slots <= 512 else 128


def block_rows_of_backward(slots: int) -> int:
    """The same of the backward, where what blocks have for a key is added up."""
    return 32 if slots <= 64 else 64 if slots <= 256 else 192


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window,
    scale: float,
    sinks: Tensor | None,
    rows: Mapping[str, Tensor | None],
) -> tuple[Tensor, Tensor] | None:
    """Output and log-sum-exp; None where scores are too large, or sequences too short."""
    at_once = _at_once(query, key, window, rows)
    pieces = [] if at_once is not None else _pieces(query, key, window, rows)
    if _too_short(pieces, query):
        return None
    factor, power = _split(scale)
    wide = (_times(query.float(), factor), key.float(), value.float())
    output, log_sum_exp, unseeing = _forward(*wide, power, query, at_once, pieces)
    seen = log_sum_exp if unseeing is None else log_sum_exp.masked_fill(unseeing, 1.0)
    lowest, highest = _range(seen)
    if not _is_moderate(lowest, highest):
        return None
    # The kernel returns 0 for rows that see nothing; and it takes for such a row one whose scores all lie below the range.
    if lowest <= 0.0 <= highest and not seen.all() and not _scores_are_in_range(*wide[:2], power):
        return None
    output, log_sum_exp = _with_sinks(output, log_sum_exp, unseeing, sinks)
    return output if query.dtype == output.dtype else empty_like(query).copy_(output), log_sum_exp


def _with_sinks(
    output: Tensor, log_sum_exp: Tensor, unseeing: Tensor | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Both as they are with the sinks, of what they are without; ``output`` is written to."""
    if sinks is None:
        return output, log_sum_exp
    sink = sinks.float()[:, None]
    shares = (log_sum_exp - sink).sigmoid_()
    log_sum_exp = torch.logaddexp(log_sum_exp, sink)
    if unseeing is not None:
        shares.masked_fill_(unseeing, 0.0)
        log_sum_exp.masked_fill_(unseeing, -torch.inf)
    return output.mul_(shares.unsqueeze(-1)), log_sum_exp


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    like: Tensor,
    at_once: AtOnce | None,
    pieces: Sequence[Piece],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output in float32, in memory as ``like``, log-sum-exp, and which rows see nothing; None for none."""
    if at_once is not None:
        return *at_once.forward(query, key, value, scale, like), None
    output = empty_like(like, dtype=torch.float32)
    log_sum_exp = query.new_empty(query.shape[:3])
    covers = _cover(pieces, query)
    if not covers:
        output.zero_()
        log_sum_exp.fill_(-torch.inf)
    tensors = (query, output, key, value)
    for piece in pieces:
        for lot in _lots(piece, block_rows(piece.end - piece.begin), tensors, returned=1):
            found, of_found = _kernel()(
                lot.of_rows(query), lot.of_keys(key), lot.of_keys(value), attn_mask=lot.mask, scale=scale
            )
            lot.of_rows(output).copy_(found)
            lot.of_rows(log_sum_exp.unsqueeze(-1)).copy_(of_found.unsqueeze(-1))
    return output, log_sum_exp, None if covers else log_sum_exp == -torch.inf


def local_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    window: Window,
    scale: float,
    sinks: Tensor | None,
    rows: Mapping[str, Tensor | None],
    needs_grad: frozenset[str],
) -> dict[str, Tensor] | None:
    """The gradients; None where scores are too large, or sequences too short."""
    at_once = _at_once(query, key, window, rows)
    pieces = [] if at_once is not None else _pieces(query, key, window, rows)
    if _too_short(pieces, query):
        return None
    unseeing = None if at_once is not None or _cover(pieces, query) else log_sum_exp == -torch.inf
    if not _is_moderate(*_range(log_sum_exp if unseeing is None else log_sum_exp.masked_fill(unseeing, 1.0))):
        return None
    factor, power = _split(scale)
    inputs = (_times(query.float(), factor), key.float(), value.float())
    if output.dtype != torch.float32:
        # D = rowsum(dO * O) has to cancel what P * dP sums to, in which nothing is rounded to 16 bits.
        output, log_sum_exp = _with_sinks(*_forward(*inputs, power, query, at_once, pieces), sinks)
    wide = (grad_output.float(), *inputs, output)
    if at_once is not None:
        found = at_once.backward(*wide, log_sum_exp, power, (query, key, value))
    else:
        found = _backward(*wide, log_sum_exp, power, (query, key, value), pieces)
    if factor != 1.0:
        found[0].mul_(factor)
    gradients = {
        name: total if total.dtype == like.dtype else empty_like(like).copy_(total)
        for name, like, total in zip(("query", "key", "value"), (query, key, value), found)
    }
    if sinks is not None:
        # A sink is a score whose value is 0.
        row_sum = (wide[0] * wide[4]).sum(-1)
        terms = (sinks.float()[:, None] - log_sum_exp).exp_().mul_(row_sum)
        if unseeing is not None:
            terms.masked_fill_(unseeing, 0.0)
        gradients["sinks"] = empty_like(sinks).copy_(terms.sum((0, 2)).neg_())
    return {name: gradient for name, gradient in gradients.items() if name in needs_grad}


def _backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    scale: float,
    like: tuple[Tensor, Tensor, Tensor],
    pieces: Sequence[Piece],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value in float32, in memory as ``like``."""
    of_query, of_key, of_value = (empty_like(tensor, dtype=torch.float32).zero_() for tensor in like)
    statistics = log_sum_exp.unsqueeze(-1)
    tensors = (grad_output, query, output, of_query, key, value, of_key, of_value)
    for piece in pieces:
        for lot in _lots(piece, block_rows_of_backward(piece.end - piece.begin), tensors, returned=3):
            found = _kernel_of_backward()(
                lot.of_rows(grad_output),
                lot.of_rows(query),
                lot.of_keys(key),
                lot.of_keys(value),
                lot.of_rows(output),
                lot.of_rows(statistics).squeeze(-1),
                0.0,
                False,
                attn_mask=lot.mask,
                scale=scale,
            )
            lot.of_rows(of_query).copy_(found[0])
            lot.add_to_keys(of_key, found[1])
            lot.add_to_keys(of_value, found[2])
    return of_query, of_key, of_value


def _split(scale: float) -> tuple[float, float]:
    """``scale`` as a product with a power of two.

    The kernel multiplies scores by the scale before it adds them up, or after: differently forward and backward. A power of two
    rounds neither.
    """
    mantissa, exponent = math.frexp(scale)
    return 2.0 * mantissa, 2.0 ** (exponent - 1)


def _times(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1.0 else tensor * factor


def _range(log_sum_exp: Tensor) -> tuple[float, float]:
    lowest, highest = torch.aminmax(log_sum_exp)
    return lowest.item(), highest.item()


def _is_moderate(lowest: float, highest: float) -> bool:
    """Whether no score of the largest ones is too large; False where one is not finite."""
    return lowest >= -LARGEST_LOG_SUM_EXP and highest <= LARGEST_LOG_SUM_EXP


def _scores_are_in_range(query: Tensor, key: Tensor, scale: float) -> bool:
    bound = float(query.abs().amax()) * float(key.abs().amax()) * query.shape[3]
    return bound * max(abs(scale), 1.0) < torch.finfo(torch.float32).max


def _at_once(query: Tensor, key: Tensor, window: Window, rows: Mapping[str, Tensor | None]) -> AtOnce | None:
    """How the kernel takes a problem in one call; None where it does not, or where that is not worth it."""
    return None if given(rows) else _of_sizes(*query.shape, *key.shape[1:3], window)


@functools.lru_cache(maxsize=64)
def _of_sizes(
    batch: int, heads: int, query_length: int, size: int, kv_heads: int, key_length: int, window: Window
) -> AtOnce | None:
    piece = _piece((0, batch), (0, query_length), (0, key_length), key_length - query_length, window)
    if piece is None or piece.rows < query_length:
        return None
    group, mask = heads // kv_heads, None
    if not piece.sees_all:
        if batch * heads * piece.rows * piece.keys * size > FEW_MULTIPLICATIONS:
            return None
        band = _new_band(piece.rows, piece.end - piece.begin)
        mask = band[:, -piece.begin : piece.keys - piece.begin].repeat(group, 1)
    return AtOnce(group, piece.first_key, piece.keys, mask)


def _too_short(pieces: Sequence[Piece], query: Tensor) -> bool:
    """Whether sequences are too short for calls of their own."""
    return len(pieces) > 1 and query.shape[0] * query.shape[1] * query.shape[2] < FEWEST_ROWS * len(pieces)


def _cover(pieces: Sequence[Piece], query: Tensor) -> bool:
    """Whether every row is of a piece."""
    return sum((piece.batch[1] - piece.batch[0]) * piece.rows for piece in pieces) == query.shape[0] * query.shape[2]


def _pieces(query: Tensor, key: Tensor, window: Window, rows: Mapping[str, Tensor | None]) -> list[Piece]:
    """The pieces of a call, by :mod:`attnreg.rows`."""
    batch, _, query_length, _ = query.shape
    key_length = key.shape[2]
    start = key_length - query_length
    found = {name: tensor.tolist() for name, tensor in given(rows).items()}
    pieces: list[Piece | None]
    if not found:
        pieces = [_piece((0, batch), (0, query_length), (0, key_length), start, window)]
    elif "cu_seqlens_q" in found:
        ends = found["cu_seqlens_q"]
        ends_of_keys = found.get("cu_seqlens_k", ends)
        pieces = [
            _piece((0, 1), (begin, end), (low, high), high - end, window)
            for begin, end, low, high in zip(ends, ends[1:], ends_of_keys, ends_of_keys[1:])
        ]
    else:
        starts = found.get("query_starts", [start] * batch)
        lows, highs = found.get("key_starts", [0] * batch), found.get("key_lengths", [key_length] * batch)
        pieces = [_piece((n, n + 1), (0, query_length), (lows[n], highs[n]), starts[n], window) for n in range(batch)]
    return [piece for piece in pieces if piece is not None]


def _piece(
    batch: tuple[int, int], rows: tuple[int, int], keys: tuple[int, int], start: int, window: Window
) -> Piece | None:
    """Of rows [first, last), of which row i stands at key ``start + i``, and keys [first, last); None where none is seen."""
    low, high = keys
    first = max(rows[0], low - window.right - start)
    last = min(rows[1], high + window.left - start)
    if first >= last or low >= high:
        return None
    begin, end = start + first - window.left, start + first + window.right + 1
    count = last - first
    first_key, last_key = max(low, begin), min(high, end + count - 1)
    # Further than all rows and keys no window has to reach.
    size = last_key - first_key
    begin, end = max(begin - first_key, -count), min(end - first_key, size)
    return Piece(batch, first, count, first_key, size, begin, end)


def _lots(piece: Piece, rows: int, tensors: Sequence[Tensor], returned: int) -> Iterator[Lot]:
    """The calls for a piece, so that each key gets what its blocks have for it in their order.

    Args:
        piece: the piece.
        rows: of a block.
        tensors: whatever goes in or comes out; the first has the query heads, the last those of keys.
        returned: how many tensors the kernel returns.
    """
    heads, kv_heads, size = tensors[0].shape[1], tensors[-1].shape[1], tensors[0].shape[3]
    first, last = piece.batch
    if piece.sees_all or (last - first) * heads * piece.rows * piece.keys * size <= FEW_MULTIPLICATIONS:
        rows = piece.rows
    slots, count = piece.end - piece.begin, -(-piece.rows // rows)
    keys = rows + slots - 1
    band = None if piece.sees_all else _band(rows, slots)
    # The blocks whose windows lie inside the keys.
    inside = max(-(piece.begin // rows), 0)
    end_inside = min(piece.rows // rows, (piece.keys - keys - piece.begin) // rows + 1)
    if end_inside - inside < 2:
        inside = end_inside = count

    def at_an_end(block: int) -> Lot:
        row = block * rows
        here, begin = min(rows, piece.rows - row), piece.begin + row
        low, high = max(begin, 0), min(begin + here + slots - 1, piece.keys)
        mask = None if band is None else band[:here, low - begin : high - begin]
        return Lot(piece.batch, 1, piece.first_row + row, here, piece.first_key + low, high - low, mask)

    lots = [at_an_end(block) for block in range(inside)]
    if inside < end_inside:
        fold = last - first == 1 or all(_fold(tensor, kv_heads) for tensor in tensors)
        batches = [piece.batch] if fold else [(n, n + 1) for n in range(first, last)]
        of_block = (batches[0][1] - batches[0][0]) * kv_heads * max(rows, keys) * size * 4 * returned
        step = max(BYTES_AT_A_TIME * torch.get_num_threads() // of_block, 1)
        for block in range(inside, end_inside, step):
            row, blocks = block * rows, min(step, end_inside - block)
            key = piece.first_key + piece.begin + row
            lots += [Lot(batch, blocks, piece.first_row + row, rows, key, keys, band) for batch in batches]
    lots += [at_an_end(block) for block in range(end_inside, count)]
    group = heads // kv_heads
    for lot in lots:
        for head in range(group):
            yield lot if group == 1 else replace(lot, head=head, group=group)


def _fold(tensor: Tensor, kv_heads: int) -> bool:
    """Whether the heads of a sequence follow those of the one before at the same distance."""
    return kv_heads == 1 or tensor.stride(0) == tensor.shape[1] * tensor.stride(1)


def _band(rows: int, slots: int) -> Tensor:
    """(rows, rows + slots - 1): 0 in the columns that a row sees, ``slots`` from its own number on, -inf elsewhere."""
    return (_kept_band if rows * (rows + slots) <= MOST_KEPT else _new_band)(rows, slots)


def _new_band(rows: int, slots: int) -> Tensor:
    slot = torch.arange(rows + slots - 1, device="cpu") - torch.arange(rows, device="cpu")[:, None]
    band = torch.zeros(slot.shape, dtype=torch.float32, device="cpu")
    return band.masked_fill_((slot < 0) | (slot >= slots), -torch.inf)


@functools.lru_cache(maxsize=64)
def _kept_band(rows: int, slots: int) -> Tensor:
    return _new_band(rows, slots)
