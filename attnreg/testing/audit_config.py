"""A small random model of a configuration of Hugging Face, for an audit that downloads nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

# What a small model has instead of what its configuration says, where it says it.
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "intermediate_size_mlp": 64,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "vocab_size": 160,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
WINDOWS = ("sliding_window", "local_attention", "attention_window", "attention_chunk_size")
# Windows that are larger become so large: the sequence must be longer than them.
SMALL_WINDOW = 16
MOST_LAYERS = 12


def small(given: dict[str, Any]) -> dict[str, Any]:
    """A configuration with few features, layers and tokens, and with layers of every kind that it has."""
    found: dict[str, Any] = {
        name: SMALL.get(name, each) if isinstance(each, (int, float)) else each for name, each in given.items()
    }
    for name, each in given.items():
        if isinstance(each, dict) and "hidden_size" in each:
            found[name] = small(each)
    if isinstance(given.get("num_key_value_heads"), int):
        same = given["num_key_value_heads"] == given.get("num_attention_heads")
        found["num_key_value_heads"] = 4 if same else min(2, given["num_key_value_heads"])
    for name in ("eos_token_id", "bos_token_id"):
        if isinstance(given.get(name), list):
            found[name] = SMALL[name]
    for name in WINDOWS:
        if isinstance(given.get(name), int) and given[name] > 2 * SMALL_WINDOW:
            found[name] = SMALL_WINDOW
    if isinstance(given.get("attention_window"), list):
        found["attention_window"] = [min(each, SMALL_WINDOW) for each in given["attention_window"]]
    layers = given.get("num_hidden_layers")
    if isinstance(layers, int):
        types = given.get("layer_types")
        count = min(layers, _pattern(given))
        if isinstance(types, list):
            count = min(max(types.index(kind) for kind in set(types)) + 1, MOST_LAYERS)
        found["num_hidden_layers"] = count
        for name, each in given.items():
            if isinstance(each, list) and len(each) == layers:
                found[name] = list(found[name])[:count]
    return found


def _pattern(given: dict[str, Any]) -> int:
    """How many layers it takes to have one of each kind."""
    names = ("sliding_window_pattern", "_sliding_window_pattern", "global_attn_every_n_layers", "max_window_layers")
    sizes = [int(given[name]) for name in names if isinstance(given.get(name), int)]
    return min(max([2, *(size + 1 for size in sizes)]), MOST_LAYERS)


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
        OSError, ValueError: the file cannot be read, or says nothing of a model that transformers knows.
    """
    import transformers

    path = path / "config.json" if path.is_dir() else path
    given = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(given, dict) or not isinstance(given.get("model_type"), str):
        raise ValueError(f"{path}: expected the configuration of a model, with its model_type")
    config = _configuration(given)
    told = []
    if not as_it_is:
        # With what the library fills in: a default is as large as what is written.
        written = config.to_dict()
        used = small(written)
        told = [
            f"{name} {written[name]} -> {used[name]}"
            for name in (*WINDOWS, "num_hidden_layers")
            if name in written and written[name] != used[name]
        ]
        config = _configuration(used)
    if implementation is not None:
        config._attn_implementation = implementation
    named = [getattr(transformers, str(each), None) for each in given.get("architectures") or ()]
    made = next((each(config) for each in named if each is not None), None)
    if made is None:
        made = transformers.AutoModel.from_config(config)
    model: nn.Module = made.eval()
    return model, told


def _configuration(given: dict[str, Any]) -> Any:
    import transformers

    return transformers.AutoConfig.for_model(
        given["model_type"], **{name: each for name, each in given.items() if name != "model_type"}
    )
