"""Tiny models of every family of transformers that has a window or chunks: a table, and how its rows are built."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from attnreg.integrations.transformers import explain

# What the models' own files call to make a mask of a window or of chunks.
_MASKS = re.compile(
    r"create_(?:bidirectional_)?sliding_window(?:_causal)?_mask|create_chunked_causal_mask"
    r"|sliding_window\w*(?:overlay|mask_function)|chunked\w*(?:overlay|mask_function)|_window_overlay"
)

# What they read of a window, whether they make a mask of it or not.
_CLAIMS = re.compile(r"config(?:\.|, \")sliding_window\b")

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

# Families whose configurations say a window of which their models make nothing, on any implementation: a class of each, and what
# of its configuration is not as in all.
WINDOWLESS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "kyutai_speech_to_text": (
        "KyutaiSpeechToTextModel",
        {"codebook_vocab_size": VOCABULARY, "num_codebooks": 1, "audio_pad_token_id": 3, "ffn_dim": 48},
    ),
    "moshi": ("MoshiModel", {"ffn_dim": 48}),
    "olmoe": ("OlmoeModel", {"sliding_window": WINDOW}),
    "paddleocr_vl": (
        "PaddleOCRTextModel",
        {"sliding_window": WINDOW, "layer_types": ["sliding_attention"] * 4, "rope_parameters": _MROPE},
    ),
}

# Families whose models are not built here, and why.
ELSEWHERE: Mapping[str, str] = {
    "deepseek_ocr2": "a window in the layers of its image encoder, whose model makes one mask for all",
    "esmfold2": "its windows are over atoms of proteins, whose features no small input has",
    "exaone4_5": "its text model is that of exaone4, which is built; its own is images",
    "gemma4_assistant": "drafts by the keys and values of a Gemma 4 beside it",
    "gemma4_unified_assistant": "drafts by the keys and values of a Gemma 4 beside it",
    "gpt_neo": "a local window in every second layer, in attention code of its own, which no name reaches",
    "muse_glimmer_assistant": "drafts by the hidden states of a Muse Glimmer beside it",
    "nemotron_asr_streaming": "its attention adds a position bias, which no band has: it runs on its own eager function",
    "paligemma": "its text model is one of Gemma's, which are built; its own is images",
    "phi4_multimodal": "its text model is that of phi3, which is built; its own is images and sound",
}


def families_installed() -> frozenset[str]:
    """The families of the installed version that make such masks, or whose configurations say a window."""
    return _families_with(_MASKS) | _families_with(_CLAIMS)


@functools.cache
def _families_with(code: re.Pattern[str]) -> frozenset[str]:
    root = Path(transformers.__file__).parent / "models"
    return frozenset(path.parent.name for path in root.glob("*/modeling_*.py") if code.search(path.read_text()))


def families_with_classes() -> frozenset[str]:
    """The families that choose attention from a table of classes of their own."""
    return _families_with(re.compile(r"_ATTENTION_CLASSES\["))


def installed() -> Mapping[str, Family]:
    """The rows whose families the installed version has, with such masks."""
    return {family: row for family, row in FAMILIES.items() if family in _families_with(_MASKS)}


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


def _fields(config: type) -> set[str]:
    """What a configuration of this class may be given."""
    names: set[str] = set(inspect.signature(config.__init__).parameters)  # type: ignore[misc]
    for kind in config.__mro__:
        names |= set(getattr(kind, "__annotations__", {}))
    return names


def tiny_config(config: type, **changes: Any) -> Any:
    """A configuration of this class, small."""
    names = _fields(config)
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


def build_windowless(family: str) -> nn.Module:
    """A model of a family that makes nothing of the window in its configuration, with eager attention."""
    name, changes = WINDOWLESS[family]
    kind = _class(family, name)
    config = tiny_config(kind.config_class, **changes)  # type: ignore[arg-type]
    assert config.sliding_window == WINDOW
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    return kind(config).eval()


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


def not_among() -> str:
    """The sentence of the page on families that are not in the table."""
    windowless = dict.fromkeys(
        WINDOWLESS, "its configuration says a window, and its model makes full masks, for eager too"
    )
    reasons = sorted({**ELSEWHERE, **windowless}.items())
    return f"Not among them: {'; '.join(f'{family} ({reason})' for family, reason in reasons)}.\n"


def _shape(kind: str) -> str:
    """A layer's kind without the sizes of a tiny model."""
    if kind.startswith("window"):
        return "both sides" if "+" in kind else "sliding"
    return "chunks" if kind.startswith("chunks") else kind


