"""Derivatives that a backend does not have are refused, by an error that names one that has them, whoever asks and how."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, OPS, make_inputs
from given import PAIRS, make_call, taking
from running import runs
from torch.autograd import forward_ad

import attnreg
from attnreg.op import ROWS

# Made of torch operations, which have every derivative.
DIFFERENTIABLE = {status.name for status in attnreg.backends() if status.backend and status.backend.differentiable}
CASE = next(case for case in CASES if case.name == "causal")


def function_of(op: str, backend: str, device: str):
    """The op as a function of its first tensor, with 0 in place of -inf, and that tensor."""
    inputs = make_inputs(op, CASE, torch.float32, device)
    first, *others = inputs.tensors.values()

    def run(tensor):
        output = getattr(attnreg, op)(tensor, *others, CASE.window, backend=backend)
        return output.masked_fill(output == -torch.inf, 0.0)

    return run, first


def second_by_grad(run, first):
    first = first.requires_grad_()
    loss = run(first).square().sum()
    (gradient,) = torch.autograd.grad(loss, first, create_graph=True)
    return torch.autograd.grad(loss + gradient.square().sum(), first)


def second_by_a_sum(run, first):
    """The incoming gradient of a sum needs no gradient itself."""
    first = first.requires_grad_()
    (gradient,) = torch.autograd.grad(run(first).sum(), first, create_graph=True)
    gradient.sum().backward()


def second_by_backward_inputs(run, first):
    first = first.requires_grad_()
    loss = run(first).square().sum()
    loss.backward(inputs=[first], create_graph=True)
    (loss + first.grad.square().sum()).backward(inputs=[first])


def second_by_functional(run, first):
    return torch.autograd.functional.hvp(lambda x: run(x).square().sum(), first, torch.ones_like(first))


def second_through_an_earlier_result(run, first):
    first = first.requires_grad_()
    (gradient,) = torch.autograd.grad(run(first * 2).sum(), first, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), first)


def forward_mode(run, first):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(run(forward_ad.make_dual(first, torch.ones_like(first)))).tangent.sum()


def forward_mode_of_a_leaf(run, first):
    first = first.requires_grad_()
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(run(forward_ad.make_dual(first, torch.ones_like(first)))).tangent.sum()


ASKS = {
    "grad": second_by_grad,
    "sum": second_by_a_sum,
    "inputs": second_by_backward_inputs,
    "hvp": second_by_functional,
    "earlier": second_through_an_earlier_result,
    "make_dual": forward_mode,
    "make_dual_of_a_leaf": forward_mode_of_a_leaf,
    "jvp": lambda run, first: torch.func.jvp(run, (first,), (torch.ones_like(first),)),
    "jacfwd": lambda run, first: torch.func.jacfwd(lambda x: run(x).sum())(first),
    "func.grad": lambda run, first: torch.func.grad(lambda x: run(x).sum())(first),
    "func.vjp": lambda run, first: torch.func.vjp(run, first),
    "vmap": lambda run, first: torch.func.vmap(run)(first[None]),
    "hessian": lambda run, first: torch.func.hessian(lambda x: run(x).sum())(first),
}


@pytest.mark.parametrize("ask", ASKS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("backend", "device", "dtype"), [run for run in runs(torch.float32) if run.values[0] not in DIFFERENTIABLE]
)
def test_a_derivative_that_a_backend_lacks_is_refused_and_who_has_it_is_named(op, ask, backend, device, dtype):
    run, first = function_of(op, backend, device)
    with pytest.raises(NotImplementedError, match=r'backend="torch"'):
        ASKS[ask](run, first)


@pytest.mark.parametrize("op", OPS)
def test_torch_has_them_all(op):
    """Forward over reverse, against reverse over reverse; and the tangent against a difference."""
    _, first = function_of(op, "torch", "cpu")
    first = first.double()[:1, :1, :5].contiguous()
    others = [tensor.double()[:1, :1, :5] for tensor in list(make_inputs(op, CASE, torch.float32).tensors.values())[1:]]

    def scalar(tensor):
        output = getattr(attnreg, op)(tensor, *others, CASE.window, backend="torch")
        return output.masked_fill(output == -torch.inf, 0.0).sin().sum()

    hessian = torch.func.hessian(scalar)(first)
    reverse = torch.autograd.functional.hessian(scalar, first)
    assert torch.allclose(hessian, reverse, atol=1e-10)
    assert hessian.abs().max() > 1e-3
    direction = torch.randn(first.shape, dtype=first.dtype, generator=torch.Generator().manual_seed(0))
    _, tangent = torch.func.jvp(scalar, (first,), (direction,))
    step = 1e-6
    difference = (scalar(first + step * direction) - scalar(first - step * direction)) / (2 * step)
    assert torch.allclose(tangent, difference, rtol=1e-5)
    batched = torch.func.vmap(scalar)(torch.stack([first, 2 * first]))
    assert torch.allclose(batched, torch.stack([scalar(first), scalar(2 * first)]))


@pytest.mark.parametrize(("op", "example"), PAIRS)
def test_torch_has_them_with_all_that_a_call_may_give(op, example):
    """Forward over reverse against reverse over reverse, by each tensor that has a gradient; and a batch of calls."""
    call = make_call(op, example, torch.float64)
    for name, leaf in call.leaves.items():
        leaf = leaf.detach()

        def scalar(tensor, name=name):
            (output, *_) = call.leaf(**{name: tensor}).results("torch")
            return output.masked_fill(output == -torch.inf, 0.0).sin().sum()

        direction = torch.randn(leaf.shape, dtype=leaf.dtype, generator=torch.Generator().manual_seed(0))
        if name == "bias":  # a hidden slot is hidden all around
            direction = direction.masked_fill(leaf == -torch.inf, 0.0)
        _, forward_over_reverse = torch.func.jvp(torch.func.grad(scalar), (leaf,), (direction,))
        (gradient,) = torch.autograd.grad(
            scalar(variable := leaf.clone().requires_grad_()), variable, create_graph=True
        )
        (reverse,) = torch.autograd.grad(
            (gradient * direction).sum(), variable, allow_unused=True, materialize_grads=True
        )
        torch.testing.assert_close(forward_over_reverse, reverse, msg=name)
        batched = torch.func.vmap(scalar)(torch.stack([leaf, 2 * leaf]))
        torch.testing.assert_close(batched, torch.stack([scalar(leaf), scalar(2 * leaf)]), msg=name)


@pytest.mark.parametrize(
    ("op", "example", "backend", "device", "dtype"),
    [run for run in taking(torch.float32) if run.values[2] not in DIFFERENTIABLE and run.values[1] != "nothing"],
)
def test_each_is_refused_whatever_a_call_gives(op, example, backend, device, dtype):
    call = make_call(op, example, dtype, device)
    *_, name = call.leaves

    def run(tensor):
        (output, *_) = call.leaf(**{name: tensor}).results(backend)
        return output.masked_fill(output == -torch.inf, 0.0)

    for ask in ("grad", "make_dual", "jvp", "vmap"):
        with pytest.raises(NotImplementedError, match=r'backend="torch"'):
            ASKS[ask](run, call.leaves[name].detach())


@pytest.mark.parametrize("backend", ["torch", "torch_block"])
@pytest.mark.parametrize("op", OPS)
def test_a_compiled_call_refuses_second_derivatives_and_forward_mode(op, backend):
    """Torch has no second derivatives of what it compiles, for any backend."""
    run, first = function_of(op, backend, "cpu")
    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        second_by_grad(compiled, first.clone())
    with pytest.raises(NotImplementedError, match="forward-mode"):
        forward_mode(compiled, first.detach())


def test_first_derivatives_are_the_same_where_the_graph_is_kept():
    run, first = function_of("local_attention", "torch_block", "cpu")
    first = first.requires_grad_()
    (kept,) = torch.autograd.grad(run(first).square().sum(), first, create_graph=True)
    (plain,) = torch.autograd.grad(run(first).square().sum(), first)
    assert torch.equal(kept, plain)


@pytest.mark.parametrize("op", OPS)
def test_batched_gradients_are_there_or_refused(op):
    """By torch's older vmap, which is_grads_batched and vectorize=True ask for."""
    query, window = torch.randn(1, 1, 5, 4, requires_grad=True), attnreg.Window(1, 2)
    second = torch.randn(1, 1, 5, 4)

    def call(backend):
        tensors = (query, second, second)[: len(ROWS[op].tensors)]
        return getattr(attnreg, op)(*tensors, window, backend=backend)

    output = call("torch")
    upstream = torch.randn(3, *output.shape)
    batched = torch.autograd.grad(output, query, upstream, is_grads_batched=True, retain_graph=True)[0]
    alone = [torch.autograd.grad(output, query, each, retain_graph=True)[0] for each in upstream]
    torch.testing.assert_close(batched, torch.stack(alone))
    with pytest.raises(attnreg.NotDifferentiable, match=r'is_grads_batched .* backend="torch"'):
        torch.autograd.grad(call("torch_block"), query, upstream, is_grads_batched=True)


