"""A backend that is wrongly made is refused where it is made; one that misbehaves when it is asked costs only itself."""

from __future__ import annotations

import itertools

import pytest
import torch

import attnreg
from attnreg import Backend, Capability, Window
from attnreg.registry import registry

QUERY = torch.randn(1, 1, 5, 4)
WINDOW = Window(1, 1)

NONSENSE = [64, 0.5, True, "cuda", b"cuda", "", torch.float32, object(), {}, set(), [], (), {"a": 1}, [None], [[64]], [64.0],
            [True], [0], [-1], ["64"], [torch.int32], ["cuda:0"], ["no such thing!"], [object()], range(0), range(9), lambda: 1]  # fmt: skip
SOUND = {
    "dtypes": [],
    "devices": [],
    "head_dims": [],
    "window_sizes": [],
    "takes": [set(), [], (), range(0)],
    "grouped_heads": [True],
    "unequal_lengths": [True],
}


def dot(query, key, window, *, scale):
    return query.new_zeros((*query.shape[:3], window.size))


@pytest.mark.parametrize(
    ("field", "given"),
    [pair for pair in itertools.product(SOUND, NONSENSE) if not any(pair[1] is each or pair[1] == each for each in SOUND[pair[0]] if type(pair[1]) is type(each))],
    ids=lambda value: value if isinstance(value, str) and value in SOUND else None,
)  # fmt: skip
def test_a_capability_of_nonsense_is_refused_where_it_is_made(field, given):
    with pytest.raises((TypeError, ValueError), match=f"Capability: {field} "):
        Capability(**{"dtypes": {torch.float32}, field: given})


def test_a_capability_keeps_its_own_copy():
    sizes = [4]
    capability = Capability(dtypes=[torch.float32], head_dims=sizes)
    sizes.append(object())
    assert capability.head_dims == {4}
    assert Capability(dtypes=[torch.float32], window_sizes=range(1, 9)).window_sizes == range(1, 9)


def raising(error):
    def question(*_):
        raise error

    return question


MISBEHAVIOUR = [
    {question: raising(error)}
    for question in ("rank", "refuse", "unavailable", "prepare")
    for error in (RuntimeError("trouble"), SystemExit(3), KeyError(), AssertionError())
] + [
    {"rank": lambda problem: float("nan")},
    {"rank": lambda problem: "first"},
    {"refuse": lambda problem: 5},
    {"refuse": lambda: None},
    {"unavailable": lambda: True},
    {"prepare": lambda: object()},
]


@pytest.mark.parametrize("fields", MISBEHAVIOUR, ids=lambda fields: next(iter(fields)))
def test_a_question_that_goes_wrong_refuses_its_backend_alone(fields):
    first = {"rank": -1.0} if "rank" not in fields else {}
    backend = Backend(
        name="wild", capability=Capability(dtypes={torch.float32}), local_dot_product=dot, **{**first, **fields}
    )
    with attnreg.register(backend):
        for name in ("torch", None):
            scores = attnreg.local_dot_product(QUERY, QUERY, WINDOW, backend=name)
            assert scores.isfinite().any()
        with pytest.raises(attnreg.BackendError, match="wild"):
            attnreg.local_dot_product(QUERY, QUERY, WINDOW, backend="wild")
        decision = attnreg.explain(QUERY, QUERY, WINDOW, op="local_dot_product")
        (candidate,) = (each for each in decision.candidates if each.name == "wild")
        assert next(iter(fields)) in candidate.refusals[0]
        assert {status.name for status in attnreg.backends()} >= {"wild", "torch"}


@pytest.mark.parametrize(
    ("field", "given"), [("rank", float("nan")), ("rank", "1"), ("differentiable", 1), ("summary", 5), ("library", 5)]
)
def test_a_backend_of_nonsense_is_refused_where_it_is_made(field, given):
    with pytest.raises(TypeError, match=field):
        Backend(name="own", capability=Capability(dtypes={torch.float32}), local_dot_product=dot, **{field: given})


@pytest.mark.parametrize(
    ("written", "on"), [("", 0), ("0", 0), ("false", 0), ("OFF", 0), ("no", 0), ("1", 1), ("True", 1)]
)
def test_the_switch_of_autotune_is_read_as_it_is_meant(monkeypatch, written, on):
    monkeypatch.setenv("ATTNREG_AUTOTUNE", written)
    assert registry.autotunes is bool(on)


def test_a_switch_that_is_neither_on_nor_off_is_an_error(monkeypatch):
    monkeypatch.setenv("ATTNREG_AUTOTUNE", "perhaps")
    with pytest.raises(ValueError, match="ATTNREG_AUTOTUNE must be 1 or 0, got 'perhaps'"):
        attnreg.local_dot_product(QUERY.double(), QUERY.double(), Window(1, 3))
