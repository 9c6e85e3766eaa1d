"""Calls of the wrong form, answered: other libraries' names, a window that is left out, too many arguments by position.

Python's own errors would say what is wrong, and not what to write instead. So a public function catches what it does not know,
and has a default for what it needs. Neither is part of its signature: see :func:`answers`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from attnreg.op import ATTENTION, DOT_PRODUCT
from attnreg.request import did_you_mean


class _Missing:
    """What stands for an argument that a call does not give."""

    def __repr__(self) -> str:
        return "nothing"


MISSING: Any = _Missing()

WINDOWS = "Window.causal(n), Window.centered(n) or Window(left, right)"
TRANSPOSE = "of tensors in (N, L, H, E) give tensor.transpose(1, 2), which copies nothing"

_WINDOW = f"give window={WINDOWS}"
_CAUSAL = "give window=Window.causal(n): a query sees its own position and the n - 1 before it"
_MASK = "give bias=band_from_dense(mask, window), or key_lengths= or key_starts= for padding"
_POSITIONS = "give bias=, of shape (H, 1, W) where it is a table of relative positions"
_MOST = "leave it out: no length is needed beside the offsets"
_BETWEEN = "between local_dot_product and local_weighted_average"
_FUNCTIONS = f"there are no functions of scores yet: give bias= for what is added to them, and do the rest {_BETWEEN}"
_LSE = "call local_attention_with_lse, which returns both"
_WEIGHTS = "leave it out: local_dot_product(query, key, window, scale=scale).softmax(-1) are the weights"
_BLOCKS = "leave it out: blocks are a backend's own, and the window alone says which keys a query sees"
_LAYOUT = f"tensors are (N, H, L, E); {TRANSPOSE}"
_PROJECTIONS = "leave it out: heads are a dimension of the tensors, and the projections are yours"

_ELSEWHERE: Mapping[str, str] = {
    **dict.fromkeys(("window_size", "sliding_window", "window_left", "left_window_size", "local_window_size"), _WINDOW),
    **dict.fromkeys(("attention_window", "local_context", "kernel_size", "lookback"), _WINDOW),
    **dict.fromkeys(("is_causal", "causal"), _CAUSAL),
    **dict.fromkeys(("mask", "attn_mask", "attention_mask", "attn_bias", "key_padding_mask", "block_mask"), _MASK),
    **dict.fromkeys(("rpb", "relative_position_bias", "position_bias"), _POSITIONS),
    **dict.fromkeys(
        ("alibi_slopes", "alibi"), "give bias=-slopes[:, None, None] * (window.left - torch.arange(window.size)).abs()"
    ),
    **dict.fromkeys(("softmax_scale", "sm_scale", "scaling"), "give scale="),
    **dict.fromkeys(
        ("cu_seqlens", "cu_seqlens_query", "cu_seq_lens_q", "cu_seq_q", "document_offsets"), "give cu_seqlens_q="
    ),
    **dict.fromkeys(("cu_seqlens_kv", "cu_seq_lens_k", "cu_seq_k"), "give cu_seqlens_k="),
    **dict.fromkeys(("max_seqlen", "max_seqlen_q", "max_seqlen_k", "max_q", "max_k", "max_length_q"), _MOST),
    **dict.fromkeys(("seq_lens", "seqlens", "lengths", "kv_lengths", "seqused_k"), "give key_lengths="),
    **dict.fromkeys(("leftpad_k", "left_padding", "leftpad"), "give key_starts="),
    **dict.fromkeys(
        ("q_offset", "query_offset", "query_positions", "cache_position", "start_pos"), "give query_starts="
    ),
    **dict.fromkeys(("dropout", "p_dropout", "attn_dropout", "dropout_rate"), "give dropout_p="),
    **dict.fromkeys(("soft_cap", "logits_soft_cap", "logit_softcapping"), "give softcap="),
    **dict.fromkeys(("generator", "rng_state", "dropout_seed"), "give seed=, an int64 tensor of one element"),
    **dict.fromkeys(("score_mod", "mask_mod"), _FUNCTIONS),
    **dict.fromkeys(("sink", "s_aux", "learnable_sink", "attention_sinks"), "give sinks=, of shape (H,)"),
    **dict.fromkeys(("return_lse", "return_softmax_lse", "return_aux"), _LSE),
    **dict.fromkeys(("need_weights", "return_attn_probs", "output_attentions"), _WEIGHTS),
    **dict.fromkeys(("block_size", "block_q", "block_k"), _BLOCKS),
    **dict.fromkeys(("layout", "tensor_layout", "input_layout", "qkv_format", "batch_first"), _LAYOUT),
    **dict.fromkeys(("num_heads", "embed_dim", "heads", "dim", "head_dim"), _PROJECTIONS),
    "enable_gqa": "leave it out: fewer key/value heads than query heads are taken as they are",
    "q": "give query=",
    "k": "give key=",
    "v": "give value=",
}

# Where to give what such a call does not take, but another one does.
_MADE, _CALLED = "where the module is made", "in the call of the module"
_TENSORS = [row.name for row in ATTENTION.arguments if row.dims is not None]
_OF_ATTENTION = dict.fromkeys(
    (row.name for row in ATTENTION.arguments if row.name not in {each.name for each in DOT_PRODUCT.arguments}),
    "in local_attention",
)
_OTHERS: Mapping[str, Mapping[str, str]] = {
    "local_dot_product": {**dict.fromkeys(("weights", "value"), "in local_weighted_average"), **_OF_ATTENTION},
    "local_weighted_average": {
        **dict.fromkeys(("query", "key", "bias", "scale"), "in local_dot_product"),
        **_OF_ATTENTION,
    },
    "LocalAttention": dict.fromkeys(("query", "key", "value", *_TENSORS), _CALLED),
    "LocalAttention.forward": dict.fromkeys(("window", "scale", "softcap", "dropout_p", "backend"), _MADE),
}

Answering = TypeVar("Answering", bound=Callable[..., Any])


def answers(function: Answering) -> Answering:
    """Let every call of the wrong form reach ``function``, whose ``*_more`` and ``**_unknown`` catch what it does not know.

    What it needs gets a default, MISSING, which its checks refuse. All that costs a call nothing, and its signature, for people
    and for type checkers, stays what it takes and needs.
    """
    signature = inspect.signature(function)
    known = [each for each in signature.parameters.values() if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
    needed = [each for each in known if each.kind is each.POSITIONAL_OR_KEYWORD and each.name != "self"]
    function.__defaults__ = (MISSING,) * len(needed)
    function.__signature__ = signature.replace(parameters=known)  # type: ignore[attr-defined]
    return function


def names_of(function: Callable[..., Any], *, by_position: bool = False) -> list[str]:
    """What ``function`` takes, or what of it may be given by position."""
    parameters = inspect.signature(function).parameters.values()
    return [
        each.name for each in parameters if each.name != "self" and not (by_position and each.kind is each.KEYWORD_ONLY)
    ]


def wrong_call(function: Callable[..., Any], unknown: Iterable[str], more: Sequence[object] = ()) -> TypeError:
    """The error of a call with names that ``function`` does not have, or with ``more`` arguments than it takes by position."""
    name = function.__qualname__.removesuffix(".__init__")
    own, positional = names_of(function), names_of(function, by_position=True)
    if unknown:
        return unknown_arguments(name, own, unknown)
    return TypeError(
        f"{name}() takes {', '.join(positional)} by position, and {', '.join(own[len(positional) :])} by name alone; "
        f"got {len(positional) + len(more)} arguments by position"
    )


def unknown_arguments(name: str, own: Sequence[str], unknown: Iterable[str]) -> TypeError:
    """The error for keyword arguments that ``name`` does not have, beside its ``own``, with what to write instead."""
    first = next(iter(unknown))
    others = _OTHERS.get(name, {})
    hint = f"give {first}=" if first in others else _ELSEWHERE.get(first)
    if hint is None:
        advice = did_you_mean(first, own)
    else:
        where = next((f"{where}, " for other, where in others.items() if hint.startswith(f"give {other}=")), "")
        advice = f"; {where}{hint}"
    return TypeError(f"{name}() has no argument {first!r}{advice}; it takes {', '.join(own)}")


def missing_arguments(name: str, missing: Sequence[str]) -> TypeError:
    """The error of a call that leaves out what it has to give, with what to write."""
    what = "arguments" if len(missing) > 1 else "argument"
    hint = f"; {_WINDOW}" if "window" in missing else ""
    return TypeError(f"{name}() is missing its {what} {', '.join(map(repr, missing))}{hint}")


def bound(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name, each that it leaves out with its default, or MISSING.

    Raises:
        TypeError: the call is of the wrong form.
    """
    signature = inspect.signature(function)
    unknown = [name for name in kwargs if name not in signature.parameters]
    more = args[len(names_of(function, by_position=True)) :]
    if unknown or more:
        raise wrong_call(function, unknown, more)
    defaults = {
        name: MISSING if each.default is each.empty else each.default for name, each in signature.parameters.items()
    }
    return {**defaults, **signature.bind_partial(*args, **kwargs).arguments}
