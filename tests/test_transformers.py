"""Models of transformers on attnreg, against their own eager attention, and against themselves where eager is wrong."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="the integration with transformers needs it")

from transformers import masking_utils  # noqa: E402
from transformers_models import (  # noqa: E402
    ELSEWHERE,
    FAMILIES,
    LENGTH,
    UNPACKED,
    WINDOW,
    WINDOWLESS,
    build,
    build_windowless,
    families_installed,
    families_with_classes,
    inputs_of,
    installed,
    not_among,
    packs,
    small_text_model,
    table,
    use,
)

import attnreg.integrations.transformers as integration  # noqa: E402
from attnreg import BackendError, use_backend  # noqa: E402
from attnreg.integrations._transformers_mask import BandMask, dense, visibility  # noqa: E402

transformers.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def as_at_first() -> Iterator[None]:
    """Options are those of the import, before a test and after it."""
    torch.set_grad_enabled(True)
    integration.register()
    yield
    integration.register()


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled yet, and Dynamo's tracing log, of which pytest would keep every line, is off."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    torch._dynamo.reset()


# What makes a model of two layers, one of each kind.
TWO_LAYERS: dict[str, dict[str, Any]] = {
    "mistral": {"num_hidden_layers": 1},
    "gemma3": {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
    "llama4": {
        "num_hidden_layers": 2,
        "layer_types": ["chunked_attention", "full_attention"],
        "no_rope_layers": [1, 0],
    },
}


def output_of(model: nn.Module, **inputs: Any) -> Tensor:
    """The logits, or the last hidden states."""
    found = model(**inputs)
    return found.logits if hasattr(found, "logits") else found[0]


def mask_of(kind: str, batch: int = 2, length: int = LENGTH) -> Tensor | None:
    """A padding mask (N, L) whose first row is padded."""
    mask = torch.ones(batch, length, dtype=torch.long)
    if kind == "none":
        return None
    mask[0, {"left": slice(0, 4), "right": slice(-4, None), "holes": slice(5, 8)}[kind]] = 0
    return mask


def step(model: nn.Module, inputs: dict[str, Any], mask: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The outputs of tokens, and the gradients of all parameters under a random gradient of them."""
    model.zero_grad()
    given = inputs if mask is None else {**inputs, "attention_mask": mask}
    found = output_of(model, **given)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(3)).to(found.device)
    if mask is not None and mask.shape == found.shape[:2]:
        upstream, found = upstream * mask[..., None], found * mask[..., None]
    (found * upstream).sum().backward()
    gradients = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    return found.detach(), gradients


def assert_same(
    found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]], rounding: float = 2e-5
) -> None:
    """As near as float32 lets two ways of one computation be."""
    assert not found[0].isnan().any()
    torch.testing.assert_close(found[0], expected[0], atol=rounding * max(1, expected[0].abs().max().item()), rtol=0)
    assert found[1].keys() == expected[1].keys()
    size = max(each.abs().max().item() for each in expected[1].values())
    for name, gradient in expected[1].items():
        torch.testing.assert_close(
            found[1][name], gradient, atol=rounding * size, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


# Every family


def test_every_family_of_the_installed_version_is_built_or_has_a_reason() -> None:
    assert families_installed() <= FAMILIES.keys() | ELSEWHERE.keys() | WINDOWLESS.keys()
    assert not FAMILIES.keys() & (ELSEWHERE.keys() | WINDOWLESS.keys())


@pytest.mark.parametrize("family", sorted(WINDOWLESS.keys() & families_installed()))
def test_a_window_of_which_a_model_makes_nothing_is_none_on_eager_and_on_attnreg(family: str) -> None:
    model = build_windowless(family)
    # Kyutai's tokens are those of a text and of one codebook.
    shape = (1, LENGTH, 2) if family == "kyutai_speech_to_text" else (1, LENGTH)
    texts = torch.randint(4, 60, shape, generator=torch.Generator().manual_seed(5))
    use(model, "attnreg")
    assert {layer.kind for layer in integration.explain(model, input_ids=texts).layers} == {"full"}
    found = output_of(model, input_ids=texts)
    use(model, "eager")
    torch.testing.assert_close(found, output_of(model, input_ids=texts), atol=1e-4, rtol=1e-4)


PADDED = [
    (family, kind)
    for family, row in installed().items()
    for kind in ("none", "left", "right")
    if row.pads or kind == "none"
]


@pytest.mark.parametrize(("family", "padding"), PADDED, ids=["-".join(each) for each in PADDED])
def test_a_model_on_attnreg_is_the_model_on_eager(family: str, padding: str) -> None:
    model, inputs, mask = build(family), inputs_of(family), mask_of(padding)
    expected = step(model, inputs, mask)
    use(model, "attnreg")
    assert_same(step(model, inputs, mask), expected, FAMILIES[family].rounding)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("family", "padding"), PADDED, ids=["-".join(each) for each in PADDED])
def test_a_model_on_a_gpu_is_the_model_on_eager(family: str, padding: str) -> None:
    model, mask = build(family).cuda(), mask_of(padding)
    inputs = {name: each.cuda() for name, each in inputs_of(family).items()}
    mask = None if mask is None else mask.cuda()
    expected = step(model, inputs, mask)
    use(model, "attnreg")
    assert_same(step(model, inputs, mask), expected, 5 * FAMILIES[family].rounding)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["mistral", "gemma2", "modernbert"])
