"""``local_attention_with_lse``: two results, each with a gradient, on every path; and what is refused."""

from __future__ import annotations

import pytest
import torch
from composed import composed
from given import EXAMPLES, WINDOW, make_call, taking
from torch.autograd import forward_ad

import attnreg
from attnreg import local_attention_with_lse
from attnreg.op import ATTENTION
from attnreg.testing.oracle import truth

RESULTS = tuple(ATTENTION.results)
# One made of torch operations, one with kernels of its own, and one that is composed of the products of that.
BACKENDS = ["torch", "torch_block", "composed"]
USED = {"both": RESULTS, "the output": RESULTS[:1], "the log-sum-exp": RESULTS[1:]}
DIFFERENTIABLE = [pytest.param(*run.values, marks=run.marks) for run in taking(torch.float32, ops=("local_attention",))
                  if run.values[1] == "nothing"]  # fmt: skip


@pytest.fixture(autouse=True)
def _composed():
    with attnreg.register(composed("torch_block")):
        yield


def gradients_of(call, results, used):
    """The gradients of all leaves, under a random gradient of each result that is used."""
    of_names = dict(zip(RESULTS, results))
    found = torch.autograd.grad(
        [of_names[name] for name in used], list(call.leaves.values()), [call.upstream[name] for name in used],
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    return dict(zip(call.leaves, found))


def true_of(call, used):
    """The same in float64, by the oracle."""

    def wide(each):
        is_floating = isinstance(each, torch.Tensor) and each.is_floating_point()
        return each.detach().double() if is_floating else each

    tensors = {name: wide(each) for name, each in call.tensors.items()}
    given = {name: wide(each) for name, each in call.given.items()}
    return truth(ATTENTION, tensors, WINDOW, given, {name: call.upstream[name].double() for name in used})


@pytest.mark.parametrize("size", [1e4, 1e6, -1e9])
@pytest.mark.parametrize(
    ("op", "example", "backend", "device", "dtype"),
    [run for run in taking(torch.float32, more=("bias", "grad_log_sum_exp"), ops=("local_attention",))
     if run.values[1] == "nothing"],
)  # fmt: skip
def test_its_gradient_is_the_softmax_however_large_it_is(op, example, size, backend, device, dtype):
    query, key, value = (torch.randn(1, 1, 6, 4, dtype=torch.float64, device=device) for _ in range(3))
    # Scores of a query of 0 are the bias alone, of which nothing is lost.
    query.zero_()
    found = []
    for each, name in ((torch.float64, "torch"), (dtype, backend)):
        leaf = query.to(each).requires_grad_()
        bias = torch.full((6,), size, dtype=each, device=device)
        _, lse = local_attention_with_lse(
            leaf, key.to(each), value.to(each), attnreg.Window(5, 0), bias=bias, backend=name
        )
        found.append(torch.autograd.grad(lse.sum(), leaf)[0].double())
    true, gradient = found
    assert (gradient - true).norm() <= 1e-6 * true.norm()


@pytest.mark.parametrize("used", USED)
@pytest.mark.parametrize(
    ("op", "example", "backend", "device", "dtype"),
    taking(torch.float32, torch.bfloat16, torch.float64, more=("grad_log_sum_exp",), ops=("local_attention",)),
)
def test_each_result_is_right_and_has_its_gradient(op, example, used, backend, device, dtype):
    call = make_call(op, example, dtype, device)
    results = call.results(backend, function=local_attention_with_lse)
    true = true_of(call, USED[used])
    assert [each.dtype for each in results] == [dtype, torch.float64 if dtype == torch.float64 else torch.float32]
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float64: 1e-10}[dtype]
    for result, name in zip(results, RESULTS):
        torch.testing.assert_close(result.double(), true.results[name], rtol=tolerance, atol=tolerance)
    for name, gradient in gradients_of(call, results, USED[used]).items():
        size = float(true.gradients[name].abs().max()) + 1.0
        torch.testing.assert_close(
            gradient.double(), true.gradients[name], rtol=4 * tolerance, atol=4 * tolerance * size, msg=name
        )


@pytest.mark.parametrize("example", ["nothing", "bias", "sinks", "key_starts", "packed"])
def test_the_first_result_is_that_of_local_attention_bit_for_bit(example):
    call = make_call("local_attention", example)
    output, _ = call.results("torch", function=local_attention_with_lse)
    assert torch.equal(output, call.results("torch")[0])


@pytest.mark.parametrize("used", USED)
@pytest.mark.parametrize("example", [name for name in EXAMPLES if name != "nothing"])
def test_a_compiled_call_gives_the_same(example, used):
    call = make_call("local_attention", example)
    expected = call.results("torch", function=local_attention_with_lse)
    gradients = gradients_of(call, expected, USED[used])
    torch._dynamo.reset()
    compiled = torch.compile(local_attention_with_lse, fullgraph=True, backend="aot_eager")
    results = call.results("torch", function=compiled)
    assert all(torch.equal(*pair) for pair in zip(results, expected))
    for name, gradient in gradients_of(call, results, USED[used]).items():
        assert torch.equal(gradient, gradients[name]), name


