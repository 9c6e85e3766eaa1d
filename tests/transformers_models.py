"""Tiny models of every family of transformers that has a window or chunks: a table, and how its rows are built."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from attnreg.integrations.transformers import explain

# What the models' own files call to make a mask of a window or of chunks.
_MASKS = re.compile(
    r"create_(?:bidirectional_)?sliding_window(?:_causal)?_mask|create_chunked_causal_mask"
    r"|sliding_window\w*(?:overlay|mask_function)|chunked\w*(?:overlay|mask_function)|_window_overlay"
)

WINDOW, LENGTH, VOCABULARY = 5, 19, 64

# Whatever of this a configuration has.
_TINY: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": WINDOW,
    "attention_chunk_size": WINDOW,
    "local_attention": 2 * WINDOW,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "query_pre_attn_scalar": 8,
    "use_sliding_window": True,
    "max_window_layers": 0,
}

_MIXED = ["sliding_attention", "full_attention"] * 2
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
_SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_GEMMA = {
    **_SMALL,
    "vocab_size": VOCABULARY,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": WINDOW,
    "query_pre_attn_scalar": 8,
    "layer_types": _MIXED[:2],
    "dropout_rate": 0.0,
}


@dataclass(frozen=True)
class Family:
    """One row.

    Attributes:
        model: the model's class.
        config: what of its configuration is not as in all.
        inputs: what it is given beside or instead of tokens: its arguments by name, each a shape, to which (N, L) may belong.
        generates: whether ``generate`` takes it.
        pads: whether it takes an attention mask, and its tokens do not depend on what padded positions hold.
        rounding: how far rounding may take it, in parts of its largest number.
    """

    model: str
    config: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[str, ...] = ("input_ids",)
    generates: bool = True
    pads: bool = True
    rounding: float = 2e-5


FAMILIES: Mapping[str, Family] = {
    "afmoe": Family("AfmoeForCausalLM"),
    "beam": Family("BeamForCausalLM", {"n_group": 2, "topk_group": 1}),
    "blt": Family("BltPatcher", generates=False, pads=False),
    "cohere2": Family("Cohere2ForCausalLM"),
    "cohere2_moe": Family("Cohere2MoeForCausalLM"),
    "cohere_compass": Family(
        "CohereCompassTextModel",
        {"rope_parameters": {"full_attention": None, "sliding_attention": _MROPE}, "layer_types": _MIXED},
        generates=False,
    ),
    "cwm": Family("CwmForCausalLM"),
    "deepseek_v4": Family(
        "DeepseekV4ForCausalLM",
        {
            "num_key_value_heads": 1,
            "q_lora_rank": 16,
            "o_lora_rank": 16,
            "o_groups": 2,
            "index_n_heads": 2,
            "index_head_dim": 8,
            "index_topk": 4,
            "hc_mult": 2,
        },
    ),
    "diffusion_gemma": Family("DiffusionGemmaEncoderTextModel", {"top_k_experts": 2}, generates=False),
    "doge": Family("DogeForCausalLM"),
    "dory": Family("DoryForCausalLM", {"n_input_layers": 1, "n_output_layers": 1}, rounding=2e-4),
    "dots1": Family(
        "Dots1ForCausalLM", {"n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
    ),
    "dots3_note": Family(
        "Dots3NoteForCausalLM",
        {
            "num_key_value_heads": 4,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "qk_nope_head_dim": 8,
            "index_head_dim": 16,
            "index_n_heads": 2,
            "shared_experts_intermediate_size": 16,
            "mlp_layer_types": ["dense"] * 4,
            "layer_types": ["sliding_attention"] * 4,
            "index_topk": 4,
            "swa_q_lora_rank": 16,
            "swa_kv_lora_rank": 16,
            "swa_head_dim": 16,
            "swa_qk_nope_head_dim": 8,
            "swa_v_head_dim": 8,
        },
    ),
    "embedding_gemma2": Family("EmbeddingGemma2TextModel", generates=False, rounding=2e-4),
    "exaone4": Family("Exaone4ForCausalLM"),
    "exaone_moe": Family("ExaoneMoeForCausalLM"),
    "flint": Family("FlintForCausalLM"),
    "gemma2": Family("Gemma2ForCausalLM"),
    "gemma3": Family("Gemma3ForCausalLM", {"layer_types": _MIXED}),
    "gemma3n": Family(
        "Gemma3nForCausalLM",
        {
            "num_kv_shared_layers": 2,
            "layer_types": _MIXED,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
            "altup_num_inputs": 2,
        },
    ),
    "gemma4": Family("Gemma4ForCausalLM", {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8}),
    "gemma4_unified": Family("Gemma4UnifiedForCausalLM"),
    "gpt_oss": Family("GptOssForCausalLM"),
    "granite_swa": Family("GraniteSWAForCausalLM"),
    "granitemoe_swa": Family("GraniteMoeSWAForCausalLM"),
    "inkling": Family(
        "InklingForCausalLM",
        {
            "sliding_window_size": WINDOW,
            "layer_types": ["hybrid_sliding", "hybrid"] * 2,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 8,
            "d_rel": 4,
            "rel_extent": 16,
        },
    ),
    "inkling2": Family(
        "Inkling2ForCausalLM",
        {
            "sliding_window_size": WINDOW,
            "unpadded_vocab_size": VOCABULARY,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 8,
            "d_rel": 4,
            "rel_extent": 16,
        },
    ),
    "inkling2_loop": Family(
        "Inkling2LoopForCausalLM",
        {
            "sliding_window_size": WINDOW,
            "unpadded_vocab_size": VOCABULARY,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 8,
            "d_rel": 4,
            "rel_extent": 16,
        },
    ),
    "kolibri1": Family("Kolibri1ForCausalLM"),
    "laguna": Family("LagunaForCausalLM", {"layer_types": _MIXED}),
    "lara_mini": Family("LaraMiniForCausalLM"),
    "lfm3": Family("Lfm3ForCausalLM", {"layer_types": ["sliding_attention", "conv", "full_attention", "conv"]}),
    "llama4": Family("Llama4ForCausalLM"),
    "mellum": Family("MellumForCausalLM", {"layer_types": _MIXED}),
    "mimo_v2_flash": Family("MiMoV2FlashForCausalLM"),
    "minimax": Family("MiniMaxForCausalLM"),
    "ministral": Family("MinistralForCausalLM"),
    "ministral3": Family("Ministral3ForCausalLM"),
    "mistral": Family("MistralForCausalLM"),
    "mixtral": Family("MixtralForCausalLM"),
    "modernbert": Family("ModernBertModel", generates=False),
    "modernbert_decoder": Family("ModernBertDecoderForCausalLM"),
    "moonshine_streaming": Family(
        "MoonshineStreamingEncoder",
        {"sliding_windows": ((5, 3), (5, 0), (4, 2), (16, 4)), "num_key_value_heads": 4},
        inputs=("input_values", "attention_mask"),
        generates=False,
        pads=False,
    ),
    "muse_glimmer": Family("MuseGlimmerTextModel", generates=False),
    "mimi": Family("MimiTransformerModel", inputs=("hidden_states",), generates=False),
    "muse_spark": Family("MuseSparkTextModel", {"moe_hidden_size": 32, "layer_types": _MIXED}, generates=False),
    "neomme": Family("NeoMMEModel", {"head_dim": 32}, generates=False),
    "olmo3": Family("Olmo3ForCausalLM"),
    "openai_privacy_filter": Family("OpenAIPrivacyFilterModel", generates=False),
    "pocket_tts_audio_tokenizer": Family(
        "PocketTTSAudioTokenizerTransformerModel", inputs=("hidden_states",), generates=False
    ),
    "phi3": Family("Phi3ForCausalLM"),
    "phimoe": Family("PhimoeForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM"),
    "qwen2_5_omni": Family("Qwen2_5OmniThinkerTextModel", {"rope_parameters": _MROPE}, generates=False),
    "qwen2_5_vl": Family("Qwen2_5_VLTextModel", {"rope_parameters": _MROPE}, generates=False),
    "qwen2_moe": Family("Qwen2MoeForCausalLM", {"layer_types": _MIXED, "shared_expert_intermediate_size": 16}),
    "qwen2_vl": Family("Qwen2VLTextModel", {"rope_parameters": _MROPE}, generates=False),
    "qwen3": Family("Qwen3ForCausalLM"),
    "qwen3_moe": Family("Qwen3MoeForCausalLM"),
    "qwen3_omni_moe": Family("Qwen3OmniMoeCode2WavTransformerModel", inputs=("inputs_embeds",), generates=False),
    "recurrent_gemma": Family("RecurrentGemmaForCausalLM", {"attention_window_size": WINDOW}, pads=False),
    "smollm3": Family("SmolLM3ForCausalLM"),
    "starcoder2": Family("Starcoder2ForCausalLM"),
    "step3p7": Family("Step3p7TextModel", {"layer_types": _MIXED}, generates=False),
    "t5gemma": Family(
        "T5GemmaForConditionalGeneration",
        {"encoder": _GEMMA, "decoder": {**_GEMMA, "is_decoder": True}},
        inputs=("input_ids", "decoder_input_ids"),
    ),
    "t5gemma2": Family(
        "T5Gemma2ForConditionalGeneration",
        {
            "encoder": {"text_config": _GEMMA, "vision_config": {**_SMALL, "image_size": 28, "patch_size": 14}},
            "decoder": _GEMMA,
        },
        inputs=("input_ids", "decoder_input_ids"),
    ),
    "ultrabert": Family("UltrabertModel", generates=False),
    "unlimited_ocr": Family("UnlimitedOcrTextModel", {"num_key_value_heads": 4}, generates=False),
    "vaultgemma": Family("VaultGemmaForCausalLM"),
    "voxtral_realtime": Family("VoxtralRealtimeEncoder", inputs=("inputs_embeds",), generates=False),
    "zaya": Family(
        "ZayaForCausalLM",
        {"num_experts_per_tok": 1, "router_hidden_size": 16, "layer_types": ["hybrid_sliding", "hybrid"] * 2},
    ),
}

# Families whose models are not built here, and why.
ELSEWHERE: Mapping[str, str] = {
    "esmfold2": "its windows are over atoms of proteins, whose features no small input has",
    "gemma4_assistant": "drafts by the keys and values of a Gemma 4 beside it",
    "gemma4_unified_assistant": "drafts by the keys and values of a Gemma 4 beside it",
    "muse_glimmer_assistant": "drafts by the hidden states of a Muse Glimmer beside it",
    "nemotron_asr_streaming": "its attention adds a position bias, which no band has: it runs on its own eager function",
    "paligemma": "its text model is one of Gemma's, which are built; its own is images",
    "phi4_multimodal": "its text model is that of phi3, which is built; its own is images and sound",
}


@functools.cache
def families_installed() -> frozenset[str]:
    """The families of the installed version that make such masks."""
    root = Path(transformers.__file__).parent / "models"
    return frozenset(path.parent.name for path in root.glob("*/modeling_*.py") if _MASKS.search(path.read_text()))


def installed() -> Mapping[str, Family]:
    """The rows whose families the installed version has."""
    return {family: row for family, row in FAMILIES.items() if family in families_installed()}


def _class(family: str, name: str) -> type[nn.Module]:
    found: type[nn.Module] = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)
    return found


def config_class(family: str) -> type:
    """The class of its configuration; that of a part which is no model of its own is the family's."""
    kind = _class(family, FAMILIES[family].model)
    named = inspect.get_annotations(kind.__init__, eval_str=True).get("config")
    if isinstance(named, type) and named is not transformers.PreTrainedConfig:
        return named
    found: type = kind.config_class  # type: ignore[assignment]
    return found


