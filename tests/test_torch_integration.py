"""The ops are citizens of torch: opcheck, compile, fake tensors, autocast, streams, graphs, memory."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from cases import CASES, OPS, Case, make_inputs
from given import PAIRS, WINDOW, make_call, taking
from reference import call, truth
from running import runs

import attnreg
from attnreg import Window
from attnreg.op import ROWS

CASES_OF = {case.name: case for case in CASES}
GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def op_calls(op: str, case: Case, device: str, dtype: torch.dtype, backend: str):
    """The torch.library calls, forward and backward, that one public call makes."""
    inputs = make_inputs(op, case, dtype, device)
    tensors, window = inputs.tensors, case.window
    given = {"bias": tensors.pop("bias", None), "key_lengths": inputs.key_lengths, "scale": 0.5}
    asked = (window.left, window.right, backend)
    yield from forward_and_backward(op, tensors, given, asked, (inputs.grad, *[None] * len(ROWS[op].incoming)))


def forward_and_backward(op, tensors, given, asked, grads):
    row = ROWS[op]
    arguments = [given.get(argument.name) for argument in row.arguments]
    needs_grad = [name for name in row.differentiable if name in tensors or given.get(name) is not None]
    all_results = any(grad is not None for grad in grads[1:])
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors.values()]
    yield getattr(torch.ops.attnreg, op).default, (*leaves, *arguments, *asked, True, all_results)
    plain = [tensor.detach() for tensor in tensors.values()]
    *results, ticket = getattr(torch.ops.attnreg, op).default(*plain, *arguments, *asked, False, False)
    saved = [*plain, *(results if op == "local_attention" else [])]
    backward = getattr(torch.ops.attnreg, f"{op}_backward").default
    yield backward, (*grads, *saved, *arguments, *asked, ticket, needs_grad)


def opchecks(backend: str) -> list[str]:
    """All of torch's. Under the mode of its schema test torch compiles nothing, and FlexAttention is nothing uncompiled."""
    schema = [] if backend == "flex" else ["test_schema"]
    return [*schema, "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]


@pytest.mark.parametrize("case", [CASES_OF["causal"], CASES_OF["key_lengths_with_bias"], CASES_OF["no_key"]], ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("backend", "device", "dtype"), runs(torch.float32))
def test_opcheck_passes_on_every_op_forward_and_backward(op, case, backend, device, dtype):
    call(op, make_inputs(op, case, dtype, device), case.window, backend=backend)
    for function, arguments in op_calls(op, case, device, dtype, backend):
        torch.library.opcheck(function, arguments, test_utils=opchecks(backend))


@pytest.mark.parametrize(("op", "example"), PAIRS)
def test_opcheck_passes_with_all_that_a_call_may_give(op, example):
    call = make_call(op, example)
    given = {"scale": 0.5, **call.given}
    given = {name: each.detach() if isinstance(each, torch.Tensor) else each for name, each in given.items()}
    asked = (WINDOW.left, WINDOW.right, "torch")
    for function, arguments in forward_and_backward(op, call.tensors, given, asked, tuple(call.upstream.values())):
        torch.library.opcheck(function, arguments, test_utils=opchecks("torch"))


@pytest.mark.parametrize(("op", "example", "backend", "device", "dtype"), taking(torch.float32))
def test_a_compiled_call_gives_the_same_bits_whatever_it_gives(op, example, backend, device, dtype):
    call = make_call(op, example, dtype, device)
    expected, gradients = call.with_gradients(backend)
    torch._dynamo.reset()
    function = torch.compile(getattr(attnreg, op), fullgraph=True, backend="aot_eager")
    output, found = call.with_gradients(backend, function=function)
    assert torch.equal(output, expected)
    for name, gradient in found.items():
        assert torch.equal(gradient, gradients[name]), name


@pytest.mark.parametrize(("op", "example"), PAIRS)
def test_fake_and_meta_tensors_have_the_shapes_of_real_ones_whatever_a_call_gives(op, example):
    from torch._subclasses.fake_tensor import FakeTensorMode

    call = make_call(op, example)
    real, gradients = call.with_gradients()

    def converted(convert):
        other = call.leaf(**{name: convert(each) for name, each in call.everything.items()})
        return replace(other, upstream={name: convert(each) for name, each in call.upstream.items()})

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = converted(mode.from_tensor).with_gradients()
    meta = converted(lambda tensor: tensor.detach().to("meta").requires_grad_(tensor.requires_grad)).with_gradients()
    for found, found_gradients in (fake, meta):
        assert (found.shape, found.dtype, found.stride()) == (real.shape, real.dtype, real.stride())
        for name, gradient in gradients.items():
            assert (found_gradients[name].shape, found_gradients[name].dtype) == (gradient.shape, gradient.dtype)


@pytest.mark.parametrize(("op", "example"), PAIRS)
def test_checkpointing_and_a_trace_give_the_same_whatever_a_call_gives(op, example):
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils.checkpoint import checkpoint

    call = make_call(op, example)
    expected, gradients = call.with_gradients()

    def run(*tensors):
        return call.leaf(**dict(zip(call.everything, tensors))).results()[0]

    output = checkpoint(run, *call.everything.values(), use_reentrant=False)
    assert torch.equal(output, expected)
    found = torch.autograd.grad(output, list(call.leaves.values()), next(iter(call.upstream.values())))
    for name, gradient in zip(gradients, found):
        assert torch.equal(gradient, gradients[name]), name
    tensors = [each.detach() for each in call.everything.values()]
    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(run, tracing_mode=mode)(*tensors)
        assert f"attnreg.{op}" in graph.code
        assert torch.equal(graph(*tensors), expected)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("backend", "device", "dtype"), runs(torch.float32, torch.bfloat16))
