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


def assert_right(tensors_of, window, backend, **arguments):
    """Output and gradients of attention against float64, for two of three draws.

    Where scores are large, gradients hang on the few rows in which two of them are nearly equal, and whether a backend or the
    naive computation rounds these better is luck.
    """
    faults = []
    for seed in range(3):
        faults.append(fault_of(*tensors_of(seed), window, backend, **arguments))
        if faults.count(None) == 2:
            return
    raise AssertionError(faults)


def fault_of(query, key, value, window, backend, bias=None, sinks=None, **arguments):
    """What is beyond the budget, under a random incoming gradient; None where nothing is."""
    tensors = {"query": query, "key": key, "value": value}
    given = {name: each for name, each in (("bias", bias), ("sinks", sinks)) if each is not None}
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in {**tensors, **given}.items()}
    output = attnreg.local_attention(
        *(leaves[name] for name in tensors),
        window,
        **{name: leaves[name] for name in given},
        backend=backend,
        **arguments,
    )
    grad = random(*output.shape, dtype=output.dtype, device=output.device, seed=99)
    gradients = torch.autograd.grad(output, list(leaves.values()), grad)

    def computed(dtype):
        inputs = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        rest = {name: each.double() if dtype == torch.float64 else each for name, each in given.items()}
        return truth(ATTENTION, inputs, window, {**arguments, **rest}, {"output": grad.to(dtype)})

    true, naive = computed(torch.float64), computed(query.dtype)
    fault = budget(true.results["output"], naive.results["output"], query.dtype).fault(output, true.results["output"])
    if fault is not None:
        return f"output: {fault}"
    for name, gradient in zip(leaves, gradients):
        allowed = budget(true.gradients[name], naive.gradients[name], query.dtype, true.gradients.values())
        fault = allowed.fault(gradient, true.gradients[name])
        if fault is not None:
            return f"gradient of {name}: {fault}"
    return None


def random(*shape, dtype, device, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 30.0, 8e2, 2e4, 1e6])
@pytest.mark.parametrize("head_dim", [16, 64, 256])
@pytest.mark.parametrize(("backend", "device", "dtype"), runs(torch.float32, torch.bfloat16))
def test_scores_of_every_magnitude(magnitude, head_dim, with_bias, backend, device, dtype):
    """All of one sign, so that the scores of a row are near each other and far from 0."""
    sizes = (1, 2, 20, head_dim)

    def tensors_of(seed):
        query, key, value = (
            random(*sizes, dtype=torch.float32, device=device, seed=3 * seed + place) for place in range(3)
        )
        return (query.abs() * magnitude / head_dim**0.5).to(dtype), key.abs().to(dtype), value.to(dtype)

    bias = {"bias": torch.zeros(4, device=device)} if with_bias else {}
    assert_right(tensors_of, Window(3, 0), backend, **bias)


# These take D = rowsum(dO * O) of the output that was rounded, unless scores are large: docs/numerics.md.
OF_ROUNDED_OUTPUT = ("triton", "flash", "flash4", "flex")
EXACT = [run for run in runs(torch.bfloat16, torch.float16) if run.values[0] not in OF_ROUNDED_OUTPUT]


@pytest.mark.parametrize("mean", [2.0, 8.0])
@pytest.mark.parametrize(("backend", "device", "dtype"), EXACT)
def test_keys_and_values_far_from_zero(mean, backend, device, dtype):
    """What they have in common has no gradient: ``dP`` and its mean under ``P`` cancel, also where the output is rounded."""

    def tensors_of(seed):
        query, key, value = (
            random(1, 1, 130, 64, dtype=torch.float32, device=device, seed=3 * seed + place) for place in range(3)
        )
        return query.to(dtype), (key + mean).to(dtype), (value + mean).to(dtype)

    assert_right(tensors_of, Window.causal(64), backend)


def taking(name, *dtypes):
    """Where a backend takes an argument."""
    taken = {status.name: status.backend.taken for status in attnreg.backends() if status.backend is not None}
    return [run for run in runs(*dtypes) if name in taken[run.values[0]].get("local_attention", ())]