@pytest.mark.parametrize("empty", ["queries", "keys", "batch"])
def test_a_call_without_elements_has_all_derivatives_of_torch(empty):
    query = torch.randn(0 if empty == "batch" else 1, 2, 0 if empty == "queries" else 5, 4)
    key = torch.randn(0 if empty == "batch" else 1, 2, 0 if empty == "keys" else 5, 4)

    def call(query, key):
        return attnreg.local_attention(query, key, key, attnreg.Window(1, 1), backend="torch").sum()

    gradients = torch.func.grad(call, argnums=(0, 1))(query, key)
    assert [each.shape for each in gradients] == [query.shape, key.shape]
    assert not any(each.any() for each in gradients)
    _, tangent = torch.func.jvp(call, (query, key), (query, key))
    assert tangent == 0


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("key_lengths", [[3], [5]]),
        ("key_starts", [[0], [4]]),
        ("query_starts", [[-2], [3]]),
        ("cu_seqlens_q", [[0, 1, 5], [0, 4, 4]]),
    ],
)
def test_vmap_over_rows_of_torch(name, numbers):
    query, window = torch.randn(1, 1, 5, 4), attnreg.Window(1, 1)

    def call(given):
        return attnreg.local_attention(query, query, query, window, **{name: given}, backend="torch")

    numbers = torch.tensor(numbers)
    torch.testing.assert_close(torch.vmap(call)(numbers), torch.stack([call(each) for each in numbers]))


def test_vmap_over_seeds_and_sinks_of_torch():
    query, window = torch.randn(1, 2, 5, 4), attnreg.Window(1, 1)

    def call(seed, sinks):
        given = {"dropout_p": 0.5, "seed": seed, "sinks": sinks}
        return attnreg.local_attention(query, query, query, window, **given, backend="torch")

    seeds, sinks = torch.tensor([[3], [5]]), torch.randn(2, 2)
    expected = torch.stack([call(*each) for each in zip(seeds, sinks)])
    torch.testing.assert_close(torch.vmap(call)(seeds, sinks), expected)
    assert not torch.equal(expected[0] == 0, expected[1] == 0)