def test_a_compiled_call_without_graph_breaks_gives_the_same_values_and_gradients(op, backend, device, dtype):
    case = CASES_OF["everything"]
    inputs = make_inputs(op, case, dtype, device)
    expected, expected_gradients = call(op, inputs, case.window, backend=backend)
    torch._dynamo.reset()
    eager = getattr(attnreg, op)
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    try:
        setattr(attnreg, op, compiled)
        output, gradients = call(op, inputs, case.window, backend=backend)
    finally:
        setattr(attnreg, op, eager)
    assert torch.equal(output, expected)
    for name, gradient in gradients.items():
        # A broadcast bias's is a sum, which the compiled call may add up in another order.
        expected, share = expected_gradients[name], 1e-2 if dtype == torch.bfloat16 else 1e-5
        assert torch.allclose(gradient, expected, rtol=share, atol=share * float(expected.abs().max())), name


def test_a_compiled_module_serves_many_lengths_and_keeps_asking_for_its_backend():
    module = attnreg.LocalAttention(Window(2, 1))
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 9, 17):
        query = torch.randn(1, 2, length, 4)
        assert torch.allclose(compiled(query, query, query), module(query, query, query))


def test_a_compiled_call_chooses_its_backend_when_the_graph_runs():
    def local_dot_product(query, key, window, *, bias, key_lengths, scale):
        return query.new_full((*query.shape[:3], window.size), 5.0)

    mine = attnreg.Backend(
        name="mine",
        capability=attnreg.Capability(dtypes={torch.float32}),
        local_dot_product=local_dot_product,
    )
    query = torch.randn(1, 1, 4, 4)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda query: attnreg.local_dot_product(query, query, Window(1, 1)), fullgraph=True, backend="aot_eager"
    )
    before = compiled(query)
    with attnreg.register(mine), attnreg.use_backend("mine"):
        assert (compiled(query) == 5.0).all()
    assert torch.equal(compiled(query), before)


@pytest.mark.parametrize(("backend", "device", "dtype"), runs(torch.float32))
def test_a_compiled_call_checks_and_prepares_key_lengths_as_an_eager_one(backend, device, dtype):
    query = torch.randn(2, 2, 6, 16, dtype=dtype, device=device)
    torch._dynamo.reset()

    def attend(lengths):
        return attnreg.local_attention(query, query, query, Window(2, 1), key_lengths=lengths, backend=backend)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for lengths_dtype in (torch.uint8, torch.int64):
        lengths = torch.tensor([6, 0, 3, 0], dtype=lengths_dtype, device=device)[::2]
        assert torch.equal(compiled(lengths), attend(lengths))
    if device == "cpu":
        with pytest.raises(ValueError, match=r"key_lengths: every length must lie in 0\.\.6"):
            compiled(torch.tensor([7, 3]))


