"""What an attention says of its window: a claim, given by the user or read from the module and its configuration."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from attnreg.printable import brief
from attnreg.window import Window


@dataclass(frozen=True)
class Pattern:
    """A claim that is no window: which keys a row sees, by the positions of both in their document.

    Attributes:
        name: what reports call it.
        visible: of rows' positions (L, 1) and keys' positions (1, L), int64, which rows see which keys: bool (L, L).
        border: how far it reaches where it ends; None: the largest number in its name.
    """

    name: str
    visible: Callable[[Tensor, Tensor], Tensor]
    border: int | None = None

    def __str__(self) -> str:
        return self.name


def chunks(size: int, *, causal: bool = True) -> Pattern:
    """Chunked attention: a row sees the keys of its own chunk of ``size``, causal ones those up to its own."""

    def visible(row: Tensor, key: Tensor) -> Tensor:
        return (row // size == key // size) & ((key <= row) | torch.tensor(not causal))

    return Pattern(f"chunks of {size}{'' if causal else ', not causal'}", visible)


def buckets(size: int, before: int, after: int, *, causal: bool = True) -> Pattern:
    """Attention by buckets of ``size``: a row sees its own, so many before and after it, causal ones those up to its own key."""

    def visible(row: Tensor, key: Tensor) -> Tensor:
        ahead = key // size - row // size
        return (ahead >= -before) & (ahead <= after) & ((key <= row) | torch.tensor(not causal))

    name = f"buckets of {size}, {before} before{', causal' if causal else f' and {after} after'}"
    return Pattern(name, visible, border=(max(before, after) + 1) * size - 1)


def _others(claim: Claim) -> Pattern:
    """A claim of rows that see their own key only where they see no other, as where queries are keys."""

    def visible_others(row: Tensor, key: Tensor) -> Tensor:
        others = visible(claim, row, key) & (key != row)
        return others | ((key == row) & ~others.any(-1, keepdim=True))

    return Pattern(f"{told_claim(claim)}, without the own key", visible_others, border=reach(claim))


def full(*, causal: bool = True) -> Pattern:
    """Full attention: every key, or every key up to the row's own."""
    name = "full, causal" if causal else "full"
    return Pattern(name, lambda row, key: (key <= row) if causal else torch.ones_like(row + key, dtype=torch.bool))


def window_and_first(window: Window, count: int) -> Pattern:
    """A window, and the first ``count`` keys, which every later row sees, as streaming models have them."""

    def visible(row: Tensor, key: Tensor) -> Tensor:
        return in_window(window, row, key) | ((key < count) & (key <= row))

    return Pattern(f"{told_window(window)} and the first {count} key{'s' * (count != 1)}", visible)


Claim = Window | Pattern
# What ``window=`` takes: one claim for all, by pattern of names, or of a name and its module.
Claims = Claim | Mapping[str, Claim | None] | Callable[[str, nn.Module], Claim | None]


def in_window(window: Window, row: Tensor, key: Tensor) -> Tensor:
    """Which rows see which keys."""
    return (key >= row - window.left) & (key <= row + window.right)


def visible(claim: Claim, row: Tensor, key: Tensor) -> Tensor:
    """Which rows see which keys by a claim."""
    return in_window(claim, row, key) if isinstance(claim, Window) else claim.visible(row, key)


def told_window(window: Window) -> str:
    """A window as reports write it."""
    return f"Window({window.left}, {window.right})"


def told_claim(claim: Claim | None, otherwise: str = "nothing") -> str:
    """A claim as reports write it."""
    return otherwise if claim is None else told_window(claim) if isinstance(claim, Window) else str(claim)


def claims_full(claim: Claim) -> bool:
    """Whether it is full attention that is claimed, as :func:`full` does."""
    return isinstance(claim, Pattern) and claim.name in (full().name, full(causal=False).name)


def reach(claim: Claim | None) -> int:
    """How many positions a sequence must have for a claim's border to be inside it; 0 where there is none."""
    if isinstance(claim, Window):
        return max(claim.left, claim.right)
    if claim is not None and claim.border is not None:
        return claim.border
    numbers = [int(number) for number in re.findall(r"\d+", claim.name)] if claim is not None else []
    return max(numbers, default=0)


