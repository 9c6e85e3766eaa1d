"""What users may ask for: one backend, several in order of preference, any but some; each refusal is kept in the trace."""

from __future__ import annotations

import pytest
import torch

import attnreg
from attnreg import Backend, BackendError, Capability, Window
from attnreg.request import parse_wish

WINDOW = Window(1, 1)
QUERY = torch.randn(1, 2, 5, 4)


def painter(name: str, mark: float, **options) -> Backend:
    def local_attention(query, key, value, window, *, scale, **given):
        return torch.full_like(query, mark + given.get("shade", 0.0)), query.new_zeros(query.shape[:3])

    return Backend(
        name=name,
        capability=options.pop("capability", Capability(dtypes={torch.float32}, takes=())),
        local_attention=local_attention,
        **options,
    )


@pytest.fixture(autouse=True)
def painters():
    half = Capability(dtypes={torch.float16}, takes=())
    with (
        attnreg.register(painter("one", 1.0, rank=-2)),
        attnreg.register(painter("two", 2.0, rank=-1, options={"shade": float})),
        attnreg.register(painter("half", 3.0, rank=-3, capability=half)),
    ):
        yield


def argument(wish):
    return attnreg.local_attention(QUERY, QUERY, QUERY, WINDOW, backend=wish)


def block(wish):
    with attnreg.use_backend(wish):
        return attnreg.local_attention(QUERY, QUERY, QUERY, WINDOW)


def module(wish):
    return attnreg.LocalAttention(WINDOW, backend=wish)(QUERY, QUERY, QUERY)


def compiled(wish):
    torch._dynamo.reset()
    return torch.compile(argument, backend="aot_eager", fullgraph=True)(wish)


WAYS = [argument, block, module, compiled]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize(
    ("wish", "mark"),
    [
        ("two", 2.0),
        (["two", "one"], 2.0),
        (["half", "two", "one"], 2.0),
        (("missing", "two"), 2.0),
        ("half; two", 2.0),
        (["half", "two:shade=0.5"], 2.5),
        ("-one", 2.0),
        (["-one"], 2.0),
        ("-missing", 1.0),
        (["half", "one", "-two"], 1.0),
    ],
)
def test_the_first_backend_that_can_run_a_call_is_taken(way, wish, mark):
    for _ in range(2):
        assert way(wish)[0, 0, 0, 0].item() == mark


def test_the_environment_may_ask_for_several(monkeypatch):
    monkeypatch.setenv("ATTNREG_BACKEND", "half;two")
    assert argument(None)[0, 0, 0, 0].item() == 2.0
    monkeypatch.setenv("ATTNREG_BACKEND", "-one")
    assert argument(None)[0, 0, 0, 0].item() == 2.0


def test_the_trace_keeps_every_refusal():
    decision = attnreg.explain(QUERY, QUERY, QUERY, WINDOW, backend=["half", "hafl", "two", "-one", "-tow"])
    assert decision.backend == "two"
    assert "the first of half, hafl, two that can run it, as the argument backend= asks" in str(decision)
    assert "the dtype is float32; it takes float16" in str(decision)
    assert "excluded by the argument backend=" in str(decision)
    assert "hafl, asked for by the argument backend=, is not registered (did you mean 'half'?)" in str(decision)
    assert "-tow, asked for by the argument backend=, excludes nothing: no such backend (did you mean 'two'?)" in str(
        decision
    )


def test_the_trace_keeps_what_is_wrong_with_an_option():
    decision = attnreg.explain(QUERY, QUERY, QUERY, WINDOW, backend=["one:b=1", "two:shade=dark", "two:shade=1"])
    assert (decision.backend, decision.options) == ("two", (("shade", "1"),))
    assert decision.remarks == (
        "one:b=1, asked for by the argument backend=, is passed over: it has no option 'b'; it has none",
        "two:shade=dark, asked for by the argument backend=, is passed over: the option shade is 'dark': "
        "could not convert string to float: 'dark'",
    )
    assert decision.remarks[0] in str(decision)


@pytest.mark.parametrize("way", WAYS[:2], ids=lambda way: way.__name__)
def test_where_none_can_run_it_every_reason_is_given_and_no_other_is_taken(way):
    with pytest.raises(BackendError) as raised:
        way(["half", "two:shade=dark"] if way is argument else ["half", "half"])
    assert "cannot run" in str(raised.value) or "none of the backends" in str(raised.value)
    assert "it takes float16" in str(raised.value)


@pytest.mark.parametrize("name", ["oen", "tow", "Two"])
def test_a_name_that_is_not_there_brings_the_likeliest(name):
    likeliest = {"oen": "one"}.get(name, "two")
    for way in (argument, block):
        with pytest.raises(BackendError, match=rf"no backend is called '{name}', .*\(did you mean '{likeliest}'\?\)"):
            way(name)


@pytest.mark.parametrize("wish", ["", ";", "one;", "-", "- ; one", "-one:shade=1", "one:shade", [""], ["one", ""]])
def test_a_wish_of_another_form_is_an_error(wish):
    with pytest.raises(ValueError, match=r"as NAME|as -NAME|a name is missing|no backend is called"):
        argument(wish)


@pytest.mark.parametrize("text", ["one", "one:a=1,b=2", "one; two:a=1", "-one", "one; -two; -three"])
def test_a_wish_is_written_as_it_is_read(text):
    wish = parse_wish(text)
    assert str(parse_wish(str(wish))) == str(wish)
    assert {str(each) for each in wish.preferred} | {f"-{name}" for name in wish.excluded} == set(text.split("; "))


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("window_size", r"Window\.causal\(n\), Window\.centered\(n\)"),
        ("is_causal", r"Window\.causal\(n\)"),
        ("dropout", "give dropout_p="),
        ("rng_state", "give seed="),
        ("attn_mask", "band_from_dense"),
        ("attention_mask", "key_lengths= or key_starts= for padding"),
        ("softmax_scale", "give scale="),
        ("cu_seqlens", "give cu_seqlens_q="),
        ("cu_seq_lens_q", "give cu_seqlens_q="),
        ("cu_seqlens_kv", "give cu_seqlens_k="),
        ("max_seqlen_q", "leave it out: no length is needed beside the offsets"),
        ("seqused_k", "give key_lengths="),
        ("leftpad_k", "give key_starts="),
        ("cache_position", "give query_starts="),
        ("logits_soft_cap", "give softcap="),
        ("s_aux", r"give sinks=, of shape \(H,\)"),
        ("return_softmax_lse", "call local_attention_with_lse"),
        ("softcaps", "did you mean 'softcap'"),
        ("enable_gqa", "leave it out"),
        ("bais", "did you mean 'bias'"),
        ("something", "it takes query, key, value, window, bias"),
    ],
)
def test_the_names_of_other_libraries_are_answered_with_what_to_write(name, advice):
    for function in (attnreg.local_attention, attnreg.explain):
        with pytest.raises(TypeError, match=rf"local_attention\(\) has no argument '{name}'.*{advice}"):
            function(QUERY, QUERY, QUERY, WINDOW, **{name: 1})


def test_tensors_with_the_length_before_the_heads_are_recognised():
    query, key = torch.randn(1, 6, 2, 4), torch.randn(1, 9, 2, 4)
    with pytest.raises(ValueError, match=r"tensor\.transpose\(1, 2\)"):
        attnreg.local_attention(query, key, key, WINDOW)
