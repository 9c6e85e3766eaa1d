"""Every tracer sees one op, which chooses its backend, checks and cuts the window when it runs."""

from __future__ import annotations

import pytest
import torch
from cases import OPS, Case, make_inputs
from torch.export import Dim, export
from torch.fx.experimental.proxy_tensor import make_fx

import attnreg
from attnreg import Window
from attnreg.op import ROWS

WINDOW = Window(20, 3)


class Call(torch.nn.Module):
    """An op of one tensor, whose other tensors follow its shape."""

    def __init__(self, op: str, backend: str | None = None) -> None:
        super().__init__()
        self.op, self.backend = op, backend

    def forward(self, tensor):
        if self.op == "local_weighted_average":
            weights = tensor[..., :1].expand(*tensor.shape[:3], WINDOW.size)
            return attnreg.local_weighted_average(weights, tensor, WINDOW, backend=self.backend)
        others = [tensor] * (len(ROWS[self.op].tensors) - 1)
        return getattr(attnreg, self.op)(tensor, *others, WINDOW, backend=self.backend)


def ops_in(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    return [node for node in graph.nodes if str(node.target).startswith("attnreg.")]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("op", OPS)
def test_an_export_with_a_dynamic_batch_and_length_serves_others(op, strict, transposed):
    def tensor(batch, length):
        made = torch.randn(batch, 3, length, 8, generator=torch.Generator().manual_seed(length))
        return made.transpose(1, 2).contiguous().transpose(1, 2) if transposed else made

    dims = {0: Dim("batch", min=1, max=64), 2: Dim("length", min=2, max=4096)}
    module = Call(op)
    program = export(module, (tensor(2, 9),), dynamic_shapes={"tensor": dims}, strict=strict)
    (node,) = ops_in(program.graph)
    assert op in str(node.target)
    for batch, length in ((1, 5), (3, 40)):
        given = tensor(batch, length)
        assert torch.equal(program.module()(given), module(given))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("op", OPS)
def test_an_export_stores_the_backend_that_was_asked_for_in_the_call_alone(op, strict):
    tensor = torch.randn(1, 2, 6, 8)
    with attnreg.use_backend("torch"):
        program = export(Call(op), (tensor,), strict=strict)
        asked = export(Call(op, "torch_block"), (tensor,), strict=strict)
    for exported, name in ((program, None), (asked, "torch_block")):
        (node,) = ops_in(exported.graph)
        assert [argument for argument in node.args if isinstance(argument, str)] == ([] if name is None else [name])


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("op", OPS)
def test_a_graph_of_make_fx_keeps_the_op_and_its_window(op, mode, gradients):
    module = Call(op)

    def run(tensor):
        if not gradients:
            return module(tensor)
        leaf = tensor.detach().requires_grad_()
        output = module(leaf)
        return torch.autograd.grad(output.masked_fill(output == -torch.inf, 0.0).square().sum(), leaf)[0]

    graph = make_fx(run, tracing_mode=mode)(torch.randn(2, 2, 6, 8))
    assert len(ops_in(graph.graph)) == 1 + gradients
    longer = torch.randn(2, 2, 6 if mode != "symbolic" else 33, 8)
    assert torch.allclose(graph(longer), run(longer), atol=1e-6)


@pytest.mark.parametrize("op", OPS)
def test_inductor_takes_the_op(op):
    module, tensor = Call(op), torch.randn(2, 2, 9, 8, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True)
    for run in (module, compiled):
        output = run(tensor)
        (gradient,) = torch.autograd.grad(output.masked_fill(output == -torch.inf, 0.0).square().sum(), tensor)
        if run is module:
            expected, expected_gradient = output, gradient
    assert torch.allclose(output, expected)
    assert torch.allclose(gradient, expected_gradient, atol=1e-5)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_compiled_call_cuts_the_window_to_the_sequence(compiler):
    """A thousand million columns would not fit any memory."""
    query = torch.randn(1, 1, 6, 8)

    def run(tensor):
        return attnreg.local_attention(tensor, tensor, tensor, Window(10**9, 0))

    torch._dynamo.reset()
    expected = attnreg.local_attention(query, query, query, Window(5, 0))
    assert torch.equal(torch.compile(run, backend=compiler, fullgraph=True)(query), expected)


@pytest.mark.parametrize("op", OPS)
def test_the_backward_of_a_compiled_call_runs_on_the_backend_of_its_forward(op, monkeypatch):
    from attnreg import ops

    ran = []
    run_backward = ops.run_backward
    monkeypatch.setattr(
        ops,
        "run_backward",
        lambda plan, *rest: ran.append(plan.implementation.backend.name) or run_backward(plan, *rest),
    )
    tensor = torch.randn(1, 2, 6, 8, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(Call(op), backend="aot_eager", fullgraph=True)
    for name in ("torch", "torch_block"):
        with attnreg.use_backend(name):
            output = compiled(tensor)
        with attnreg.use_backend("torch_block" if name == "torch" else "torch"):
            output.masked_fill(output == -torch.inf, 0.0).sum().backward()
    assert ran == ["torch", "torch_block"]


def test_the_backward_of_a_removed_backend_is_still_its_own():
    """Another one has taken its name meanwhile."""

    def painter(mark):
        def forward(query, key, window, *, scale):
            return query.new_full((*query.shape[:3], window.size), mark)

        def backward(grad_scores, query, key, window, *, scale, needs_grad):
            tensors = {"query": query, "key": key}
            return {name: torch.full_like(tensors[name], mark) for name in needs_grad}

        return attnreg.Backend(
            name="painter",
            capability=attnreg.Capability(dtypes={torch.float32}),
            local_dot_product=forward,
            local_dot_product_backward=backward,
        )

    def run(tensor):
        return attnreg.local_dot_product(tensor, tensor.detach(), Window(1, 1), backend="painter")

    torch._dynamo.reset()
    for call in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        tensor = torch.randn(1, 1, 4, 4, requires_grad=True)
        with attnreg.register(painter(2.0)):
            output = call(tensor)
        with attnreg.register(painter(3.0)):
            output.sum().backward()
        assert (tensor.grad == 2.0).all()


def test_torch_jit_trace_is_refused_with_what_to_use():
    query = torch.randn(1, 1, 6, 8)
    for _ in range(2):
        with pytest.raises(NotImplementedError, match=r"torch\.export or torch\.compile"):
            torch.jit.trace(lambda tensor: attnreg.local_attention(tensor, tensor, tensor, WINDOW), (query,))
        attnreg.local_attention(query, query, query, WINDOW)


def test_a_dtensor_is_refused_with_what_to_do(tmp_path):
    from torch.distributed.tensor import DTensor, init_device_mesh

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        query = DTensor.from_local(torch.randn(1, 2, 6, 8), mesh)

        def call(tensor):
            return attnreg.local_attention(tensor, tensor, tensor, WINDOW)

        for way in (call, torch.compile(call, backend="aot_eager")):
            with pytest.raises(NotImplementedError, match="local_map"):
                way(query)
            leaf = torch.randn(1, 2, 6, 8, requires_grad=True)
            output = way(leaf)
            with pytest.raises(NotImplementedError, match="local_map"):
                torch.autograd.grad(output, leaf, DTensor.from_local(torch.ones_like(output), mesh))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("backend", ["torch", "torch_block"])
@pytest.mark.parametrize("op", OPS)
def test_meta_tensors_give_meta_results(op, backend):
    case = Case("meta", bias="H1W", key_lengths=(23, 37))
    real, meta = make_inputs(op, case, torch.float32), make_inputs(op, case, torch.float32, "meta")
    results = []
    for inputs in (real, meta):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.tensors.items()}
        bias = {"bias": leaves["bias"]} if "bias" in leaves else {}
        output = getattr(attnreg, op)(
            *(leaf for name, leaf in leaves.items() if name != "bias"),
            case.window,
            **bias,
            key_lengths=inputs.key_lengths,
            backend=backend,
        )
        results.append([output, *torch.autograd.grad(output, list(leaves.values()), inputs.grad)])
    for true, found in zip(*results):
        assert found.is_meta
        assert (found.shape, found.dtype, found.stride()) == (true.shape, true.dtype, true.stride())


@pytest.mark.parametrize("given", ["bias", "incoming gradient", "query"])
@pytest.mark.parametrize("backend", ["torch", "torch_block", "triton"])
def test_a_negative_bit_is_read(given, backend):
    """The imaginary part of a conjugate is a view that is negated when it is read; torch's ops do, kernels do not."""
    if not any(status.name == backend and status.runs_here for status in attnreg.backends()):
        pytest.skip(f"{backend} does not run here")
    device = "cuda" if torch.cuda.is_available() and backend == "triton" else "cpu"
    case = Case("negative", heads=2, kv_heads=2, head_dim=16, value_dim=16)
    inputs = make_inputs("local_attention", case, torch.float32, device)
    query, key, value = inputs.tensors.values()
    bias = torch.randn(2, 2, 37, case.window.size, device=device)

    def negated(tensor):
        view = torch.complex(tensor, -tensor).conj().imag
        assert view.is_neg()
        return view

    plain = {"query": query, "bias": bias, "incoming gradient": inputs.grad}
    results = []
    for lazy in (False, True):
        named = {name: negated(tensor) if lazy and name == given else tensor for name, tensor in plain.items()}
        leaves = [named["query"].detach().requires_grad_(), named["bias"].detach().requires_grad_()]
        output = attnreg.local_attention(leaves[0], key, value, case.window, bias=leaves[1], backend=backend)
        results.append([output, *torch.autograd.grad(output, leaves, named["incoming gradient"])])
    for first, second in zip(*results):
        assert torch.equal(first, second)


def test_a_program_exported_without_gradients_can_be_differentiated():
    """A backend without a backward is the best for the export, and is not taken where a gradient is recorded."""

    class Model(torch.nn.Module):
        def forward(self, query):
            return attnreg.local_dot_product(query, query, Window(1, 1))

    def forward_only(query, key, window, *, scale):
        return query.new_zeros((*query.shape[:3], window.size))

    backend = attnreg.Backend(
        name="forward_only",
        capability=attnreg.Capability(dtypes={torch.float32}),
        local_dot_product=forward_only,
        rank=-1,
    )
    query = torch.randn(1, 2, 5, 4)
    with attnreg.register(backend):
        program = export(Model(), (query,)).module()
        assert (program(query) == 0).all()
        leaf, expected = query.clone().requires_grad_(), query.clone().requires_grad_()
        program(leaf).square().sum().backward()
        Model()(expected).square().sum().backward()
    assert leaf.grad.any()
    torch.testing.assert_close(leaf.grad, expected.grad)


class WindowOfLength(torch.nn.Module):
    """Its window depends on a size of what it gets."""

    def forward(self, query):
        return attnreg.local_attention(query, query, query, Window(query.shape[2] - 1, 0))


LONGER = torch.randn(1, 2, 13, 8)


class Rows(torch.nn.Module):
    """A call whose rows are told by a tensor."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, query, numbers):
        return attnreg.local_attention(query, query, query, WINDOW, **{self.name: numbers})


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("cu_seqlens_q", [0, 4, 6], [0, 3, 3, 9, 13]),
        ("key_lengths", [4], [11]),
        ("key_starts", [2], [5]),
        ("query_starts", [-1], [3]),
    ],
)
def test_an_export_serves_other_lengths_numbers_and_numbers_of_sequences(name, first, second, strict):
    module, length = Rows(name), Dim("length", min=2, max=99)
    of_numbers = {0: Dim("offsets", min=2, max=99)} if name == "cu_seqlens_q" else {}
    program = export(
        module,
        (LONGER[:, :, :6].clone(), torch.tensor(first)),
        dynamic_shapes=({2: length}, of_numbers),
        strict=strict,
    ).module()
    for query, numbers in ((LONGER[:, :, :6].clone(), first), (LONGER, second)):
        assert torch.equal(program(query, torch.tensor(numbers)), module(query, torch.tensor(numbers)))
    if name != "query_starts":  # which may be any number
        with pytest.raises(ValueError, match=f"{name}: every"):  # checked as those of an eager call
            program(LONGER, torch.tensor([*second[:-1], 99]))


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_packed_call_serves_every_length_and_number_of_sequences(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(Rows("cu_seqlens_q"), backend="aot_eager", fullgraph=True, dynamic=dynamic or None)
    for length, offsets in ((6, [0, 4, 6]), (6, [0, 1, 6]), (13, [0, 13]), (9, [0, 3, 3, 7, 9])):
        query, numbers = LONGER[:, :, :length], torch.tensor(offsets)
        assert torch.equal(compiled(query, numbers), Rows("cu_seqlens_q")(query, numbers))


@pytest.mark.parametrize("strict", [True, False])
def test_an_export_keeps_both_results_the_sinks_and_a_seed_that_is_drawn(strict):
    class Model(torch.nn.Module):
        def forward(self, query, sinks):
            return attnreg.local_attention_with_lse(
                query, query, query, WINDOW, sinks=sinks, softcap=2.0, dropout_p=0.5
            )

    query, sinks = LONGER[:, :, :6].clone(), torch.randn(2)
    program = export(Model(), (query, sinks), dynamic_shapes=({2: Dim("length", min=2, max=99)}, {}), strict=strict)
    (node,) = ops_in(program.graph)
    assert "local_attention" in str(node.target)
    results = []
    for model in (program.module(), program.module(), Model()):
        torch.manual_seed(0)
        results.append(model(LONGER, sinks))
    for found in results[:2]:
        for result, expected in zip(found, results[2]):
            torch.testing.assert_close(result, expected)
    assert not torch.equal(program.module()(LONGER, sinks)[0], results[0][0])


@pytest.mark.parametrize("name", ["query", "sinks", "bias"])
def test_a_compiled_call_takes_a_parameter(name):
    given = {
        "query": LONGER,
        "key": LONGER,
        "value": LONGER,
        "sinks": torch.randn(2),
        "bias": torch.randn(1, 2, 1, WINDOW.size),
    }
    given[name] = torch.nn.Parameter(given[name].clone())

    def run():
        return attnreg.local_attention(window=WINDOW, **given)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    gradients = [torch.autograd.grad(each().sin().sum(), given[name])[0] for each in (compiled, run)]
    torch.testing.assert_close(*gradients)


def test_inductor_takes_the_ops_of_all_arguments():
    query, sinks = LONGER.clone().requires_grad_(), torch.randn(2, requires_grad=True)
    offsets, seed = torch.tensor([0, 4, 13]), torch.tensor([5])

    def run(query, sinks, offsets):
        given = {"cu_seqlens_q": offsets, "softcap": 2.0, "sinks": sinks, "dropout_p": 0.25, "seed": seed}
        output, log_sum_exp = attnreg.local_attention_with_lse(query, query, query, WINDOW, **given)
        return output.sin().sum() + log_sum_exp.cos().sum()

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True)
    found, expected = (torch.autograd.grad(each(query, sinks, offsets), (query, sinks)) for each in (compiled, run))
    for gradient, wanted in zip(found, expected):
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_window_follows_the_length(strict):
    program = export(
        WindowOfLength(), (torch.randn(1, 2, 6, 8),), dynamic_shapes=({2: Dim("length", min=2, max=99)},), strict=strict
    )
    torch.testing.assert_close(program.module()(LONGER), WindowOfLength()(LONGER))


@pytest.mark.parametrize("op", OPS[:1])
def test_a_traced_window_follows_the_length(op):
    def call(query):
        return getattr(attnreg, op)(query, query, Window(query.shape[2] - 1, 0))

    graph = make_fx(call, tracing_mode="symbolic")(torch.randn(1, 2, 6, 8))
    torch.testing.assert_close(graph(LONGER), call(LONGER))
    graph = make_fx(WindowOfLength(), tracing_mode="symbolic")(torch.randn(1, 2, 6, 8))
    torch.testing.assert_close(graph(LONGER), WindowOfLength()(LONGER))


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_a_transform_of_torch_is_traced_with_open_sizes(transform):
    """The window is wider than the traced length: it must not be cut to that."""

    def attend(query):
        return attnreg.local_attention(query, query, query, Window(10, 0), backend="torch")

    transformed = {
        "grad": torch.func.grad(lambda query: attend(query).square().sum()),
        "vmap": torch.vmap(lambda query: attend(query[None])[0]),
    }[transform]
    graph = make_fx(transformed, tracing_mode="symbolic")(torch.randn(1, 2, 6, 8))
    torch.testing.assert_close(graph(LONGER), transformed(LONGER))


@pytest.mark.parametrize("backend", ["torch", "torch_block"])
def test_functionalization_keeps_the_op(backend):
    def attend(query):
        return attnreg.local_attention(query, query, query, Window(2, 1), backend=backend)

    functional = torch.func.functionalize(attend)
    torch.testing.assert_close(functional(LONGER), attend(LONGER))
    assert "attnreg.local_attention" in make_fx(functional)(LONGER).code


@pytest.mark.parametrize("needs_grad", [False, True])
def test_a_compiled_call_is_right_after_one_that_was_refused(needs_grad):
    """The refusal broke the graph; torch.compile must not make graphs of the functions of a backend then."""

    @torch.compile(backend="aot_eager")
    def attend(query, scale):
        return attnreg.local_attention(query, query, query, Window(1, 1), scale=scale, backend="torch_block")

    query = torch.randn(1, 2, 6, 8, requires_grad=needs_grad)
    with pytest.raises(TypeError, match="scale"):
        attend(query, "a half")
    expected = attnreg.local_attention(query, query, query, Window(1, 1), scale=0.5, backend="torch_block")
    output = attend(query, 0.5)
    torch.testing.assert_close(output, expected)
    if needs_grad:
        upstream = torch.randn_like(output)
        torch.testing.assert_close(*(torch.autograd.grad(each, query, upstream)[0] for each in (output, expected)))


@pytest.mark.parametrize("backend", ["torch", "torch_block"])
def test_compiled_autograd_differentiates_an_eager_call(backend):
    query = torch.randn(1, 2, 6, 8, requires_grad=True)
    expected = torch.autograd.grad(
        attnreg.local_attention(query, query, query, Window(1, 1), backend=backend).sum(), query
    )[0]
    compiler = torch.compile(backend="aot_eager")
    with torch._dynamo.compiled_autograd._enable(compiler):
        attnreg.local_attention(query, query, query, Window(1, 1), backend=backend).sum().backward()
    torch.testing.assert_close(query.grad, expected)