def check_claims(given: object) -> None:
    """Refuse what is no claim.

    Raises:
        TypeError: it is none.
    """
    if given is None or isinstance(given, (Window, Pattern)):
        return
    if isinstance(given, Mapping):
        for name, claim in given.items():
            if not isinstance(name, str) or not (claim is None or isinstance(claim, (Window, Pattern))):
                raise TypeError(
                    "window must map patterns of layer names to a Window, a Pattern or None; "
                    f"got {brief(name)}: {brief(claim)}"
                )
        return
    if not callable(given):
        raise TypeError(
            "window must be a Window, a Pattern such as chunks(size), a mapping of layer names to these, a function of a layer's "
            f"name and module, or None; got {brief(given)}"
        )


def claim_of(given: Claims | None, name: str, model: nn.Module) -> Claim | None:
    """What a layer claims: by what the user gave, or by what itself says where nothing was given.

    Args:
        given: by the user.
        name: of the layer in ``model``.
        model: the whole.
    """
    if given is None:
        return read_claim(name, model)
    if isinstance(given, (Window, Pattern)):
        return given
    if isinstance(given, Mapping):
        return next((claim for pattern, claim in given.items() if fnmatchcase(plain_name(name), pattern)), None)
    claim = given(plain_name(name), model.get_submodule(name))
    if not (claim is None or isinstance(claim, (Window, Pattern))):
        raise TypeError(f"window must give a Window, a Pattern or None for the layer {name!r}; got {brief(claim)}")
    return claim


def plain_name(name: str) -> str:
    """The name of a module as it was before anything was compiled."""
    return name.replace("_orig_mod.", "").removesuffix("_orig_mod").rstrip(".")


def looks_like_attention(module: nn.Module) -> bool:
    """Whether the class of a module says that it is one."""
    name = type(module).__name__
    part = re.search(r"norm|rotary|embed|mask|output|mlp|drop|softmax|layer$|block$|model$", name, re.IGNORECASE)
    return part is None and re.search(r"att(entio)?n|mha", name, re.IGNORECASE) is not None


def _is_something_else(name: str, module: nn.Module) -> bool:
    last = name.rpartition(".")[2]
    return (
        re.search(r"conv|mamba|ssm|recurrent|rwkv|lstm|gru\b|pool|deltanet", f"{type(module).__name__} {last}", re.I)
        is not None
    )


def read_claim(name: str, model: nn.Module) -> Claim | None:
    """What a layer says of itself, by the conventions on the page of the audit; None where it says nothing.

    Where the layer itself says nothing, what stands around it does: its parents, to the model and its configuration.
    """
    chain = _chain(name, model)
    module = chain[0]
    configs = (read(each, "config") for each in chain)
    config = _of_layer(next((each for each in configs if each is not None), None), _layer_index(name, chain))
    if re.search("cross", f"{type(module).__name__} {name.rpartition('.')[2]}", re.IGNORECASE):
        return None
    causal = _is_causal(chain, config)
    kind = _layer_type(name, chain, config)
    if kind == "full_attention":
        return full(causal=causal)
    if kind == "chunked_attention":
        size = read(config, "attention_chunk_size")
        return chunks(size, causal=causal) if isinstance(size, int) else None
    if kind not in (None, "sliding_attention") or (
        _is_something_else(name, module) and own_window(module, causal) is None
    ):
        return None
    both_sides = _configured_both_sides(module, config)
    if not causal and both_sides is not None:
        return both_sides
    for each in chain:
        own = own_window(each, causal)
        if own is not None:
            return own
        # A module that has the attribute, and nothing in it, says that it is no layer with a window.
        if kind is None and any(read(each, attribute, _MISSING) is not _MISSING for attribute in _ATTRIBUTES):
            return full(causal=causal)
    configured = _configured_window(config, causal)
    if configured is None and looks_like_attention(module) and _has_no_window(config):
        return full(causal=causal)
    return configured


_MISSING = object()


def read(owner: Any, name: str, otherwise: Any = None) -> Any:
    """An attribute; where it is missing, or where asking for it is an error of whatever kind, nothing is said."""
    try:
        return getattr(owner, name, otherwise)
    except Exception:
        return otherwise


class _Overridden:
    """A configuration in which some attributes are those of one layer."""

    def __init__(self, config: Any, own: Mapping[str, Any]) -> None:
        self._config, self._own = config, own

    def __getattr__(self, name: str) -> Any:
        return self._own[name] if name in self._own else getattr(self._config, name)


def _of_layer(config: Any, index: int | None) -> Any:
    """The configuration of one layer, where one says by layer what differs; of the whole it would be an error to ask that."""
    by_layer = read(config, "per_layer_config")
    if by_layer is None or index is None:
        return config
    try:
        if isinstance(by_layer, Mapping):
            own: Mapping[str, Any] = next((facts for layer, facts in by_layer.items() if int(layer) == index), {})
            return _Overridden(config, own)
        return by_layer[index]
    except Exception:
        return config


