"""Results lie in memory as the tensors that they belong to: eager, compiled, and in the fake kernels."""

from __future__ import annotations

import pytest
import torch
from cases import OPS, Case, make_inputs
from composed import composed
from given import make_call, taking
from running import runs

import attnreg
from attnreg import composition
from attnreg.op import ROWS

CASE = Case("order", batch=2, heads=3, kv_heads=3, query_length=21, key_length=21, head_dim=16, value_dim=16)


def contiguous(tensor):
    return tensor.clone()


def lengths_first(tensor):
    """(N, L, H, E) in memory, as models keep it."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def packed(tensor):
    """A slice of packed projections, (N, L, 3, H, E)."""
    return torch.stack([tensor.transpose(1, 2)] * 3, dim=2)[:, :, 1].transpose(1, 2)


def expanded(tensor):
    return tensor[:, :1].expand(tensor.shape)


def heads_last(tensor):
    """(L, N, H, E) in memory, as torch's own multi-head attention keeps it."""
    return tensor.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)


LAYOUTS = [contiguous, lengths_first, packed, expanded, heads_last]


def laid_out(op: str, layout, dtype, device, case: Case = CASE):
    inputs = make_inputs(op, case, dtype, device)
    return [layout(tensor) for tensor in inputs.tensors.values()], inputs.grad


@pytest.mark.parametrize("value_dim", [16, 24])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("backend", "device", "dtype"), runs(torch.float32, torch.bfloat16))
def test_results_and_gradients_lie_as_their_tensors(op, layout, value_dim, backend, device, dtype):
    if backend == "flex" and layout is expanded:
        pytest.skip("FlexAttention's own autograd orders the gradients of expanded tensors")
    case = Case(**{**CASE.__dict__, "value_dim": value_dim})
    tensors, grad = laid_out(op, layout, dtype, device, case)
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = getattr(attnreg, op)(*leaves, case.window, backend=backend)
    expected = attnreg.empty_like(tensors[0], output.shape[-1]).stride()
    assert output.stride() == expected
    gradients = torch.autograd.grad(output, leaves, grad)
    for name, gradient, tensor in zip(ROWS[op].tensors, gradients, tensors):
        assert gradient.stride() == torch.empty_like(tensor).stride(), name


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize(("op", "example", "backend", "device", "dtype"), taking(torch.float32))
def test_so_they_do_whatever_a_call_gives(op, example, layout, backend, device, dtype):
    call = make_call(op, example, dtype, device)
    call = call.leaf(**{name: layout(each.detach()).requires_grad_() for name, each in call.tensors.items()})
    first = next(iter(call.tensors.values()))
    output, gradients = call.with_gradients(backend)
    assert output.stride() == attnreg.empty_like(first, output.shape[-1]).stride()
    for name, tensor in call.leaves.items():
        # Where a dimension of one element lies says nothing: a pack is a batch of one.
        pairs = zip(gradients[name].stride(), torch.empty_like(tensor).stride(), tensor.shape)
        assert all(own == wanted or size == 1 for own, wanted, size in pairs), name


@pytest.mark.parametrize("limit", [composition.LARGEST_BAND, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("of", ["torch", "torch_block"])
def test_so_do_those_of_composed_attention(of, layout, dtype, limit, monkeypatch):
    monkeypatch.setattr(composition, "LARGEST_BAND", limit)
    tensors, grad = laid_out("local_attention", layout, dtype, "cpu")
    bias = layout(torch.randn(2, 3, 21, CASE.window.size)).to(dtype)
    leaves = [tensor.detach().requires_grad_() for tensor in (*tensors, bias)]
    with attnreg.register(composed(of)):
        output = attnreg.local_attention(*leaves[:3], CASE.window, bias=leaves[3], backend="composed")
        gradients = torch.autograd.grad(output, leaves, grad)
    assert output.stride() == attnreg.empty_like(tensors[0]).stride()
    for name, gradient, tensor in zip((*ROWS["local_attention"].tensors, "bias"), gradients, (*tensors, bias)):
        assert gradient.stride() == torch.empty_like(tensor).stride(), name


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["torch", "torch_block"])
def test_a_compiled_call_gives_the_same_strides(op, layout, backend):
    tensors, grad = laid_out(op, layout, torch.float32, "cpu")
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *given: getattr(attnreg, op)(*given, CASE.window, backend=backend), backend="aot_eager", fullgraph=True
    )
    output = compiled(*leaves)
    assert output.stride() == attnreg.empty_like(tensors[0], output.shape[-1]).stride()
    for gradient, tensor in zip(torch.autograd.grad(output, leaves, grad), tensors):
        assert gradient.stride() == torch.empty_like(tensor).stride()


@pytest.mark.parametrize("op", OPS)
def test_a_backend_that_answers_in_another_order_is_brought_into_it(op):
    (block,) = (status.backend for status in attnreg.backends() if status.name == "torch_block")

    def disordered(function):
        def call(*inputs, **options):
            found = function(*inputs, **options)
            if isinstance(found, dict):
                return {name: heads_last(gradient) for name, gradient in found.items()}
            if isinstance(found, tuple):
                return (heads_last(found[0]), *found[1:])
            return heads_last(found)

        return call

    from dataclasses import replace

    functions = {name: disordered(getattr(block, name)) for name in (op, f"{op}_backward")}
    capability = replace(block.capability, takes={"bias", "key_lengths"})
    mine = replace(block, name="disordered", capability=capability, **functions)
    tensors, grad = laid_out(op, lengths_first, torch.float32, "cpu")
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    with attnreg.register(mine):
        output = getattr(attnreg, op)(*leaves, CASE.window, backend="disordered")
        gradients = torch.autograd.grad(output, leaves, grad)
    expected = getattr(attnreg, op)(*leaves, CASE.window, backend="torch_block")
    assert output.stride() == expected.stride()
    assert torch.equal(output, expected)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, leaves, grad)):
        assert gradient.stride() == wanted.stride()
        assert torch.equal(gradient, wanted)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_empty_like_orders_as_torch_does(layout):
    for shape in ((2, 3, 5, 4), (1, 3, 5, 4), (2, 1, 5, 4), (2, 3, 1, 4), (1, 1, 1, 1)):
        tensor = layout(torch.randn(shape))
        assert attnreg.empty_like(tensor).stride() == torch.empty_like(tensor).stride()
        assert attnreg.empty_like(tensor, 7).shape == (*shape[:-1], 7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("layout", [contiguous, lengths_first], ids=lambda layout: layout.__name__)
def test_no_copy_runs_beside_the_kernels_of_attention(layout):
    tensors, grad = laid_out(
        "local_attention", layout, torch.bfloat16, "cuda",
        Case("profiled", batch=2, heads=4, kv_heads=4, query_length=512, key_length=512, head_dim=64, value_dim=64),
    )  # fmt: skip
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    grad = layout(grad)
    window = attnreg.Window.causal(64)

    def step():
        output = attnreg.local_attention(*leaves, window, backend="triton")
        return torch.autograd.grad(output, leaves, grad)

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type.name == "CUDA"]
    assert kernels
    assert all("attention" in name for name in kernels), kernels
