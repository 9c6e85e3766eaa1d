"""Every result and gradient of every backend is within the budget at every magnitude of the scores."""

from __future__ import annotations

import pytest
import torch
from running import runs

import attnreg
from attnreg import Window
from attnreg.op import ROWS
from attnreg.testing.budget import budget
from attnreg.testing.oracle import truth

ATTENTION = ROWS["local_attention"]


def assert_right(query, key, value, window, backend, **arguments):
    """Output and gradients of attention against float64, under a random gradient."""
    tensors = {"query": query, "key": key, "value": value}
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    bias = arguments.pop("bias", None)
    if bias is not None:
        leaves["bias"] = bias.detach().requires_grad_()
    output = attnreg.local_attention(
        *(leaves[name] for name in tensors), window, bias=leaves.get("bias"), backend=backend, **arguments
    )
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(output.shape, generator=generator).to(output)
    gradients = torch.autograd.grad(output, list(leaves.values()), grad)

    def computed(dtype):
        given = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        rest = {**arguments, **({} if bias is None else {"bias": bias.double() if dtype == torch.float64 else bias})}
        return truth(ATTENTION, given, window, rest, {"output": grad.to(dtype)})

    true, naive = computed(torch.float64), computed(query.dtype)
    fault = budget(true.results["output"], naive.results["output"], query.dtype).fault(output, true.results["output"])
    assert fault is None, f"output: {fault}"
    for name, gradient in zip(leaves, gradients):
        allowed = budget(true.gradients[name], naive.gradients[name], query.dtype, true.gradients.values())
        fault = allowed.fault(gradient, true.gradients[name])
        assert fault is None, f"gradient of {name}: {fault}"


def random(*shape, dtype, device, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 30.0, 8e2, 2e4, 1e6])
@pytest.mark.parametrize("head_dim", [16, 64, 256])
@pytest.mark.parametrize(("backend", "device", "dtype"), runs(torch.float32, torch.bfloat16))
def test_scores_of_every_magnitude(magnitude, head_dim, with_bias, backend, device, dtype):
    """All of one sign, so that the scores of a row are near each other and far from 0."""
    sizes = (1, 2, 20, head_dim)
    query, key = (random(*sizes, dtype=torch.float32, device=device, seed=seed).abs() for seed in (0, 1))
    query = (query * magnitude / head_dim**0.5).to(dtype)
    bias = {"bias": torch.zeros(1, device=device)} if with_bias else {}
    assert_right(
        query, key.to(dtype), random(*sizes, dtype=dtype, device=device, seed=2), Window(3, 0), backend, **bias
    )


@pytest.mark.parametrize("scale", [1.0, 0.02, -0.5])
@pytest.mark.parametrize(
    ("length", "head_dim", "window"),
    [(40, 128, Window(127, 0)), (5, 256, Window(4, 4)), (40, 256, Window(7, 8)), (33, 80, Window(9, 0))],
)
@pytest.mark.parametrize(("backend", "device", "dtype"), runs(torch.float32))
def test_every_scale_and_head_dim(length, head_dim, window, scale, backend, device, dtype):
    tensors = [random(1, 2, length, head_dim, dtype=dtype, device=device, seed=seed) for seed in range(3)]
    assert_right(*tensors, window, backend, scale=scale)


@pytest.mark.parametrize("magnitude", [1.0, 4.0, 64.0])
@pytest.mark.parametrize(("backend", "device", "dtype"), runs(torch.bfloat16, torch.float16))
def test_scores_are_not_rounded_before_the_softmax(magnitude, backend, device, dtype):
    query, key, value = (random(1, 2, 48, 32, dtype=dtype, device=device, seed=seed) for seed in range(3))
    assert_right(query * magnitude, key, value, Window(9, 3), backend)


@pytest.mark.parametrize(("backend", "device", "dtype"), runs(torch.float16))
def test_large_numbers_in_float16_give_no_nan(backend, device, dtype):
    """Scores and gradients of scores are far beyond 65,504; what the naive computation in float32 can hold, holds."""
    signs = [random(1, 1, 24, 32, dtype=torch.float32, device=device, seed=seed).sign() for seed in range(3)]
    tensors = dict(zip(ATTENTION.tensors, ((6e4 * sign).to(dtype) for sign in signs)))
    leaves = [tensor.detach().requires_grad_() for tensor in tensors.values()]
    output = attnreg.local_attention(*leaves, Window(5, 0), backend=backend)
    assert output.isfinite().all()
    grad = random(*output.shape, dtype=dtype, device=device, seed=3)
    gradients = torch.autograd.grad(output, leaves, grad)
    true, naive = (
        truth(
            ATTENTION,
            {name: tensor.to(wide) for name, tensor in tensors.items()},
            Window(5, 0),
            upstream={"output": grad.to(wide)},
        ).gradients
        for wide in (torch.float64, torch.float32)
    )
    for name, got in zip(tensors, gradients):
        fits = true[name].abs() < 65504
        noise = float((naive[name] - true[name])[fits].abs().max())
        allowed = 8 * noise + 1e-2 * float(true[name][fits].abs().max())
        assert not got.isnan().any(), name
        assert float((got - true[name])[fits].abs().max()) <= allowed, name


@pytest.mark.parametrize("bound", [-1e300, -1.7e308, -3.5e38, 1e300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["torch", "torch_block", "triton"])
def test_a_wide_bias_beyond_the_narrow_range_hides_nothing(bound, dtype, backend):
    """The same finite number for a whole row: its average is uniform."""
    if not any(status.name == backend and status.runs_here for status in attnreg.backends()):
        pytest.skip(f"{backend} does not run here")
    device = "cuda" if torch.cuda.is_available() and backend == "triton" else "cpu"
    query, key = (torch.zeros(1, 1, 6, 16, dtype=dtype, device=device) for _ in range(2))
    value = random(1, 1, 6, 16, dtype=dtype, device=device)
    bias = torch.full((1, 1, 6, 3), bound, dtype=torch.float64, device=device)
    output = attnreg.local_attention(query, key, value, Window(1, 1), bias=bias, backend=backend)
    expected = attnreg.local_attention(query, key, value, Window(1, 1), backend="torch")
    assert torch.allclose(output, expected, atol=1e-2 if dtype == torch.bfloat16 else 1e-6)
