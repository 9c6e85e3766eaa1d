"""Small models of configurations: of every family of the installed transformers that has a window or chunks, as it is by default."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
import transformers_models as families

from attnreg.testing import audit_config
from attnreg.testing.audit_config import SMALL, model_of_config, small

# What a default leaves empty without which the family makes no model, or none that runs, of whatever size.
COMPLETED = {
    "cohere_compass": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [24, 20, 20]}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "diffusion_gemma": {"num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704},
    "dots1": {"n_shared_experts": 2, "n_routed_experts": 128, "num_experts_per_tok": 6},
    "step3p7": {"sliding_window": 512},
}
NO_MODEL_BY_DEFAULT = ("cohere_compass", "diffusion_gemma", "dots1")
# Parts of models whose configurations do not say of which.
NAMELESS = ("qwen3_omni_moe",)
NAMED = [family for family in sorted(families.installed()) if family not in NAMELESS]


@pytest.fixture
def written(tmp_path):
    """A function that writes a configuration, and gives the path of its file."""

    def write(config):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config, default=str))
        return path

    return write


def default(family, **changes):
    config = families.config_class(family)().to_dict()
    return {**config, "architectures": [families.FAMILIES[family].model], **changes}


def run(model, family, length=40):
    given = {}
    for name in families.FAMILIES[family].inputs:
        if name.endswith("ids"):
            given[name] = torch.randint(3, SMALL["vocab_size"] - 4, (1, length))
        elif name == "input_values":
            given[name] = torch.randn(1, 4 * 80 * length)
        elif name == "attention_mask":
            given[name] = torch.ones(1, 4 * 80 * length, dtype=torch.long)
        else:
            given[name] = torch.randn(1, length, SMALL["hidden_size"])
    with torch.no_grad():
        model(**given)


@pytest.mark.parametrize("family", NAMED)
def test_a_small_model_is_made_of_every_family_with_a_window(family, written):
    model, _ = model_of_config(written(default(family, **COMPLETED.get(family, {}))))
    assert type(model).__name__ == families.FAMILIES[family].model
    assert sum(each.numel() for each in model.parameters()) < 3e7
    run(model, family)


@pytest.mark.parametrize("family", NO_MODEL_BY_DEFAULT)
def test_a_configuration_that_lacks_something_says_what_it_leaves_empty(family, written):
    missing = next(iter(COMPLETED[family]))
    with pytest.raises(ValueError, match=f"as large as it says none either .*what it leaves empty: .*{missing}"):
        model_of_config(written(default(family)))


@pytest.mark.parametrize("family", NAMELESS)
def test_a_part_of_a_model_without_a_name_is_refused(family, written):
    with pytest.raises(ValueError, match=r"model_type is empty.*give the configuration of the whole model"):
        model_of_config(written(default(family)))


def test_what_cannot_be_made_small_says_what_to_do(written, monkeypatch):
    monkeypatch.setattr(audit_config, "small", lambda given: {**given, "num_hidden_layers": "few"})
    with pytest.raises(ValueError, match=r"no small one .*make the file small by hand and give --as-it-is$"):
        model_of_config(written({"model_type": "mistral"}))
    monkeypatch.setattr(audit_config, "small", lambda given: {**given, "text_config": "nothing"})
    with pytest.raises(ValueError, match=r"or give what it has as text_config as a file of its own$"):
        model_of_config(written({"model_type": "gemma3", "num_hidden_layers": 2, "text_config": {}}))


def test_windows_of_layers_that_differ_differ_in_the_small_model(written):
    model, _ = model_of_config(written(default("neomme")))
    windows = [each.sliding_window for each in model.config.per_layer_config]
    assert windows == [16, 64, 16, 64, 16, None]


def test_layers_of_every_kind_are_left_where_keys_are_shared():
    config = default("gemma3n")
    found = small(config)
    count, shared = found["num_hidden_layers"], found["num_kv_shared_layers"]
    assert (count, shared) == (10, 5)
    assert set(found["layer_types"][: count - shared]) == set(found["layer_types"][count - shared :])
    assert len(found["intermediate_size"]) == len(found["activation_sparsity_pattern"]) == count


def test_parts_of_the_layers_go_on_adding_up():
    found = small(default("dory"))
    parts = [found[name] for name in ("n_input_layers", "n_recurrent_layers", "n_output_layers")]
    assert sum(parts) == found["num_hidden_layers"] == len(found["layer_types"])
    assert all(count >= 2 for count in parts)


def test_what_is_said_by_layer_is_cut_to_the_layers_that_are_left():
    types = ["sliding_attention"] * 20 + ["full_attention"]
    by_layer = {"03": {"head_dim": 512}, "20": {"head_dim": 512, "sliding_window": None}}
    found = small({"num_hidden_layers": 21, "layer_types": types, "head_dim": 256, "per_layer_config": by_layer})
    assert found["layer_types"] == [*types[:12], "full_attention"]
    assert found["per_layer_config"] == {"3": {"head_dim": 32}, "12": {"head_dim": 32, "sliding_window": None}}


@pytest.mark.parametrize(
    "config",
    [
        {
            "model_type": "phi3",
            "architectures": ["Phi3ForCausalLM"],
            "hidden_size": 3072,
            "num_attention_heads": 32,
            "sliding_window": 262144,
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.5] * 48},
        },
        {
            "model_type": "qwen2_vl_text",
            "architectures": ["Qwen2VLTextModel"],
            "use_sliding_window": True,
            "sliding_window": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        {
            "model_type": "gemma4_text",
            "architectures": ["Gemma4ForCausalLM"],
            "enable_moe_block": True,
            "num_experts": 128,
            "top_k_experts": 8,
            "moe_intermediate_size": 704,
        },
    ],
    ids=["longrope", "mrope", "experts"],
)
def test_what_belongs_to_a_size_becomes_small_with_it(config, written):
    model, _ = model_of_config(written(config))
    with torch.no_grad():
        model(torch.randint(3, 150, (1, 20)))


def test_a_model_as_large_as_it_says_is_not_cut(written):
    config = {"model_type": "mistral", "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    path = written({**config, "num_hidden_layers": 3, "vocab_size": 50, "intermediate_size": 40})
    model, told = model_of_config(path, as_it_is=True)
    assert isinstance(model, transformers.MistralModel)
    assert len(model.layers) == 3
    assert not told
