"""What layers and configurations are read to claim: lucidrains' buckets, and what a configuration says of one layer alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers_models as families
from torch import nn

from attnreg import Window
from attnreg.integrations.local_attention import LocalAttention, patch
from attnreg.testing import audit_window
from attnreg.testing.audit_claims import reach, read_claim

W, HEADS, DIM = 8, 4, 8
OPTIONS = {"length": 61, "dtypes": (), "train": False}
# By what a LocalAttention of W=8 is given: what it claims.
BUCKETS = {
    "exact, causal": ({"causal": True, "exact_windowsize": True}, "Window(8, 0)"),
    "exact": ({"exact_windowsize": True}, "Window(8, 8)"),
    "exact, two back": ({"exact_windowsize": True, "causal": True, "look_backward": 2}, "Window(16, 0)"),
    "causal": ({"causal": True}, "buckets of 8, 1 before, causal"),
    "both sides": ({}, "buckets of 8, 1 before and 1 after"),
    "two back, none forward": ({"look_backward": 2, "look_forward": 0}, "buckets of 8, 2 before and 0 after"),
    "its own alone": ({"look_backward": 0, "causal": True}, "buckets of 8, 0 before, causal"),
    "shared": ({"shared_qk": True, "causal": True}, "buckets of 8, 1 before, causal, without the own key"),
    "shared, exact": ({"shared_qk": True, "exact_windowsize": True}, "Window(8, 8), without the own key"),
}


class Block(nn.Module):
    def __init__(self, attention):
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Linear(HEADS * DIM, 3 * HEADS * DIM)
        self.attn = attention

    def forward(self, hidden):
        query, key, value = self.project(hidden).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4)
        return hidden + self.attn(query, key, value).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("case", BUCKETS)
def test_attention_by_buckets_is_not_accused(case):
    settings, claim = BUCKETS[case]
    audit = audit_window(Block(LocalAttention(W, autopad=True, dim=DIM, **settings)), **OPTIONS)
    assert audit.ok, str(audit)
    assert claim in str(audit)


@pytest.mark.parametrize("case", BUCKETS)
def test_the_package_is_not_accused(case):
    package = pytest.importorskip("local_attention", reason="lucidrains' local-attention is not installed")
    settings, claim = BUCKETS[case]
    audit = audit_window(Block(package.LocalAttention(W, autopad=True, dim=DIM, **settings)), **OPTIONS)
    assert audit.ok, str(audit)
    assert claim in str(audit)


@pytest.mark.parametrize("is_patched", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_a_transformer_of_the_package_is_not_accused(exact, is_patched):
    package = pytest.importorskip("local_attention", reason="lucidrains' local-attention is not installed")
    sizes = {"num_tokens": 64, "dim": 32, "depth": 1, "max_seq_len": 256, "heads": HEADS, "dim_head": DIM}
    model = package.LocalTransformer(**sizes, local_attn_window_size=W, causal=True, exact_windowsize=exact)
    if is_patched:
        patch(model)
    audit = audit_window(model.eval(), inputs=lambda length: torch.randint(0, 64, (1, length)), **OPTIONS)
    assert audit.ok, str(audit)


class OneMore(LocalAttention):
    def _window(self, *arguments):
        window = super()._window(*arguments)
        return Window(window.left + 1, window.right)


class HalfBuckets(LocalAttention):
    def _in_frames(self, call, width):
        return super()._in_frames(call, width // 2)


@pytest.mark.parametrize(
    ("kind", "settings", "told"),
    [
        (OneMore, {"causal": True, "exact_windowsize": True}, "Window(8, 0) is claimed, Window(9, 0) is seen"),
        (HalfBuckets, {"causal": True}, "buckets of 8, 1 before, causal is claimed: row 8 does not see key 0"),
        (HalfBuckets, {}, "buckets of 8, 1 before and 1 after is claimed: row 0 does not see key 8"),
    ],
    ids=["one key too many", "half of the buckets, causal", "half of the buckets"],
)
def test_buckets_that_lie_are_accused(kind, settings, told):
    audit = audit_window(Block(kind(W, autopad=True, dim=DIM, **settings)), **OPTIONS)
    assert not audit.ok
    assert told in str(audit)


def test_buckets_reach_as_far_as_their_row_that_sees_farthest():
    model = Block(LocalAttention(W, look_backward=2, look_forward=1))
    assert reach(read_claim("attn", model)) == 3 * W - 1


def test_a_window_size_without_buckets_is_the_number_of_keys():
    model = nn.Module()
    model.window_size, model.causal = W, True
    assert read_claim("", model) == Window(W - 1, 0)


def test_what_differs_by_layer_is_read_for_the_layer():
    windows = (5, 9, None)
    by_layer = {place: {"sliding_window": window} for place, window in enumerate(windows)}
    types = ["sliding_attention", "sliding_attention", "full_attention"]
    model = families.build("neomme", num_hidden_layers=3, layer_types=types, per_layer_config=by_layer)
    for place, window in enumerate(windows):
        claim = read_claim(f"layers.{place}.self_attn", model)
        assert claim == Window(window, window) if window else not isinstance(claim, Window)
    for name, _ in model.named_modules():
        read_claim(name, model)


def test_a_model_whose_configuration_says_by_layer_is_audited():
    audit = audit_window(families.build("neomme"), **OPTIONS)
    assert [layer.name for layer in audit.layers if layer.name.endswith("self_attn")]


class Layers(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(nn.Module() for _ in range(2))


def test_a_dictionary_by_layer_is_read_as_it_is_written():
    config = SimpleNamespace(sliding_window=W, per_layer_config={"01": {"sliding_window": 2 * W}})
    model = Layers(config)
    assert read_claim("layers.0", model) == Window(W - 1, 0)
    assert read_claim("layers.1", model) == Window(2 * W - 1, 0)


def test_what_cannot_be_read_is_no_claim():
    class Raises:
        def __getattr__(self, name):
            raise RuntimeError(name)

    model = Layers(Raises())
    for name in ("", "layers.0", "layers.1"):
        assert read_claim(name, model) is None
