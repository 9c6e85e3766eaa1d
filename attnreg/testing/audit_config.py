"""A small random model of a configuration of Hugging Face, for an audit that downloads nothing."""

from __future__ import annotations

import inspect
import json
import re
from fractions import Fraction
from importlib import import_module
from math import gcd
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnreg.printable import printable, told

# What a small model has instead of what its configuration says, where it says it.
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "intermediate_size_mlp": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_experts_intermediate_size": 32,
    "num_attention_heads": 4,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "vocab_size": 160,
    "unpadded_vocab_size": 160,
    "vocab_size_per_layer_input": 160,
    "hidden_size_per_layer_input": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
}
# What a small model has at most: a family may allow less.
AT_MOST = {"num_experts_per_tok": 2, "top_k_experts": 2, "n_group": 2, "topk_group": 2}
WINDOWS = (
    "sliding_window",
    "sliding_window_size",
    "local_attention",
    "attention_window",
    "attention_window_size",
    "attention_chunk_size",
)
# Windows that are larger become so large: the sequence must be longer than them.
SMALL_WINDOW = 16
MOST_LAYERS = 12
# Blocks that configurations list as layers, and that belong to the layer before.
_NO_LAYERS = ("mlp",)


def small(given: dict[str, Any]) -> dict[str, Any]:
    """A configuration with few features, layers and tokens, and with layers of every kind that it has."""
    found = {name: _small_value(name, each) for name, each in given.items()}
    _keep_ratios(given, found)
    layers = given.get("num_hidden_layers")
    if isinstance(layers, int) and layers > 0:
        _cut_layers(given, found, layers)
    return found


def _small_value(name: str, each: Any) -> Any:
    if isinstance(each, dict):
        return small(each) if "hidden_size" in each or "model_type" in each else each
    if name in WINDOWS and isinstance(each, list):
        return [min(size, SMALL_WINDOW) if isinstance(size, int) else size for size in each]
    if name in ("eos_token_id", "bos_token_id") and isinstance(each, list):
        return SMALL[name]
    if name in SMALL and isinstance(each, list):
        return [_small_value(name, one) for one in each]
    if isinstance(each, bool) or not isinstance(each, (int, float)):
        return each
    if name in WINDOWS:
        return SMALL_WINDOW if each > 2 * SMALL_WINDOW else each
    return min(each, AT_MOST[name]) if name in AT_MOST else SMALL.get(name, each)


