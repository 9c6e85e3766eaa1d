"""What only a GPU shows of the FlashAttention adapters: the library itself, in every memory order, at head dims that it has.

The cases of the one table have head dims whose gradients ``flash4`` refuses.
"""

from __future__ import annotations

import pytest
import torch
from cases import Case, make_inputs
from reference import call, truth

import attnreg
from attnreg import Window
from attnreg.testing.budget import budget

pytestmark = pytest.mark.gpu

OP = "local_attention"


def _runs(name):
    (status,) = (each for each in attnreg.backends() if each.name == name)
    skip = pytest.mark.skipif(status.reason is not None, reason=f"{name}: {status.reason}")
    return pytest.param(name, marks=skip)


NAMES = [_runs("flash"), _runs("flash4")]


def case_of(heads, lengths, head_dim, window, layout="contiguous", **options):
    sizes = {"heads": heads[0], "kv_heads": heads[1], "query_length": lengths[0], "key_length": lengths[1]}
    return Case("adapter", head_dim=head_dim, value_dim=head_dim, window=window, layout=layout, **sizes, **options)


SHAPES = [
    ((4, 4), (300, 300), 64, Window.causal(64)),
    ((4, 2), (300, 411), 64, Window.centered(33)),
    ((6, 1), (129, 129), 128, Window(200, 200)),
    ((2, 2), (200, 700), 128, Window(100, 9)),
    ((2, 2), (411, 400), 96, Window(5, 30)),
    ((2, 1), (70, 70), 256, Window(0, 0)),
    ((2, 2), (1, 50), 64, Window.causal(16)),
]


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided", "expanded", "last_dimension_strided"])
@pytest.mark.parametrize(("heads", "lengths", "head_dim", "window"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("poisoned_memory")
def test_results_are_right_and_lie_as_their_tensors(name, dtype, heads, lengths, head_dim, window, layout):
    case = case_of(heads, lengths, head_dim, window, layout)
    inputs = make_inputs(OP, case, dtype, "cuda")
    output, gradients = call(OP, inputs, window, backend=name)
    (true, true_gradients), (naive, naive_gradients) = (
        truth(OP, given, window) for given in (inputs.to(torch.float64), inputs)
    )
    assert budget(true, naive, dtype).fault(output, true) is None
    assert output.stride() == attnreg.empty_like(inputs.tensors["query"]).stride()
    for which, gradient in gradients.items():
        allowed = budget(true_gradients[which], naive_gradients[which], dtype, true_gradients.values())
        assert allowed.fault(gradient, true_gradients[which]) is None, which
        assert gradient.stride() == attnreg.empty_like(inputs.tensors[which]).stride(), which


@pytest.mark.parametrize("scale", [-0.2, 0.0])
@pytest.mark.parametrize("name", NAMES)
def test_a_scale_that_is_not_above_zero(name, scale):
    case = case_of((2, 2), (200, 200), 64, Window(30, 3), "transposed", scale=scale)
    inputs = make_inputs(OP, case, torch.bfloat16, "cuda")
    output, gradients = call(OP, inputs, case.window, backend=name)
    true, true_gradients = truth(OP, inputs.to(torch.float64), case.window)
    torch.testing.assert_close(output.double(), true, rtol=2e-2, atol=2e-2)
    for which, gradient in gradients.items():
        torch.testing.assert_close(gradient.double(), true_gradients[which], rtol=2e-2, atol=2e-2, msg=which)


@pytest.mark.parametrize("name", NAMES)
def test_keys_that_no_query_sees_may_be_nan_and_get_no_gradient(name):
    case = case_of((4, 2), (100, 700), 64, Window(100, 9), "transposed")
    inputs = make_inputs(OP, case, torch.bfloat16, "cuda")
    expected, right = call(OP, inputs, case.window, backend=name)
    unseen = 700 - 100 - 100
    for which in ("key", "value"):
        inputs.tensors[which][:, :, :unseen] = torch.nan
    output, gradients = call(OP, inputs, case.window, backend=name)
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    for which, gradient in gradients.items():
        torch.testing.assert_close(gradient, right[which], rtol=0, atol=0, msg=which)
    assert not gradients["key"][:, :, :unseen].any()


@pytest.mark.parametrize("heads", [(8, 8), (8, 2)])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_have_the_same_bits_every_time(name, heads):
    case = case_of(heads, (4096, 4096), 128, Window.causal(512), "transposed")
    inputs = make_inputs(OP, case, torch.bfloat16, "cuda")
    _, first = call(OP, inputs, case.window, backend=name)
    for _ in range(4):
        _, again = call(OP, inputs, case.window, backend=name)
        assert all(torch.equal(gradient, first[which]) for which, gradient in again.items())