@pytest.mark.parametrize(
    ("magnitude", "softcap"),
    [(1e-3, 50.0), (1.0, 1.0), (30.0, 50.0), (1e4, 50.0), (1.0, 1e6), (1.0, 1e30), (1.0, 1e300), (1.0, 1e-300)],
)
@pytest.mark.parametrize(("backend", "device", "dtype"), taking("softcap", torch.float32, torch.bfloat16))
def test_soft_caps_of_every_magnitude(magnitude, softcap, backend, device, dtype):
    def tensors_of(seed):
        query, key, value = (
            random(1, 2, 20, 64, dtype=dtype, device=device, seed=3 * seed + place) for place in range(3)
        )
        return query * (magnitude / 8), key, value

    assert_right(tensors_of, Window(3, 2), backend, softcap=softcap)


@pytest.mark.parametrize("sink", [-float("inf"), -1e4, 0.0, 30.0, 1e4])
@pytest.mark.parametrize(("backend", "device", "dtype"), taking("sinks", torch.float32, torch.bfloat16))
def test_sinks_of_every_magnitude(sink, backend, device, dtype):
    """One of -inf is none; one that is above all scores leaves nothing, and no NaN."""

    def tensors_of(seed):
        return [random(1, 2, 20, 64, dtype=dtype, device=device, seed=3 * seed + place) for place in range(3)]

    sinks = torch.tensor([sink, 1.0], dtype=dtype, device=device)
    if abs(sink) < 100:
        assert_right(tensors_of, Window(3, 2), backend, sinks=sinks)
    leaves = [each.requires_grad_() for each in (*tensors_of(0), sinks)]
    output = attnreg.local_attention(*leaves[:3], Window(3, 2), sinks=leaves[3], backend=backend)
    gradients = torch.autograd.grad(output.sin().sum(), leaves)
    assert all(each.isfinite().all() for each in (output, *gradients))
    plain = attnreg.local_attention(*leaves[:3], Window(3, 2), backend=backend)
    if sink < -100:
        torch.testing.assert_close(output[:, 0], plain[:, 0])
        assert gradients[3][0] == 0
    if sink > 100:
        assert not output[:, 0].any()
        assert not any(each[:, 0].any() for each in gradients[:3])