def _keep_ratios(given: dict[str, Any], found: dict[str, Any]) -> None:
    """What goes with another number stays in its ratio to it."""
    heads, kv_heads, hidden = (
        given.get(name) for name in ("num_attention_heads", "num_key_value_heads", "hidden_size")
    )
    if isinstance(kv_heads, int):
        found["num_key_value_heads"] = 4 if kv_heads == heads else min(2, kv_heads)
    if isinstance(given.get("qk_nope_head_dim"), int):
        # A head is made of parts whose sizes add up.
        found["head_dim"] = given.get("head_dim")
    elif "head_dim" in given and given["head_dim"] is None and isinstance(hidden, int):
        # Not every family that allows it fills it in.
        found["head_dim"] = SMALL["head_dim"]
    if isinstance(hidden, int):
        for name, each in given.items():
            # Groups of channels.
            if name.endswith("_groups") and isinstance(each, int) and each > 0 and hidden % each == 0:
                found[name] = gcd(each, SMALL["hidden_size"])
    if isinstance(heads, int) and isinstance(hidden, int):
        before = given.get("head_dim") or hidden // heads
        after = found.get("head_dim") or SMALL["hidden_size"] // SMALL["num_attention_heads"]
        for name in ("rope_parameters", "rope_scaling"):
            if isinstance(given.get(name), dict):
                found[name] = _small_rope(given[name], Fraction(after, before))
        rope = found.get("rope_parameters")
        if isinstance(rope, dict) and "rope_theta" in rope and "mrope_section" not in rope and _has_sections(given):
            # The default is written for heads of another size.
            found["rope_parameters"] = rope | {"mrope_section": [after // 2 - 2 * (after // 6), after // 6, after // 6]}


def _small_rope(given: dict[str, Any], ratio: Fraction) -> dict[str, Any]:
    """Rotary embeddings of heads that have another size, for all layers or by their kind."""
    found: dict[str, Any] = {}
    for name, each in given.items():
        if isinstance(each, dict):
            found[name] = _small_rope(each, ratio)
        elif name == "mrope_section" and isinstance(each, list):
            sizes = [max(1, int(size * ratio)) for size in each]
            found[name] = [*sizes[:-1], int(sum(each) * ratio) - sum(sizes[:-1])]
        elif name in ("short_factor", "long_factor") and isinstance(each, list):
            found[name] = each[: max(1, int(len(each) * ratio))]
        else:
            found[name] = each
    return found


def _has_sections(given: dict[str, Any]) -> bool:
    """Whether the models of a family rotate sections of a head by several positions, as its source says."""
    import transformers

    try:
        modeling = _modeling(transformers.CONFIG_MAPPING[given["model_type"]])
        return "mrope_section" in inspect.getsource(modeling)
    except (KeyError, TypeError, OSError):
        return False


# Layers


def _cut_layers(given: dict[str, Any], found: dict[str, Any], layers: int) -> None:
    """Few layers, and what a configuration says of each layer, for those that are left."""
    parts = _parts(given, layers)
    left = _layers_left(given, layers, parts)
    found["num_hidden_layers"] = len(left)
    for name, (first, end) in parts.items():
        if name in given:
            found[name] = sum(first <= layer < end for layer in left)
    for name, each in given.items():
        if name in parts:
            continue
        if isinstance(each, (list, tuple)) and len(each) == layers:
            found[name] = [found[name][layer] for layer in left]
        elif isinstance(each, dict) and _is_by_layer(each):
            by_layer = {int(layer): facts for layer, facts in each.items()}
            found[name] = {
                str(place): _small_facts(by_layer[layer], given, found)
                for place, layer in enumerate(left)
                if layer in by_layer
            }


def _is_by_layer(given: dict[Any, Any]) -> bool:
    """Whether a dictionary says of some layers, by their numbers, what is other in them."""
    return bool(given) and all(str(name).isdecimal() and isinstance(each, dict) for name, each in given.items())


def _small_facts(facts: dict[str, Any], given: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """What is other in one layer: as many times that of all layers as it was."""
    cut: dict[str, Any] = {}
    for name, each in facts.items():
        of_all, small_of_all = given.get(name), found.get(name)
        if all(isinstance(number, int) and number > 0 for number in (each, of_all, small_of_all)):
            cut[name] = max(1, each * small_of_all // of_all)
        else:
            cut[name] = _small_value(name, each)
    return cut


def _parts(given: dict[str, Any], layers: int) -> dict[str, tuple[int, int]]:
    """Runs of layers whose number a configuration says, by the name of that number: the first one, and that after the last."""
    shared = given.get("num_kv_shared_layers")
    if isinstance(shared, int) and 0 < shared <= layers:
        return {"": (0, layers - shared), "num_kv_shared_layers": (layers - shared, layers)}
    counts = {
        name: each
        for name, each in given.items()
        if re.fullmatch(r"n(um)?_(?!hidden)\w+_layers", name) and isinstance(each, int) and each > 0
    }
    if len(counts) < 2 or sum(counts.values()) != layers:
        return {"": (0, layers)}
    parts, first = {}, 0
    for name, count in counts.items():
        parts[name] = (first, first + count)
        first += count
    return parts


def _layers_left(given: dict[str, Any], layers: int, parts: dict[str, tuple[int, int]]) -> list[int]:
    types = given.get("layer_types")
    if not isinstance(types, list) or len(types) != layers:
        types = [None] * layers
    left: set[int] = set()
    for name, (first, end) in parts.items():
        if first == end:
            continue
        # Layers that share keys with those before have to be of the same kinds; of other parts one will do.
        whole = first == 0 or name == "num_kv_shared_layers"
        left.update(_of_every_kind(given, types, first, end) if whole else [first])
    followers = [layer + 1 for layer in left if layer + 1 < layers and types[layer + 1] in _NO_LAYERS]
    return sorted({*left, *followers})


def _of_every_kind(given: dict[str, Any], types: list[Any], first: int, end: int) -> list[int]:
    """The first layers of a part, up to that with which all kinds are there, or to the most; then one of each kind left out."""
    firsts = [types.index(kind, first, end) for kind in set(types[first:end])]
    count = max(firsts) - first + 1 if types[first] is not None else min(end - first, _pattern(given))
    row = range(first, first + min(count, MOST_LAYERS))
    return [*row, *(layer for layer in firsts if layer >= row.stop)]


def _pattern(given: dict[str, Any]) -> int:
    """How many layers it takes to have one of each kind."""
    names = ("sliding_window_pattern", "_sliding_window_pattern", "global_attn_every_n_layers", "max_window_layers")
    sizes = [int(given[name]) + 1 for name in names if isinstance(given.get(name), int)]
    # A list of kinds that is shorter than the layers is gone through again and again.
    sizes += [
        len(each) for name, each in given.items() if name in ("block_types", "layer_types") and isinstance(each, list)
    ]
    return min(max([2, *sizes]), MOST_LAYERS)


# Models

# What says nothing of how a model is made.
_OFTEN_EMPTY = (
    "architectures",
    "dtype",
    "problem_type",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "per_layer_config",
)


def model_of_config(
    path: Path, *, as_it_is: bool = False, implementation: str | None = None
) -> tuple[nn.Module, list[str]]:
    """A model with random weights, and what is smaller in it than the file says.

    Args:
        path: a ``config.json``, or a folder that has it.
        as_it_is: whether the model is as large as the file says.
        implementation: of the attention, as ``attn_implementation`` takes it; None: that which the library chooses.

    Raises:
        ImportError: there is no transformers.
        OSError, ValueError: the file cannot be read, says nothing of a model that transformers knows, or no small model can be
            made of it.
    """
    path = path / "config.json" if path.is_dir() else path
    given = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(given, dict) or not isinstance(given.get("model_type"), str):
        raise ValueError(f"{path}: expected the configuration of a model, with its model_type")
    if not given["model_type"]:
        raise ValueError(
            f"{path}: model_type is empty, as in a part of a model; give the configuration of the whole model"
        )
    if as_it_is:
        return _model(given, given, implementation), []
    # With what the library fills in: a default is as large as what is written.
    written = _configuration(given).to_dict()
    used = small(written)
    names = [name for name in (*WINDOWS, "num_hidden_layers") if name in written and written[name] != used[name]]
    try:
        model = _model(used, given, implementation)
    except Exception as error:
        raise ValueError(_why_not(given, error)) from error
    return model, [f"{name} {written[name]} -> {used[name]}" for name in names]


def _why_not(given: dict[str, Any], error: Exception) -> str:
    """Whether no small model can be made because none can be made, and what to do."""
    why = printable(told(error), 120)
    try:
        with torch.device("meta"):
            _model(given, given, None)
    except Exception as other:
        if told(other) == told(error):
            facts = _configuration(given).to_dict()
            empty = [name for name, each in facts.items() if each in (None, {}) and name not in _OFTEN_EMPTY]
            return (
                f"as large as it says none either ({why}); write into it what the family needs of what it leaves empty: "
                f"{', '.join(empty) or 'nothing'}"
            )
    part = ", or give what it has as text_config as a file of its own" if "text_config" in given else ""
    return f"no small one ({why}); make the file small by hand and give --as-it-is{part}"


def _model(used: dict[str, Any], given: dict[str, Any], implementation: str | None) -> nn.Module:
    import transformers

    config = _configuration(used)
    if implementation is not None:
        config._attn_implementation = implementation
    for name in given.get("architectures") or ():
        kind = getattr(transformers, str(name), None) or getattr(_modeling(type(config)), str(name), None)
        if kind is not None:
            return kind(config).eval()  # type: ignore[no-any-return]
    if type(config) not in transformers.MODEL_MAPPING:
        # A part of a model, such as its encoder: the first class beside it that takes such a configuration and can be called.
        for kind in vars(_modeling(type(config))).values():
            if getattr(kind, "config_class", None) is type(config) and "forward" in vars(kind):
                return kind(config).eval()  # type: ignore[no-any-return]
    model: nn.Module = transformers.AutoModel.from_config(config).eval()
    return model


def _modeling(config: type) -> Any:
    """The module of a configuration's models, which are not all in transformers' own namespace; None if there is none."""
    name = config.__module__.replace(".configuration_", ".modeling_")
    try:
        return import_module(name)
    except ImportError:
        return None


def _configuration(given: dict[str, Any]) -> Any:
    import transformers

    return transformers.AutoConfig.for_model(
        given["model_type"], **{name: each for name, each in given.items() if name != "model_type"}
    )
