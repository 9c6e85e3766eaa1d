"""cuDNN's attention through its graph API (the distribution nvidia-cudnn-frontend), where it is installed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from attnreg import Problem
from attnreg.measuring.sizes import result_shape, tensor_shapes
from attnreg.testing.inputs import Calls, Gradients, Inputs
from attnreg_benchmarks.contender import Contender
from attnreg_benchmarks.peers.refusals import not_half_on_cuda
from attnreg_benchmarks.workloads import FUSED


@dataclass(frozen=True, eq=False)
class Plan:
    """A built graph.

    Attributes:
        graph: cuDNN's graph.
        nodes: its tensors by name.
        workspace: the scratch memory that an execution needs.
    """

    graph: Any
    nodes: Mapping[str, Any]
    workspace: Tensor

    def run(self, tensors: Mapping[str, Tensor]) -> None:
        """Execute on the current stream; ``tensors`` gives one for each node, by name."""
        import cudnn

        handle = _handle()
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        pack = {node: tensors[name] for name, node in self.nodes.items()}
        self.graph.execute(pack, self.workspace, handle=handle)


def _refuse(problem: Problem) -> str | None:
    return _missing() or not_half_on_cuda(problem)


@functools.cache
def _missing() -> str | None:
    if find_spec("cudnn") is None:
        return "nvidia-cudnn-frontend is not installed"
    try:
        import cudnn  # noqa: F401
    except Exception as error:  # it loads libcudnn while it is imported
        return f"nvidia-cudnn-frontend cannot be imported: {type(error).__name__}: {error}"
    return None


def _prepare(problem: Problem, inputs: Inputs) -> Calls:
    query, named = inputs.tensors["query"], inputs.tensors

    def forward() -> Tensor:
        output = torch.empty_like(query)
        _forward_plan(problem, False).run({**named, "output": output})
        return output

    def make_backward() -> Callable[[], Gradients]:
        output = torch.empty_like(query)
        statistics = query.new_empty((*query.shape[:3], 1), dtype=torch.float32)
        saved = {**named, "output": output, "statistics": statistics}
        _forward_plan(problem, True).run(saved)
        plan = _backward_plan(problem)

        def backward() -> Gradients:
            gradients = tuple(map(torch.empty_like, named.values()))
            outputs = dict(zip(("grad_query", "grad_key", "grad_value"), gradients))
            plan.run({**saved, "upstream": inputs.upstream, **outputs})
            return gradients

        return backward

    return Calls(forward, make_backward)


@functools.lru_cache(maxsize=32)
def _forward_plan(problem: Problem, with_statistics: bool) -> Plan:
    import cudnn

    graph = _graph(problem)
    shapes = tensor_shapes(problem)
    nodes = {name: _node(graph, shape, problem.dtype) for name, shape in shapes.items()}
    output, statistics = graph.sdpa(
        q=nodes["query"],
        k=nodes["key"],
        v=nodes["value"],
        generate_stats=with_statistics,
        **_options(problem),
    )
    nodes["output"] = _as_output(output, result_shape(problem))
    if with_statistics:
        nodes["statistics"] = _as_output(statistics, _statistics(problem)).set_data_type(cudnn.data_type.FLOAT)
    return _built(graph, nodes)


@functools.lru_cache(maxsize=32)
def _backward_plan(problem: Problem) -> Plan:
    graph = _graph(problem)
    shapes = {**tensor_shapes(problem), "output": result_shape(problem), "upstream": result_shape(problem)}
    nodes = {name: _node(graph, shape, problem.dtype) for name, shape in shapes.items()}
    nodes["statistics"] = _node(graph, _statistics(problem), torch.float32)
    gradients = graph.sdpa_backward(
        q=nodes["query"],
        k=nodes["key"],
        v=nodes["value"],
        o=nodes["output"],
        dO=nodes["upstream"],
        stats=nodes["statistics"],
        **_options(problem),
    )
    for (name, shape), gradient in zip(tensor_shapes(problem).items(), gradients):
        nodes[f"grad_{name}"] = _as_output(gradient, shape)
    return _built(graph, nodes)


def _options(problem: Problem) -> dict[str, Any]:
    import cudnn

    return {
        "attn_scale": problem.head_dim**-0.5,
        "diagonal_alignment": cudnn.diagonal_alignment.TOP_LEFT,
        # Its left bound counts the query's own position, its right bound does not.
        "diagonal_band_left_bound": problem.window.left + 1,
        "diagonal_band_right_bound": problem.window.right,
    }


def _graph(problem: Problem) -> Any:
    import cudnn

    return cudnn.pygraph(
        io_data_type=_cudnn_dtype(problem.dtype),
        intermediate_data_type=cudnn.data_type.FLOAT,
        compute_data_type=cudnn.data_type.FLOAT,
        handle=_handle(),
    )


def _built(graph: Any, nodes: Mapping[str, Any]) -> Plan:
    import cudnn

    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device="cuda")
    return Plan(graph, nodes, workspace)


def _node(graph: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    return graph.tensor(dim=shape, stride=_strides(shape), data_type=_cudnn_dtype(dtype))


def _as_output(node: Any, shape: tuple[int, ...]) -> Any:
    return node.set_output(True).set_dim(shape).set_stride(_strides(shape))


def _statistics(problem: Problem) -> tuple[int, ...]:
    return (problem.batch, problem.heads, problem.query_length, 1)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a contiguous tensor."""
    return torch.empty(shape, device="meta").stride()


def _cudnn_dtype(dtype: torch.dtype) -> Any:
    import cudnn

    return {
        torch.float16: cudnn.data_type.HALF,
        torch.bfloat16: cudnn.data_type.BFLOAT16,
        torch.float32: cudnn.data_type.FLOAT,
    }[dtype]


@functools.cache
def _handle() -> Any:
    import cudnn

    return cudnn.create_handle()


CUDNN = Contender("cudnn", "peer", (FUSED,), _refuse, _prepare)
