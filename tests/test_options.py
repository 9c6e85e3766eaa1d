"""A backend's options: declared by it, written behind its name, given to each of its functions."""

from __future__ import annotations

import pytest
import torch

import attnreg
from attnreg import Backend, BackendError, Capability, Window, use_backend

QUERY = torch.randn(1, 2, 6, 4)
WINDOW = Window(2, 1)


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("it takes a number") from None


def _dot_product(query, key, window, *, mark=0.0, sign=1.0, **_):
    return query.new_full((*query.shape[:3], window.size), mark * sign)


def _dot_product_backward(grad_scores, query, key, window, *, needs_grad, mark=0.0, sign=1.0, **_):
    tensors = {"query": query, "key": key}
    return {name: torch.full_like(tensors[name], mark * sign) for name in needs_grad}


@pytest.fixture(autouse=True)
def painter():
    backend = Backend(
        name="painter",
        capability=Capability(dtypes={torch.float32}),
        local_dot_product=_dot_product,
        local_dot_product_backward=_dot_product_backward,
        options={"mark": number, "sign": number},
    )
    with attnreg.register(backend):
        yield


def painted(**options) -> float:
    return attnreg.local_dot_product(QUERY, QUERY, WINDOW, **options)[0, 0, 0, 0].item()


def test_options_reach_the_function_from_wherever_the_backend_is_asked_for(monkeypatch):
    assert painted(backend="painter") == 0.0
    assert painted(backend="painter:mark=2,sign=-1") == -2.0
    with use_backend("painter:mark=3"):
        assert painted() == 3.0
        with use_backend("painter", mark=4, sign=-1):
            assert painted() == -4.0
    monkeypatch.setenv("ATTNREG_BACKEND", "painter:mark=5")
    assert painted() == 5.0


def test_each_set_of_options_has_a_plan_of_its_own():
    for mark in (1.0, 2.0, 1.0, 3.0, 2.0):
        assert painted(backend=f"painter:mark={mark}") == mark


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_backward_gets_the_options_of_its_forward(compiled):
    query = QUERY.clone().requires_grad_()

    def run(query):
        return attnreg.local_dot_product(query, QUERY, WINDOW, backend="painter:mark=7")

    function = torch.compile(run, backend="aot_eager", fullgraph=True) if compiled else run
    function(query).sum().backward()
    assert (query.grad == 7.0).all()


def test_explain_shows_the_options():
    decision = attnreg.explain(QUERY, QUERY, WINDOW, op="local_dot_product", backend="painter:sign=1,mark=2")
    assert (decision.backend, decision.options) == ("painter", (("mark", "2"), ("sign", "1")))
    assert "-> painter:mark=2,sign=1: forced" in str(decision)


@pytest.mark.parametrize(
    ("request_text", "message"),
    [
        ("painter:colour=1", "no option 'colour'; it has mark, sign"),
        ("painter:mark=red", "the option mark is 'red': it takes a number"),
        ("torch:mark=1", "no option 'mark'; it has none"),
        ("painter:mark", "NAME or NAME:OPTION=VALUE"),
        ("painter:", "NAME or NAME:OPTION=VALUE"),
        ("painter:mark=1,mark=2", "given twice"),
        ("nonesuch:mark=1", "no backend is called 'nonesuch'"),
    ],
)
def test_a_bad_option_is_refused_with_what_there_is(request_text, message):
    with pytest.raises(BackendError, match=message):
        painted(backend=request_text)
    with pytest.raises(ValueError, match=message), use_backend(request_text):
        pass


def test_options_must_map_names_to_callables():
    for options in ({"mark": 3}, {"two words": number}, [number]):
        with pytest.raises(TypeError, match="options must map names to callables"):
            Backend(
                name="x",
                capability=Capability(dtypes={torch.float32}),
                local_dot_product=_dot_product,
                options=options,
            )
