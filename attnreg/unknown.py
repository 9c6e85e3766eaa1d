"""What to write here for what other libraries call otherwise."""

from __future__ import annotations

from collections.abc import Iterable

from attnreg.op import Op
from attnreg.request import did_you_mean

_WINDOW = "give window=Window.causal(n), Window.centered(n) or Window(left, right)"
_CAUSAL = "give window=Window.causal(n): a query sees its own position and the n - 1 before it"
_MASK = "give bias=band_from_dense(mask, window), or key_lengths= for padding"
_PACKED = "sequences are a batch here: pad them, and give key_lengths="

_ELSEWHERE = {
    **dict.fromkeys(("window_size", "sliding_window", "window_left", "left_window_size", "local_window_size"), _WINDOW),
    **dict.fromkeys(("is_causal", "causal"), _CAUSAL),
    **dict.fromkeys(("mask", "attn_mask", "attention_mask", "attn_bias", "key_padding_mask", "block_mask"), _MASK),
    **dict.fromkeys(("softmax_scale", "sm_scale", "scaling"), "give scale="),
    **dict.fromkeys(("cu_seqlens", "cu_seqlens_q", "cu_seqlens_k", "cu_seqlens_kv", "max_seqlen"), _PACKED),
    **dict.fromkeys(("seq_lens", "seqlens", "lengths", "kv_lengths"), "give key_lengths="),
    **dict.fromkeys(
        ("dropout", "dropout_p", "p_dropout"),
        "there is no dropout in the op: drop weights between local_dot_product and local_weighted_average",
    ),
    "enable_gqa": "leave it out: fewer key/value heads than query heads are taken as they are",
    "q": "give query=",
    "k": "give key=",
    "v": "give value=",
}


def unknown_arguments(op: Op, names: Iterable[str]) -> TypeError:
    """The error for keyword arguments that ``op`` does not have, with what to write instead."""
    name = next(iter(names))
    own = [*op.tensors, "window", *(argument.name for argument in op.arguments), "backend"]
    hint = _ELSEWHERE.get(name)
    advice = did_you_mean(name, own) if hint is None else f"; {hint}"
    return TypeError(f"{op.name}() has no argument {name!r}{advice}; it takes {', '.join(own)}")
