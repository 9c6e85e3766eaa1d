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
    "no log-sum-exp": (lambda query: query.clone(), "Tensor, not a tuple of output and log_sum_exp"),
    "a wrong log-sum-exp": (lambda query: (query.clone(), query.new_zeros(1, 2, 5, 1)), "log_sum_exp"),
    "a number": (lambda query: (1.0, query.new_zeros(1, 2, 5)), "output float"),
    "nothing": (lambda query: None, "NoneType, not a tuple of output and log_sum_exp"),
    "a list": (lambda query: [query.clone(), query.new_zeros(1, 2, 5)], "list, not a tuple"),
    "too many": (lambda query: (query.clone(), query.new_zeros(1, 2, 5), 0), "3 results, not a tuple of output and"),
    "an empty tuple": (lambda query: (), "0 results, not a tuple"),
    "a sparse tensor": (lambda query: (query.to_sparse(), query.new_zeros(1, 2, 5)), "output a tensor of layout torch.sparse_coo"),
    "a nested tensor": (lambda query: (torch.nested.nested_tensor([query[0]]), query.new_zeros(1, 2, 5)), "output a tensor.*nested"),
    "a tensor to be negated": (lambda query: (torch._neg_view(query.clone()), query.new_zeros(1, 2, 5)), "output .* to be negated"),
    "a parameter": (lambda query: (torch.nn.Parameter(query.clone()), query.new_zeros(1, 2, 5)), "output a Parameter"),
    "a graph of its own": (lambda query: (query.detach().clone().requires_grad_(), query.new_zeros(1, 2, 5)), "output .*requires gradients"),
    "a tensor of inference mode": (lambda query: (of_inference(query), query.new_zeros(1, 2, 5)), "output .*inference mode"),
}  # fmt: skip


def of_inference(tensor):
    with torch.inference_mode():
        return tensor.clone()


