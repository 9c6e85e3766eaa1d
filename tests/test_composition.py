"""Attention made of two products: how much of the band there is at a time, what they get, and its derivatives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from composed import composed
from given import EXAMPLES, make_call
from given import WINDOW as OF_CALLS
from torch.autograd import forward_ad

import attnreg
from attnreg import Window, composition
from attnreg.op import ATTENTION, DOT_PRODUCT, WEIGHTED_AVERAGE, Argument
from attnreg.testing.oracle import truth

WINDOW = Window.causal(8)
BATCH, HEADS, KV_HEADS, LENGTH = 3, 8, 2, 100
# Of fp32 scores: of one key head's queries, of one sequence, of all.
HEAD, SEQUENCE, ALL = (heads * LENGTH * WINDOW.size * 4 for heads in (HEADS // KV_HEADS, HEADS, BATCH * HEADS))


@pytest.fixture
def bands():
    """The bytes of every band that the products of the backend "composed" make."""
    made = []
    (block,) = (status.backend for status in attnreg.backends() if status.name == "torch_block")

    def local_dot_product(*arguments, **options):
        scores = block.local_dot_product(*arguments, **options)
        made.append(scores.nbytes)
        return scores

    with attnreg.register(composed("torch_block", local_dot_product=local_dot_product)):
        yield made


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (ALL, [ALL]),
        (ALL - 1, [2 * SEQUENCE, SEQUENCE]),
        (SEQUENCE, [SEQUENCE] * BATCH),
        (SEQUENCE - 1, [HEAD] * BATCH * KV_HEADS),
        (1, [HEAD] * BATCH * KV_HEADS),
    ],
)
def test_no_more_of_the_band_is_made_at_a_time_than_the_limit_or_one_key_head(bands, monkeypatch, limit, expected):
    monkeypatch.setattr(composition, "LARGEST_BAND", limit)
    query = torch.randn(BATCH, HEADS, LENGTH, 4, requires_grad=True)
    key, value = (torch.randn(BATCH, KV_HEADS, LENGTH, 4, requires_grad=True) for _ in range(2))
    lengths = torch.tensor([100, 50, 0])
    bias = torch.randn(1, HEADS, 1, WINDOW.size, requires_grad=True)
    inputs = (query, key, value, bias)

    def gradients(backend):
        output = attnreg.local_attention(query, key, value, WINDOW, bias=bias, key_lengths=lengths, backend=backend)
        return output, *torch.autograd.grad(output.square().sum(), inputs)

    for got, whole in zip(gradients("composed"), gradients("torch")):
        torch.testing.assert_close(got, whole, rtol=1e-4, atol=1e-4)
    # Once in the forward, and once more in the backward.
    assert bands == expected * 2


def test_products_without_float32_make_no_attention_of_16_bits():
    """Scores rounded to 16 bits before the softmax would be off by an eighth at 64."""
    wide = composed("torch_block")
    narrow = replace(wide, capability=replace(wide.capability, dtypes={torch.bfloat16}))
    query = torch.randn(1, 1, 6, 4, dtype=torch.bfloat16)
    with attnreg.register(narrow):
        attnreg.local_dot_product(query, query, WINDOW, backend="composed")
        with pytest.raises(attnreg.BackendError, match="products would have to run in float32, which it lacks"):
            attnreg.local_attention(query, query, query, WINDOW, backend="composed")


def test_products_without_backward_make_attention_with_a_bias():
    bare = {"local_dot_product_backward": None, "local_weighted_average_backward": None}
    query = torch.randn(1, 2, 6, 4)
    bias = torch.randn(6, WINDOW.size).masked_fill(torch.rand(6, WINDOW.size) < 0.5, -torch.inf)
    expected = attnreg.local_attention(query, query, query, WINDOW, bias=bias, backend="torch")
    with attnreg.register(composed("torch_block", **bare)):
        output = attnreg.local_attention(query, query, query, WINDOW, bias=bias, backend="composed")
    assert torch.allclose(output, expected, atol=1e-6)


@pytest.mark.parametrize("of", ["torch", "torch_block"])
def test_a_product_gets_the_default_of_what_attention_does_not_have(of, monkeypatch):
    """The arguments are added to the rows of the products alone."""
    slopes, gain = Argument("slopes", dims="H"), Argument("gain", default=lambda head_dim: float(head_dim))
    for op in (DOT_PRODUCT, WEIGHTED_AVERAGE):
        # The row is frozen, its dictionary is not.
        monkeypatch.setitem(op.__dict__, "arguments", (*op.arguments, slopes, gain))
    got = []
    plain = composed(of)

    def taking_more(function):
        def call(*inputs, slopes, gain, **options):
            got.append((slopes, gain))
            return function(*inputs, **options)

        return call

    names = [f"{op}{end}" for op in ("local_dot_product", "local_weighted_average") for end in ("", "_backward")]
    functions = {name: taking_more(getattr(plain, name)) for name in names if getattr(plain, name) is not None}
    capability = replace(plain.capability, takes={"bias", "key_lengths", "slopes", "gain"})
    query = torch.randn(1, 2, 6, 4, requires_grad=True)
    with attnreg.register(replace(plain, capability=capability, **functions)):
        output = attnreg.local_attention(query, query, query, WINDOW, backend="composed")
        (gradient,) = torch.autograd.grad(output.square().sum(), query)
    expected = attnreg.local_attention(query, query, query, WINDOW, backend="torch")
    assert torch.allclose(gradient, torch.autograd.grad(expected.square().sum(), query)[0], atol=1e-5)
    # The head dim is that of a query, which an average does not have.
    assert set(got) == {(None, 4.0), (None, 0.0)}


BETWEEN = ["softcap", "sinks", "dropout"]


@pytest.mark.parametrize("limit", [composition.LARGEST_BAND, 1])
@pytest.mark.parametrize("used", [("output",), ("log_sum_exp",), ("output", "log_sum_exp")], ids="+".join)
@pytest.mark.parametrize("example", EXAMPLES)
@pytest.mark.parametrize("of", ["torch", "torch_block"])
def test_composed_attention_has_all_that_its_products_take_and_what_lies_between_them(
    of, example, used, limit, monkeypatch
):
    monkeypatch.setattr(composition, "LARGEST_BAND", limit)
    (whole,) = (status.backend for status in attnreg.backends() if status.name == of)
    backend = composed(of, capability=whole.capability)
    given = {**EXAMPLES[example]}
    call = make_call("local_attention", example, torch.float64)
    with attnreg.register(backend):
        if not given.keys() & ATTENTION.optional <= backend.taken["local_attention"]:
            with pytest.raises(attnreg.BackendError, match="is given; it takes bias, dropout_p, grad_log_sum_exp"):
                call.results("composed", function=attnreg.local_attention_with_lse)
            return
        results = dict(zip(ATTENTION.results, call.results("composed", function=attnreg.local_attention_with_lse)))
        gradients = torch.autograd.grad(
            [results[name] for name in used], list(call.leaves.values()), [call.upstream[name] for name in used],
            allow_unused=True, materialize_grads=True,
        )  # fmt: skip
    arguments = {name: each.detach() if isinstance(each, torch.Tensor) else each for name, each in call.given.items()}
    tensors = {name: each.detach() for name, each in call.tensors.items()}
    true = truth(ATTENTION, tensors, OF_CALLS, arguments, {name: call.upstream[name] for name in used})
    for name, result in results.items():
        torch.testing.assert_close(result.detach(), true.results[name])
    for name, gradient in zip(call.leaves, gradients):
        torch.testing.assert_close(gradient, true.gradients[name], msg=lambda text, name=name: f"{name}: {text}")


def test_products_alone_have_what_lies_between_them_and_no_more():
    between = {"softcap", "sinks", "dropout_p", "seed", "grad_log_sum_exp"}
    assert composed("torch_block").taken["local_attention"] == between | {"bias", "key_lengths"}
    dot_alone = composed("torch_block", local_weighted_average=None, local_weighted_average_backward=None)
    assert "local_attention" not in dot_alone.taken


def test_an_argument_that_one_product_lacks_is_none_of_attention():
    def dot(query, key, window, *, bias, key_lengths, key_starts, cu_seqlens_q, scale):
        raise AssertionError

    def average(weights, value, window, *, key_lengths):
        raise AssertionError

    capability = attnreg.Capability(dtypes={torch.float32})
    backend = attnreg.Backend(
        name="narrow", capability=capability, local_dot_product=dot, local_weighted_average=average
    )
    assert backend.taken["local_dot_product"] == {"bias", "key_lengths", "key_starts", "cu_seqlens_q"}
    between = {"softcap", "sinks", "dropout_p", "seed", "grad_log_sum_exp"}
    assert backend.taken["local_attention"] == between | {"bias", "key_lengths"}


@pytest.mark.parametrize("example", BETWEEN)
def test_composed_attention_of_16_bits_is_as_exact_with_what_lies_between(example):
    call = make_call("local_attention", example, torch.bfloat16)
    with attnreg.register(composed("torch_block")):
        output, gradients = call.with_gradients("composed")
    expected, wanted = call.with_gradients("torch")
    torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=3e-2, atol=3e-2)


def derivative_by_make_dual(function, tensor):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(tensor, tensor.cos()))).tangent


def derivative_twice_in_reverse(function, tensor):
    return torch.autograd.functional.hessian(lambda each: function(each).sin().sum(), tensor)


TRANSFORMS = {
    "vmap": lambda function, tensor: torch.func.vmap(function)(torch.stack([tensor, tensor.cos()])),
    "vmap of grad": lambda function, tensor: torch.func.vmap(torch.func.grad(lambda each: function(each).sin().sum()))(
        torch.stack([tensor, tensor.cos()])
    ),
    "jvp": lambda function, tensor: torch.func.jvp(function, (tensor,), (tensor.cos(),))[1],
    "jacrev": lambda function, tensor: torch.func.jacrev(function)(tensor),
    "hessian": lambda function, tensor: torch.func.hessian(lambda each: function(each).sin().sum())(tensor),
    "make_dual": derivative_by_make_dual,
    "twice in reverse": derivative_twice_in_reverse,
}


@pytest.mark.parametrize("limit", [composition.LARGEST_BAND, 1])
@pytest.mark.parametrize("lengths", [None, [5, 0]])
@pytest.mark.parametrize("place", [0, 1, 2, 3], ids=["query", "key", "value", "bias"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_attention_of_differentiable_products_has_every_derivative(transform, place, lengths, limit, monkeypatch):
    monkeypatch.setattr(composition, "LARGEST_BAND", limit)
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 5, 3), (2, 2, 6, 3), (2, 2, 6, 2), (4, 5, 4)]
    given = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    hidden = torch.rand(shapes[3], generator=generator) < 0.3
    key_lengths = None if lengths is None else torch.tensor(lengths)

    def function(backend):
        def call(tensor):
            *tensors, bias = (*given[:place], tensor, *given[place + 1 :])
            return attnreg.local_attention(
                *tensors,
                Window(2, 1),
                bias=bias.masked_fill(hidden, -torch.inf),
                key_lengths=key_lengths,
                backend=backend,
            )

        return call

    expected = TRANSFORMS[transform](function("torch"), given[place])
    with attnreg.register(composed("torch")):
        found = TRANSFORMS[transform](function("composed"), given[place])
    assert torch.allclose(found, expected, atol=1e-12)
