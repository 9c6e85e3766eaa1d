"""How a problem is cut into blocks: their geometry, the tensors' way into them and back, and their products.

Shapes here: G = H / Hkv query heads share a key head, so a block's product has G B rows: (N, Hkv, blocks, G, B, P).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnreg import Window, empty_like
from attnreg.memory import strides_like
from attnreg_torch.products import FEW_MULTIPLICATIONS, TERMS, TERMS_FOR_SOFTMAX, operand, product


@dataclass(frozen=True)
class Blocks:
    """Blocks of consecutive rows, each of which stands one key after the row before.

    A row's *band* are the columns of its slots: slot c of row r is column r + c.

    Attributes:
        batch, kv_heads, group: N, Hkv and G.
        query_length, key_length: Lq and Lk.
        rows: B, query rows a block.
        count: blocks a sequence; the last one may be padded.
        keys: P, the keys that a block sees, ``B + W - 1``.
        slots: columns of a band, W.
        first_key: the position of the first block's first key; negative where it lies before the sequence.
    """

    batch: int
    kv_heads: int
    group: int
    query_length: int
    key_length: int
    rows: int
    count: int
    keys: int
    slots: int
    first_key: int

    @property
    def padded(self) -> bool:
        """Whether blocks have more rows than the sequence."""
        return self.count * self.rows > self.query_length

    @property
    def has_slots(self) -> bool:
        """Whether the columns of a band are a row's slots."""
        return True

    @property
    def pitch(self) -> int:
        """From the start of a row's band to that of the next, in dense blocks."""
        return self.keys + 1

    @property
    def as_they_lie(self) -> bool:
        """Whether the rows of contiguous blocks follow each other as those of a contiguous tensor do."""
        return not self.padded and (self.group == 1 or self.count == 1)

    def first_keys(self, device: torch.device) -> Tensor:
        """The position of each block's first key, (N or 1, blocks)."""
        return (self.first_key + self.rows * torch.arange(self.count, device=device))[None]

    def spread(self, tensor: Tensor, padding: float) -> Tensor:
        """(·, ·, Lq, X) in the order in which the blocks have the rows, ``padding`` between them; without that at the end."""
        return tensor

    def split(self, tensor: Tensor) -> Tensor:
        """(N, H, Lq, X) -> (N, Hkv, blocks, G, B, X), padded rows are 0; or 1 in place of N, H, Lq and what comes of it."""
        batch, heads, length, size = tensor.shape
        kv_heads, group = (self.kv_heads, self.group) if heads > 1 else (1, 1)
        if length == 1:
            return tensor.reshape(batch, kv_heads, 1, group, 1, size)
        rows = self.spread(tensor, 0.0)
        padding = self.count * self.rows - rows.shape[2]
        padded = pad(rows, (0, 0, 0, padding)) if padding else rows
        return padded.reshape(batch, kv_heads, group, self.count, self.rows, size).transpose(2, 3)

    def split_rows(self, tensor: Tensor, unseeing: Tensor | None) -> Tensor:
        """(N, H, Lq, X) -> (N, Hkv, blocks, G, B, X), operands of products; padded and ``unseeing`` rows are 0."""
        return self.split(operand(tensor) if unseeing is None else torch.where(unseeing, 0.0, operand(tensor)))

    def split_keys(self, tensor: Tensor, unseen: Tensor | None) -> Tensor:
        """(N, Hkv, Lk, X) -> (N, Hkv, blocks, P, X), operands of products; ``unseen`` keys are 0.

        Keys that do not exist may be anything where they are not told to be ``unseen``.
        """
        end = self.first_key + (self.count - 1) * self.rows + self.keys
        first, last = max(self.first_key, 0), min(end, self.key_length)
        if first < last and last - first < self.key_length:
            # Keys that no query sees are not looked at.
            tensor = tensor[:, :, first:last]
        else:
            first, last = 0, self.key_length
        padding = (first - self.first_key, end - last)
        padded = pad(operand(tensor), (0, 0, *padding)) if any(padding) else operand(tensor)
        blocks = padded.unfold(2, self.keys, self.rows).transpose(-1, -2)
        return blocks if unseen is None else torch.where(unseen, 0.0, blocks)

    def join_rows(self, blocks: Tensor, like: Tensor) -> Tensor:
        """(N, Hkv, blocks, G, B, X) -> (N, H, Lq, X) of the dtype of ``like``, in memory as ``like``."""
        shape = (*like.shape[:-1], blocks.shape[-1])
        if self.as_they_lie and blocks.dtype == like.dtype and blocks.is_contiguous():
            joined = blocks.view(shape)
            if joined.stride() == strides_like(like, shape[-1]):
                return joined
        joined = empty_like(like, shape[-1])
        self.write_rows(blocks, joined)
        return joined

    def write_rows(self, blocks: Tensor, joined: Tensor) -> None:
        """The same into a tensor of that shape."""
        for in_blocks, in_rows in self.pairs(blocks, joined):
            in_rows.copy_(in_blocks)

    def join_keys(self, blocks: Tensor, like: Tensor) -> Tensor:
        """(N, Hkv, blocks, P, X) -> (N, Hkv, Lk, X) of the dtype of ``like``, in memory as ``like``.

        Each key sums up the blocks that see it, always in the same order.
        """
        sums = self._sums(blocks)
        begin, end = max(self.first_key, 0), min(self.first_key + sums.shape[2], self.key_length)
        joined = empty_like(like)
        if begin:
            joined[:, :, :begin].zero_()
        if end < self.key_length:
            joined[:, :, max(end, 0) :].zero_()
        if begin < end:
            joined[:, :, begin:end].copy_(sums[:, :, begin - self.first_key : end - self.first_key])
        return joined

    def _sums(self, blocks: Tensor) -> Tensor:
        """Of all positions from the first key on, in a row."""
        if self.count == 1:
            return blocks.squeeze(2)
        spread = -(-self.keys // self.rows)
        sums = blocks.new_zeros((self.batch, self.kv_heads, self.count + spread, self.rows, blocks.shape[-1]))
        for part in range(spread):
            piece = blocks[:, :, :, part * self.rows : (part + 1) * self.rows]
            sums[:, :, part : part + self.count, : piece.shape[3]].add_(piece)
        return sums.flatten(2, 3)

    def pairs(self, blocks: Tensor, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of (N, Hkv, blocks, G, B, X) and of (N, H, Lq, X) that belong together: all full blocks, then the padded one.

        Either tensor may have one sequence or one head for all. The rows are in the order of the blocks.
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
        dense = product(self.matrices(rows), self.matrices(keys).transpose(1, 2), scale, TERMS)
        return dense.view(*rows.shape[:-1], self.keys)

    def product_for_softmax(self, rows: Tensor, keys: Tensor, scale: float = 1.0) -> Tensor:
        """The same with a smaller error."""
        left, right = self.matrices(rows), self.matrices(keys).transpose(1, 2)
        few = rows.numel() * self.keys <= FEW_MULTIPLICATIONS
        # Other devices may have no float64.
        if few and rows.dtype == torch.float32 and rows.device.type in ("cpu", "cuda"):
            dense = product(left.double(), right.double(), scale).float()
        else:
            dense = product(left, right, scale, TERMS_FOR_SOFTMAX)
        return dense.view(*rows.shape[:-1], self.keys)

    def average(self, dense: Tensor, keys: Tensor, scale: float = 1.0) -> Tensor:
        """(…, G, B, P) x (…, P, X) -> (…, G, B, X), times ``scale``."""
        rows = product(self.matrices(dense), self.matrices(keys), scale)
        return rows.view(*dense.shape[:-1], keys.shape[-1])

    def average_transposed(self, dense: Tensor, rows: Tensor, scale: float = 1.0) -> Tensor:
        """(…, G, B, P) x (…, G, B, X) -> (…, P, X), times ``scale``."""
        keys = product(self.matrices(dense).transpose(1, 2), self.matrices(rows), scale)
        return keys.view(*dense.shape[:3], self.keys, rows.shape[-1])

    def matrices(self, blocks: Tensor) -> Tensor:
        """(…, G, B, X) or (…, P, X) as a batch of matrices, (N Hkv blocks, G B, X) or (N Hkv blocks, P, X)."""
        return blocks.reshape(self.batch * self.kv_heads * self.count, -1, blocks.shape[-1])

    def band(self, dense: Tensor) -> Tensor:
        """The band (…, G, B, W) as a view of contiguous dense blocks (…, G, B, P)."""
        *outer, _, _ = dense.stride()
        shape = (*dense.shape[:-1], self.slots)
        return dense.as_strided(shape, (*outer, self.pitch, 1))

    def beside_band(self, dense: Tensor) -> Tensor:
        """All that lies outside the band, as a view (…, G, B - 1, B): from one row's last slot to the next one's first."""
        *outer, _, _ = dense.stride()
        shape = (*dense.shape[:-2], self.rows - 1, self.rows)
        return dense.as_strided(shape, (*outer, self.pitch, 1), dense.storage_offset() + self.slots)

    def at_the_ends(self) -> tuple[range, range]:
        """The blocks that see positions before the first key, and those that see some past the last."""
        first_inside = min(max(-(self.first_key // self.rows), 0), self.count)
        inside = (self.key_length - self.keys - self.first_key) // self.rows + 1
        return range(first_inside), range(min(max(inside, first_inside), self.count), self.count)

    def dense_from_band(self, band: Tensor, outside: float) -> Tensor:
        """(N, H, Lq, W) -> (N, Hkv, blocks, G, B, P), ``outside`` the band and in padded rows; 1 may stand for N and H."""
        batch, heads = band.shape[:2]
        heads_of_blocks = (self.kv_heads, self.count, self.group) if heads > 1 else (1, self.count, 1)
        dense = band.new_full((batch, *heads_of_blocks, self.rows, self.keys), outside)
        for in_blocks, in_rows in self.pairs(self.band(dense), self.spread(band, outside)):
            in_blocks.copy_(in_rows)
        return dense

    def add_bias(self, dense: Tensor, bias: Tensor) -> None:
        """Add ``bias`` to dense scores, -inf as a finite number."""
        lowest, highest = torch.finfo(dense.dtype).min, torch.finfo(dense.dtype).max
        # A bias in a wider dtype may be beyond this one's range.
        finite = bias.to(dense.dtype).clamp(lowest, highest)
        if bias.shape[3] == 1:
            dense.add_(self.split(finite))
            return
        band = finite.expand(-1, -1, self.query_length, -1)
        for in_blocks, in_rows in self.pairs(self.band(dense), self.spread(band, 0.0)):
            in_blocks.add_(in_rows)

    def bias_gradient(self, dense: Tensor, bias: Tensor) -> Tensor:
        """The gradient of the scores in dense blocks, summed to the shape of ``bias``."""
        columns = self.band(dense) if bias.shape[3] > 1 else dense.sum(-1, keepdim=True)
        shape = (self.batch, self.kv_heads * self.group, self.query_length, columns.shape[-1])
        rows = dense.new_empty(shape)
        self.write_rows(columns, rows)
        return empty_like(bias).copy_(rows.sum_to_size(bias.shape))


@dataclass(frozen=True)
class Whole(Blocks):
    """One block of all rows and all keys. It has no slots: the band are all columns."""

    @property
    def has_slots(self) -> bool:
        """Whether the columns of a band are a row's slots."""
        return False

    @property
    def pitch(self) -> int:
        """From the start of a row's band to that of the next."""
        return self.keys


def block_rows(window: Window) -> int:
    """B, query rows a block: as many as the window has slots, within what makes a matrix product worth its call."""
    return min(max(1 << (window.size - 1).bit_length(), 32), 128)