@pytest.mark.parametrize("op", OPS)
def test_fake_tensors_and_meta_shapes_agree_with_real_ones(op):
    from torch._subclasses.fake_tensor import FakeTensorMode

    case = CASES_OF["everything"]
    real, gradients = call(op, make_inputs(op, case, torch.float32), case.window)
    inputs = make_inputs(op, case, torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        inputs.tensors = {name: mode.from_tensor(tensor) for name, tensor in inputs.tensors.items()}
        inputs.grad, inputs.key_lengths = mode.from_tensor(inputs.grad), mode.from_tensor(inputs.key_lengths)
        fake, fake_gradients = call(op, inputs, case.window)
    assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
    for name, gradient in gradients.items():
        assert fake_gradients[name].shape == gradient.shape


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_a_traced_call_keeps_the_op_in_its_graph(tracing_mode):
    from torch.fx.experimental.proxy_tensor import make_fx

    query = torch.randn(1, 2, 6, 4)
    graph = make_fx(lambda q: attnreg.local_attention(q, q, q, Window(2, 1)), tracing_mode=tracing_mode)(query)
    assert "attnreg.local_attention" in graph.code
    assert torch.allclose(graph(query), attnreg.local_attention(query, query, query, Window(2, 1)))


def test_gradients_can_be_taken_by_autograd_grad_and_inside_checkpointing():
    from torch.utils.checkpoint import checkpoint

    query = torch.randn(1, 2, 6, 4, requires_grad=True)

    def loss(query):
        return attnreg.local_attention(query, query, query, Window(2, 1)).square().sum()

    (expected,) = torch.autograd.grad(loss(query), query)
    (checkpointed,) = torch.autograd.grad(checkpoint(loss, query, use_reentrant=False), query)
    assert torch.equal(checkpointed, expected)


def test_differentiating_twice_names_what_is_missing_where_a_backend_cannot():
    query = torch.randn(1, 2, 6, 4, requires_grad=True)
    output = attnreg.local_attention(query, query, query, Window(2, 1), backend="torch_block")
    (gradient,) = torch.autograd.grad(output.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("op", OPS)
def test_autocast_casts_as_it_does_for_matrix_products(op):
    case = CASES_OF["causal"]
    inputs = make_inputs(op, case, torch.float32)
    inputs.grad = inputs.grad.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):  # a known kind of call must be cast like a new one
            output, gradients = call(op, inputs, case.window)
            assert output.dtype == torch.bfloat16
            assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
        mixed = make_inputs(op, case, torch.float32)
        first = next(iter(mixed.tensors))
        mixed.tensors[first] = mixed.tensors[first].bfloat16()
        mixed.grad = mixed.grad.bfloat16()
        assert call(op, mixed, case.window)[0].dtype == torch.bfloat16
    assert call(op, make_inputs(op, case, torch.float32), case.window)[0].dtype == torch.float32


def test_no_grad_and_inference_mode_need_no_backward():
    def local_dot_product(query, key, window, *, bias, key_lengths, scale):
        return query.new_zeros((*query.shape[:3], window.size))

    forward_only = attnreg.Backend(
        name="forward_only",
        capability=attnreg.Capability(dtypes={torch.float32}),
        local_dot_product=local_dot_product,
    )
    query = torch.randn(1, 1, 4, 4, requires_grad=True)
    with attnreg.register(forward_only):
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                attnreg.local_dot_product(query, query, Window(1, 1), backend="forward_only")
        with pytest.raises(attnreg.BackendError, match="gradients are needed"):
            attnreg.local_dot_product(query, query, Window(1, 1), backend="forward_only")


@pytest.mark.parametrize("name", ["query", "bias"])
def test_each_gradient_alone_is_enough_to_need_gradients(name):
    tensors = {"query": torch.randn(1, 1, 4, 4), "bias": torch.randn(4)}
    tensors[name].requires_grad_()
    output = attnreg.local_attention(
        tensors["query"], torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4), Window(2, 1), bias=tensors["bias"]
    )
    output.sum().backward()
    assert tensors[name].grad.shape == tensors[name].shape


def test_the_gradient_of_a_bias_has_its_own_shape():
    query = torch.randn(2, 3, 5, 4)
    for shape in [(), (4,), (5, 1), (3, 1, 4), (1, 3, 5, 4), (2, 1, 1, 1)]:
        bias = torch.randn(shape, requires_grad=True)
        attnreg.local_attention(query, query, query, Window(2, 1), bias=bias).sum().backward()
        assert bias.grad.shape == bias.shape


def gpu_runs(*dtypes: torch.dtype):
    return [run for run in runs(*dtypes) if run.values[1] == "cuda" and run.values[0] != "torch"]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("backend", "device", "dtype"), gpu_runs(torch.float32, torch.bfloat16))
