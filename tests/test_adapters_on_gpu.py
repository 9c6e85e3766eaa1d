"""What only a GPU shows of the adapters: the library itself, in every memory order, at head dims that it has, and packed.

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
PACKED = [*NAMES, _runs("flex")]


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


OFFSETS = {
    "whole": ((700, 700), [0, 1, 1, 130, 400, 700], None),
    "to_capacity": ((700, 700), [0, 5, 300, 300, 520, 520], None),
    "between": ((700, 700), [40, 200, 201, 650, 650, 650], None),
    "unequal": ((700, 800), [0, 10, 10, 140, 300, 300, 620, 640], [3, 3, 100, 120, 420, 600, 760, 770]),
}


def packed_inputs(lengths, dtype):
    torch.manual_seed(0)
    sizes = {"query": (4, lengths[0]), "key": (2, lengths[1]), "value": (2, lengths[1]), "grad_output": (4, lengths[0])}
    return {
        name: torch.randn(1, length, heads, 64, device="cuda", dtype=dtype).transpose(1, 2)
        for name, (heads, length) in sizes.items()
    }


def packed_results(name, tensors, window, **arguments):
    """Output, log-sum-exp and gradients of a call."""
    leaves = {
        each: tensors[each].detach().requires_grad_() for each in ("query", "key", "value", "sinks") if each in tensors
    }
    inputs = (leaves[each] for each in ("query", "key", "value"))
    if "sinks" in leaves:
        arguments["sinks"] = leaves["sinks"]
    output, log_sum_exp = attnreg.local_attention_with_lse(*inputs, window, **arguments, backend=name)
    gradients = torch.autograd.grad(output, list(leaves.values()), tensors["grad_output"])
    return {"output": output.detach(), "log_sum_exp": log_sum_exp.detach(), **dict(zip(leaves, gradients))}


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [Window(63, 0), Window(30, 7)], ids=str)
@pytest.mark.parametrize("pack", OFFSETS)
@pytest.mark.parametrize("name", PACKED)
@pytest.mark.usefixtures("poisoned_memory")
def test_packed_sequences_are_right_and_take_nothing_of_what_lies_beside_them(name, pack, window, sinks):
    lengths, of_queries, of_keys = OFFSETS[pack]
    offsets = {"cu_seqlens_q": torch.tensor(of_queries, device="cuda")}
    if of_keys is not None:
        offsets["cu_seqlens_k"] = torch.tensor(of_keys, device="cuda", dtype=torch.int32)
    tensors = packed_inputs(lengths, torch.float16)
    if sinks:
        tensors["sinks"] = torch.tensor([0.5, -torch.inf, 30.0, -1.0], device="cuda")
    double = {each: tensor.double() for each, tensor in tensors.items()}
    true, naive = (packed_results("torch", each, window, **offsets) for each in (double, tensors))
    hidden = true["log_sum_exp"] == -torch.inf
    unseen = (true["value"] == 0).all(-1)
    for each in ("query", "grad_output"):
        tensors[each] = tensors[each].masked_fill(hidden[..., None], torch.nan)
    for each in ("key", "value"):
        tensors[each] = tensors[each].masked_fill(unseen[..., None], torch.nan)
    found = packed_results(name, tensors, window, **offsets)
    assert torch.equal(found["log_sum_exp"] == -torch.inf, hidden)
    torch.testing.assert_close(found["log_sum_exp"].double(), true["log_sum_exp"], rtol=1e-3, atol=1e-3)
    gradients = [true[each] for each in ("query", "key", "value")]
    for each in ("output", "query", "key", "value"):
        others = () if each == "output" else gradients
        allowed = budget(true[each], naive[each], torch.float16, *([others] if others else []))
        assert allowed.fault(found[each], true[each]) is None, each
        assert found[each].stride() == attnreg.empty_like(tensors["query" if each == "output" else each]).stride(), each
    if sinks:
        torch.testing.assert_close(found["sinks"].double(), true["sinks"], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", PACKED)
def test_a_graph_of_a_packed_call_reads_its_offsets_when_it_is_replayed(name):
    window, tensors = Window(63, 0), packed_inputs((700, 700), torch.bfloat16)
    offsets = torch.tensor(OFFSETS["whole"][1], device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        packed_results(name, tensors, window, cu_seqlens_q=offsets)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = packed_results(name, tensors, window, cu_seqlens_q=offsets)
    for pack in ("to_capacity", "between", "whole"):
        offsets.copy_(torch.tensor(OFFSETS[pack][1]))
        graph.replay()
        again = packed_results(name, tensors, window, cu_seqlens_q=offsets)
        for each, tensor in captured.items():
            torch.testing.assert_close(tensor, again[each], rtol=0, atol=0, msg=each)