def _has_no_window(config: Any) -> bool:
    """Whether a configuration that could have a window says that there is none."""
    return read(config, "sliding_window", 1) is None or read(config, "use_sliding_window", True) is False


def _chain(name: str, model: nn.Module) -> list[nn.Module]:
    """The module of that name, its parent, and so on to the model."""
    parts = name.split(".") if name else []
    return [model.get_submodule(".".join(parts[:count])) for count in range(len(parts), -1, -1)]


def _is_causal(chain: list[nn.Module], config: Any) -> bool:
    """Whether a layer says that it is causal; those that say nothing are."""
    if read(config, "use_bidirectional_attention") in (True, "all"):
        return False
    for module in chain:
        for attribute in ("is_causal", "causal"):
            own = read(module, attribute)
            if isinstance(own, bool):
                return own
    return True


def _layer_index(name: str, chain: list[nn.Module]) -> int | None:
    """The number of a layer, as it or what stands around it says, or its name."""
    indices = (read(module, attribute) for module in chain for attribute in ("layer_idx", "layer_id"))
    index = next((each for each in indices if isinstance(each, int)), None)
    if index is None:
        numbers = re.findall(r"(?:^|\.)(\d+)(?:\.|$)", name)
        index = int(numbers[0]) if numbers else None
    return index


def _layer_type(name: str, chain: list[nn.Module], config: Any) -> str | None:
    own = (read(module, attribute) for module in chain for attribute in ("layer_type", "attention_type"))
    said = next((each for each in own if isinstance(each, str) and each.endswith("_attention")), None)
    types = read(config, "layer_types")
    if said is not None or not isinstance(types, (list, tuple)):
        return said
    index = _layer_index(name, chain)
    return types[index] if index is not None and 0 <= index < len(types) else None


_ATTRIBUTES = ("sliding_window", "window_size", "window", "local_attention")


def _buckets_of(module: nn.Module) -> Claim | None:
    """What lucidrains' ``LocalAttention`` claims, or a module around one, as ``LocalMHA`` is; None of others.

    Its ``window_size`` is that of buckets. It is known by attributes that no other attention has: it may be attnreg's, or a
    subclass.
    """
    for each in (module, *module.children()):
        size, before, after = (read(each, name) for name in ("window_size", "look_backward", "look_forward"))
        exact, causal = read(each, "exact_windowsize"), read(each, "causal")
        if not all(isinstance(flag, bool) for flag in (exact, causal)):
            continue
        if all(isinstance(count, int) for count in (size, before, after)):
            after = 0 if causal else after
            claim = Window(size * before, size * after) if exact else buckets(size, before, after, causal=causal)
            return _others(claim) if read(each, "shared_qk") is True else claim
    return None


def own_window(module: nn.Module, causal: bool) -> Claim | None:
    """What an attribute of a module itself says of its window."""
    of_buckets = _buckets_of(module)
    if of_buckets is not None:
        return of_buckets
    one_side = read(module, "one_sided_attn_window_size")
    if isinstance(one_side, int):
        return Window(one_side, one_side)
    for attribute in _ATTRIBUTES:
        given = read(module, attribute)
        if isinstance(given, Window):
            return given
        if isinstance(given, int) and not isinstance(given, bool) and given > 0:
            return Window(given - 1, 0 if causal else given - 1)
        if isinstance(given, (tuple, list)) and len(given) == 2 and all(isinstance(side, int) for side in given):
            # As FlashAttention has it: distances to the left and to the right, -1 where there is no limit.
            left, right = given
            if left >= 0 and right >= 0:
                return Window(left, 0 if causal else right)
            if left >= 0 and causal:
                return Window(left, 0)
    return None


def _configured_both_sides(module: nn.Module, config: Any) -> Claim | None:
    """In Hugging Face's models that are not causal by nature the configuration's window W means distances up to W.

    What their layers hold is for FlashAttention, and in some families one less than that.
    """
    size, own = read(config, "sliding_window"), read(module, "sliding_window")
    if not isinstance(size, int) or read(config, "use_bidirectional_attention") or own not in (size, size + 1):
        return None
    return Window(size, size)


def _configured_window(config: Any, causal: bool) -> Claim | None:
    local = read(config, "local_attention")
    if isinstance(local, int) and local > 0:
        return Window(local // 2, 0 if causal else local // 2)
    size = read(config, "sliding_window")
    if isinstance(size, int) and size > 0 and read(config, "use_sliding_window", True):
        return Window(size - 1, 0) if causal else Window(size, size)
    return None