def test_a_cuda_graph_replays_forward_and_backward(op, backend, device, dtype):
    case = CASES_OF["everything"]
    inputs = make_inputs(op, case, dtype, device)
    expected, expected_gradients = call(op, inputs, case.window, backend=backend)
    static = make_inputs(op, case, dtype, device, seed=1)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(op, static, case.window, backend=backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, gradients = call(op, static, case.window, backend=backend)
    for name, tensor in inputs.tensors.items():
        static.tensors[name].copy_(tensor)
    static.grad.copy_(inputs.grad)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(output, expected)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected_gradients[name]), name


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("backend", "device", "dtype"), gpu_runs(torch.bfloat16))
def test_work_goes_to_the_current_stream(op, backend, device, dtype):
    """A long kernel fills the inputs on a side stream; a launch on any other stream would read them too early."""
    case = Case("stream", batch=4, heads=8, kv_heads=8, query_length=512, key_length=512, head_dim=64, value_dim=64)
    inputs = make_inputs(op, case, dtype, device)
    expected, expected_gradients = call(op, inputs, case.window, backend=backend)
    late = make_inputs(op, case, dtype, device, seed=2)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        for name, tensor in inputs.tensors.items():
            late.tensors[name].copy_(tensor)
        late.grad.copy_(inputs.grad)
        output, gradients = call(op, late, case.window, backend=backend)
    side.synchronize()
    assert torch.equal(output, expected)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected_gradients[name]), name


@pytest.mark.parametrize(("backend", "device", "dtype"), gpu_runs(torch.bfloat16))
def test_more_than_two_to_the_31_elements_are_addressed_rightly(backend, device, dtype):
    """The last rows of tensors past 2**31 elements against the same rows computed alone."""
    heads, length, dim = 3, 1 << 23, 96
    window = Window(7, 0)
    query, key, value = (torch.randn(1, heads, length, dim, dtype=dtype, device=device) for _ in range(3))
    assert query.numel() > 2**31
    tail = slice(length - 200, length)
    last = [tensor[:, :, tail].clone() for tensor in (query, key, value)]
    with torch.no_grad():
        for op, arguments, alone in (
            ("local_attention", (query, key, value), last),
            ("local_dot_product", (query, key), last[:2]),
        ):
            if op == "local_attention" and backend not in ("triton",):
                continue  # the other backends hold whole blocks of scores: more than one device's memory
            got = getattr(attnreg, op)(*arguments, window, backend=backend)[:, :, tail][:, :, 8:]
            expected = getattr(attnreg, op)(*alone, window, backend=backend)[:, :, 8:]
            # Alone, the rows stand elsewhere in their tile and are summed in another order.
            assert torch.allclose(got, expected, atol=2e-2), op
            del got


@pytest.mark.parametrize("mark", [pytest.param(None, marks=GPU)])
def test_key_lengths_out_of_range_on_a_gpu_are_clamped(mark):
    """Reading them would cost a synchronisation: they must do no harm."""
    query = torch.randn(3, 1, 9, 16, device="cuda")
    for status in attnreg.backends():
        on_a_gpu = "cuda" in (status.backend.capability.devices or ("cuda",))
        if status.runs_here and on_a_gpu and len(status.backend.own_ops) > 1:  # adapters take no lengths
            results = [
                attnreg.local_attention(
                    query,
                    query,
                    query,
                    Window(2, 1),
                    key_lengths=torch.tensor(lengths, device="cuda"),
                    backend=status.name,
                )
                for lengths in ([-5, 4, 1000], [0, 4, 9])
            ]
            assert torch.equal(*results), status.name


def test_every_op_has_its_own_plan_for_equal_shapes():
    """weights and value of one shape look like query and key of one shape; the window tells nothing."""
    tensor = torch.randn(1, 1, 4, 4)
    for first, second in itertools.permutations(["local_dot_product", "local_weighted_average"]):
        attnreg.reset()
        results = {name: getattr(attnreg, name)(tensor, tensor, Window(2, 1)) for name in (first, second)}
        assert (results["local_dot_product"] == -torch.inf).any()
        assert results["local_weighted_average"].isfinite().all()


@pytest.mark.parametrize("op", OPS)
def test_the_default_backend_of_this_machine_is_right(op):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = CASES_OF["everything"]
    inputs = make_inputs(op, case, torch.float32, device)
    output, gradients = call(op, inputs, case.window)
    true, true_gradients = truth(op, inputs.to(torch.float64), case.window)
    assert torch.allclose(output.double(), true, atol=1e-5)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient.double(), true_gradients[name], atol=1e-4), name