@pytest.mark.parametrize("padding", ["left", "right", "holes"])
def test_a_graph_of_a_padded_forward_replays_with_other_padding(family: str, padding: str) -> None:
    model = build(family).cuda()
    use(model, "attnreg")
    integration.register(look=False)
    inputs = {name: each.cuda() for name, each in inputs_of(family).items()}
    mask = torch.ones(2, LENGTH, dtype=torch.long, device="cuda")
    given = {**inputs, "attention_mask": mask} | ({} if family == "modernbert" else {"use_cache": False})
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            output_of(model, **given)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            found = output_of(model, **given)
        mask.copy_(mask_of(padding))
        graph.replay()
        use(model, "eager")
        expected = output_of(model, **given)
    torch.testing.assert_close(found * mask[..., None], expected * mask[..., None], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", [family for family, row in installed().items() if row.generates])
def test_it_generates_the_tokens_that_eager_generates(family: str) -> None:
    model, inputs = build(family), inputs_of(family, length=9)
    asked = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    tokens = {"input_ids": inputs["input_ids"], "attention_mask": mask_of("left", length=9)}
    expected = model.generate(**tokens, **asked)
    use(model, "attnreg")
    assert torch.equal(model.generate(**tokens, **asked), expected)


@pytest.fixture
def page(request: pytest.FixtureRequest) -> str:
    """The page, which is about one version."""
    text: str = (request.config.rootpath / "docs" / "integrations" / "transformers.md").read_text()
    if f"transformers {transformers.__version__}" not in text:
        pytest.skip(f"the page's table is that of another version than {transformers.__version__}")
    return text


def families_in(page: str, begin: str, end: str) -> set[str]:
    """The families in backticks between two places of the page."""
    found = re.search(f"{re.escape(begin)}(.*?){re.escape(end)}", " ".join(page.split()))
    assert found is not None, begin
    return set(re.findall(r"`([a-z0-9_]+)`", found[1]))


def families_that(verdict: str) -> set[str]:
    return {family for family, found in packs().items() if found == verdict}


def test_the_page_says_what_runs_fused(page: str) -> None:
    assert table() in page
    assert not_among() in page


def test_the_page_names_the_families_whose_packs_are_mixed(page: str) -> None:
    failed = {family: found for family, found in packs().items() if found.startswith("failed")}
    assert failed.keys() <= UNPACKED.keys(), failed
    assert families_that("offsets") == families_in(page, "nor do these decoders:", "Give them `cu_seq_lens_q`")
    assert families_that("no cache") == families_in(
        page, "For these `cu_seq_lens_q` does not do:", "keeps documents apart"
    )
    assert not families_that("never")


def test_the_page_names_the_families_that_choose_keys_for_themselves(page: str) -> None:
    # By default Dots3-Note has layers that choose keys; that of the table has none.
    assert families_that("chosen") | {"dots3_note"} == families_in(
        page, "choose keys for themselves:", "their models make"
    )


def test_the_page_names_the_families_with_a_table_of_attention_classes(page: str) -> None:
    named = families_in(page, "**`KeyError: 'attnreg'`**", "Name the text model alone")
    # A SAM is in DeepSeek-VL-hybrid.
    assert families_with_classes() | {"deepseek_vl_hybrid"} == named


@pytest.mark.parametrize("name", ["Bloom", "BigBird", "RoFormer", "Mpt", "XGLM"])
def test_a_model_beside_the_registry_takes_the_name_and_explain_lists_no_layer(name: str) -> None:
    model = small_text_model(f"{name}ForCausalLM")
    use(model, "attnreg")
    assert integration.explain(model, length=LENGTH).layers == ()


@pytest.mark.parametrize("family", ["unlimited_ocr", "deepseek_vl_hybrid"])
def test_a_text_model_beside_such_a_table_is_named_alone(family: str) -> None:
    if family not in transformers.CONFIG_MAPPING:
        pytest.skip("this version has no such family")
    config = transformers.CONFIG_MAPPING[family]
    with torch.device("meta"):
        with pytest.raises(KeyError, match="attnreg"):
            transformers.AutoModel.from_config(config(), attn_implementation="attnreg")
        model = transformers.AutoModel.from_config(config(), attn_implementation={"text_config": "attnreg"})
        assert model.config.text_config._attn_implementation == "attnreg"
        assert model.config.vision_config._attn_implementation != "attnreg"
        later = transformers.AutoModel.from_config(config())
        later.set_attn_implementation("attnreg")
        assert later.config.text_config._attn_implementation == "attnreg"


# Masks


def functions() -> dict[str, tuple[Any, int | None, dict[str, Any]]]:
    """Of each kind the mask function, the size that comes with it, and further arguments."""
    chunks = masking_utils.chunked_causal_mask_function(4, torch.tensor([0, 3]))
    both = {"allow_is_bidirectional_skip": True}
    return {
        "full": (masking_utils.causal_mask_function, None, {}),
        "all": (masking_utils.bidirectional_mask_function, None, both),
        "sliding": (masking_utils.sliding_window_causal_mask_function(3), 3, {}),
        "symmetric": (masking_utils.sliding_window_bidirectional_mask_function(3), 3, both),
        "chunks": (chunks, 4, {}),
    }


def rows_of_tokens(mask: Tensor, offset: int, length: int) -> Tensor:
    """Which queries are tokens: what padding sees is nobody's business."""
    padded = torch.nn.functional.pad(mask, (0, max(0, offset + length - mask.shape[1])), value=True)
    return padded[:, offset : offset + length].bool()


LENGTHS = {
    "as many": (12, 12, 0, 0),
    "one more": (1, 12, 11, 0),
    "two more": (2, 12, 10, 0),
    "sliding cache": (3, 7, 9, 5),
    "sliding cache, one": (1, 5, 11, 7),
    "static cache, first": (6, 12, 0, 0),
    "static cache": (1, 12, torch.tensor(7), 0),
    "static cache, some": (3, 12, torch.tensor(5), 0),
}


@pytest.mark.parametrize("padding", ["none", "left", "right", "holes"])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("kind", functions())
@pytest.mark.parametrize("looks", [True, False], ids=["looks", "cannot look"])
def test_a_mask_shows_what_that_of_sdpa_shows(
    kind: str, lengths: str, padding: str, looks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, size, more = functions()[kind]
    query_length, key_length, query_offset, key_offset = LENGTHS[lengths]
    if isinstance(query_offset, Tensor) or lengths.startswith("static"):
        tokens = int(query_offset) + query_length
    else:
        tokens = key_length + key_offset
    padded = mask_of(padding, length=tokens)
    asked = {
        "batch_size": 2,
        "q_length": query_length,
        "kv_length": key_length,
        "q_offset": query_offset,
        "kv_offset": key_offset,
    }
    asked |= {
        "mask_function": function,
        "attention_mask": None if padded is None else padded.bool(),
        "local_size": size,
    }
    never = {"allow_is_causal_skip": False, **dict.fromkeys(more, False)}
    expected = masking_utils.sdpa_mask(**asked, **never)
    if not looks:
        monkeypatch.setattr("attnreg.integrations._transformers_mask.may_look", lambda tensor, looks: False)
    found = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["attnreg"](**asked, **more)
    assert isinstance(found, BandMask)
    assert found.shape == expected.shape
    is_token = torch.ones(2, query_length, dtype=torch.bool)
    if padded is not None:
        is_token = rows_of_tokens(padded, int(query_offset), query_length)
    found_dense, expected = visibility(found)[:, 0], expected[:, 0].expand(2, -1, -1)
    assert torch.equal(found_dense[is_token], expected[is_token])


@pytest.mark.parametrize("kind", ["full", "sliding", "chunks"])
def test_positions_that_restart_are_documents(kind: str) -> None:
    positions = torch.stack([torch.cat([torch.arange(5), torch.arange(7)]), torch.arange(12)])
    function, size, _ = functions()[kind]
    packed = masking_utils.find_packed_sequence_indices(positions)
    if hasattr(masking_utils, "remap_positions_for_packed_sequence"):
        function = masking_utils.remap_positions_for_packed_sequence(function, positions)
    function = masking_utils.and_masks(function, masking_utils.packed_sequence_mask_function(packed))
    asked = {"batch_size": 2, "q_length": 12, "kv_length": 12, "mask_function": function, "local_size": size}
    found = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["attnreg"](**asked)
    expected = masking_utils.sdpa_mask(**asked, allow_is_causal_skip=False)
    assert torch.equal(visibility(found), expected)


def test_what_no_band_can_say_is_dense() -> None:
    blocks = masking_utils.blockwise_overlay(torch.tensor([[-1, 0, 0, 0, -1, -1]]))
    function = masking_utils.or_masks(masking_utils.sliding_window_causal_mask_function(2), blocks)
    asked = {"batch_size": 1, "q_length": 6, "kv_length": 6, "mask_function": function, "local_size": 2}
    found = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["attnreg"](**asked)
    assert not isinstance(found, BandMask)
    assert torch.equal(found == 0, masking_utils.sdpa_mask(**asked))
    integration.register(unsupported="raise")
    with pytest.raises(NotImplementedError, match=r'window or chunks of 2 is no band.*unsupported="dense"'):
        masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["attnreg"](**asked)


def test_a_function_that_wants_one_index_at_a_time_is_dense() -> None:
    sees = torch.ones(2, 6, dtype=torch.bool)
    sees[1, :3] = False

    def picks(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees[batch][key]

    function = masking_utils.and_masks(masking_utils.sliding_window_causal_mask_function(3), picks)
    asked = {
        "batch_size": 2,
        "q_length": 6,
        "kv_length": 6,
        "mask_function": function,
        "local_size": 3,
        "use_vmap": True,
    }
    found = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["attnreg"](**asked)
    assert torch.equal(found == 0, masking_utils.sdpa_mask(**asked))


def test_a_mask_is_an_ordinary_one_to_whoever_reads_it() -> None:
    function, size, _ = functions()["sliding"]
    found = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["attnreg"](
        batch_size=2, q_length=6, kv_length=6, mask_function=function, local_size=size, dtype=torch.bfloat16
    )
    ordinary = dense(found)
    assert ordinary.dtype is torch.bfloat16
    assert type(ordinary) is Tensor
    assert torch.equal(found[:, :, 2:, :4], ordinary[:, :, 2:, :4])
    assert torch.equal(torch.cat([found, found], dim=-1), torch.cat([ordinary, ordinary], dim=-1))
    moved = found.to(torch.float32)
    assert isinstance(moved, BandMask)
    assert torch.equal(dense(moved) == 0, dense(found) == 0)
    assert type(found.to(torch.bool)) is Tensor
    assert "BandMask((2, 1, 6, 6), keys -2..0 from a query)" in repr(found)


# Packed sequences

DOCUMENTS = (7, 5, 9)
# Whether this version of transformers counts the chunks of a document from its own begin.
COUNTS_CHUNKS = hasattr(masking_utils, "remap_positions_for_packed_sequence")
PACKABLE = ["mistral", "gemma2", "gemma3", "gpt_oss", "llama4"]


def packed(lengths: tuple[int, ...] = DOCUMENTS) -> dict[str, Any]:
    """What ``DataCollatorWithFlattening(return_flash_attn_kwargs=True)`` makes of texts."""
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    texts = torch.randint(3, 60, (1, sum(lengths)), generator=torch.Generator().manual_seed(5))
    positions = torch.cat([torch.arange(each) for each in lengths])[None]
    told = {
        "cu_seq_lens_q": offsets,
        "cu_seq_lens_k": offsets,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }
    return {"input_ids": texts, "position_ids": positions, **told}


def one_by_one(model: nn.Module, given: dict[str, Any]) -> Tensor:
    """The outputs of the documents of a pack, each alone."""
    texts = given["input_ids"].split(DOCUMENTS, dim=1)
    return torch.cat([output_of(model, input_ids=text) for text in texts], dim=1)


@pytest.mark.parametrize("told", ["cu_seq_lens", "position_ids", "both"])
@pytest.mark.parametrize("use_cache", [False, True], ids=["no cache", "new cache"])
@pytest.mark.parametrize("family", PACKABLE)
def test_documents_of_a_pack_do_not_see_each_other(family: str, use_cache: bool, told: str) -> None:
    if family == "llama4" and told == "position_ids" and (use_cache or not COUNTS_CHUNKS):
        pytest.skip("Llama 4 tells its attention no positions; older versions count its chunks from the pack's begin")
    model, given = build(family), packed()
    use(model, "attnreg")
    expected = one_by_one(model, given)
    if told != "both":
        given = {
            name: each for name, each in given.items() if name in ("input_ids", "position_ids") or told == "cu_seq_lens"
        }
    found = output_of(model, **given, use_cache=use_cache)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_documents_of_keys_count_where_the_model_makes_the_mask() -> None:
    """A layer whose mask is no band: the queries of a document see the keys that the keys' own offsets give it."""
    query, key, value = (torch.randn(1, 2, 6, 8, generator=torch.Generator().manual_seed(each)) for each in range(3))
    offsets = {"cu_seq_lens_q": torch.tensor([0, 2, 6]), "cu_seq_lens_k": torch.tensor([0, 4, 6])}
    everything = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    found, _ = transformers.AttentionInterface()["attnreg"](nn.Module(), query, key, value, everything, **offsets)
    visible = torch.zeros(6, 6, dtype=torch.bool)
    visible[:2, :4] = visible[2:, 4:] = True
    expected = nn.functional.scaled_dot_product_attention(query, key, value, visible)
    torch.testing.assert_close(found.transpose(1, 2), expected)


def test_documents_beside_a_mask_that_cannot_hold_them_are_refused() -> None:
    query, padding, offsets = torch.randn(1, 2, 6, 8), torch.ones(1, 6), torch.tensor([0, 2, 6])
    with pytest.raises(NotImplementedError, match=r"cu_seq_lens_q was given together with a mask of shape \(1, 6\)"):
        transformers.AttentionInterface()["attnreg"](nn.Module(), query, query, query, padding, cu_seq_lens_q=offsets)


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_offsets_of_keys_without_those_of_queries_are_refused(family: str) -> None:
    model, given = build(family), packed()
    use(model, "attnreg")
    del given["cu_seq_lens_q"]
    with pytest.raises(TypeError, match=r"was given cu_seq_lens_k=a tensor \(4,\) without cu_seq_lens_q"):
        output_of(model, **given)


@pytest.mark.parametrize(("family", "use_cache"), [("mistral", True), ("gemma3", True), ("llama4", False)])
def test_a_compiled_model_keeps_documents_apart_too(family: str, use_cache: bool, quiet: None) -> None:
    if family == "llama4" and not COUNTS_CHUNKS:
        pytest.skip("this version of transformers counts chunks from the pack's begin")
    model, given = build(family, **TWO_LAYERS[family]), packed()
    use(model, "attnreg")
    expected = one_by_one(model, given)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    given = {name: given[name] for name in ("input_ids", "position_ids")}
    torch.testing.assert_close(output_of(compiled, **given, use_cache=use_cache), expected, atol=1e-5, rtol=1e-5)


def test_packs_of_several_rows_have_documents_of_their_own() -> None:
    model = build("gemma3")
    ids = inputs_of("gemma3", batch=2, length=12)["input_ids"]
    positions = torch.stack(
        [torch.cat([torch.arange(5), torch.arange(7)]), torch.cat([torch.arange(9), torch.arange(3)])]
    )
    expected = step(model, {"input_ids": ids, "position_ids": positions, "use_cache": False})
    use(model, "attnreg")
    assert_same(step(model, {"input_ids": ids, "position_ids": positions, "use_cache": False}), expected)
    assert_same(step(model, {"input_ids": ids, "position_ids": positions, "use_cache": True}), expected)


@pytest.mark.parametrize("family", ["mistral", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("looks", [True, False], ids=["looks", "cannot look"])
def test_a_pack_that_is_padded_keeps_its_documents_apart(
    family: str, looks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = build(family), packed()
    use(model, "attnreg")
    expected = one_by_one(model, given)
    if not looks:
        monkeypatch.setattr("attnreg.integrations._transformers_mask.may_look", lambda tensor, looks: False)
        monkeypatch.setattr(integration, "may_look", lambda tensor, looks: False)
    length = sum(DOCUMENTS)
    ids, positions = (torch.nn.functional.pad(given[name], (0, 3)) for name in ("input_ids", "position_ids"))
    mask = torch.nn.functional.pad(torch.ones(1, length, dtype=torch.long), (0, 3))
    found = output_of(model, input_ids=ids, position_ids=positions, attention_mask=mask)
    torch.testing.assert_close(found[:, :length], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("told", ["cache", "mask", "padded left"])
@pytest.mark.parametrize(
    "positions",
    [
        [0] * LENGTH,
        [each // 2 for each in range(LENGTH)],
        [*range(LENGTH - 2), LENGTH - 4, LENGTH - 3],
        [*range(5), *range(3, LENGTH - 2)],
        [LENGTH - each for each in range(LENGTH)],
    ],
    ids=["all 0", "twice each", "a dip at the end", "a dip inside", "falling"],
)
def test_positions_that_are_no_pack_are_one_document_as_for_eager(positions: list[int], told: str) -> None:
    model, inputs = build("gemma3"), inputs_of("gemma3", batch=2)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    if told == "padded left":
        mask[1, :4] = 0
    inputs["position_ids"] = torch.tensor([positions, positions])
    inputs["use_cache"] = told == "cache"
    expected = step(model, inputs, None if told == "cache" else mask)
    use(model, "attnreg")
    assert_same(step(model, inputs, None if told == "cache" else mask), expected)


@pytest.mark.parametrize("counts_holes", [False, True], ids=["positions skip holes", "positions count holes"])
@pytest.mark.parametrize("looks", [True, False], ids=["looks", "cannot look"])
def test_documents_that_are_padded_one_by_one_are_kept_apart(
    looks: bool, counts_holes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("gemma3")
    texts = [inputs_of("gemma3", batch=1, length=length)["input_ids"] for length in (6, 5)]
    use(model, "attnreg")
    expected = [output_of(model, input_ids=text) for text in texts]
    if not looks:
        monkeypatch.setattr("attnreg.integrations._transformers_mask.may_look", lambda tensor, looks: False)
        monkeypatch.setattr(integration, "may_look", lambda tensor, looks: False)
    hole, of_hole = torch.zeros(1, 3, dtype=torch.long), torch.tensor([6, 7, 8] if counts_holes else [1, 1, 1])
    ids = torch.cat([texts[0], hole, texts[1], hole], dim=1)
    positions = torch.cat([torch.arange(6), of_hole, torch.arange(5), of_hole])[None]
    mask = torch.tensor([1] * 6 + [0] * 3 + [1] * 5 + [0] * 3)[None]
    found = output_of(model, input_ids=ids, position_ids=positions, attention_mask=mask)
    torch.testing.assert_close(found[:, :6], expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[:, 9:14], expected[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3", "gpt_oss"])
def test_documents_of_a_pack_do_not_see_each_other_in_a_static_cache(family: str) -> None:
    model, given = build(family), packed()
    use(model, "attnreg")
    expected = one_by_one(model, given)
    cache = transformers.StaticCache(config=model.config, max_cache_len=32)
    given = {name: given[name] for name in ("input_ids", "position_ids")}
    found = output_of(model, **given, use_cache=True, past_key_values=cache)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["mistral", "gemma3", "gpt_oss"])
def test_documents_that_begin_in_a_later_call_do_not_see_what_a_cache_holds(family: str) -> None:
    model, given = build(family), packed()
    use(model, "attnreg")
    expected = one_by_one(model, given)
    cache = transformers.DynamicCache(config=model.config)
    # The first call ends inside the first document, and the others begin in the second call.
    parts = [
        {name: given[name][:, some] for name in ("input_ids", "position_ids")} for some in (slice(4), slice(4, None))
    ]
    found = torch.cat([output_of(model, **part, use_cache=True, past_key_values=cache) for part in parts], dim=1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama4", "mistral", "gemma3"])
def test_padding_of_a_pack_told_by_offsets_is_not_seen(family: str) -> None:
    model, inputs = build(family), inputs_of(family, batch=1)
    use(model, "attnreg")
    given = {
        "attention_mask": torch.tensor([[0] * 3 + [1] * (LENGTH - 3)]),
        "cu_seq_lens_q": torch.tensor([0, 8, LENGTH], dtype=torch.int32),
    }
    ids = inputs["input_ids"]
    other = torch.cat([ids[:, :3].flip(1) + 1, ids[:, 3:]], dim=1)
    found, again = (output_of(model, input_ids=each, **given) for each in (ids, other))
    assert torch.equal(found[:, 3:], again[:, 3:])


def test_positions_that_restart_beside_flex_attention_are_refused_where_its_mask_has_no_documents() -> None:
    model, given = build("gemma3"), packed()
    integration.register(full="flex_attention")
    use(model, "attnreg")
    given = {name: given[name] for name in ("input_ids", "position_ids")}
    with pytest.raises(ValueError, match='position_ids restart, and full="flex_attention" cannot be told of documents'):
        model(**given, use_cache=True)


def test_positions_that_jump_ahead_are_one_document_as_for_eager() -> None:
    model, inputs = build("gemma3"), inputs_of("gemma3")
    inputs["position_ids"] = torch.cat([torch.arange(8), torch.arange(20, 31)])[None]
    expected = step(model, inputs, mask_of("holes"))
    use(model, "attnreg")
    assert_same(step(model, inputs, mask_of("holes")), expected)


def test_offsets_beside_a_batch_are_refused() -> None:
    model = build("mistral")
    use(model, "attnreg")
    with pytest.raises(
        ValueError, match=r"cu_seq_lens_q was given with 2 rows of 19 queries .*; packed sequences are one row"
    ):
        model(**inputs_of("mistral"), cu_seq_lens_q=torch.tensor([0, 4, LENGTH], dtype=torch.int32))


@pytest.mark.parametrize("offsets", [[0, 4, LENGTH - 1], [0, 4, LENGTH + 1], [1, LENGTH], [0, 9, 4, LENGTH], []])
@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_offsets_that_do_not_rise_to_the_number_of_tokens_are_refused(family: str, offsets: list[int]) -> None:
    model = build(family)
    use(model, "attnreg")
    with pytest.raises(ValueError, match=rf"cu_seq_lens_q must rise from 0 to {LENGTH}, the number of tokens; got \["):
        model(**inputs_of(family, batch=1), cu_seq_lens_q=torch.tensor(offsets, dtype=torch.int32))


# Caches

ASKED = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize("way", ["static", "beams", "chunked prefill", "no cache", "assisted", "sampled"])
@pytest.mark.parametrize("family", ["mistral", "gemma3", "gpt_oss", "llama4"])
def test_all_ways_to_generate_give_the_tokens_of_eager(family: str, way: str) -> None:
    model = build(family)
    batch = 1 if way == "assisted" else 2
    tokens = {"input_ids": inputs_of(family, batch, 9)["input_ids"], "attention_mask": mask_of("left", batch, 9)}
    more = {
        "static": {"cache_implementation": "static", "disable_compile": True},
        "beams": {"num_beams": 3},
        "chunked prefill": {"prefill_chunk_size": 4},
        "no cache": {"use_cache": False},
        "assisted": {"prompt_lookup_num_tokens": 3},
        "sampled": {"do_sample": True},
    }[way]

    def generated() -> Tensor:
        torch.manual_seed(4)
        return model.generate(**tokens, **{**ASKED, **more})

    expected = generated()
    use(model, "attnreg")
    assert torch.equal(generated(), expected)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_a_compiled_step_with_a_static_cache_decodes_as_eager(family: str, padding: str, quiet: None) -> None:
    model = build(family, **TWO_LAYERS[family])
    tokens = {"input_ids": inputs_of(family, length=9)["input_ids"]}
    tokens["attention_mask"] = mask_of("left", length=9) if padding == "left" else torch.ones(2, 9, dtype=torch.long)
    asked = {**ASKED, "max_new_tokens": 3, "min_new_tokens": 3, "cache_implementation": "static"}
    expected = model.generate(**tokens, **asked)
    use(model, "attnreg")
    assert model._can_compile_fullgraph
    config = transformers.generation.CompileConfig(fullgraph=True, dynamic=False, backend="eager", mode=None)
    config._compile_all_devices = True
    torch._dynamo.utils.counters.clear()
    assert torch.equal(model.generate(**tokens, **asked, compile_config=config), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_a_text_read_in_parts_is_the_text_read_at_once() -> None:
    for family in ("gemma3", "llama4"):
        model, ids = build(family), inputs_of(family, length=17)["input_ids"]
        use(model, "attnreg")
        whole = output_of(model, input_ids=ids)
        cache, parts = transformers.DynamicCache(config=model.config), []
        for part in ids.split((6, 1, 7, 3), dim=1):
            parts.append(output_of(model, input_ids=part, past_key_values=cache))
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)


# Training


@pytest.mark.parametrize("padding", ["none", "left", "holes"])
@pytest.mark.parametrize("family", [*TWO_LAYERS, "modernbert", "gpt_oss"])
def test_a_compiled_step_of_training_is_that_of_eager(family: str, padding: str, quiet: None) -> None:
    model = build(family, **TWO_LAYERS.get(family, {"num_hidden_layers": 2}))
    inputs, mask = inputs_of(family), mask_of(padding)
    expected = step(model, inputs, mask)
    use(model, "attnreg")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = step(compiled, inputs, mask)  # type: ignore[arg-type]
    assert_same((found[0], {name.removeprefix("_orig_mod."): each for name, each in found[1].items()}), expected)


def test_a_model_compiled_for_any_length_takes_another_one(quiet: None) -> None:
    model = build("gemma3", **TWO_LAYERS["gemma3"])
    use(model, "attnreg")
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    for length in (11, 19, 26):
        inputs = inputs_of("gemma3", length=length)
        torch.testing.assert_close(
            output_of(compiled, **inputs, use_cache=False), output_of(model, **inputs), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("padding", ["none", "left"])
def test_an_exported_model_is_the_model(padding: str, quiet: None) -> None:
    model, mask = build("gemma3", **TWO_LAYERS["gemma3"]), mask_of(padding)
    use(model, "attnreg")
    inputs = {**inputs_of("gemma3"), "use_cache": False}
    if mask is not None:
        inputs["attention_mask"] = mask
    exported = torch.export.export(model, (), inputs, strict=False).module()
    is_token = torch.ones(2, LENGTH, dtype=torch.bool) if mask is None else mask.bool()
    found, expected = output_of(exported, **inputs)[is_token], output_of(model, **inputs)[is_token]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "padding", "strict", "traced"),
    [
        ("mistral", "none", False, LENGTH),
        ("mistral", "left", True, LENGTH),
        ("mistral", "left", False, 4),
        ("gemma3", "none", True, 4),
        ("modernbert", "none", False, 4),
        ("modernbert", "left", False, LENGTH),
    ],
)
def test_a_model_exported_for_any_length_takes_texts_shorter_and_longer_than_its_window(
    family: str, padding: str, strict: bool, traced: int, quiet: None
) -> None:
    model = build(family, **TWO_LAYERS.get(family, {"num_hidden_layers": 2}))
    use(model, "attnreg")

    def of(length: int) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": inputs_of(family, length=length)["input_ids"]}
        if padding != "none":
            inputs["attention_mask"] = torch.ones(2, length, dtype=torch.long)
            inputs["attention_mask"][0, : length // 3] = 0
        return inputs if family == "modernbert" else {**inputs, "use_cache": False}

    length = torch.export.Dim("length", min=2, max=60)
    open_sizes = {name: {1: length} if isinstance(each, Tensor) else None for name, each in of(traced).items()}
    program = torch.export.export(model, (), of(traced), dynamic_shapes=open_sizes, strict=strict)
    assert "attnreg.local_attention" in str(program.graph)
    for longer_or_shorter in (2, WINDOW, WINDOW + 1, 12, 40):
        inputs = of(longer_or_shorter)
        is_token = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        found, expected = output_of(program.module(), **inputs)[is_token], output_of(model, **inputs)[is_token]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_model_made_to_see_both_sides_compiles_dense(quiet: None) -> None:
    model = build("gemma3", use_bidirectional_attention=True, **TWO_LAYERS["gemma3"])
    inputs = inputs_of("gemma3")
    expected = output_of(model, **inputs)
    use(model, "attnreg")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(output_of(compiled, **inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "llama4"])
def test_gradient_checkpointing_changes_nothing(family: str) -> None:
    model, inputs = build(family), inputs_of(family)
    expected = step(model, inputs)
    use(model, "attnreg")
    model.train()
    model.gradient_checkpointing_enable()
    assert_same(step(model, inputs), expected)


def test_dropout_is_that_of_attnreg_and_repeats_by_torchs_seed() -> None:
    model = build("mistral", attention_dropout=0.5).train()
    use(model, "attnreg")
    inputs = inputs_of("mistral")
    torch.manual_seed(1)
    first, again = output_of(model, **inputs), output_of(model, **inputs)
    torch.manual_seed(1)
    assert torch.equal(output_of(model, **inputs), first)
    assert not torch.allclose(first, again)
    model.eval()
    assert torch.equal(output_of(model, **inputs), output_of(model, **inputs))


@pytest.mark.parametrize("is_packed", [False, True], ids=["rows", "packed by DataCollatorWithFlattening"])
def test_a_trainer_trains_as_with_eager(is_packed: bool, tmp_path: Any) -> None:
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    weights = []
    for implementation in ("eager", "attnreg"):
        model = build("gemma3")
        use(model, implementation)
        rows = [{"input_ids": each, "labels": each} for each in inputs_of("gemma3", batch=4)["input_ids"].tolist()]
        # Eager can be told of documents by their positions alone.
        collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=implementation == "attnreg")
        asked = transformers.TrainingArguments(tmp_path, max_steps=2, use_cpu=True, report_to=[], save_strategy="no")
        given = {"data_collator": collator} if is_packed else {}
        transformers.Trainer(model, asked, train_dataset=rows, **given).train()
        weights.append(torch.cat([each.detach().flatten() for each in model.parameters()]))
    torch.testing.assert_close(*weights, atol=1e-5, rtol=1e-4)


def test_a_model_sharded_by_fsdp_trains_as_without(tmp_path: Any) -> None:
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, inputs, mask = build("gemma3"), inputs_of("gemma3"), mask_of("left")
    expected = step(model, inputs, mask)
    use(model, "attnreg")
    init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        found = step(model, inputs, mask)
        assert_same((found[0], {name: each.full_tensor() for name, each in found[1].items()}), expected)
    finally:
        destroy_process_group()


# What is asked of a layer


def test_attention_weights_come_from_the_models_own_eager() -> None:
    model, inputs = build("gemma3"), inputs_of("gemma3")
    expected = model(**inputs, output_attentions=True)
    use(model, "attnreg")
    found = model(**inputs, output_attentions=True)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-5)
    assert len(found.attentions) == len(expected.attentions) == 4
    for one, other in zip(found.attentions, expected.attentions):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    integration.register(unsupported="raise")
    with pytest.raises(NotImplementedError, match="Gemma3Attention was asked for its attention weights"):
        model(**inputs, output_attentions=True)


def test_an_argument_that_is_not_known_is_named() -> None:
    model, inputs = build("mistral"), inputs_of("mistral")
    use(model, "attnreg")
    with pytest.raises(TypeError, match=r"MistralAttention was given temperature=0\.5, which attnreg does not know"):
        model(**inputs, temperature=0.5)
    integration.register(ignored=["temperature"])
    assert torch.equal(output_of(model, **inputs, temperature=0.5), output_of(model, **inputs))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt_oss"])
def test_a_mask_of_the_users_own_is_kept_to(family: str, dtype: torch.dtype) -> None:
    model, inputs = build(family), inputs_of(family)
    sees = torch.rand(2, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.5
    sees = sees.tril() | torch.eye(LENGTH, dtype=torch.bool)
    additive = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
    expected = output_of(model, **inputs, attention_mask=additive)
    use(model, "attnreg")
    found = output_of(model, **inputs, attention_mask=sees if dtype is torch.bool else additive)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padding", ["none", "left"])
def test_a_decoder_that_is_made_to_see_both_sides_does_so(padding: str) -> None:
    model, inputs, mask = build("gemma3", use_bidirectional_attention=True), inputs_of("gemma3"), mask_of(padding)
    expected = step(model, inputs, mask)
    use(model, "attnreg")
    assert_same(step(model, inputs, mask), expected)
    kinds = [(layer.kind, layer.path) for layer in integration.explain(model).layers]
    # transformers halves the window of such a model, and adds 1.
    assert kinds == [("window 2 + 1 + 2", "attnreg"), ("full", "sdpa")] * 2


@pytest.mark.parametrize("full", ["sdpa", "eager", "attnreg"])
@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gpt_oss", "cohere2", "modernbert", "t5gemma"])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_full_layers_are_right_wherever_they_go(family: str, full: str, padding: str) -> None:
    model, inputs, mask = build(family), inputs_of(family), mask_of(padding)
    expected = step(model, inputs, mask)
    integration.register(full=full)
    use(model, "attnreg")
    assert_same(step(model, inputs, mask), expected)
    paths = {layer.path for layer in integration.explain(model, **inputs).layers if layer.kind == "full"}
    is_beyond_sdpa = family in ("gemma2", "gpt_oss", "t5gemma")
    assert paths == {"attnreg" if full == "sdpa" and is_beyond_sdpa else full}


def test_a_full_layer_gets_masks_and_arguments_of_the_implementation_it_goes_to() -> None:
    seen: list[Any] = []

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        seen.append((module.config._attn_implementation, mask, module.layer_idx, kwargs["scaling"]))
        return query.transpose(1, 2), None

    transformers.AttentionInterface.register("counting", attention)
    transformers.AttentionMaskInterface.register("counting", lambda **kwargs: kwargs["kv_length"])
    try:
        integration.register(full="counting")
        model = build("gemma3")
        use(model, "attnreg")
        paths = [layer.path for layer in integration.explain(model, **inputs_of("gemma3")).layers]
    finally:
        del transformers.AttentionInterface._global_mapping["counting"]
        del transformers.AttentionMaskInterface._global_mapping["counting"]
    assert paths == ["attnreg", "counting", "attnreg", "counting"]
    assert [each[:3] for each in seen] == [("counting", LENGTH, 1), ("counting", LENGTH, 3)]


def test_options_are_by_name_and_go_back_to_the_first() -> None:
    integration.register("attnreg-reference", backend="torch", full="eager")
    model = build("gemma3")
    use(model, "attnreg-reference")
    first, second, *_ = integration.explain(model).layers
    assert (first.path, second.path) == ("attnreg", "eager")
    assert first.decision is not None
    assert first.decision.backend == "torch"
    use(model, "attnreg")
    assert [layer.path for layer in integration.explain(model).layers] == ["attnreg", "sdpa"] * 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"full": "flash"}, "full must be one of sdpa, eager, attnreg, .*; got 'flash'"),
        ({"unsupported": "ignore"}, 'unsupported must be "dense" or "raise", got \'ignore\''),
        ({"name": "sdpa"}, "name must be a name that transformers does not have, got 'sdpa'"),
        ({"look": 1}, "look must be True or False, got 1"),
        ({"ignored": "temperature"}, "ignored must be a sequence of names, got 'temperature'"),
        ({"backend": "nope"}, "no backend is called 'nope', asked for by register"),
        ({"backend": "torch_block:blocks=4"}, "backend 'torch_block:blocks=4', asked for by register: .*blocks"),
    ],
)
def test_bad_options_are_told(given: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError, BackendError), match=message):
        integration.register(**given)


def test_a_mask_of_the_users_own_is_no_band() -> None:
    model, inputs = build("gemma3"), inputs_of("gemma3")
    use(model, "attnreg")
    inputs["attention_mask"] = torch.zeros(2, 1, LENGTH, LENGTH)
    integration.register(unsupported="raise")
    with pytest.raises(
        NotImplementedError, match=r"has a window and was given a mask .* that the model or the user made"
    ):
        model(**inputs)


def test_a_window_without_a_mask_is_refused_where_no_other_way_is_wanted() -> None:
    layer = build("mistral").model.layers[2].self_attn
    query, key, value = torch.randn(3, 1, 4, 10, 8)
    layer.num_key_value_groups = 1
    attention = integration.AttentionInterface._global_mapping
    asked = {"attention_mask": None, "scaling": 8**-0.5}
    loose, _ = attention["attnreg"](layer, query, key, value, sliding_window=3, **asked)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(loose.transpose(1, 2), expected)
    integration.register(unsupported="raise")
    with pytest.raises(
        NotImplementedError, match=r"MistralAttention of layer 2 has sliding_window=3 and its model made no mask"
    ):
        attention["attnreg"](layer, query, key, value, sliding_window=3, **asked)
    # A window that hides nothing, and none, need no mask.
    for window in (10, None):
        strict, _ = attention["attnreg"](layer, query, key, value, sliding_window=window, **asked)
        torch.testing.assert_close(strict.transpose(1, 2), expected)


def test_positions_of_which_none_goes_on_are_one_document() -> None:
    model, tokens = build("mistral"), torch.randint(3, 60, (1, 6))
    use(model, "attnreg")
    others = tokens.clone()
    others[0, 0] = tokens[0, 0] % 50 + 3

    def changed(positions: list[int], **given: Any) -> list[bool]:
        found, other = (
            model(input_ids=each, position_ids=torch.tensor([positions]), **given).logits for each in (tokens, others)
        )
        return (found != other).any(-1)[0].tolist()

    apart, together = [True] + [False] * 5, [True] * 6
    assert changed([0] * 6, use_cache=False) == apart
    for given in ({"use_cache": True}, {"use_cache": False, "attention_mask": torch.ones(1, 6, dtype=torch.long)}):
        assert changed([0] * 6, **given) == changed([0, 0, 1, 1, 2, 2], **given) == together
        assert changed([0, 0, 0, 1, 2, 3], **given) == apart


def test_a_name_does_not_send_its_full_layers_to_another_of_ours() -> None:
    integration.register("attnreg-reference", backend="torch")
    with pytest.raises(ValueError, match=r"full must be one of .*; got 'attnreg-reference'"):
        integration.register(full="attnreg-reference")


def test_keys_that_a_layer_chose_are_refused() -> None:
    model = build("dots3_note", layer_types=["sliding_attention", "full_attention"] * 2)
    use(model, "attnreg")
    with pytest.raises(
        NotImplementedError, match=r"Dots3NoteTextAttention was given indices=a tensor .*, keys that it chose"
    ):
        model(**inputs_of("dots3_note"))


def test_arguments_of_the_loss_pass() -> None:
    model, inputs = build("mistral"), inputs_of("mistral")
    inputs["labels"] = inputs["input_ids"]
    inputs["shift_labels"] = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    expected = model(**inputs).loss
    use(model, "attnreg")
    torch.testing.assert_close(model(**inputs).loss, expected, atol=1e-5, rtol=1e-5)


def test_a_window_that_a_mask_function_takes_from_a_global_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    config = build("mistral").config
    config.sliding_window, config._attn_implementation = None, "attnreg"
    given = {"config": config, "inputs_embeds": torch.zeros(1, 9, 32), "attention_mask": None, "past_key_values": None}
    for window in (4, 2):
        monkeypatch.setattr(sys.modules[__name__], "WINDOW_OF_OVERLAY", window)
        mask = masking_utils.create_causal_mask(**given, and_mask_function=overlay)
        rows = torch.arange(9)
        expected = (rows <= rows[:, None]) & (rows > rows[:, None] - window)
        assert torch.equal(mask[0, 0] == 0, expected)


WINDOW_OF_OVERLAY = 4


def overlay(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return key > query - WINDOW_OF_OVERLAY


def test_a_window_that_hides_nothing_is_a_full_layer() -> None:
    model, inputs = build("gemma2", attn_logit_softcapping=None), inputs_of("gemma2", length=WINDOW)
    expected = step(model, inputs)
    use(model, "attnreg")
    assert_same(step(model, inputs), expected)
    found = integration.explain(model, **inputs)
    assert [(layer.kind, layer.path) for layer in found.layers] == [("window 5", "sdpa"), ("full", "sdpa")] * 2
    integration.register(full="eager")
    found = integration.explain(model, **inputs)
    assert [(layer.kind, layer.path) for layer in found.layers] == [("window 5", "attnreg"), ("full", "eager")] * 2


def test_explain_names_layers_kinds_paths_and_backends() -> None:
    model = build("llama4")
    use(model, "attnreg")
    with use_backend("torch_block"):
        found = integration.explain(model, batch=2, length=12)
    assert [layer.kind for layer in found.layers] == ["chunks of 5"] * 3 + ["full"]
    assert str(found).splitlines()[0] == "model.layers.0.self_attn: chunks of 5: attnreg (torch_block)"
    use(model, "eager")
    assert "no layer ran" in str(integration.explain(model))
    with pytest.raises(ValueError, match="batch and length must be at least 1, got 1 and 0"):
        integration.explain(model, length=0)


@pytest.mark.parametrize(
    ("family", "wanted"),
    [
        ("t5gemma", "explain(model, input_ids=..., decoder_input_ids=...)"),
        ("mimi", "explain(model, hidden_states=...)"),
    ],
)
def test_explain_says_what_a_model_needs_for_which_tokens_alone_do_not_do(family: str, wanted: str) -> None:
    model = build(family)
    use(model, "attnreg")
    with pytest.raises(ValueError, match=rf"attnreg: explain gave \w+ input_ids alone.*{re.escape(wanted)}"):
        integration.explain(model, length=32)
    # What the model says of arguments that were given is left as it is.
    with pytest.raises((TypeError, ValueError, AttributeError)) as told:
        integration.explain(model, input_ids=torch.ones(1, 4, dtype=torch.long))
    assert "attnreg" not in str(told.value)
    assert integration.explain(model, **inputs_of(family)).layers


@pytest.mark.parametrize("padding", ["left", "right", "holes"])
@pytest.mark.parametrize("family", ["mistral", "modernbert", "llama4", "gpt_oss"])
def test_nothing_hangs_on_what_padded_positions_hold(family: str, padding: str) -> None:
    model, mask = build(family), mask_of(padding)
    use(model, "attnreg")
    ids = inputs_of(family)["input_ids"]
    others = torch.where(mask.bool(), ids, 7)
    found, other = (
        output_of(model, input_ids=ids, attention_mask=mask),
        output_of(model, input_ids=others, attention_mask=mask),
    )
    torch.testing.assert_close(found[mask.bool()], other[mask.bool()], atol=1e-6, rtol=1e-6)
    assert not found.isnan().any()
