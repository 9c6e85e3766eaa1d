"""Hugging Face Transformers: ``attn_implementation="attnreg"``.

Importing this module registers the name, as an attention function and as a mask function. Layers with a sliding window or
chunks, causal or bidirectional, run on attnreg; all others where ``register(full=...)`` says.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.utils.generic import TransformersKwargs

import attnreg
from attnreg import local_attention
from attnreg.asking import check_known
from attnreg.integrations._transformers_mask import (
    BandMask,
    Sizes,
    additive,
    band_of,
    dense,
    hides_nothing,
    is_full,
    key_length_of,
    may_look,
    restarts,
    tensors_of,
    visibility,
    window_of,
    with_offsets,
    with_restarts,
)
from attnreg.integrations._transformers_paths import LayerPath, ModelPaths, explain, is_recorded, record
from attnreg.integrations._transformers_rule import MaskFunction, read_rule
from attnreg.request import parse_wish, written

__all__ = ["NAME", "LayerPath", "ModelPaths", "Options", "explain", "register"]

NAME = "attnreg"
Made = TypeVar("Made")

# Where full layers may go that take the masks that are made here; those of another name get the masks registered for it.
_OWN = ("sdpa", "eager", NAME)

# What models hand to all attention functions, and what says nothing that the mask or the layer has not said already.
_HARMLESS = frozenset(
    {
        *TransformersKwargs.__annotations__,
        *(
            "attention_mask",
            "cache_position",
            "deterministic",
            "input_ids",
            "layer_idx",
            "logits_to_keep",
            "max_length_k",
            "max_length_q",
        ),
        *("ignore_index", "shift_labels"),  # of losses
        *("mm_token_type_ids", "output_router_logits", "past_key_value", "past_key_values", "position_embeddings"),
        *("position_ids", "return_dict", "seq_idx", "sliding_window", "token_type_ids", "use_cache"),
    }
)


@dataclass(frozen=True)
class Options:
    """What a registered name does.

    Attributes:
        full: the implementation of layers without a window, and of masks that are no band.
        unsupported: "dense" or "raise".
        backend: attnreg's backend, or None.
        look: whether masks on an accelerator are looked at.
        ignored: names of further keyword arguments that change no number.
    """

    full: str = "sdpa"
    unsupported: str = "dense"
    backend: str | Sequence[str] | None = None
    look: bool = True
    ignored: frozenset[str] = frozenset()


def register(
    name: str = NAME,
    *,
    full: str = "sdpa",
    unsupported: str = "dense",
    backend: str | Sequence[str] | None = None,
    look: bool = True,
    ignored: Sequence[str] = (),
) -> Options:
    """Register attnreg's attention and masks with transformers, under a name for ``attn_implementation``.

    A name that is registered again does the new thing, also in models that have it already; ``register()`` is as at first.

    Args:
        name: for ``attn_implementation``. Not one that transformers has.
        full: where layers without a window go, and masks that no band can say: "sdpa", "eager", "attnreg", whose window is
            then the whole sequence, or any other implementation that attnreg did not register. Layers with a soft cap or sinks,
            which SDPA lacks, run on attnreg where this is "sdpa", and on the model's own eager function where their mask is no
            band.
        unsupported: what becomes of a layer with a window whose mask or arguments no band can say: "dense" sends it with a
            dense mask where full layers go, "raise" raises NotImplementedError, also where a model made no mask for it.
        backend: attnreg's backend, see :func:`attnreg.local_attention`.
        look: whether a padding mask on an accelerator is looked at, once a forward, outside of graphs, as SDPA and
            FlashAttention do it. Otherwise nothing there is ever read on the host, and a call with a padding mask has a bias.
        ignored: names of keyword arguments, beside those that attnreg knows, that change no number and may reach a layer.

    Returns:
        What the name does now.

    Raises:
        TypeError, ValueError: an argument is none of those.
        attnreg.BackendError: none of these backends is registered, or one has not such an option.
    """
    registered = AttentionInterface._global_mapping
    known = [each for each, function in registered.items() if getattr(function, "func", None) is not _attention]
    if not isinstance(name, str) or not name or name == "eager" or "|" in name:
        raise ValueError(f"name must be a name that transformers does not have, got {name!r}")
    if name in known:
        raise ValueError(f"name must be a name that transformers does not have, got {name!r}")
    if full not in (*_OWN, *known):
        raise ValueError(f"full must be one of {', '.join(dict.fromkeys((*_OWN, *known)))}; got {full!r}")
    if unsupported not in ("dense", "raise"):
        raise ValueError(f'unsupported must be "dense" or "raise", got {unsupported!r}')
    if not isinstance(look, bool):
        raise TypeError(f"look must be True or False, got {look!r} ({type(look).__name__})")
    if not isinstance(ignored, (list, tuple, set, frozenset)) or not all(isinstance(each, str) for each in ignored):
        raise TypeError(f"ignored must be a sequence of names, got {ignored!r}")
    asked = written(backend)
    if asked is not None:
        check_known(parse_wish(asked, "register"))
    options = Options(full, unsupported, asked, look, frozenset(ignored))
    AttentionInterface.register(name, partial(_attention, options))
    AttentionMaskInterface.register(name, partial(_mask, options))
    return options


def _registered(interface: Any, name: str) -> Callable[..., Any]:
    """What transformers has by a name. Its mapping is looked into as its own code does, for Dynamo's sake."""
    found: Callable[..., Any] = interface._global_mapping[name]
    return found


