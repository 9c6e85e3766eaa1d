"""A plan serves a call again only where the tensors are like those for which it was made."""

from __future__ import annotations

import pytest
import torch

import attnreg
from attnreg import Window, guard
from attnreg.registry import registry

WINDOW = Window(2, 1)
TENSOR = torch.randn(2, 3, 5, 4)

UNLIKE = {
    "shape": lambda: torch.randn(2, 3, 6, 4),
    "dimensions": lambda: torch.randn(3, 5, 4),
    "dtype": lambda: torch.randn(2, 3, 5, 4, dtype=torch.float64),
    "device": lambda: torch.empty(2, 3, 5, 4, device="meta"),
    "layout": lambda: torch.randn(2, 3, 5, 4).to_sparse(),
    "requires_grad": lambda: torch.randn(2, 3, 5, 4, requires_grad=True),
    "class": lambda: torch.nn.Buffer(torch.randn(2, 3, 5, 4)).as_subclass(type("Own", (torch.Tensor,), {})),
    "to be negated": lambda: torch.randn(2, 3, 5, 4, dtype=torch.complex64).conj().imag,
    "no tensor": lambda: None,
}


@pytest.fixture(params=["in C++", "in Python"])
def way(request, monkeypatch):
    if request.param == "in Python":
        monkeypatch.setattr(guard, "_TensorGuards", None)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("unlike", UNLIKE.values(), ids=UNLIKE)
def test_a_tensor_that_differs_in_a_fact_of_the_plan_is_not_alike(way, unlike, place):
    are_alike = guard.guard((TENSOR, TENSOR.clone()))
    others = [torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)]
    assert are_alike(*others)
    others[place] = unlike()
    assert not are_alike(*others)


def test_strides_do_not_count(way):
    are_alike = guard.guard((TENSOR, TENSOR.clone()))
    assert are_alike(torch.randn(2, 5, 3, 4).transpose(1, 2), torch.randn(2, 1, 5, 4).expand(2, 3, 5, 4))


def test_a_tensor_may_be_given_twice():
    are_alike = guard.guard((TENSOR, TENSOR))
    assert are_alike(TENSOR, TENSOR)
    assert are_alike(TENSOR, TENSOR.clone())


def found_without_planning(call, monkeypatch) -> bool:
    """Whether a call finds its plan by a guard."""
    looked_for = []
    with monkeypatch.context() as patched:
        patched.setattr(attnreg.functional, "_find", lambda *_: looked_for.append(1))
        patched.setattr(attnreg.functional, "_watched", lambda *_: (None,))
        call()
    return not looked_for


@pytest.mark.parametrize("number", [0.5, 1], ids=["float", "int"])
def test_calls_seen_before_are_found_by_guards(number, monkeypatch):
    """Of each kind several sizes, under autocast with nothing to cast, one tensor given twice, an int as scale."""
    calls = [
        lambda length=length: attnreg.local_attention(
            *torch.randn(3, 1, 1, length, 4), WINDOW, scale=number, key_lengths=torch.tensor([length])
        )
        for length in range(5, 5 + attnreg.functional.MOST_CALLS)
    ]
    calls.append(lambda: attnreg.local_dot_product(TENSOR, TENSOR, WINDOW))
    for call in calls * 2:
        call()
    assert all(found_without_planning(call, monkeypatch) for call in calls)
    with torch.autocast("cpu", torch.bfloat16):

        def call():
            return attnreg.local_dot_product(TENSOR.bfloat16(), TENSOR.bfloat16(), WINDOW)

        call()
        assert found_without_planning(call, monkeypatch)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_refused_in_a_call_seen_before():
    """Torch's guards end the process where one is given."""
    attnreg.local_dot_product(TENSOR, TENSOR.clone(), WINDOW)
    nested = torch.nested.nested_tensor([torch.randn(3, 5, 4), torch.randn(3, 5, 4)])
    for tensors in ((nested, TENSOR), (TENSOR, nested)):
        with pytest.raises(TypeError, match="nested"):
            attnreg.local_dot_product(*tensors, WINDOW)


def test_blocks_that_ask_for_the_same_backend_share_their_plans():
    def call():
        with attnreg.use_backend("torch"):
            attnreg.local_dot_product(TENSOR, TENSOR.clone(), WINDOW)

    call()
    plans = len(registry.plans)
    for _ in range(5):
        call()
    assert len(registry.plans) == plans