def attend(backend, query, key, value, sinks):
    return local_attention_with_lse(query, key, value, WINDOW, sinks=sinks, backend=backend)


def inputs(dtype=torch.float32):
    call = make_call("local_attention", "sinks", dtype)
    return call, list(call.leaves.values())


def checkpointed(*tensors):
    from torch.utils.checkpoint import checkpoint

    return checkpoint(attend, "torch", *tensors, use_reentrant=False)


def traced(mode):
    def run(*tensors):
        from torch.fx.experimental.proxy_tensor import make_fx

        graph = make_fx(lambda *each: attend("torch", *each), tracing_mode=mode)(*[each.detach() for each in tensors])
        assert "attnreg.local_attention" in graph.code
        return graph(*tensors)

    return run


class Module(torch.nn.Module):
    def forward(self, query, key, value, sinks):
        return attend("torch", query, key, value, sinks)


def exported(strict):
    def run(*tensors):
        return torch.export.export(Module(), tuple(tensors), strict=strict).module()(*tensors)

    return run


WAYS = {
    "checkpoint": checkpointed,
    "make_fx, real": traced("real"),
    "make_fx, symbolic": traced("symbolic"),
    "export": exported(False),
    "strict export": exported(True),
}


@pytest.mark.parametrize("used", USED)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_keeps_both_results_differentiable(way, used):
    call, tensors = inputs()
    expected = gradients_of(call, attend("torch", *tensors), USED[used])
    for name, gradient in gradients_of(call, WAYS[way](*tensors), USED[used]).items():
        torch.testing.assert_close(gradient, expected[name])


