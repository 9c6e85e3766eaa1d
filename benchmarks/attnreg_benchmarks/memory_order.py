"""What a call on transposes of (N, L, H, E), as models keep their tensors, costs over one on contiguous tensors.

``python -m attnreg_benchmarks.memory_order --json FILE`` needs a GPU. Both orders are measured in turns, forward and backward,
and the kernels of one step on transposes are listed: no copy should be among them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import attnreg
from attnreg import Window
from attnreg.measuring.sizes import result_shape, square_problem, tensor_shapes
from attnreg.measuring.timing import measure, measuring_stream
from attnreg.op import OPS
from attnreg.problem import Problem, dtype_name
from attnreg_benchmarks.machine import environment
from attnreg_benchmarks.results import now, write

SECONDS = 0.03
TURNS = 3
SETS = 3
# N, H, Hkv, L, E
SHAPES = ((4, 16, 16, 8192, 64), (4, 16, 16, 8192, 128), (2, 64, 8, 8192, 64))
WINDOWS = (16, 64, 256, 1024)
# The bands of the products are as wide as the window: shorter sequences.
PRODUCT_SHAPES = ((10, 12, 12, 2048, 64),)
PRODUCT_WINDOWS = (8, 64, 256)

Layout = Callable[[Tensor], Tensor]


def contiguous(tensor: Tensor) -> Tensor:
    """(N, H, L, E) in memory."""
    return tensor


def lengths_first(tensor: Tensor) -> Tensor:
    """(N, L, H, E) in memory."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def calls_of(problem: Problem, layout: Layout, backend: str) -> dict[str, list[Callable[[], object]]]:
    """The forward and the backward of independent sets of tensors."""
    found: dict[str, list[Callable[[], object]]] = {"forward": [], "backward": []}
    function = getattr(attnreg, problem.op)
    for _ in range(SETS):

        def random(shape: tuple[int, ...]) -> Tensor:
            return layout(torch.randn(shape, dtype=problem.dtype, device=problem.device))

        tensors = [random(shape) for shape in tensor_shapes(problem).values()]
        upstream = random(result_shape(problem))
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        output = function(*leaves, problem.window, backend=backend)

        def forward(tensors: list[Tensor] = tensors) -> object:
            return function(*tensors, problem.window, backend=backend)

        def backward(output: Tensor = output, leaves: list[Tensor] = leaves, upstream: Tensor = upstream) -> object:
            return torch.autograd.grad(output, leaves, upstream, retain_graph=True)

        found["forward"].append(forward)
        found["backward"].append(backward)
    return found


def kernels_of(calls: dict[str, list[Callable[[], object]]]) -> dict[str, int]:
    """How often each kernel runs in one forward and one backward."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for each in calls.values():
            each[0]()
        torch.cuda.synchronize()
    names = [event.name[:80] for event in profile.events() if event.device_type.name == "CUDA"]
    return {name: names.count(name) for name in dict.fromkeys(names)}


def compare(problem: Problem, backend: str) -> dict[str, Any]:
    """Microseconds in both orders, and their ratio, by direction."""
    row: dict[str, Any] = {"problem": str(problem), "dtype": dtype_name(problem.dtype), "backend": backend}
    with measuring_stream(problem.device):
        calls = {layout.__name__: calls_of(problem, layout, backend) for layout in (contiguous, lengths_first)}
        for direction in ("forward", "backward"):
            times: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(TURNS):
                for name, each in calls.items():
                    times[name].append(measure(each[direction], problem.device, seconds=SECONDS).median * 1e6)
            medians = {name: statistics.median(samples) for name, samples in times.items()}
            row[direction] = {name: round(median, 2) for name, median in medians.items()} | {
                "ratio": round(medians["lengths_first"] / medians["contiguous"], 4)
            }
        row["kernels"] = kernels_of(calls["lengths_first"])
    return row


def problems(device: torch.device) -> list[Problem]:
    """Attention in bf16, the products in fp32 and bf16."""
    fused = [
        square_problem("local_attention", device, torch.bfloat16, sizes, Window.causal(size))
        for sizes, size in product(SHAPES, WINDOWS)
    ]
    products = [
        square_problem(op, device, dtype, sizes, Window.centered(size))
        for op, dtype, sizes, size in product(
            (op for op in OPS if op != "local_attention"),
            (torch.float32, torch.bfloat16),
            PRODUCT_SHAPES,
            PRODUCT_WINDOWS,
        )
    ]
    return [*fused, *products]


def main(
    json_file: Annotated[Path, typer.Option("--json", metavar="FILE", help="Where the results go.")],
    backend: Annotated[str, typer.Option(help="Which backend.")] = "triton",
) -> None:
    """Measure all, print the ratios and store everything."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("this needs a GPU, and torch has no CUDA device")
    device = torch.device("cuda", torch.cuda.current_device())
    rows = []
    for problem in problems(device):
        rows.append(compare(problem, backend))
        ratios = {direction: rows[-1][direction] for direction in ("forward", "backward")}
        print(rows[-1]["problem"], ratios, list(rows[-1]["kernels"]), flush=True)
    write({"date": now(), "environment": asdict(environment(device)), "rows": rows}, json_file)


if __name__ == "__main__":
    typer.run(main)