# Packs, in text models of all families, with a window or without

# What further configurations call the sizes of _TINY, and further sizes that they have.
_OTHERWISE: Mapping[str, Any] = {
    **dict.fromkeys(("d_model", "n_embd", "emb_dim", "embedding_size", "word_embed_proj_dim", "decoder_embed_dim"), 32),
    **dict.fromkeys(("n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("d_ff", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size", "n_inner"), 48),
    **dict.fromkeys(("n_group", "topk_group", "num_experts_per_tok"), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    "is_decoder": True,
    "n_positions": 64,
    "rotary_dim": 4,
}

# What of their configurations is not as in all, by the model's class.
_LATENT = {"num_key_value_heads": 4}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
_PACKABLE: Mapping[str, Mapping[str, Any]] = {
    "AXK1ForCausalLM": _LATENT,
    "BailingHybridForCausalLM": {**_LATENT, "layer_types": ["linear_attention", "full_attention"] * 2},
    "BambaForCausalLM": {**_MAMBA, "attn_layer_indices": [1, 3]},
    "Cosmos3EdgeTextModel": {"rope_parameters": _MROPE},
    "DbrxForCausalLM": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 2, "moe_top_k": 1},
    },
    "DeepseekV2ForCausalLM": _LATENT,
    "DeepseekV3ForCausalLM": _LATENT,
    "FuyuForCausalLM": {"text_config": {**_SMALL, "vocab_size": VOCABULARY}},
    "Glm4MoeLiteForCausalLM": _LATENT,
    "Glm4vMoeTextModel": {"rope_parameters": {**_MROPE, "mrope_section": [1, 1, 0]}},
    "Glm4vTextModel": {"rope_parameters": _MROPE},
    "Glm5NextTextModel": {**_LATENT, "qk_rope_head_dim": 0},
    "GlmImageTextModel": {"rope_parameters": _MROPE},
    "GlmOcrTextModel": {"rope_parameters": _MROPE},
    "GraniteMoeHybridForCausalLM": {**_MAMBA, "layer_types": ["mamba", "attention"] * 2},
    "HYV4VLTextModel": {**_LATENT, "rope_parameters": _MROPE},
    "HunYuanVLTextModel": {"rope_parameters": _MROPE},
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "KimiLinearForCausalLM": {**_LATENT, "layer_types": ["linear_attention", "full_attention"] * 2},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"] * 2},
    "LongcatFlashForCausalLM": {**_LATENT, "expert_ffn_hidden_size": 16, "moe_topk": 2, "zero_expert_num": 2},
    "MiniCPM3ForCausalLM": _LATENT,
    "Qwen4ExpForCausalLM": {
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "RoCBertForCausalLM": {"pronunciation_vocab_size": VOCABULARY, "shape_vocab_size": VOCABULARY},
    "SarvamMLAForCausalLM": _LATENT,
    "XmodForCausalLM": {"default_language": "en_XX"},
    "YoutuForCausalLM": _LATENT,
    "ZambaForCausalLM": {"num_hidden_layers": 6, "layers_block_type": ["mamba", "mamba", "hybrid"] * 2},
    "Zamba2ForCausalLM": {"layers_block_type": ["mamba", "hybrid"] * 2, "num_key_value_heads": 4},
}

# Families of which no text model is built here, and why.
UNPACKED: Mapping[str, str] = {
    "git": "keeps a table of attention classes of its own",
    "got_ocr2": "its text model is that of qwen2, which is built",
    "mamba2": "has no attention",
    "moss_transcribe_diarize": "its text model is that of qwen3, which is built",
    "musicgen": "its tokens are of several codebooks",
    "musicgen_melody": "its tokens are of several codebooks",
    "reformer": "its attention is code of its own",
    "sam3_lite_text": "encodes texts, and is not small",
    "xlstm": "has no attention",
}

_NAME = "attnreg-watched"


# What attention makes of a pack, the worst last.
_VERDICTS = ("failed", "none", "chosen", "apart", "offsets", "no cache", "never")