def test_a_trace_with_gradients_has_the_backward_of_both():
    from torch.fx.experimental.proxy_tensor import make_fx

    _, tensors = inputs()

    def run(*tensors):
        leaves = [each.detach().requires_grad_() for each in tensors]
        output, log_sum_exp = attend("torch", *leaves)
        return torch.autograd.grad(output.sin().sum() + log_sum_exp.cos().sum(), leaves)

    graph = make_fx(run, tracing_mode="symbolic")(*tensors)
    assert graph.code.count("attnreg.local_attention_backward") == 1
    for found, expected in zip(graph(*tensors), run(*tensors)):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("compiler", [None, "eager", "aot_eager"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_where_no_result_is_used_there_is_no_gradient(backend, compiler):
    class Nothing(torch.autograd.Function):
        """Its gradients are undefined."""

        @staticmethod
        def forward(ctx, *tensors):
            return tensors[0].new_zeros(())

        @staticmethod
        def backward(ctx, grad):
            return None, None

    if "grad_log_sum_exp" not in taken(backend):
        pytest.skip(f"{backend} does not take it")
    query = torch.randn(1, 2, 6, 8, requires_grad=True)

    def run(query):
        return local_attention_with_lse(query, query.detach(), query.detach(), WINDOW, backend=backend)

    torch._dynamo.reset()
    run = torch.compile(run, backend=compiler) if compiler else run
    results = run(query)
    (gradient,) = torch.autograd.grad(query.sum(), query)
    assert (gradient == 1).all()
    (gradient,) = torch.autograd.grad(Nothing.apply(*results), query, allow_unused=True)
    assert gradient is None or not gradient.any()


@pytest.mark.parametrize(("op", "example", "backend", "device", "dtype"), DIFFERENTIABLE)
def test_what_needs_no_gradient_has_none(op, example, backend, device, dtype):
    call = make_call(op, example, dtype, device)
    tensors = {name: each.detach() for name, each in call.tensors.items()}
    output, log_sum_exp = call.leaf(**tensors).results(backend, function=local_attention_with_lse)
    assert not output.requires_grad
    assert not log_sum_exp.requires_grad
    with torch.no_grad():
        assert not any(each.requires_grad for each in call.results(backend, function=local_attention_with_lse))


def test_a_row_that_sees_nothing_has_minus_infinity_and_a_nan_that_comes_in_there_reaches_nothing():
    call = make_call("local_attention", "packed")
    results = call.results("torch", function=local_attention_with_lse)
    unseeing = results[1] == -torch.inf
    assert unseeing[:, :, 6:].all()
    assert not unseeing[:, :, :6].any()
    expected = gradients_of(call, results, RESULTS)
    for name in RESULTS:
        call.upstream[name][:, :, 6:] = torch.nan
    found = gradients_of(call, call.results("torch", function=local_attention_with_lse), RESULTS)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def lacking(name, **changes):
    """The backend torch_block as one that knows nothing of the gradient of a log-sum-exp."""
    from dataclasses import replace

    (block,) = (status.backend for status in attnreg.backends() if status.name == "torch_block")
    capability = replace(block.capability, takes={"bias", "key_lengths"})
    return replace(block, name=name, capability=capability, **changes)


def test_a_backend_that_lacks_the_gradient_is_refused_with_the_reason_and_takes_the_rest():
    query = torch.randn(1, 2, 6, 8, requires_grad=True)
    with attnreg.register(lacking("lacking")):
        with pytest.raises(attnreg.BackendError, match="grad_log_sum_exp is given; it takes bias, key_lengths"):
            local_attention_with_lse(query, query, query, WINDOW, backend="lacking")
        decision = attnreg.explain(query, query, query, WINDOW, op="local_attention_with_lse", backend="-torch_block")
        assert decision.problem.gives("grad_log_sum_exp") is not None
        assert "grad_log_sum_exp" in str(decision)
        attnreg.local_attention(query, query, query, WINDOW, backend="lacking").sum().backward()
        with torch.no_grad():
            output, log_sum_exp = local_attention_with_lse(query, query, query, WINDOW, backend="lacking")
    expected = local_attention_with_lse(query, query, query, WINDOW, backend="torch")
    torch.testing.assert_close((output, log_sum_exp), tuple(each.detach() for each in expected))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("used", USED)
def test_second_derivatives_are_there_or_refused(backend, used):
    _, (query, *others) = inputs(torch.float64)
    others = [each.detach() for each in others]
    if backend != "torch" and not {"sinks", "grad_log_sum_exp"} <= taken(backend):
        pytest.skip(f"{backend} does not take it")

    def loss(query):
        results = dict(zip(RESULTS, attend(backend, query, *others)))
        return sum(results[name].sin().sum() for name in USED[used])

    (gradient,) = torch.autograd.grad(loss(query), query, create_graph=True)
    if backend == "torch":
        assert torch.autograd.gradgradcheck(lambda each: loss(each), query, atol=1e-6)
        assert torch.autograd.grad(gradient.square().sum(), query)[0].any()
    else:
        with pytest.raises(NotImplementedError, match=r'backend="torch"'):
            gradient.square().sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_mode_is_there_or_refused(backend):
    query = torch.randn(1, 2, 6, 8, dtype=torch.float64)
    if backend != "torch" and "grad_log_sum_exp" not in taken(backend):
        pytest.skip(f"{backend} does not take it")

    def run(query):
        return local_attention_with_lse(query, query, query, WINDOW, backend=backend)

    if backend != "torch":
        for ask in (lambda: torch.func.jvp(run, (query,), (query,)), lambda: torch.func.vmap(run)(query[None])):
            with pytest.raises(NotImplementedError, match=r'backend="torch"'):
                ask()
        return
    _, tangents = torch.func.jvp(run, (query,), (query.cos(),))
    step = 1e-6
    ahead, behind = run(query + step * query.cos()), run(query - step * query.cos())
    for tangent, first, second in zip(tangents, ahead, behind):
        torch.testing.assert_close(tangent, (first - second) / (2 * step), rtol=1e-5, atol=1e-7)
    with forward_ad.dual_level():
        found = run(forward_ad.make_dual(query, query.cos()))
        assert all(torch.equal(forward_ad.unpack_dual(each).tangent, tangent) for each, tangent in zip(found, tangents))
    batched = torch.func.vmap(run)(torch.stack([query, query.sin()]))
    for index, alone in enumerate((run(query), run(query.sin()))):
        for result, wanted in zip(batched, alone):
            torch.testing.assert_close(result[index], wanted)


def taken(backend):
    (status,) = (status for status in attnreg.backends() if status.name == backend)
    return status.backend.taken["local_attention"]


def test_the_results_of_a_call_without_elements():
    for queries, keys in ((0, 5), (5, 0)):
        query = torch.randn(1, 2, queries, 8, requires_grad=True)
        key = torch.randn(1, 2, keys, 8, requires_grad=True)
        output, log_sum_exp = local_attention_with_lse(query, key, key, WINDOW)
        assert output.shape == query.shape
        assert (log_sum_exp.shape, log_sum_exp.dtype) == ((1, 2, queries), torch.float32)
        assert not output.any()
        assert (log_sum_exp == -torch.inf).all()
        for gradient in torch.autograd.grad((output, log_sum_exp), (query, key), (output, log_sum_exp.exp())):
            assert not gradient.any()


def test_autocast_casts_the_tensors_and_leaves_the_log_sum_exp_wide():
    query = torch.randn(1, 2, 6, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output, log_sum_exp = local_attention_with_lse(query, query, query, WINDOW)
    assert (output.dtype, log_sum_exp.dtype) == (torch.bfloat16, torch.float32)
    (gradient,) = torch.autograd.grad((output.float().sum() + log_sum_exp.sum()), query)
    assert gradient.dtype == torch.float32