GRADIENTS = {
    "a transposed gradient": (lambda query: {"query": query.new_zeros(1, 5, 2, 4)}, "gradient of query .*shape"),
    "a flat gradient": (lambda query: {"query": query.flatten()}, "gradient of query .*shape"),
    "a gradient of another dtype": (lambda query: {"query": query.double()}, "gradient of query .*float64"),
    "no gradient": (lambda query: {}, "left out the gradient of query"),
    "None": (lambda query: {"query": None}, "gradient of query NoneType"),
    "a tuple": (lambda query: (query,), "returned tuple"),
    "a sparse gradient": (lambda query: {"query": query.to_sparse()}, "gradient of query a tensor of layout"),
    "a gradient elsewhere": (lambda query: {"query": query.to("meta")}, "gradient of query .*meta"),
    "its input": (lambda query: {"query": query.detach()}, "gradient of query a view of one of its inputs"),
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


@pytest.mark.parametrize(
    "wrong", [lambda query: query.double(), lambda query: query[:, :1].clone()], ids=["a dtype", "a shape"]
)
def test_every_call_sees_whether_a_result_has_the_shape_and_the_dtype(wrong):
    calls = []

    def attention(query, key, value, window, *, scale):
        calls.append(None)
        output = query.clone() if len(calls) == 1 else wrong(query)
        return output, query.new_zeros(1, 2, 5)

    backend = Backend(name="own", capability=Capability(dtypes={torch.float32}), local_attention=attention)
    with attnreg.register(backend):
        attnreg.local_attention(QUERY, QUERY, QUERY, WINDOW, backend="own")
        with pytest.raises(RuntimeError, match="returned as output a tensor of shape"):
            attnreg.local_attention(QUERY, QUERY, QUERY, WINDOW, backend="own")


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_every_call_of_a_compiled_graph_is_looked_at_whole(compiler):
    """The graph's code reads a result as its fake kernel said that it is, whatever it is."""
    negated = []

    def attention(query, key, value, window, *, scale):
        return torch._neg_view(query.clone()) if negated else query.clone(), query.new_zeros(1, 2, 5)

    backend = Backend(name="own", capability=Capability(dtypes={torch.float32}), local_attention=attention)
    call = torch.compile(
        lambda query: attnreg.local_attention(query, query, query, WINDOW, backend="own") * 1, backend=compiler
    )
    with attnreg.register(backend):
        torch.testing.assert_close(call(QUERY), QUERY)
        negated.append(True)
        with pytest.raises(RuntimeError, match="returned as output a tensor that is still to be negated"):
            call(QUERY)


def test_a_result_that_is_an_optional_argument_is_refused():
    def scores(query, key, window, *, bias, scale):
        return bias

    backend = Backend(name="own", capability=Capability(dtypes={torch.float32}), local_dot_product=scores)
    with attnreg.register(backend), pytest.raises(RuntimeError, match="returned as scores a view of one of its inputs"):
        attnreg.local_dot_product(QUERY, QUERY, WINDOW, bias=torch.zeros(1, 2, 5, 3), backend="own")


@ways
def test_a_differentiable_backend_that_returns_its_input_is_refused(way):
    def attention(query, key, value, window, *, scale):
        return query, query.new_zeros(1, 2, 5)

    with pytest.raises(RuntimeError, match="returned as output a view of one of its inputs"):
        called(way, local_attention=attention, differentiable=True)


def test_two_gradients_in_one_memory_are_refused():
    def attention(query, key, value, window, *, scale):
        return query.clone(), query.new_zeros(1, 2, 5)

    def backward(grad_output, query, key, value, output, log_sum_exp, window, *, scale, needs_grad):
        return dict.fromkeys(needs_grad, torch.zeros_like(query))

    backend = Backend(
        name="own",
        capability=Capability(dtypes={torch.float32}),
        local_attention=attention,
        local_attention_backward=backward,
    )
    with attnreg.register(backend):
        inputs = [QUERY.clone().requires_grad_() for _ in range(3)]
        output = attnreg.local_attention(*inputs, WINDOW, backend="own")
        with pytest.raises(RuntimeError, match="returned one memory as gradients of key and query"):
            torch.autograd.grad(output.sum(), inputs)


@pytest.mark.parametrize("compiler", [None, "aot_eager", "inductor"])
def test_a_log_sum_exp_with_other_strides_is_made_contiguous(compiler):
    """Composed gradients and compiled graphs rely on its order."""
    seen = []

    def attention(query, key, value, window, *, scale):
        return query.clone(), query.new_zeros(5, 2, 1).permute(2, 1, 0)

    def backward(grad_output, query, key, value, output, log_sum_exp, window, *, scale, needs_grad):
        seen.append(log_sum_exp.is_contiguous())
        return {name: torch.zeros_like(query) for name in needs_grad}

    def call(query):
        return attnreg.local_attention(query, QUERY, QUERY, WINDOW, backend="own")

    backend = Backend(
        name="own",
        capability=Capability(dtypes={torch.float32}),
        local_attention=attention,
        local_attention_backward=backward,
    )
    with attnreg.register(backend):
        query = QUERY.clone().requires_grad_()
        run = call if compiler is None else torch.compile(call, backend=compiler)
        run(query).sum().backward()
    assert seen == [True]


class Unwilling(Exception):
    add_note = None


class Full(Exception):
    __notes__ = 5


@pytest.mark.parametrize("raised", [Unwilling("own"), Full("own"), SystemExit("own"), GeneratorExit("own")])
def test_whatever_a_backend_raises_comes_through(raised):
    def attention(query, key, value, window, *, scale):
        raise raised

    with pytest.raises(type(raised)) as got:
        called("eager", local_attention=attention)
    assert got.value is raised
    if isinstance(raised, (SystemExit, GeneratorExit)) and sys.version_info >= (3, 11):
        assert "local_attention of backend 'own' of this process" in raised.__notes__[0]
