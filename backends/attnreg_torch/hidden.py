"""What a row does not see, and which of its weights are dropped."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from attnreg import Window
from attnreg.dropout import kept
from attnreg.rows import rows_of
from attnreg_torch.blocks import Blocks
from attnreg_torch.placed import lay
from attnreg_torch.rows import given

# Weights to draw for at a time: as many as a CPU's cache holds the generator's numbers of, or as keep a GPU busy.
WEIGHTS = {"cpu": 2**16}
WEIGHTS_ELSEWHERE = 2**22
# Bytes that the generator makes for each: the words of four weights, and what is made on the way to them, are 64 bits each.
BYTES_PER_WEIGHT = 32


class Hidden:
    """What positions, the arguments of rows and the bias hide; True where hidden.

    What is hidden may be NaN or inf. Slots are selected away after a product that makes them. But a product that sums over rows
    or keys multiplies those that nobody sees by 0, and 0 x NaN is NaN: they are selected away before it.

    Attributes:
        blocks: of the call.
        all_seen: whether every row sees a key, and every key that exists in a block is seen.
    """

    def __init__(
        self,
        rows_like: Tensor,
        keys_like: Tensor,
        window: Window,
        bias: Tensor | None,
        rows: Mapping[str, Tensor | None],
        *,
        by_slot: bool,
    ) -> None:
        """For (N, H, Lq, ·) against (N, Hkv, Lk, ·); ``by_slot`` where a tensor has a column for each slot."""
        self.window, self.bias, self.device = window, bias, keys_like.device
        query_length, key_length = rows_like.shape[2], keys_like.shape[2]
        found = given(rows)
        self.place = rows_of(query_length, key_length, self.device, **rows) if found else None
        self.blocks = blocks = lay(rows_like, keys_like, window, found, self.place, by_slot)
        # Where nothing else says where the first row stands.
        self.first_slot = first_slot = key_length - query_length - window.left
        nothing_given = bias is None and not found
        every_key_is_in_reach = blocks.has_slots or first_slot <= 0
        self.all_seen = nothing_given and first_slot + window.size > 0 and every_key_is_in_reach
        # Whether every row sees every column of its block.
        last_slot_of_first, first_slot_of_last = first_slot + window.size - 1, first_slot + query_length - 1
        sees_all = first_slot_of_last <= 0 and last_slot_of_first >= key_length - 1
        self.nothing = nothing_given and not blocks.has_slots and sees_all
        # Whether a column of a block is a key for all rows whose band has it, or for none.
        self.by_column = type(blocks) is Blocks and "cu_seqlens_q" not in found

    @cached_property
    def band(self) -> Tensor:
        """Slots, broadcasting to (N, H, Lq, W)."""
        if self.by_column:
            hidden = self._no_key.unfold(-1, self.window.size, 1)
            if self.blocks.padded:
                hidden = hidden.narrow(-2, 0, self.blocks.query_length)
        else:
            origin, (first, last) = self.origin, self._seen
            hidden = _outside(first - origin, last - origin, self.window.size)
        if hidden.dim() > 2:
            hidden = hidden.unsqueeze(1)
        return hidden if self.bias is None else hidden | (self.bias == -torch.inf)

    @cached_property
    def dense(self) -> Tensor:
        """The same in blocks, broadcasting to (N, Hkv, blocks, G, B, P)."""
        if self.bias is not None and self.bias.shape[3] > 1:
            return self.blocks.dense_from_band(self.band, True)
        first, last = (self.blocks.split(bound[:, None, :, None]).squeeze(-1) for bound in self._seen)
        first_key = self.blocks.first_keys(self.device)[:, None, :, None, None]
        hidden = _outside(first - first_key, last - first_key, self.blocks.keys)
        return hidden if self.bias is None else hidden | self.blocks.split(self.bias == -torch.inf)

    @cached_property
    def _no_key(self) -> Tensor:
        """Which positions have no key, from the first block's first one to the last block's last, (·) or (N or 1, ·)."""
        blocks = self.blocks
        first, size = blocks.first_key, (blocks.count - 1) * blocks.rows + blocks.keys
        if self.place is None:
            no_key = torch.ones(size, dtype=torch.bool, device=self.device)
            no_key[max(-first, 0) : max(blocks.key_length - first, 0)].zero_()
            return no_key
        positions = torch.arange(first, first + size, device=self.device)
        return (positions < self.place.low) | (positions >= self.place.high)

    @cached_property
    def _no_key_of_blocks(self) -> Tensor:
        """The same of the columns of blocks, (N or 1, 1, blocks, 1, 1, P)."""
        blocks = self.blocks
        columns = self._no_key.unfold(-1, blocks.keys, blocks.rows)
        return columns.reshape(-1, 1, blocks.count, 1, 1, blocks.keys)

    @cached_property
    def _seen(self) -> tuple[Tensor, Tensor]:
        """The keys [first, last) that each row sees but for the bias, (N or 1, Lq)."""
        length = self.blocks.query_length
        if self.place is not None:
            first, last = torch.broadcast_tensors(*self.place.seen(length, self.window))
            return first, last
        origin = torch.arange(self.first_slot, self.first_slot + length, device=self.device)[None]
        return origin.clamp_min(0), (origin + self.window.size).clamp_max_(self.blocks.key_length)

    @cached_property
    def origin(self) -> Tensor:
        """The key of each row's first slot, or of the first column where blocks have all keys, (N or 1, Lq)."""
        length = self.blocks.query_length
        if not self.blocks.has_slots:
            return torch.zeros((1, length), dtype=torch.int64, device=self.device)
        if self.place is not None:
            return self.place.position(length) - self.window.left
        return torch.arange(self.first_slot, self.first_slot + length, device=self.device)[None]

    @cached_property
    def _ends(self) -> tuple[slice, ...]:
        """The blocks in which more may be hidden than what lies beside the band: all, where that is not worth telling apart."""
        if self.place is None:
            ends = self.blocks.at_the_ends()
            if 2 * sum(map(len, ends)) < self.blocks.count:
                return tuple(slice(end.start, end.stop) for end in ends if end)
        return (slice(None),)

    def hide(self, scores: Tensor) -> None:
        """-inf in hidden slots of dense scores, and nowhere else: what is below the range is its lowest number."""
        lowest = torch.finfo(scores.dtype).min
        if self.by_column and self.bias is None:
            self.blocks.band(scores).clamp_(min=lowest)
        else:
            scores.clamp_(min=lowest)
        self.fill(scores, -torch.inf)

    def fill(self, dense: Tensor, value: float) -> None:
        """``value`` wherever something is hidden."""
        if self.by_column and self.bias is None:
            # Without a mask of every slot, and through half of the memory.
            self.blocks.beside_band(dense).fill_(value)
            for end in self._ends:
                dense[:, :, end].masked_fill_(self._no_key_of_blocks[:, :, end], value)
        elif not self.nothing:
            dense.masked_fill_(self.dense, value)

    def clear(self, weights: Tensor) -> None:
        """Zeros in the rows of dense weights that see no key, of which softmax made NaN."""
        if self.by_column and self.bias is None:
            for end in self._ends:
                of_end = weights[:, :, end]
                self.blocks.beside_band(of_end).fill_(0.0)
                of_end.masked_fill_(self._no_key_of_blocks[:, :, end], 0.0)
        else:
            weights.masked_fill_(self.dense, 0.0)

    @cached_property
    def rows(self) -> Tensor | None:
        """The rows that see no key, broadcasting to (N, H, Lq, 1); None if there can be none."""
        if self.all_seen:
            return None
        if self.by_column or (self.bias is not None and self.bias.shape[3] > 1):
            return self.band.all(-1, keepdim=True)
        first, last = self._seen
        hidden = (first >= last)[:, None, :, None]
        return hidden if self.bias is None else hidden | (self.bias == -torch.inf)

    @cached_property
    def keys(self) -> Tensor | None:
        """The keys that no row of a block sees, broadcasting to (N, Hkv, blocks, P, 1); None if there can be none."""
        if self.all_seen:
            return None
        if self.by_column and self.bias is None:
            # Some row's band has every column.
            return self._no_key_of_blocks.squeeze(-2).transpose(-1, -2)
        return self.dense.flatten(-3, -2).all(-2).unsqueeze(-1)

    def dropped(self, seed: Tensor, dropout_p: float) -> Tensor:
        """Which weights are dropped, in blocks (N, Hkv, blocks, G, B, P); False beside the band."""
        blocks, device = self.blocks, self.device
        batch, heads, length = blocks.batch, blocks.kv_heads * blocks.group, blocks.query_length
        n, h, i = (torch.arange(size, device=device) for size in (batch, heads, length))
        step = max(_weights_at_a_time(device) // (batch * heads * blocks.slots), 1)
        dropped = torch.empty((batch, heads, length, blocks.slots), dtype=torch.bool, device=device)
        for begin in range(0, length, step):
            part = slice(begin, begin + step)
            origin = self.origin[:, None, part]
            stay = kept(seed, dropout_p, n[:, None, None], h[:, None], i[part], origin, blocks.slots)
            torch.logical_not(stay, out=dropped[:, :, part])
        return blocks.dense_from_band(dropped, False)


def bytes_of_generator(device: torch.device, weights: int) -> int:
    """What it needs at a time to draw for so many weights, about."""
    return min(weights, _weights_at_a_time(device)) * BYTES_PER_WEIGHT


def _weights_at_a_time(device: torch.device) -> int:
    return WEIGHTS.get(device.type, WEIGHTS_ELSEWHERE)


def _outside(first: Tensor, last: Tensor, size: int) -> Tensor:
    """Which of ``size`` columns lie outside [first, last), (..., size)."""
    columns = torch.arange(size, device=first.device)
    return (columns < first.unsqueeze(-1)) | (columns >= last.unsqueeze(-1))
