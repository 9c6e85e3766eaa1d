"""The attention of Longformer and of LED's encoder in Transformers: sliding windows and global tokens, on attnreg.

Rows of all tokens see the keys around them, global ones among these, in a call of ``local_attention_with_lse``. The global keys
farther away are few; a softmax over their scores and the call's log-sum-exp merges both. Global tokens see all keys, with
projections of their own.

``patch`` lets the attention of a model run so. Its modules stay the ones they are, with their weights, hooks and names: what
changes is their class.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, pad

from attnreg import Window, local_attention, local_attention_with_lse, local_dot_product, local_weighted_average
from attnreg.integrations._hidden_keys import can_be_read, rows_of

__all__ = ["LEDEncoderSelfAttention", "LongformerSelfAttention", "patch", "unpatch"]

_longformer: Any = import_module("transformers.models.longformer.modeling_longformer")
_led: Any = import_module("transformers.models.led.modeling_led")


@dataclass(frozen=True)
class _Tokens:
    """What the masks say of tokens.

    Attributes:
        masked: (N, L), padding: its rows are 0, and global queries do not see it; None for no mask at all.
        hidden: (N, L), what a window does not show; None likewise.
        is_global: (N, L); None where no token is.
    """

    masked: Tensor | None
    hidden: Tensor | None
    is_global: Tensor | None


@dataclass(frozen=True)
class _Globals:
    """The global tokens of each sequence, G of them or fewer.

    Attributes:
        index: (N, G), where they are, in their order; of those that do not exist, places that no other has.
        exists: (N, G).
    """

    index: Tensor
    exists: Tensor

    def of(self, heads: Tensor) -> Tensor:
        """(N, H, G, E) of (N, H, L, E)."""
        return heads.gather(2, self.index[:, None, :, None].expand(-1, heads.shape[1], -1, heads.shape[3]))


class _SlidingWindowAndGlobalTokens(nn.Module):
    """The forward of both classes; settings are those of ``patch``."""

    dilation: int = 1
    max_global_tokens: int | None = None
    padding_at_ends: bool = False
    backend: str | Sequence[str] | None = None

    # What Transformers' class sets.
    num_heads: int
    head_dim: int
    embed_dim: int
    one_sided_attn_window_size: int
    dropout: float
    query: nn.Module
    key: nn.Module
    value: nn.Module
    query_global: nn.Module
    key_global: nn.Module
    value_global: nn.Module

    def __init__(
        self,
        config: Any,
        layer_id: int,
        *,
        dilation: int = 1,
        max_global_tokens: int | None = None,
        padding_at_ends: bool = False,
        backend: str | Sequence[str] | None = None,
    ) -> None:
        super().__init__(config, layer_id)
        _set(self, _checked(dilation, max_global_tokens, padding_at_ends, backend))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        is_index_masked: Tensor | None = None,
        is_index_global_attn: Tensor | None = None,
        is_global_attn: bool | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, ...]:
        """Attention of each token to the tokens around it and to the global ones; global tokens attend to all.

        Args:
            hidden_states: (N, L, hidden_size), of any length L.
            attention_mask: (N, L), less than 0 for padding, 0 for a token, more than 0 for a global one, as the models' own
                forward makes it; None for tokens alone.
            is_index_masked: (N, L), boolean; None means ``attention_mask < 0``.
            is_index_global_attn: (N, L), boolean; None means ``attention_mask > 0``.
            is_global_attn: whether there is a global token. None looks at the mask, on an accelerator too; where
                ``max_global_tokens`` is set, it means True if there is a mask. False takes global tokens for padding that has a
                row, as in Transformers.
            output_attentions: whether weights are wanted.

        Returns:
            The output (N, L, hidden_size), 0 in rows of padding. With ``output_attentions`` also the weights (N, L, H, G +
            attention_window + 1), of which the first G are those of the global keys, and, where there are global tokens, their
            weights (N, H, G, L). G is the largest number of global tokens in a sequence, or ``max_global_tokens``.

        Raises:
            TypeError, ValueError: an argument is bad, or there are more global tokens than ``max_global_tokens``; on an
                accelerator the latter is a RuntimeError that comes later.
        """
        if hidden_states.dim() != 3 or hidden_states.shape[2] != self.embed_dim:
            raise ValueError(
                f"hidden_states must have shape (N, L, {self.embed_dim}), got {tuple(hidden_states.shape)}"
            )
        tokens = self._tokens(hidden_states, attention_mask, is_index_masked, is_index_global_attn, is_global_attn)
        query, key, value = (self._heads(of(hidden_states)) for of in (self.query, self.key, self.value))
        which = None if tokens.is_global is None else self._globals(tokens.is_global)
        attend = self._with_weights if output_attentions else self._fused
        output, *weights = attend(query, key, value, tokens, which)
        if tokens.masked is not None:
            output = output.masked_fill(tokens.masked[:, None, :, None], 0.0)
        output = output.transpose(1, 2).flatten(2)
        if which is not None:
            of_globals, global_weights = self._of_globals(hidden_states, tokens, which)
            place = which.index[:, :, None].expand(-1, -1, self.embed_dim)
            placed = torch.zeros_like(output).scatter(1, place, of_globals.to(output.dtype))
            output = torch.where(tokens.is_global[:, :, None], placed, output)  # type: ignore[index]
            weights = [*weights, global_weights] if output_attentions else weights
        return (output, *weights)

    def extra_repr(self) -> str:
        """The settings, for the module's representation."""
        settings = [f"one_sided_attn_window_size={self.one_sided_attn_window_size}"]
        defaults = _SlidingWindowAndGlobalTokens
        for name in _SETTINGS:
            if getattr(self, name) != getattr(defaults, name):
                settings.append(f"{name}={getattr(self, name)!r}")
        return ", ".join(settings)

    # What the masks say

    def _tokens(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        is_index_masked: Tensor | None,
        is_index_global_attn: Tensor | None,
        is_global_attn: bool | None,
    ) -> _Tokens:
        given = {
            "attention_mask": attention_mask,
            "is_index_masked": is_index_masked,
            "is_index_global_attn": is_index_global_attn,
        }
        for name, mask in given.items():
            if mask is not None:
                _check_mask(name, mask, hidden_states, is_boolean=name != "attention_mask")
        if attention_mask is not None:
            is_index_masked = attention_mask < 0 if is_index_masked is None else is_index_masked
            is_index_global_attn = attention_mask > 0 if is_index_global_attn is None else is_index_global_attn
        if is_index_global_attn is None:
            if is_global_attn:
                raise ValueError(
                    "is_global_attn is True, and neither attention_mask nor is_index_global_attn says where"
                )
        elif is_global_attn is None:
            is_global_attn = self.max_global_tokens is not None or bool(is_index_global_attn.any())
        is_global = is_index_global_attn if is_global_attn else None
        hidden = is_index_masked
        if attention_mask is not None:
            hidden = attention_mask != 0 if hidden is None else hidden | (attention_mask != 0)
        if hidden is not None and is_global is not None:
            hidden = hidden & ~is_global
        return _Tokens(is_index_masked, hidden, is_global)

    def _globals(self, is_global: Tensor) -> _Globals:
        count = is_global.sum(1)
        most = is_global.shape[1]
        if self.max_global_tokens is None:
            most = int(count.max())
        elif self.max_global_tokens < most:
            most = self.max_global_tokens
            fits = (count <= most).all()
            if not can_be_read(fits):
                torch._assert_async(fits, f"a sequence has more global tokens than max_global_tokens={most}")
            elif not fits:
                raise ValueError(
                    f"a sequence has {int(count.max())} global tokens; max_global_tokens={most} admits {most}"
                )
        # Global tokens first, each in its order.
        index = (~is_global).to(torch.uint8).sort(dim=1, stable=True).indices[:, :most]
        return _Globals(index, torch.arange(most, device=index.device) < count[:, None])

    def _rows(self, hidden: Tensor | None, length: int, window: Window, like: Tensor) -> dict[str, Any]:
        """The arguments of the window's calls that hide keys, of sequences as `_fold` makes them."""
        if hidden is None:
            if length % self.dilation == 0:
                return {}
            hidden = torch.zeros((like.shape[0], length), dtype=torch.bool, device=like.device)
        folded = self._fold(hidden[:, None, :, None], fill=True)[:, 0, :, 0]
        holes = None if can_be_read(folded) else not self.padding_at_ends
        return rows_of(folded, window, folded.shape[1], like.dtype, holes=holes)

    # Tokens that are not global

    def _fused(
        self, query: Tensor, key: Tensor, value: Tensor, tokens: _Tokens, which: _Globals | None
    ) -> tuple[Tensor, ...]:
        length = query.shape[2]
        side = min(self.one_sided_attn_window_size, max(-(-length // self.dilation) - 1, 0))
        window = Window(side, side)
        rows = {
            **self._rows(tokens.hidden, length, window, query),
            "scale": self._scale,
            "dropout_p": self._dropout_p,
            "backend": self.backend,
        }
        folded = (self._fold(query), self._fold(key), self._fold(value))
        if which is None:
            return (self._unfold(local_attention(*folded, window, **rows), length),)
        near, log_sum_exp = local_attention_with_lse(*folded, window, **rows)
        near, log_sum_exp = self._unfold(near, length), self._unfold(log_sum_exp[..., None], length)
        # A global key that the window shows is counted there.
        offset = torch.arange(length, device=query.device)[:, None] - which.index[:, None]
        shown = (offset.abs() <= side * self.dilation) & (offset % self.dilation == 0)
        far = self._scores_of_globals(query, key, which).to(log_sum_exp.dtype)
        far = far.masked_fill((shown | ~which.exists[:, None])[:, None], -torch.inf)
        if tokens.masked is not None:
            # Such a row may see no key at all, of which a softmax would be NaN.
            log_sum_exp = log_sum_exp.masked_fill(tokens.masked[:, None, :, None], 0.0)
        weights = torch.cat((log_sum_exp, far), dim=-1).softmax(-1)
        of_far = dropout(weights[..., 1:], self._dropout_p).to(value.dtype)
        output = weights[..., :1] * near + of_far @ which.of(value)
        return (output.to(value.dtype),)

    def _with_weights(
        self, query: Tensor, key: Tensor, value: Tensor, tokens: _Tokens, which: _Globals | None
    ) -> tuple[Tensor, ...]:
        """The same by way of all weights, which are wanted: global keys have columns of their own, and none in a window."""
        length, side = query.shape[2], self.one_sided_attn_window_size
        window = Window(side, side)
        hidden, is_global = tokens.hidden, tokens.is_global
        if is_global is not None:
            hidden = is_global if hidden is None else hidden | is_global
        rows = self._rows(hidden, length, window, query)
        scores = local_dot_product(
            self._fold(query), self._fold(key), window, scale=self._scale, backend=self.backend, **rows
        )
        scores = self._unfold(scores, length)
        count = 0
        if which is not None:
            far = self._scores_of_globals(query, key, which).masked_fill(~which.exists[:, None, None], -torch.inf)
            count = far.shape[-1]
            scores = torch.cat((far.to(scores.dtype), scores), dim=-1)
        empty = (scores == -torch.inf).all(-1, keepdim=True)
        weights = scores.masked_fill(empty, 0.0).softmax(-1, dtype=_accumulator(scores)).masked_fill(empty, 0.0)
        if tokens.masked is not None:
            weights = weights.masked_fill(tokens.masked[:, None, :, None], 0.0)
        weights = dropout(weights.to(scores.dtype), self._dropout_p)
        in_window = self._fold(weights[..., count:])
        bounds = {name: each for name, each in rows.items() if name != "bias"}
        output = local_weighted_average(in_window, self._fold(value), window, backend=self.backend, **bounds)
        output = self._unfold(output, length)
        if which is not None and is_global is not None:
            output = output + weights[..., :count] @ which.of(value)
            weights = weights.masked_fill(is_global[:, None, :, None], 0.0)
        return output, weights.transpose(1, 2)

    def _scores_of_globals(self, query: Tensor, key: Tensor, which: _Globals) -> Tensor:
        """(N, H, L, G)."""
        return (query * self._scale) @ which.of(key).transpose(2, 3)

    # Global tokens

    def _of_globals(self, hidden_states: Tensor, tokens: _Tokens, which: _Globals) -> tuple[Tensor, Tensor]:
        """The output (N, G, hidden_size) and the weights (N, H, G, L) of global queries."""
        states = hidden_states.gather(1, which.index[:, :, None].expand(-1, -1, self.embed_dim))
        query = self._heads(self.query_global(states)) * self._scale
        key, value = (self._heads(of(hidden_states)) for of in (self.key_global, self.value_global))
        scores = query @ key.transpose(2, 3)
        if tokens.masked is not None:
            # The least number and not -inf: where all is padding there is no global token, and must be no NaN.
            scores = scores.masked_fill(tokens.masked[:, None, None], torch.finfo(scores.dtype).min)
        weights = dropout(scores.softmax(-1, dtype=_accumulator(scores)).to(value.dtype), self._dropout_p)
        return (weights @ value).transpose(1, 2).flatten(2), weights

    # Heads, and sequences of tokens that are `dilation` apart

    @property
    def _scale(self) -> float:
        return 1 / math.sqrt(self.head_dim)

    @property
    def _dropout_p(self) -> float:
        return self.dropout if self.training else 0.0

    def _heads(self, projected: Tensor) -> Tensor:
        """(N, H, L, E) of (N, L, H E)."""
        heads: Tensor = projected.unflatten(2, (self.num_heads, self.head_dim))
        return heads.transpose(1, 2)

    def _fold(self, heads: Tensor, *, fill: float = 0.0) -> Tensor:
        """(N d, H, ceil(L / d), X) of (N, H, L, X): every d-th token; those that sequences lack are ``fill``."""
        apart = self.dilation
        if apart == 1:
            return heads
        missing = -heads.shape[2] % apart
        padded = pad(heads, (0, 0, 0, missing), value=fill) if missing else heads
        apart_last: Tensor = padded.unflatten(2, (-1, apart))
        return apart_last.movedim(3, 1).flatten(0, 1)

    def _unfold(self, folded: Tensor, length: int) -> Tensor:
        """The way back."""
        apart = self.dilation
        if apart == 1:
            return folded
        apart_next: Tensor = folded.unflatten(0, (-1, apart))
        return apart_next.movedim(1, 3).flatten(2, 3)[:, :, :length]


_SETTINGS = ("dilation", "max_global_tokens", "padding_at_ends", "backend")


class LongformerSelfAttention(_SlidingWindowAndGlobalTokens, _longformer.LongformerSelfAttention):  # type: ignore[misc]
    """Transformers' ``LongformerSelfAttention`` on attnreg: same parameters, same ``state_dict``, same results.

    It takes sequences of any length, with ``attention_window[layer_id] // 2`` keys on each side of a query.

    Args:
        config: a ``LongformerConfig``.
        layer_id: which layer it is of; its window is ``config.attention_window[layer_id]``.
        dilation: how far apart the keys of a window are, at least 1. Transformers has none.
        max_global_tokens: at most so many global tokens does a sequence have; None counts them, for which the host waits for an
            accelerator where there are any.
        padding_at_ends: promises that padding is at the ends of sequences alone, which spares an accelerator, and a traced call,
            a bias. On the CPU there is a look at each mask instead.
        backend: attnreg's backend, by name, or several in order of preference; None lets attnreg choose.

    Raises:
        TypeError, ValueError: a setting is bad; the message names it, what it was and what was expected.
    """


class LEDEncoderSelfAttention(_SlidingWindowAndGlobalTokens, _led.LEDEncoderSelfAttention):  # type: ignore[misc]
    """The same for the encoder of LED: Transformers' ``LEDEncoderSelfAttention``.

    Args:
        config: an ``LEDConfig``.
        layer_id: which layer it is of.
        dilation: as in :class:`LongformerSelfAttention`.
        max_global_tokens: likewise.
        padding_at_ends: likewise.
        backend: likewise.

    Raises:
        TypeError, ValueError: as there.
    """


# In a model


def patch(
    model: nn.Module,
    *,
    dilation: int | Sequence[int] = 1,
    max_global_tokens: int | None = None,
    padding_at_ends: bool = False,
    backend: str | Sequence[str] | None = None,
) -> list[str]:
    """Let the attention of a Longformer model, or of an LED model's encoder, run on attnreg.

    The model no longer pads its inputs to a multiple of the window. Hooks, weights and names of its modules stay. To patch
    a model again gives it other settings.

    Args:
        model: a model of Transformers, or a module with such a model in it.
        dilation: one for all layers, or one for each.
        max_global_tokens: as in :class:`LongformerSelfAttention`.
        padding_at_ends: likewise.
        backend: likewise.

    Returns:
        The names of the modules whose attention that is.

    Raises:
        TypeError, ValueError: there is no such module in the model, this version of Transformers gives one arguments that are
            not known here, or a setting is bad.
    """
    found = [(name, module) for name, module in model.named_modules() if _pair_of(module) is not None]
    if not found:
        raise ValueError(f"model must hold a LongformerSelfAttention or LEDEncoderSelfAttention, got {_kind(model)}")
    settings = []
    for _, module in found:
        theirs, ours = _pair(module)
        _check_arguments(theirs, ours)
        settings.append(
            _checked(
                _of_layer(dilation, module.layer_id) if isinstance(dilation, Sequence) else dilation,
                max_global_tokens,
                padding_at_ends,
                backend,
            )
        )
    for (_, module), values in zip(found, settings):
        module.__class__ = _pair(module)[1]
        _set(module, values)
    for module, no_padding in _padding(model):
        module._pad_to_window_size = no_padding
    return [name for name, _ in found]


def unpatch(model: nn.Module) -> list[str]:
    """Let the attention of a patched model be Transformers' own again.

    Returns:
        The names of the modules whose attention that is.
    """
    names = []
    for name, module in model.named_modules():
        pair = _pair_of(module)
        if pair is not None and type(module) is pair[1]:
            module.__class__ = pair[0]
            for setting in _SETTINGS:
                vars(module).pop(setting, None)
            names.append(name)
    for module, no_padding in _padding(model):
        if vars(module).get("_pad_to_window_size") is no_padding:
            del module._pad_to_window_size
    return names


_PAIRS: tuple[tuple[type[nn.Module], type[nn.Module]], ...] = (
    (_longformer.LongformerSelfAttention, LongformerSelfAttention),
    (_led.LEDEncoderSelfAttention, LEDEncoderSelfAttention),
)


def _pair_of(module: nn.Module) -> tuple[type[nn.Module], type[nn.Module]] | None:
    """Transformers' class and ours, where a module's own is one of both."""
    return next((pair for pair in _PAIRS if type(module) in pair), None)


def _pair(module: nn.Module) -> tuple[type[nn.Module], type[nn.Module]]:
    pair = _pair_of(module)
    assert pair is not None
    return pair


def _padding(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """The modules that pad to a multiple of the window, each with a function that does not."""
    for module in model.modules():
        if isinstance(module, _longformer.LongformerModel):
            yield module, _longformer_without_padding
        elif isinstance(module, _led.LEDEncoder):
            yield module, _led_without_padding


def _longformer_without_padding(
    *,
    input_ids: Tensor | None,
    attention_mask: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    pad_token_id: int,
) -> tuple[Any, ...]:
    return 0, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds


def _led_without_padding(
    *, input_ids: Tensor | None, attention_mask: Tensor, inputs_embeds: Tensor | None, pad_token_id: int
) -> tuple[Any, ...]:
    return 0, input_ids, attention_mask, inputs_embeds


# Checks


def _set(module: nn.Module, settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        setattr(module, name, value)


def _checked(dilation: Any, max_global_tokens: Any, padding_at_ends: Any, backend: Any) -> dict[str, Any]:
    for name, number, least in (("dilation", dilation, 1), ("max_global_tokens", max_global_tokens, 0)):
        if name == "max_global_tokens" and number is None:
            continue
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"{name} must be an int, got {number!r} ({type(number).__name__})")
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")
    if not isinstance(padding_at_ends, bool):
        raise TypeError(f"padding_at_ends must be True or False, got {padding_at_ends!r}")
    return dict(zip(_SETTINGS, (dilation, max_global_tokens, padding_at_ends, backend)))


def _of_layer(dilation: Sequence[Any], layer: Any) -> Any:
    if not layer < len(dilation):
        raise ValueError(f"dilation must have one number for each layer, got {len(dilation)}; there is a layer {layer}")
    return dilation[layer]


def _check_arguments(theirs: type[nn.Module], ours: type[nn.Module]) -> None:
    given, known = (set(inspect.signature(each.forward).parameters) for each in (theirs, ours))
    if given != known:
        raise TypeError(
            f"{theirs.__name__}.forward of this version of transformers has other arguments than attnreg knows: "
            f"{', '.join(sorted(given ^ known))}"
        )


def _check_mask(name: str, mask: object, hidden_states: Tensor, *, is_boolean: bool) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {_kind(mask)}")
    if (mask.dtype is torch.bool) is not is_boolean:
        expected = "boolean" if is_boolean else "numbers: less than 0 for padding, more than 0 for a global token"
        raise TypeError(f"{name} must be {expected}; got {mask.dtype}")
    if mask.shape != hidden_states.shape[:2]:
        raise ValueError(f"{name} must have shape {tuple(hidden_states.shape[:2])}, got {tuple(mask.shape)}")
    if mask.device != hidden_states.device:
        raise ValueError(f"{name} must be on hidden_states' device, {hidden_states.device}; got {mask.device}")


def _accumulator(scores: Tensor) -> torch.dtype:
    return torch.float64 if scores.dtype is torch.float64 else torch.float32


def _kind(value: object) -> str:
    return type(value).__name__
