"""A backend that returns something else than its op's row says raises an error that names it."""

from __future__ import annotations

import sys

import pytest
import torch

import attnreg
from attnreg import Backend, Capability, Window

QUERY = torch.randn(1, 2, 5, 4)
WINDOW = Window(1, 1)
SHAPE = (1, 2, 5, 4)

RESULTS = {
    "a wrong shape": (lambda query: (query.new_zeros(1, 4, 1, 64), query.new_zeros(1, 2, 5)), r"output .*\(1, 4, 1, 64\)"),
    "a shape that would broadcast": (lambda query: (query.new_zeros(1, 1, 1, 4), query.new_zeros(1, 2, 5)), "output"),
    "a wrong dtype": (lambda query: (query.double(), query.new_zeros(1, 2, 5)), "output .*float64"),
    "a wrong device": (lambda query: (query.to("meta"), query.new_zeros(1, 2, 5)), "output .*meta"),
    "a view of its input": (lambda query: (query[:], query.new_zeros(1, 2, 5)), "output a view"),
    "no log-sum-exp": (lambda query: query.clone(), "1 results, not 2"),
    "a wrong log-sum-exp": (lambda query: (query.clone(), query.new_zeros(1, 2, 5, 1)), "log_sum_exp"),
    "a number": (lambda query: (1.0, query.new_zeros(1, 2, 5)), "output float"),
    "nothing": (lambda query: None, "1 results, not 2"),
}  # fmt: skip

GRADIENTS = {
    "a transposed gradient": (lambda query: {"query": query.new_zeros(1, 5, 2, 4)}, "gradient of query .*shape"),
    "a flat gradient": (lambda query: {"query": query.flatten()}, "gradient of query .*shape"),
    "a gradient of another dtype": (lambda query: {"query": query.double()}, "gradient of query .*float64"),
    "no gradient": (lambda query: {}, "left out the gradient of query"),
    "None": (lambda query: {"query": None}, "gradient of query NoneType"),
    "a tuple": (lambda query: (query,), "returned tuple"),
}

ways = pytest.mark.parametrize("way", ["eager", "aot_eager"])


def called(way, **functions):
    """A call by a backend of these functions, and what was raised."""
    backend = Backend(name="own", capability=Capability(dtypes={torch.float32}), **functions)
    query = QUERY.clone().requires_grad_("local_attention_backward" in functions)

    def call(query):
        return attnreg.local_attention(query, QUERY.clone(), QUERY.clone(), WINDOW, backend="own")

    if way != "eager":
        call = torch.compile(call, backend=way)
    with attnreg.register(backend):
        output = call(query)
        if output.requires_grad:
            output.sum().backward()
    return query.grad


@ways
@pytest.mark.parametrize(("returned", "said"), RESULTS.values(), ids=RESULTS)
def test_a_wrong_result_is_an_error_that_names_the_backend(way, returned, said):
    def attention(query, key, value, window, *, scale):
        return returned(query)

    with pytest.raises(RuntimeError, match=f"backend 'own' of this process: local_attention returned.*{said}"):
        called(way, local_attention=attention)


@ways
@pytest.mark.parametrize(("returned", "said"), GRADIENTS.values(), ids=GRADIENTS)
def test_a_wrong_gradient_is_an_error_that_names_the_backend(way, returned, said):
    def attention(query, key, value, window, *, scale):
        return query.clone(), query.new_zeros(1, 2, 5)

    def backward(grad_output, query, key, value, output, log_sum_exp, window, *, scale, needs_grad):
        return returned(query)

    with pytest.raises(RuntimeError, match=f"backend 'own' of this process: local_attention_backward .*{said}"):
        called(way, local_attention=attention, local_attention_backward=backward)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have no notes before Python 3.11")
def test_what_a_backend_raises_says_whose_it_is():
    def attention(query, key, value, window, *, scale):
        raise KeyError("own trouble")

    with pytest.raises(KeyError, match="own trouble") as raised:
        called("eager", local_attention=attention)
    assert "local_attention of backend 'own' of this process" in raised.value.__notes__[0]
