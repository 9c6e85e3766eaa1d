"""lucidrains' ``local-attention`` on attnreg: its ``LocalAttention``, and a patch for models that have one.

Its sequences are cut into buckets of ``window_size`` tokens. A query sees its own bucket, ``look_backward`` buckets before it and
``look_forward`` after it, where it is causal up to itself. With ``exact_windowsize`` it sees ``window_size * look_backward`` keys
before itself and ``window_size * look_forward`` after itself instead, which is a sliding window; then no key is copied. Else each
bucket is a sequence of its own, with its frame of keys.

The package need not be installed, but for ``patch`` and ``unpatch``.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from math import prod
from operator import index
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad, scaled_dot_product_attention

from attnreg import Window, local_attention
from attnreg.integrations._hidden_keys import can_be_read, rows_of

__all__ = ["LocalAttention", "RotaryEmbedding", "patch", "unpatch"]

# The score of a token with itself where queries are keys: it is seen only where nothing else is.
_SELF = -5e4


# A scale applies once over so many positions; over none there is no number for it.
_WHENCE = "which is window_size // 2 where it is left out"


class RotaryEmbedding(nn.Module):
    """The angles of rotary embeddings, and the scales of xPos, as the package's ``SinusoidalEmbeddings`` has them.

    Args:
        dim: the head dim, an even number.
        scale_base: over how many positions a scale applies once.
        use_xpos: whether there are scales.
    """

    inv_freq: Tensor
    scale: Tensor

    def __init__(self, dim: int, scale_base: float, use_xpos: bool = False) -> None:
        super().__init__()
        self.use_xpos = use_xpos
        self.scale_base = scale_base
        even = torch.arange(0, dim, 2).float()
        self.register_buffer("inv_freq", 10000.0 ** -(even / dim))
        self.register_buffer("scale", (even + 0.4 * dim) / (1.4 * dim), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Angles and scales (L, dim) of the L tokens of ``x`` (..., L, dim); the scales are (1,) of 1 without xPos."""
        places = torch.arange(x.shape[-2], device=x.device, dtype=self.inv_freq.dtype)
        angles = (places[:, None] * self.inv_freq).repeat(1, 2)
        if not self.use_xpos:
            return angles, torch.ones(1, device=x.device)
        return angles, self.scale.pow(((places - x.shape[-2] // 2) / self.scale_base)[:, None]).repeat(1, 2)


@dataclass(frozen=True)
class _Call:
    """The tensors of a call.

    Attributes:
        query, key, value: (N, H, L, E), keys normalised where queries are keys.
        mask: (N, L), True where a key may be seen; None for all.
        bias: of each head and row of a bucket, what its frame's scores get: (N or 1, H or 1, w, frame); None for nothing.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    bias: Tensor | None


class LocalAttention(nn.Module):
    """The package's ``LocalAttention``, fused where a backend fuses it: same arguments, same ``state_dict``, same results.

    Two things are other than there. A query whose keys are all hidden by the mask has the output 0, and no average of what is
    hidden. ``dropout`` must be less than 1.

    Args:
        window_size: tokens in a bucket, w.
        causal: whether a query sees no key after its own position.
        look_backward: how many buckets before its own a query sees.
        look_forward: how many after it; None means 0 where it is causal and else 1.
        dropout: the share of weights that are dropped in training.
        shared_qk: keys are normalised, and a token sees itself only where it sees nothing else.
        rel_pos_emb_config: ``(head dim, heads)``: the head dim of rotary embeddings, as ``dim``.
        dim: the head dim; None, without the one before, means no rotary embeddings.
        autopad: takes lengths that are no multiple of ``window_size``. As in the package, queries that are not causal see the
            zeros that it pads with, unless there is a mask.
        exact_windowsize: a sliding window in the place of buckets.
        scale: factor of the dot products; None means ``1 / sqrt(E)``.
        use_rotary_pos_emb: False for no rotary embeddings.
        use_xpos: whether rotary embeddings have xPos' scales.
        xpos_scale_base: their base, not 0; None means ``window_size // 2``.
        padding_at_ends: promises that masks hide the ends of sequences alone, which spares an accelerator, and a traced call, a
            bias. On the CPU there is a look at each mask instead.
        backend: attnreg's backend, by name, or several in order of preference; None lets attnreg choose.

    Raises:
        TypeError, ValueError: an argument is bad; the message names it, what it was and what was expected.
    """

    padding_at_ends: bool = False
    backend: str | Sequence[str] | None = None

    def __init__(
        self,
        window_size: int,
        causal: bool = False,
        look_backward: int = 1,
        look_forward: int | None = None,
        dropout: float = 0.0,
        shared_qk: bool = False,
        rel_pos_emb_config: Sequence[int] | None = None,
        dim: int | None = None,
        autopad: bool = False,
        exact_windowsize: bool = False,
        scale: float | None = None,
        use_rotary_pos_emb: bool = True,
        use_xpos: bool = False,
        xpos_scale_base: float | None = None,
        *,
        padding_at_ends: bool = False,
        backend: str | Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.window_size = _count("window_size", window_size, least=1)
        self.causal = bool(causal)
        self.look_backward = _count("look_backward", look_backward, least=0)
        otherwise = 0 if causal else 1
        self.look_forward = _count("look_forward", otherwise if look_forward is None else look_forward, least=0)
        if causal and self.look_forward:
            raise ValueError(f"look_forward must be 0 where causal is True, got {self.look_forward}")
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)):
            raise TypeError(f"dropout must be a float, got {dropout!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and less than 1, got {dropout}")
        self.dropout = nn.Dropout(dropout)
        self.shared_qk = bool(shared_qk)
        self.autopad = bool(autopad)
        self.exact_windowsize = bool(exact_windowsize)
        self.scale = scale
        self.use_xpos = bool(use_xpos)
        self.rel_pos: Any = None
        if rel_pos_emb_config is not None:
            dim = rel_pos_emb_config[0]
        if use_rotary_pos_emb and dim is not None:
            if _count("dim", dim, least=1) % 2:
                raise ValueError(f"dim must be even for rotary embeddings, got {dim}")
            base = self.window_size // 2 if xpos_scale_base is None else xpos_scale_base
            if self.use_xpos and not base:
                raise ValueError(f"xpos_scale_base must not be 0, {_WHENCE}; got window_size={self.window_size}")
            self.rel_pos = RotaryEmbedding(dim, base, self.use_xpos)
        _set(self, padding_at_ends, backend)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        input_mask: Tensor | None = None,
        attn_bias: Tensor | None = None,
        window_size: int | None = None,
    ) -> Tensor:
        """Attention of each query to the keys of its buckets.

        Args:
            q: (..., L, E), of a floating-point dtype.
            k: likewise.
            v: (..., L, D), likewise.
            mask: (N, L), boolean: False hides a key. N divides the product of the leading dimensions.
            input_mask: another name of ``mask``.
            attn_bias: (H, w, (look_backward + 1 + look_forward) * w), or 1 in place of the last two, added to the scores of each
                bucket; it has a gradient.
            window_size: another w for this call, with xPos alone; an exact window stays that of the module.

        Returns:
            (..., L, D), in q's dtype.

        Raises:
            TypeError, ValueError: an argument is bad; the message names it, what it was and what was expected.
        """
        if mask is not None and input_mask is not None:
            raise ValueError("mask and input_mask are two names of one argument; both were given")
        if window_size is not None and not self.use_xpos:
            raise ValueError(f"window_size={window_size!r} is another one than the module's; that needs use_xpos=True")
        width = self.window_size if window_size is None else _count("window_size", window_size, least=1)
        call = self._call(q, k, v, input_mask if mask is None else mask, attn_bias, width)
        # xPos scales keys by their distance from the frame's middle, as no number could hold the scales of a long sequence; and
        # buckets of another size than the window's may end within it.
        has_scales = self.rel_pos is not None and self.use_xpos
        is_window = self.exact_windowsize and width == self.window_size
        in_frames = not is_window or has_scales or attn_bias is not None
        output = self._in_frames(call, width) if in_frames else self._sliding(call, width)
        return output.reshape(*q.shape[:-1], v.shape[-1])

    def extra_repr(self) -> str:
        """The settings, for the module's representation."""
        names = ("window_size", "causal", "look_backward", "look_forward", "shared_qk", "autopad", "exact_windowsize")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    # What the arguments say

    def _call(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, attn_bias: Tensor | None, width: int
    ) -> _Call:
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
            if tensor.dim() < 2 or not tensor.shape[-2]:
                raise ValueError(f"{name} must be (..., L, E) with a token at least, got shape {tuple(tensor.shape)}")
            if tensor.shape[:-1] != q.shape[:-1]:
                raise ValueError(
                    f"{name} must have q's shape but for the last, {tuple(q.shape)}; got {tuple(tensor.shape)}"
                )
        if self.rel_pos is not None and 2 * self.rel_pos.inv_freq.shape[0] != q.shape[-1]:
            dim = 2 * self.rel_pos.inv_freq.shape[0]
            raise ValueError(f"q must have the head dim of the rotary embeddings, {dim}; got {q.shape[-1]}")
        length = q.shape[-2]
        if not self.autopad and length % self.window_size:
            raise ValueError(
                f"q must have a length that window_size={self.window_size} divides, got {length}; or autopad"
            )
        if self._padded(length) % width:
            raise ValueError(f"q must have a length that window_size={width} divides, got {self._padded(length)}")
        sequences = prod(q.shape[:-2])
        batch, heads = q.shape[:-2] if q.dim() == 4 else (sequences, 1)
        if mask is not None:
            _check_mask(mask, q, sequences)
            batch, heads = mask.shape[0], sequences // mask.shape[0]
        if attn_bias is not None:
            frame = (self.look_backward + 1 + self.look_forward) * width
            _check_bias(attn_bias, q, sequences, (width, frame))
            attn_bias = attn_bias.expand(-1, width, frame)
            of_heads = attn_bias.shape[0]
            if mask is None:
                batch, heads = sequences // of_heads, of_heads
                attn_bias = attn_bias[None]
            elif heads % of_heads == 0:
                attn_bias = attn_bias.repeat(heads // of_heads, 1, 1)[None]
            else:
                mask = mask.repeat_interleave(heads, 0)
                batch, heads = sequences, 1
                attn_bias = attn_bias.repeat(sequences // of_heads, 1, 1)[:, None]
        query, key, value = (each.reshape(batch, heads, length, each.shape[-1]) for each in (q, k, v))
        if self.shared_qk:
            key = normalize(key, dim=-1)
        return _Call(query, key, value, mask, attn_bias)

    def _padded(self, length: int) -> int:
        """The next multiple of the window size."""
        return length + -length % self.window_size

    def _length_of_keys(self, call: _Call) -> int:
        """How many keys there are: with the zeros that queries see where neither causality nor a mask hides them."""
        length = call.key.shape[2]
        return length if self.causal or call.mask is not None else self._padded(length)

    def _window(self, width: int, back: int, forward: int) -> Window:
        """What a row sees: within buckets all that can be in its frame, of so many buckets at its sides; the frame has bounds."""
        left, right = (back + 1) * width - 1, (forward + 1) * width - 1
        if self.exact_windowsize:
            left = min(left, self.window_size * self.look_backward)
            right = min(right, self.window_size * self.look_forward)
        return Window(left, 0 if self.causal else right)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window: Window,
        bias: Tensor | None,
        hiding: dict[str, Any],
        query_start: int,
    ) -> Tensor:
        """The output of queries, the first of which stands at this key."""
        if self.shared_qk:
            itself = torch.zeros(window.size, dtype=torch.float32, device=query.device)
            itself[window.left] = _SELF
            bias = itself.expand(1, 1, 1, -1) if bias is None else bias + itself
        if "bias" in hiding:
            hiding = {**hiding, "bias": hiding["bias"] if bias is None else hiding["bias"] + bias}
        else:
            hiding = {**hiding, "bias": bias}
        starts = None
        if query_start != key.shape[2] - query.shape[2]:
            starts = torch.full((query.shape[0],), query_start, device=query.device)
        return local_attention(
            query,
            key,
            value,
            window,
            query_starts=starts,
            scale=self._scale_of(query),
            dropout_p=self._dropout_p,
            backend=self.backend,
            **hiding,
        )

    def _may_have_holes(self, mask: Tensor) -> bool | None:
        """None where that is to be looked at."""
        return None if can_be_read(mask) else not self.padding_at_ends

    def _scale_of(self, query: Tensor) -> float:
        return float(query.shape[3] ** -0.5 if self.scale is None else self.scale)

    @property
    def _dropout_p(self) -> float:
        return float(self.dropout.p) if self.dropout.training else 0.0

    # A sliding window

    def _sliding(self, call: _Call, width: int) -> Tensor:
        length, of_keys = call.query.shape[2], self._length_of_keys(call)
        query, key, value = call.query, call.key, call.value
        if self.rel_pos is not None:
            places = torch.arange(length, device=query.device)
            query = _rotated(query, self.rel_pos, places + self.look_forward * width)
            key = _rotated(key, self.rel_pos, places)
        if of_keys > length:
            key, value = (pad(each, (0, 0, 0, of_keys - length)) for each in (key, value))
        window = self._window(width, self.look_backward, self.look_forward)
        window = Window(min(window.left, of_keys - 1), min(window.right, of_keys - 1))
        hiding: dict[str, Any] = {}
        if call.mask is not None:
            hiding = rows_of(~call.mask, window, length, query.dtype, holes=self._may_have_holes(call.mask))
        return self._attend(query, key, value, window, None, hiding, 0)

    # Buckets

    def _in_frames(self, call: _Call, width: int) -> Tensor:
        batch, _, length, _ = call.query.shape
        buckets = self._padded(length) // width
        # Of buckets that no sequence of this length has there need be no frame.
        back, forward = min(self.look_backward, buckets - 1), min(self.look_forward, buckets - 1)
        query = _buckets(call.query, width, buckets).flatten(0, 1)
        key, value = (_frames(each, width, buckets, back, forward) for each in (call.key, call.value))
        if self.rel_pos is not None:
            # As in the package, a query stands in the last bucket of its frame, whichever is its own.
            last = (self.look_backward + self.look_forward) * width
            middle = (last + width) // 2
            places = torch.arange(key.shape[2], device=query.device) + (self.look_backward - back) * width
            query = _rotated(query, self.rel_pos, last + torch.arange(width, device=query.device), middle)
            key = _rotated(key, self.rel_pos, places, middle, inverse=True)
        if self.causal or self.exact_windowsize or self.backend is not None:
            output = self._banded(call, query, key, value, width, back, forward)
        else:
            output = self._dense(call, query, key, value, width, back, forward)
        cut: Tensor = output.unflatten(0, (batch, buckets))
        return cut.transpose(1, 2).flatten(2, 3)[:, :, :length]

    def _bounds(self, call: _Call, width: int, buckets: int, back: int, frame: int) -> tuple[Tensor, Tensor]:
        """Of each bucket's frame the first key of the sequence, and the one after its last: (buckets,)."""
        first = width * (torch.arange(buckets, device=call.query.device) - back)
        return (-first).clamp_min(0), (self._length_of_keys(call) - first).clamp_max(frame)

    def _banded(
        self, call: _Call, query: Tensor, key: Tensor, value: Tensor, width: int, back: int, forward: int
    ) -> Tensor:
        """Rows of a bucket see different keys of its frame: a window, or all up to themselves."""
        batch, frame = call.query.shape[0], key.shape[2]
        buckets = query.shape[0] // batch
        window = self._window(width, back, forward)
        hiding: dict[str, Any]
        if call.mask is None:
            starts, ends = self._bounds(call, width, buckets, back, frame)
            hiding = {"key_starts": starts.repeat(batch), "key_lengths": ends.repeat(batch)}
        else:
            hidden = ~_frames(call.mask[:, None, :, None], width, buckets, back, forward)[:, 0, :, 0]
            holes = self._may_have_holes(hidden)
            hiding = rows_of(hidden, window, width, query.dtype, query_start=back * width, holes=holes)
        bias = call.bias
        if bias is not None:
            bias = _band_of_frame(bias, self.look_backward * width - window.left, window.size)
            bias = bias.repeat_interleave(buckets, 0) if bias.shape[0] > 1 else bias
        return self._attend(query, key, value, window, bias, hiding, back * width)

    def _dense(
        self, call: _Call, query: Tensor, key: Tensor, value: Tensor, width: int, back: int, forward: int
    ) -> Tensor:
        """Rows of a bucket all see its whole frame, in which there is no window: what torch's own attention is made for."""
        batch, frame = call.query.shape[0], key.shape[2]
        buckets = query.shape[0] // batch
        if call.mask is None:
            starts, ends = (each[:, None] for each in self._bounds(call, width, buckets, back, frame))
            places = torch.arange(frame, device=query.device)
            seen = ((places >= starts) & (places < ends)).repeat(batch, 1)
        else:
            seen = _frames(call.mask[:, None, :, None], width, buckets, back, forward)[:, 0, :, 0]
        # A softmax of nothing would be NaN.
        empty = ~seen.any(1)[:, None, None, None]
        mask = seen[:, None, None] | empty
        bias = call.bias
        if bias is not None:
            first = (self.look_backward - back) * width
            bias = bias[..., first : first + frame].to(query.dtype)
            bias = bias.repeat_interleave(buckets, 0) if bias.shape[0] > 1 else bias
        if self.shared_qk:
            itself = query.new_zeros(width, frame)
            itself.diagonal(back * width).fill_(_SELF)
            bias = itself if bias is None else bias + itself
        output = scaled_dot_product_attention(
            query,
            key,
            value,
            mask if bias is None else bias.masked_fill(~mask, -torch.inf),
            self._dropout_p,
            scale=self._scale_of(query),
        )
        return output.masked_fill(empty, 0.0)


def _buckets(tensor: Tensor, width: int, buckets: int) -> Tensor:
    """(N, buckets, H, w, X) of (N, H, L, X), padded with 0, or False."""
    missing = buckets * width - tensor.shape[2]
    padded = pad(tensor, (0, 0, 0, missing)) if missing else tensor
    cut: Tensor = padded.unflatten(2, (buckets, width))
    return cut.transpose(1, 2)


def _frames(tensor: Tensor, width: int, buckets: int, back: int, forward: int) -> Tensor:
    """(N buckets, H, frame, X) of (N, H, L, X): each bucket after those before it, and before those after it."""
    cut = _buckets(tensor, width, buckets)
    around = pad(cut, (0, 0, 0, 0, 0, 0, back, forward)) if back or forward else cut
    return torch.cat([around[:, first : first + buckets] for first in range(back + 1 + forward)], dim=3).flatten(0, 1)


def _band_of_frame(bias: Tensor, first: int, size: int) -> Tensor:
    """(N, H, w, W) of (N, H, w, frame): row r's slots are the columns from ``first + r`` on; anything where there is none."""
    rows, columns = bias.shape[2:]
    before = max(-first, 0)
    first += before
    # A row's slots begin one column after those of the row before: with one column more in each row they are one below the other.
    after = max(first + rows - 1 + size - before - columns, 0)
    flat = pad(bias, (before, after)).flatten(2)
    below: Tensor = pad(flat, (0, rows)).unflatten(2, (rows, -1))
    return below[..., first : first + size]


def _rotated(tensor: Tensor, of: Any, places: Tensor, middle: int = 0, *, inverse: bool = False) -> Tensor:
    """``tensor`` with rotary embeddings, and xPos' scales or their inverses, at these places."""
    # Angles in a long sequence are too large for the sine of a float32.
    angles = places[:, None] * of.inv_freq.double()
    cos, sin = angles.cos(), angles.sin()
    if of.use_xpos:
        power = (places - middle).double() / (-of.scale_base if inverse else of.scale_base)
        scales = of.scale.double().pow(power[:, None])
        cos, sin = cos * scales, sin * scales
    dtype = torch.float64 if tensor.dtype is torch.float64 else torch.float32
    cos, sin = cos.to(dtype), sin.to(dtype)
    first, second = tensor.to(dtype).chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(tensor.dtype)


# Checks


def _count(name: str, given: object, *, least: int) -> int:
    try:
        if isinstance(given, bool):
            raise TypeError
        number = index(given)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an int, got {given!r} ({type(given).__name__})") from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def _check_mask(mask: object, q: Tensor, sequences: int) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a torch.Tensor, got {type(mask).__name__}")
    if mask.dtype is not torch.bool:
        raise TypeError(f"mask must be boolean, True where a key may be seen; got {mask.dtype}")
    if mask.dim() != 2 or mask.shape[1] != q.shape[-2]:
        raise ValueError(f"mask must have shape (N, {q.shape[-2]}), got {tuple(mask.shape)}")
    if not mask.shape[0] or sequences % mask.shape[0]:
        raise ValueError(f"mask must have a number of sequences that divides q's, {sequences}; got {mask.shape[0]}")
    _check_device("mask", mask, q)


def _check_bias(bias: object, q: Tensor, sequences: int, of_bucket: tuple[int, int]) -> None:
    if not isinstance(bias, Tensor):
        raise TypeError(f"attn_bias must be a torch.Tensor, got {type(bias).__name__}")
    if not bias.is_floating_point():
        raise TypeError(f"attn_bias must be of a floating-point dtype, got {bias.dtype}")
    if bias.dim() != 3 or any(found not in (1, size) for found, size in zip(bias.shape[1:], of_bucket)):
        raise ValueError(f"attn_bias must have shape (H, {of_bucket[0]}, {of_bucket[1]}), got {tuple(bias.shape)}")
    if not bias.shape[0] or sequences % bias.shape[0]:
        raise ValueError(
            f"attn_bias must have a number of heads that divides q's sequences, {sequences}; got {bias.shape[0]}"
        )
    _check_device("attn_bias", bias, q)


def _check_device(name: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.device != q.device:
        raise ValueError(f"{name} must be on q's device, {q.device}; got {tensor.device}")


# In a model


def patch(model: nn.Module, *, padding_at_ends: bool = False, backend: str | Sequence[str] | None = None) -> list[str]:
    """Let each ``LocalAttention`` of the package in a model run on attnreg. The modules stay; their class is another.

    What a model does without it, as ``LocalMHA`` does with a cache, stays as it is.

    Args:
        model: a module with such a module in it, or one itself.
        padding_at_ends: as in :class:`LocalAttention`.
        backend: likewise.

    Returns:
        The names of these modules.

    Raises:
        ImportError: the package is not installed.
        TypeError, ValueError: there is no such module in the model, or this version of the package has arguments or attributes
            that are not known here.
    """
    theirs = _their_class()
    found = [(name, module) for name, module in model.named_modules() if type(module) in (theirs, LocalAttention)]
    if not found:
        raise ValueError(f"model must hold a local_attention.LocalAttention, got {type(model).__name__}")
    for function in ("__init__", "forward"):
        given, known = (
            set(inspect.signature(getattr(each, function)).parameters) - _SETTINGS for each in (theirs, LocalAttention)
        )
        if given != known:
            raise TypeError(f"LocalAttention.{function} of this local_attention has {_difference(given, known)}")
    known = _attributes(LocalAttention(2))
    for name, module in found:
        if _attributes(module) != known:
            raise TypeError(f"{name or 'model'} has {_difference(_attributes(module), known)}")
        if not module.dropout.p < 1:
            raise ValueError(f"{name or 'model'} has dropout {module.dropout.p}, which must be less than 1")
        if module.use_xpos and module.rel_pos is not None and not module.rel_pos.scale_base:
            raise ValueError(f"{name or 'model'} has xpos_scale_base 0, {_WHENCE}, and its xPos has no scales")
    _check_settings(padding_at_ends)
    for _, module in found:
        module.__class__ = LocalAttention
        _set(module, padding_at_ends, backend)
    return [name for name, _ in found]


def unpatch(model: nn.Module) -> list[str]:
    """Let each :class:`LocalAttention` in a model be the package's.

    Returns:
        The names of these modules.

    Raises:
        ImportError: the package is not installed.
    """
    theirs = _their_class()
    found = [(name, module) for name, module in model.named_modules() if type(module) is LocalAttention]
    for _, module in found:
        for setting in _SETTINGS:
            vars(module).pop(setting, None)
        module.__class__ = theirs  # type: ignore[assignment]
    return [name for name, _ in found]


_SETTINGS = frozenset({"padding_at_ends", "backend"})


def _set(module: nn.Module, padding_at_ends: bool, backend: str | Sequence[str] | None) -> None:
    _check_settings(padding_at_ends)
    vars(module).update(padding_at_ends=padding_at_ends, backend=backend)


def _check_settings(padding_at_ends: object) -> None:
    if not isinstance(padding_at_ends, bool):
        raise TypeError(f"padding_at_ends must be True or False, got {padding_at_ends!r}")


def _their_class() -> type[nn.Module]:
    found: type[nn.Module] = import_module("local_attention").LocalAttention
    return found


def _attributes(module: nn.Module) -> set[str]:
    return {*vars(module), *dict(module.named_children())} - _SETTINGS


def _difference(given: set[str], known: set[str]) -> str:
    more, less = ", ".join(sorted(given - known)), ", ".join(sorted(known - given))
    return "; ".join(
        part
        for part in (more and f"what attnreg does not know: {more}", less and f"lacks what attnreg needs: {less}")
        if part
    )