@pytest.mark.parametrize("scale", [1.0, 0.02, -0.5])
@pytest.mark.parametrize(
    ("length", "head_dim", "window"),
    [(40, 128, Window(127, 0)), (5, 256, Window(4, 4)), (40, 256, Window(7, 8)), (33, 80, Window(9, 0))],
)
@pytest.mark.parametrize(("backend", "device", "dtype"), runs(torch.float32))
def test_every_scale_and_head_dim(length, head_dim, window, scale, backend, device, dtype):
    # Of few rows, all may be those that hang on luck.
    batch = max(1, 40 // length)

    def tensors_of(seed):
        sizes = (batch, 2, length, head_dim)
        return [random(*sizes, dtype=dtype, device=device, seed=3 * seed + place) for place in range(3)]

    assert_right(tensors_of, window, backend, scale=scale)


@pytest.mark.parametrize("magnitude", [1.0, 4.0, 64.0])
@pytest.mark.parametrize(("backend", "device", "dtype"), runs(torch.bfloat16, torch.float16))
def test_scores_are_not_rounded_before_the_softmax(magnitude, backend, device, dtype):
    def tensors_of(seed):
        query, key, value = (
            random(1, 2, 48, 32, dtype=dtype, device=device, seed=3 * seed + place) for place in range(3)
        )
        return query * magnitude, key, value

    assert_right(tensors_of, Window(9, 3), backend)


@pytest.mark.parametrize(
    ("backend", "device", "dtype"),
    # The gradients of these are their libraries': dS overflows there.
    [run for run in runs(torch.float16) if run.values[0] not in ("flash", "flash4", "flex")],
)
def test_large_numbers_in_float16_give_no_nan(backend, device, dtype):
    """Scores and gradients of scores are far beyond 65,504; what is added up may be rounded to 16 bits, no more.

    Products of 49,152 are added up exactly in float32, so that scores that are equal stay so.
    """
    length, window, scale = 24, Window(5, 0), 32**-0.5
    signs = [random(1, 1, length, 32, dtype=torch.float32, device=device, seed=seed).sign() for seed in range(3)]
    query, key, value = ((49152 * sign).to(dtype) for sign in signs)
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    output = attnreg.local_attention(*leaves, window, backend=backend)
    assert output.isfinite().all()
    grad = random(*output.shape, dtype=dtype, device=device, seed=3)
    gradients = torch.autograd.grad(output, leaves, grad)
    wide = [tensor.double() for tensor in (query, key, value, grad)]
    named = dict(zip(ATTENTION.tensors, wide))
    true = truth(ATTENTION, named, window, upstream={"output": wide[3]}).gradients
    # The terms that gradients are sums of, in size: dQ of P (|dP| + |D|) |K|, and so on.
    offset = torch.arange(length, device=device) - torch.arange(length, device=device)[:, None]
    visible = (offset <= 0) & (offset >= -5)
    weights = (scale * wide[0] @ wide[1].mT).masked_fill(~visible, -torch.inf).softmax(-1)
    inner = wide[3] @ wide[2].mT
    terms = weights * (inner.abs() + (weights * inner).sum(-1, keepdim=True).abs())
    sizes = (scale * terms @ wide[1].abs(), scale * terms.mT @ wide[0].abs(), weights.mT @ wide[3].abs())
    for name, got, size in zip(ATTENTION.tensors, gradients, sizes):
        assert not got.isnan().any(), name
        allowed = 2**-9 * size
        holds = true[name].abs() + allowed < 65504
        assert ((got - true[name]).abs() <= allowed + 1e-2 * true[name].abs())[holds].all(), name


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


@pytest.mark.parametrize("lengths", [None, [290]])
@pytest.mark.parametrize("length", [3, 300, 320])
@pytest.mark.parametrize(("size", "scale"), [(1e20, None), (1.0, -1e300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["torch", "torch_block"])
def test_scores_that_are_all_below_the_range_are_equal(backend, dtype, size, scale, length, lengths):
    """As those that a product gives are: from the lowest number on."""
    if lengths is not None and length < 290:
        lengths = [2]
    one = torch.ones(1, 1, length, 4, dtype=dtype)
    value = random(1, 1, length, 4, dtype=dtype, device="cpu").requires_grad_()
    query = size * one if scale is None else one
    arguments = {"key_lengths": None if lengths is None else torch.tensor(lengths), "backend": backend}
    output = attnreg.local_attention(
        query, -query if scale is None else one, value, Window(1, 1), scale=scale, **arguments
    )
    (gradient,) = torch.autograd.grad(output.sum(), value)
    zero = torch.zeros_like(one)
    expected = attnreg.local_attention(zero, zero, value, Window(1, 1), **arguments)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), value)[0])


@pytest.mark.parametrize("lengths", [None, [5, 4]])
@pytest.mark.parametrize("below", ["by a bias", "by its product"])
@pytest.mark.parametrize("head_dim", [8, 64])
@pytest.mark.parametrize(("backend", "device", "dtype"), runs(torch.float16, torch.bfloat16))
def test_a_visible_score_below_the_range_is_the_lowest_number_and_hides_nothing(
    below, head_dim, lengths, backend, device, dtype
):
    window = Window(2, 1)
    query = torch.ones(2, 2, 5, head_dim, dtype=dtype, device=device)
    arguments = {"key_lengths": None if lengths is None else torch.tensor(lengths, device=device)}
    key = query
    if below == "by a bias":
        bias = -1e5 if dtype == torch.float16 else -3.4e38
        arguments["bias"] = torch.full((2, 2, 5, 4), bias, dtype=torch.float32, device=device)
    else:
        size = 200.0 if dtype == torch.float16 else 3e19
        query, key = query * -size, query * size
    try:
        scores = attnreg.local_dot_product(query, key, window, backend=backend, **arguments)
    except attnreg.BackendError as error:
        pytest.skip(f"refused: {str(error).splitlines()[1]}")
    visible = attnreg.local_dot_product(
        query * 0, key * 0, window, backend="torch", key_lengths=arguments["key_lengths"]
    )
    assert (scores[visible == 0] == torch.finfo(dtype).min).all()
    assert (scores[visible != 0] == -torch.inf).all()