# The mask function


def _mask(
    options: Options,
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: MaskFunction,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Any:
    """What transformers calls for the masks of a forward, once for each kind of layer."""
    given = {
        **kwargs,
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "attention_mask": attention_mask,
        "local_size": local_size,
        "dtype": dtype,
        "use_vmap": use_vmap,
        "device": device,
    }
    device = torch.device(device)
    rule = read_rule(mask_function, device, is_given=use_vmap)
    if local_size is None and (rule is None or rule.first is None) and options.full not in _OWN:
        made = _registered(AttentionMaskInterface, options.full)(**given, mask_function=mask_function)
        if rule is not None and rule.packed and hasattr(made, "__dict__"):
            made.attnreg_is_packed = True
        return made
    if rule is not None:
        sizes = Sizes(batch_size, q_length, kv_length, q_offset, kv_offset, device)
        band = band_of(rule, sizes, mask_function, attention_mask, dtype, options.look)
        if band is not None:
            return band
    if local_size is not None and options.unsupported == "raise":
        raise NotImplementedError(
            f"attnreg: the mask of layers with a window or chunks of {local_size} is no band (something is joined to it, such as "
            f'blocks of images that see both sides); register(unsupported="dense") sends it to {options.full!r}'
        )
    name = "flex_attention" if options.full == "flex_attention" else "eager"
    given.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    return _registered(AttentionMaskInterface, name)(**given, mask_function=mask_function)


# The attention function


class _Call(NamedTuple):
    """A layer's call, as transformers makes it."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    dropout: float
    scaling: float | None
    is_causal: bool | None
    kwargs: dict[str, Any]

    def get(self, name: str) -> Any:
        """A keyword argument, or None."""
        return self.kwargs.get(name)


def _attention(
    options: Options,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls for attention: (N, H, L, E) in, (N, L, H, D) out."""
    _check(options, module, kwargs)
    call = _Call(module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs)
    if not isinstance(attention_mask, BandMask):
        if options.unsupported == "raise" and call.get("sliding_window") is not None:
            _refuse_window(call)
        return _dense(options, call, _apart(options, call))
    mask = _documented(options, call, attention_mask)
    why_not = _why_no_band(call, mask)
    # SDPA has neither soft cap nor sinks, and the model's eager function holds all scores.
    is_beyond_sdpa = options.full == "sdpa" and any(call.get(name) is not None for name in ("softcap", "s_aux"))
    if is_full(mask) and options.full != NAME and not (is_beyond_sdpa and why_not is None):
        return _dense(options, call, mask)
    if why_not is None and options.full == "sdpa" and _has_sdpa(call) and (query.shape[2] == 1 or hides_nothing(mask)):
        # One query reads one row of keys: there is nothing to save, and SDPA's call is the smaller one. Its mask is made here,
        # not where transformers asks for one: a model that joins something to its mask needs an additive one, and never None.
        return _sdpa(call, mask)
    if why_not is None:
        return _banded(options, call, mask), None
    if options.unsupported == "raise" and not is_full(mask):
        raise NotImplementedError(
            f'attnreg: {type(module).__name__} {why_not}, which no band can say; register(unsupported="dense") sends such layers '
            f"elsewhere"
        )
    return _dense(options, call, mask)


def _refuse_window(call: _Call) -> None:
    """A layer with a window whose mask, or the lack of one, does not say it."""
    name, window, elsewhere = type(call.module).__name__, call.get("sliding_window"), 'register(unsupported="dense")'
    if isinstance(call.mask, Tensor):
        raise NotImplementedError(
            f"attnreg: {name} has a window and was given a mask {tuple(call.mask.shape)} that the model or the user made, which "
            f"no band can say; {elsewhere} sends such layers elsewhere"
        )
    # Where there are no more keys than the window has, it hides none.
    if call.mask is None and isinstance(window, int) and call.key.shape[2] > window:
        index = getattr(call.module, "layer_idx", None)
        layer = name if index is None else f"{name} of layer {index}"
        raise NotImplementedError(
            f"attnreg: {layer} has sliding_window={window} and its model made no mask, which is where the window would be; "
            f"{elsewhere} runs it without its window, as eager attention does"
        )


# Keys that layers of sparse attention choose for themselves, which their models tell other implementations by a mask.
_CHOSEN_KEYS = ("indices", "block_indices")

# Arguments that are the model's own business: its eager function knows them.
_EAGER = ("position_bias", "sinks")


def _check(options: Options, module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Nothing is dropped that might change a number."""
    known = (*_EAGER, "softcap", "s_aux", "output_attentions", "cu_seq_lens_q", "cu_seq_lens_k")
    for name, value in kwargs.items():
        if value is None or name in known or name in _HARMLESS or name in options.ignored:
            continue
        if name in _CHOSEN_KEYS:
            raise NotImplementedError(
                f"attnreg: {type(module).__name__} was given {name}={_shown(value)}, keys that it chose for each query, which no "
                f'window says; choose attn_implementation="sdpa" or "eager" for this model'
            )
        raise TypeError(
            f"attnreg: {type(module).__name__} was given {name}={_shown(value)}, which attnreg does not know and will not drop; "
            f"where it changes no number, allow it by attnreg.integrations.transformers.register(ignored=[{name!r}])"
        )
    if kwargs.get("cu_seq_lens_k") is not None and kwargs.get("cu_seq_lens_q") is None:
        raise TypeError(
            f"attnreg: {type(module).__name__} was given cu_seq_lens_k={_shown(kwargs['cu_seq_lens_k'])} without cu_seq_lens_q; "
            f"packed sequences need the offsets of their queries"
        )


def _shown(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:80]


def _why_no_band(call: _Call, mask: BandMask) -> str | None:
    """Why attnreg cannot run a call whose mask is a band; None where it can."""
    if call.get("output_attentions"):
        return "was asked for its attention weights (output_attentions=True)"
    for name in _EAGER:
        if call.get(name) is not None:
            return f"was given {name}"
    sinks = call.get("s_aux")
    if sinks is None and _keeps_sinks(call.module):
        return "has sinks that it does not pass on"
    if sinks is not None and sinks.dim() != 1:
        return f"was given s_aux of shape {tuple(sinks.shape)}"
    if mask.visible is not None and mask.offsets_k is not mask.offsets_q:
        return "has documents, earlier tokens in a cache and a padding mask that may have holes"
    if not _fits(call, mask):
        rows, query_length, key_length = call.query.shape[0], call.query.shape[2], call.key.shape[2]
        return f"was given a mask of shape {tuple(mask.shape)} for {rows} rows, {query_length} queries and {key_length} keys"
    return None


def _keeps_sinks(module: nn.Module) -> bool:
    """Whether a layer has sinks; where modules keep things, as asking one for what it lacks is slow."""
    return any(kept.get("sinks") is not None for kept in (module._parameters, module._buffers, module.__dict__))


def _fits(call: _Call, mask: BandMask) -> bool:
    """Whether a mask is one of as many queries and keys as there are."""
    query, (batch, _, query_length, key_length) = call.query.shape, mask.shape
    return query[0] == batch and query[2] == query_length and call.key.shape[2] == key_length


def _documented(options: Options, call: _Call, mask: BandMask) -> BandMask:
    """The mask with the documents of packed sequences, where it has them not yet."""
    offsets_q, offsets_k = call.get("cu_seq_lens_q"), call.get("cu_seq_lens_k")
    query_length = call.query.shape[2]
    if offsets_q is not None:

        def told() -> BandMask:
            _check_offsets(call, options.look)
            return with_offsets(mask, offsets_q, offsets_q if offsets_k is None else offsets_k)

        _check_packed(call, "query_starts" in tensors_of(mask))
        return _remembered(mask, offsets_q, told)
    positions = _positions(call)
    if query_length == 1 or mask.packed or positions is None or positions.shape[1] != query_length:
        return mask
    # transformers finds where positions restart if there is neither a cache nor a padding mask, and else takes no notice of it.
    if mask.shape[2] != query_length or key_length_of(mask) < query_length:
        return mask
    if mask.chunk_size is not None and not tensors_of(mask).keys() <= {"anchor", "offsets_q", "offsets_k"}:
        return mask

    def found() -> BandMask:
        begins = restarts(mask, positions)
        if may_look(begins, options.look) and not bool(begins.any()):
            return mask
        return with_restarts(mask, begins, positions)

    return _remembered(mask, positions, found)


def _positions(call: _Call) -> Tensor | None:
    """The positions (N, L) of tokens, where the layer was told them; None where it was not."""
    positions = call.get("position_ids")
    return positions if isinstance(positions, Tensor) and positions.dim() == 2 else None


def _apart(options: Options, call: _Call) -> Any:
    """A mask that the model made, or none, with the documents of packed sequences told by their offsets."""
    offsets_q, offsets_k = call.get("cu_seq_lens_q"), call.get("cu_seq_lens_k")
    if offsets_q is None or (call.mask is None and options.full not in _OWN):
        return call.mask
    _check_packed(call, has_past=False)
    _check_offsets(call, looks=False)

    def documents(offsets: Tensor, length: int) -> Tensor:
        return torch.searchsorted(offsets, torch.arange(length, device=offsets.device), right=True)

    of_queries = documents(offsets_q, call.query.shape[2])
    of_keys = of_queries if offsets_k is None else documents(offsets_k, call.key.shape[2])
    apart = (of_queries[:, None] != of_keys)[None, None]
    if isinstance(call.mask, Tensor):
        if call.mask.dim() != 4:
            raise NotImplementedError(
                f"attnreg: cu_seq_lens_q was given together with a mask of shape {tuple(call.mask.shape)} for "
                f"full={options.full!r}; attnreg keeps documents apart in masks (N, 1, L, S) alone"
            )
        hidden = False if call.mask.dtype is torch.bool else torch.finfo(call.mask.dtype).min
        return call.mask.masked_fill(apart, hidden)
    return (~apart).tril() if _is_causal(call) else ~apart


def _check_packed(call: _Call, has_past: bool) -> None:
    (batch, _, query_length, _), key_length = call.query.shape, call.key.shape[2]
    if batch != 1 or query_length != key_length or has_past:
        raise ValueError(
            f"attnreg: cu_seq_lens_q was given with {batch} rows of {query_length} queries and {key_length} keys; packed "
            f"sequences are one row, without earlier tokens in a cache"
        )


def _check_offsets(call: _Call, looks: bool) -> None:
    """Documents have all tokens between them, where their offsets may be read."""
    for name, count in (("cu_seq_lens_q", call.query.shape[2]), ("cu_seq_lens_k", call.key.shape[2])):
        offsets = call.get(name)
        if offsets is None or not may_look(offsets, looks):
            continue
        numbers = offsets.tolist()
        if not numbers or numbers[0] != 0 or numbers[-1] != count or numbers != sorted(numbers):
            shown = f"{numbers}" if len(numbers) < 10 else f"{str(numbers[:4])[:-1]}, ..., {numbers[-1]}]"
            raise ValueError(f"attnreg: {name} must rise from 0 to {count}, the number of tokens; got {shown}")


def _is_causal(call: _Call) -> bool:
    """What a layer says of itself where no mask function was asked; eager has no other word either."""
    return bool(getattr(call.module, "is_causal", False) if call.is_causal is None else call.is_causal)


def _remembered(mask: Any, key: Tensor, make: Callable[[], Made]) -> Made:
    """What was made of a mask and a tensor, which all layers of a forward share."""
    if torch.compiler.is_compiling():
        return make()
    known = mask.__dict__.get("documented")
    if known is None or known[0] is not key:
        known = mask.documented = (key, make())
    found: Made = known[1]
    return found


def _banded(options: Options, call: _Call, mask: BandMask) -> Tensor:
    """The output (N, L, H, D) of a layer on attnreg."""
    query, key, value = call.query, call.key, call.value
    if mask.unused:
        key, value = key[:, :, : key_length_of(mask)], value[:, :, : key_length_of(mask)]
    given = {
        "bias": _bias(mask, query.dtype),
        "scale": call.scaling,
        "softcap": call.get("softcap"),
        "sinks": call.get("s_aux"),
        "dropout_p": call.dropout,
        "backend": options.backend,
    }
    is_folded = mask.offsets_q is not None
    if is_folded:
        query, key, value = _folded(query), _folded(key), _folded(value)
        offsets_k = None if mask.offsets_k is mask.offsets_q else mask.offsets_k
        given.update(cu_seqlens_q=mask.offsets_q, cu_seqlens_k=offsets_k)
    else:
        given.update(query_starts=mask.query_starts, key_starts=mask.key_starts, key_lengths=mask.key_lengths)
    if is_recorded():
        record(call.module, mask, NAME, attnreg.explain(query, key, value, window_of(mask), **given))
    output: Tensor = local_attention(query, key, value, window_of(mask), **given)
    if is_folded:
        output = output[0].transpose(0, 1)
        return output.reshape(call.query.shape[0], -1, *output.shape[1:]).contiguous()
    return output.transpose(1, 2).contiguous()


def _folded(tensor: Tensor) -> Tensor:
    """(1, H, N * L, E) of (N, H, L, E): a view, where memory has the order of (N, L, H, E) as models keep it."""
    return tensor.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None]


def _bias(mask: BandMask, dtype: torch.dtype) -> Tensor | None:
    """The bias that hides keys one by one: a view of what it says of each key, not of each slot."""
    if mask.visible is None:
        return None
    window, key_length, query_length = window_of(mask), key_length_of(mask), mask.shape[2]
    of_keys = torch.zeros(mask.visible.shape, dtype=dtype, device=mask.visible.device)
    of_keys = of_keys.masked_fill(~mask.visible, -torch.inf)
    starts = mask.query_starts
    if mask.offsets_q is not None:
        of_keys = of_keys.flatten()[None]
        starts, query_length, key_length = None, of_keys.shape[1], of_keys.shape[1]
    slots = pad(of_keys, (window.left, window.right), value=-torch.inf)
    if starts is None:
        # What Tensor.unfold gives, which in a graph has one number of slots for all lengths.
        shape, strides = (slots.shape[0], query_length, window.size), (slots.shape[1], 1, 1)
        return slots.as_strided(shape, strides, key_length - query_length)[:, None]
    rows = torch.arange(query_length, device=starts.device)[:, None] + torch.arange(window.size, device=starts.device)
    places = (starts[:, None, None] + rows).clamp(0, slots.shape[1] - 1)
    return slots.gather(1, places.flatten(1)).view(places.shape)[:, None]


# Where the rest goes


def _dense(options: Options, call: _Call, mask: Any) -> tuple[Tensor, Tensor | None]:
    """A layer on the implementation of full layers; its mask is a BandMask, or whatever the model made."""
    name = "sdpa" if options.full == NAME else options.full
    if name not in _OWN and not isinstance(mask, BandMask):
        return _elsewhere(options, name, call, mask)
    if name == "eager" or not _has_sdpa(call):
        return _eager(call, mask)
    return _sdpa(call, mask)


def _has_sdpa(call: _Call) -> bool:
    """Whether SDPA has all that a call asks for."""
    for name in ("softcap", "s_aux", *_EAGER):
        if call.get(name) is not None:
            return False
    return not (call.get("output_attentions") or _keeps_sinks(call.module))


def _elsewhere(options: Options, name: str, call: _Call, mask: Any) -> tuple[Tensor, Tensor | None]:
    """A full layer on an implementation that gets the mask made for it."""
    given = _documents_of(options, call) if name == "flex_attention" else None
    if given is not None:
        raise ValueError(
            f'attnreg: {given}, and full="flex_attention" cannot be told of documents but by position_ids with '
            f'use_cache=False and no attention_mask; or register(full="sdpa")'
        )
    record(call.module, mask, name)
    found: tuple[Tensor, Tensor | None] = _registered(AttentionInterface, name)(
        _As(call.module, name),
        call.query,
        call.key,
        call.value,
        mask,
        dropout=call.dropout,
        scaling=call.scaling,
        is_causal=call.is_causal,
        **call.kwargs,
    )
    return found


def _documents_of(options: Options, call: _Call) -> str | None:
    """What tells of documents that a mask of FlexAttention does not have, as far as it may be read."""
    if call.get("cu_seq_lens_q") is not None:
        return "cu_seq_lens_q was given"
    positions, mask = _positions(call), call.mask
    query_length = call.query.shape[2]
    if positions is None or not may_look(positions, options.look):
        return None
    if mask is None or hasattr(mask, "attnreg_is_packed") or query_length == 1 or positions.shape[1] != query_length:
        return None
    shape = (call.query.shape[0], 1, query_length, query_length)
    plain = BandMask(shape, (None, None, False, None, 0, call.query.dtype), {"anchor": positions})
    is_pack = _remembered(mask, positions, lambda: bool(restarts(plain, positions).any()))
    return "position_ids restart" if is_pack else None


class _As:
    """A layer whose configuration names another implementation, by which FlashAttention's function finds its kernels."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self._module, self.config = module, _Configured(getattr(module, "config", None), name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _Configured:
    def __init__(self, config: Any, name: str) -> None:
        self._config, self._attn_implementation = config, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def _sdpa(call: _Call, mask: Any) -> tuple[Tensor, None]:
    record(call.module, mask, "sdpa")
    key, value, is_causal = call.key, call.value, False
    if isinstance(mask, BandMask):
        if hides_nothing(mask) and _fits(call, mask):
            query_length, key_length = mask.shape[2], key_length_of(mask)
            is_causal = mask.last == 0 and query_length > 1
            if not is_causal or query_length == key_length:
                if mask.unused:
                    key, value = key[:, :, :key_length], value[:, :, :key_length]
                mask = None
        mask = None if mask is None else _shared(mask, visibility)
    elif isinstance(mask, Tensor):
        mask = mask if mask.dtype is torch.bool else _in_dtype(mask, call.query.dtype)
    else:
        is_causal = _is_causal(call)
    output, _ = _registered(AttentionInterface, "sdpa")(
        call.module,
        call.query,
        key,
        value,
        mask,
        dropout=call.dropout,
        scaling=call.scaling,
        is_causal=is_causal and mask is None,
    )
    return output, None


def _eager(call: _Call, mask: Any) -> tuple[Tensor, Tensor | None]:
    """A layer on the model's own eager function, which is found where its class is."""
    record(call.module, mask, "eager")
    for kind in type(call.module).__mro__:
        function = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if function is not None:
            break
    else:
        raise NotImplementedError(
            f"attnreg: {type(call.module).__name__} needs its model's own eager attention, and its module has no "
            f'eager_attention_forward; choose attn_implementation="eager" for this model'
        )
    if isinstance(mask, BandMask):
        mask = _shared(mask, dense)
    elif isinstance(mask, Tensor) and mask.dtype is torch.bool:
        mask = additive(mask, call.query.dtype)
    output, weights = function(
        call.module,
        call.query,
        call.key,
        call.value,
        mask,
        dropout=call.dropout,
        scaling=call.scaling,
        **call.kwargs,
    )
    return output, weights


def _shared(mask: BandMask, make: Callable[[BandMask], Tensor]) -> Tensor:
    """A dense form of the mask, made once for all layers of a forward."""
    if torch.compiler.is_compiling():
        return make(mask)
    made: dict[Any, Tensor] = mask.__dict__.setdefault("made", {})
    if make not in made:
        made[make] = make(mask)
    return made[make]


def _in_dtype(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """An additive mask in another dtype, whose least number may be a larger one."""
    return mask if mask.dtype is dtype else mask.clamp_min(torch.finfo(dtype).min).to(dtype)


register()