def tiny_config(config: type, **changes: Any) -> Any:
    """A configuration of this class, small."""
    names: set[str] = set(inspect.signature(config.__init__).parameters)  # type: ignore[misc]
    for kind in config.__mro__:
        names |= set(getattr(kind, "__annotations__", {}))
    return config(**{**{name: value for name, value in _TINY.items() if name in names}, **changes})


def build(family: str, **changes: Any) -> nn.Module:
    """The family's model with random weights, in eval mode, with eager attention."""
    row = FAMILIES[family]
    kind = _class(family, row.model)
    config = tiny_config(config_class(family), **{**row.config, **changes})
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = kind(config).eval()
    # Norms, sinks and projections that begin as zeros or ones hide what is left out.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2 or not parameter.any():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def use(model: nn.Module, implementation: str) -> None:
    """Let the model run on an attention implementation."""
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation(implementation)
    else:
        model.config._attn_implementation = implementation  # type: ignore[union-attr]


def inputs_of(family: str, batch: int = 2, length: int = LENGTH) -> dict[str, Tensor]:
    """What the model is given."""
    generator = torch.Generator().manual_seed(2)
    made: dict[str, Tensor] = {}
    for name in FAMILIES[family].inputs:
        if name == "input_values":
            made[name] = torch.randn(batch, 4 * 80 * length, generator=generator)
        elif name == "attention_mask":
            made[name] = torch.ones(batch, 4 * 80 * length, dtype=torch.long)
        elif name.endswith("ids"):
            made[name] = torch.randint(3, VOCABULARY - 4, (batch, length), generator=generator)
        else:
            made[name] = torch.randn(batch, length, 32, generator=generator)
    return made


def table() -> str:
    """The families and what ran where in their tiny models: the table of the page, in Markdown."""
    lines = ["| family | model | attnreg | elsewhere |", "|---|---|---|---|"]
    for family, row in sorted(installed().items()):
        model = build(family)
        use(model, "attnreg")
        paths = explain(model, **inputs_of(family)).layers
        fused = dict.fromkeys(_shape(path.kind) for path in paths if path.path == "attnreg")
        others = dict.fromkeys(f"{_shape(path.kind)}: {path.path}" for path in paths if path.path != "attnreg")
        lines.append(f"| {family} | {row.model} | {', '.join(fused) or 'nothing'} | {', '.join(others)} |")
    return "\n".join(lines) + "\n"


def _shape(kind: str) -> str:
    """A layer's kind without the sizes of a tiny model."""
    if kind.startswith("window"):
        return "both sides" if "+" in kind else "sliding"
    return "chunks" if kind.startswith("chunks") else kind
