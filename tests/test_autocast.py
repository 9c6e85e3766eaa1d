"""Autocast casts a call's tensors as it does for matrix products, and nothing inside a backend."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import CASES, OPS, make_inputs
from given import make_call, taking
from reference import call
from running import runs

import attnreg
from attnreg import Window

CASE = next(case for case in CASES if case.name == "key_lengths_with_bias")


def autocast_dtypes(backend: str, device: str):
    import attnreg

    (status,) = (status for status in attnreg.backends() if status.name == backend)
    return [dtype for dtype in (torch.bfloat16, torch.float16) if dtype in status.backend.capability.dtypes]


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("backend", "device", "dtype"), runs(torch.float32))
def test_a_call_under_autocast_is_the_call_with_tensors_cast_by_hand(op, scale, backend, device, dtype):
    for narrow in autocast_dtypes(backend, device):
        inputs = make_inputs(op, CASE, dtype, device)
        first = next(iter(inputs.tensors))
        inputs.tensors[first] = inputs.tensors[first] * scale
        by_hand = inputs.to(narrow)
        if "bias" in inputs.tensors:
            by_hand.tensors["bias"] = inputs.tensors["bias"]
        expected, expected_gradients = call(op, by_hand, CASE.window, backend=backend)
        inputs.grad = inputs.grad.to(narrow)
        with torch.autocast(device, dtype=narrow):
            output, gradients = call(op, inputs, CASE.window, backend=backend)
        assert output.dtype == narrow
        assert torch.equal(output, expected)
        for name, gradient in gradients.items():
            assert torch.equal(gradient, expected_gradients[name].to(gradient.dtype)), name


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("backend", "device", "dtype"), runs(torch.float32))
def test_gradients_taken_under_autocast_are_those_taken_outside(op, backend, device, dtype):
    inputs = make_inputs(op, CASE, dtype, device)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.tensors.items()}
    import attnreg

    arguments = [leaves[name] for name in leaves if name != "bias"]
    options = {"bias": leaves["bias"]} if "bias" in leaves else {}
    output = getattr(attnreg, op)(
        *arguments, CASE.window, **options, key_lengths=inputs.key_lengths, **inputs.options, backend=backend
    )
    expected = torch.autograd.grad(output, list(leaves.values()), inputs.grad, retain_graph=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        got = torch.autograd.grad(output, list(leaves.values()), inputs.grad)
    for gradient, wanted in zip(got, expected):
        assert torch.equal(gradient, wanted)


@pytest.mark.parametrize(("op", "example", "backend", "device", "dtype"), taking(torch.float32))
def test_what_a_call_gives_keeps_its_own_dtype(op, example, backend, device, dtype):
    """A bias and sinks are not cast; their gradients are of their dtype."""
    for narrow in autocast_dtypes(backend, device)[:1]:
        plain = make_call(op, example, dtype, device)
        first = next(iter(plain.upstream))
        upstream = {first: plain.upstream[first].to(narrow)}
        call = replace(plain, upstream=upstream)
        cast = {name: each.detach().to(narrow).requires_grad_() for name, each in plain.tensors.items()}
        expected, gradients = call.leaf(**cast).with_gradients(backend)
        with torch.autocast(device, dtype=narrow):
            output, found = call.with_gradients(backend)
        assert torch.equal(output, expected)
        for name, gradient in found.items():
            assert gradient.dtype == dtype
            assert torch.equal(gradient, gradients[name].to(dtype)), name


@pytest.mark.parametrize("op", OPS)
def test_a_compiled_call_under_autocast_is_an_eager_one(op):
    import attnreg

    inputs = make_inputs(op, CASE, torch.float32)
    first, *others = (tensor for name, tensor in inputs.tensors.items() if name != "bias")

    def run(tensor):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return getattr(attnreg, op)(tensor, *others, CASE.window, key_lengths=inputs.key_lengths)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(first), run(first))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outside = torch.compile(
            lambda tensor: getattr(attnreg, op)(tensor, *others, CASE.window, key_lengths=inputs.key_lengths),
            fullgraph=True,
            backend="aot_eager",
        )
        assert torch.equal(outside(first), run(first))


def test_float64_is_left_alone_and_a_device_without_autocast_is_no_matter():
    import attnreg

    query = torch.randn(1, 2, 5, 4, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attnreg.local_attention(query, query, query, attnreg.Window(2, 1)).dtype == torch.float64
        meta = query.float().to("meta")
        assert attnreg.local_attention(meta, meta, meta, attnreg.Window(2, 1)).dtype == torch.float32


def test_explain_speaks_of_the_call_as_autocast_makes_it():
    tensor = torch.randn(1, 1, 5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        decision = attnreg.explain(tensor, tensor, tensor, Window(1, 1))
    assert decision.problem.dtype is torch.bfloat16