@functools.cache
def packs() -> Mapping[str, str]:
    """What attention makes of packs, by family: each model gets one forward, with a cache, and positions that restart.

    "apart"; where documents are mixed, what keeps them apart, "offsets" or "no cache", or "never"; "chosen" where attnreg refuses
    keys that a layer chose; "none" where no causal layer ran on attnreg; or, after "failed", why there was no forward.
    """
    found: dict[str, str] = {}
    with _watched() as calls:
        for family, make in _text_models():
            try:
                verdict = _packed(make(), calls)
            except Exception as error:
                has_chosen = isinstance(error, NotImplementedError) and "keys that it chose" in str(error)
                verdict = "chosen" if has_chosen else f"failed: {type(error).__name__}: {error}"
            # A family may have several models.
            found[family] = max(
                verdict, found.get(family, verdict), key=lambda each: _VERDICTS.index(each.split(":")[0])
            )
    return found


def _packed(model: nn.Module, calls: list[bool]) -> str:
    use(model, _NAME)
    generator = torch.Generator().manual_seed(2)
    texts = torch.randint(3, VOCABULARY - 4, (1, sum(_DOCUMENTS)), generator=generator)
    positions = torch.cat([torch.arange(each) for each in _DOCUMENTS])[None]
    offsets = torch.tensor([0, *_DOCUMENTS]).cumsum(0).int()
    given = {"input_ids": texts, "position_ids": positions, "use_cache": True}

    def mixes(**more: Any) -> bool:
        calls.clear()
        with torch.no_grad():
            model(**given | more)
        return any(calls)

    if not mixes():
        return "apart" if calls else "none"
    for verdict, more in (
        ("offsets", {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}),
        ("no cache", {"use_cache": False}),
    ):
        # Some models refuse offsets.
        with suppress(ValueError):
            if not mixes(**more):
                return verdict
    return "never"


_DOCUMENTS = (11, 19)


@contextmanager
def _watched() -> Iterator[list[bool]]:
    """A name that runs as attnreg does, and a list of whether the second document of a pack saw the first, for each causal layer.

    A layer is asked by itself, with other keys and values: convolutions and recurrences do carry one document to the next.
    """
    calls: list[bool] = []
    first, length = _DOCUMENTS[0], sum(_DOCUMENTS)
    functions, masks = AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping
    attention = functions["attnreg"]

    def watched(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        found = attention(module, query, key, value, attention_mask, **kwargs)

        def sees(queries: slice, keys: slice) -> bool:
            others = key.clone(), value.clone()
            for each in others:
                each[:, :, keys] += 1
            output = attention(module, query, *others, attention_mask, **kwargs)[0]
            return not torch.allclose(output[:, queries], found[0][:, queries], atol=1e-4)

        is_causal = query.shape[2] == key.shape[2] == length and not sees(slice(0, -1), slice(-1, None))
        if is_causal:
            calls.append(sees(slice(first, None), slice(0, first)))
        return found

    AttentionInterface.register(_NAME, watched)
    AttentionMaskInterface.register(_NAME, masks["attnreg"])
    try:
        yield calls
    finally:
        del functions[_NAME], masks[_NAME]


def _text_models() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """The families that have a text model, and how it is made: those of the table, and all others that transformers knows."""
    for family, row in installed().items():
        if row.inputs == ("input_ids",):
            yield family, functools.partial(build, family)
    texts = {name: kind for name, kind in MODEL_MAPPING_NAMES.items() if re.search("(?<!_to)_text$", name)}
    seen = {*FAMILIES, *ELSEWHERE}
    for named in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, texts):
        kinds = {each: name for name, given in named.items() for each in ([given] if isinstance(given, str) else given)}
        families = {kind: transformers.CONFIG_MAPPING[name].__module__.split(".")[2] for kind, name in kinds.items()}
        for kind, family in families.items():
            if family not in seen:
                yield family, functools.partial(small_text_model, kind)
        seen |= set(families.values())


def small_text_model(name: str) -> nn.Module:
    """A text model of a family without a row, with random weights, in eval mode."""
    kind = getattr(transformers, name)
    config_kind = kind.config_class
    fields = _fields(config_kind)
    otherwise = {field: value for field, value in _OTHERWISE.items() if field in fields}
    config = tiny_config(config_kind, **{**otherwise, **_PACKABLE.get(name, {})})
    with torch.device("meta"):
        size = sum(each.numel() for each in kind(config).parameters())
    if size > 2e7:
        raise ValueError(f"{name} is not small: {size} weights")
    torch.manual_seed(0)
    model: nn.Module = kind(config).eval()
    return model
