"""The adapters against their library's own calls, in the library's own layout (N, L, H, E).

``python -m attnreg_benchmarks.adapters --json FILE`` needs a GPU. Each pair is captured in CUDA graphs of one call (forward) and
one step (forward and backward) and replayed in turns, so that neither the host nor the clock's drift counts. ``ratio`` is
attnreg's time over the library's, with the same determinism; ``host_ratio`` is the same for eager calls, where small ones are
bound by the host; ``kernels`` are those that attnreg's step runs and the library's does not.
"""

from __future__ import annotations

import collections
import functools
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
from attnreg_benchmarks.machine import environment
from attnreg_benchmarks.results import now, write

SHAPES = ((4, 16, 8192, 64), (4, 16, 8192, 128))
WINDOWS = (64, 256, 1024)
ROUNDS, REPLAYS = 15, 4

Run = Callable[[], Any]
Pair = tuple[Callable[[], Any], Callable[[Tensor], Any]]


def flash(query: Tensor, key: Tensor, value: Tensor, window: Window, scale: float) -> Pair:
    """FlashAttention 2 of torch, (N, L, H, E), deterministic as the adapter has it."""
    sizes: dict[str, Any] = {"scale": scale, "window_size_left": window.left, "window_size_right": window.right}
    length = query.size(1)
    settings: Any = torch.utils.deterministic
    common: Any = (None, None, length, length, 0.0, False)

    def forward() -> Any:
        return torch.ops.aten._flash_attention_forward(query, key, value, *common, False, **sizes)[:2]

    def step(grad_output: Tensor) -> Any:
        output, log_sum_exp = forward()
        state = torch.empty(2, dtype=torch.uint64, device=query.device)
        torch.set_deterministic_debug_mode("error")
        settings.fill_uninitialized_memory = False
        try:
            return torch.ops.aten._flash_attention_backward(
                grad_output, query, key, value, output, log_sum_exp, *common, state, state, **sizes
            )
        finally:
            torch.set_deterministic_debug_mode("default")

    return forward, step


def flash4(query: Tensor, key: Tensor, value: Tensor, window: Window, scale: float) -> Pair:
    """FlashAttention 4, (N, L, H, E), deterministic, by its own autograd."""
    from flash_attn.cute import flash_attn_func

    def call(*inputs: Tensor) -> Any:
        return flash_attn_func(
            *inputs,
            softmax_scale=scale,
            window_size=(window.left, window.right),
            deterministic=True,
            return_lse=True,
        )[0]

    leaves = [each.detach().requires_grad_() for each in (query, key, value)]

    def forward() -> Any:
        with torch.no_grad():
            return call(query, key, value)

    def step(grad_output: Tensor) -> Any:
        return torch.autograd.grad(call(*leaves), leaves, grad_output)

    return forward, step


def flex(query: Tensor, key: Tensor, value: Tensor, window: Window, scale: float) -> Pair:
    """FlexAttention, compiled, on transposed views; the mask is the adapter's."""
    import torch._functorch.config as functorch
    from attnreg_adapters import flex as adapter
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    functorch.donated_buffer = False
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    mask, _ = adapter._block_mask(window.left, window.right, query.size(1), key.size(1), query.device)
    call: Callable[..., Any] = functools.partial(
        compiled, block_mask=mask, scale=scale, return_aux=AuxRequest(lse=True)
    )
    views = [each.transpose(1, 2) for each in (query, key, value)]
    leaves = [each.detach().requires_grad_() for each in views]

    def forward() -> Any:
        with torch.no_grad():
            return call(*views)[0]

    def step(grad_output: Tensor) -> Any:
        return torch.autograd.grad(call(*leaves)[0], leaves, grad_output.transpose(1, 2))

    return forward, step


LIBRARIES: dict[str, Callable[..., Pair]] = {"flash": flash, "flash4": flash4, "flex": flex}


def ours(name: str, query: Tensor, key: Tensor, value: Tensor, window: Window, scale: float) -> Pair:
    """attnreg's call on transposes of the same tensors."""
    attend: Callable[..., Tensor] = functools.partial(attnreg.local_attention, window=window, scale=scale, backend=name)
    views = [each.transpose(1, 2) for each in (query, key, value)]
    leaves = [each.detach().requires_grad_() for each in views]

    def forward() -> Any:
        with torch.no_grad():
            return attend(*views)

    def step(grad_output: Tensor) -> Any:
        return torch.autograd.grad(attend(*leaves), leaves, grad_output.transpose(1, 2))

    return forward, step


def captured(run: Run) -> tuple[Run, Any]:
    """A replay of a graph of ``run``, and what it needs."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()
    return graph.replay, (graph, kept)


def alternately(*runs: Run) -> list[float]:
    """Median microseconds of each."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(ROUNDS + 2):
        for run, found in zip(runs, times):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(REPLAYS):
                run()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) * 1000 / REPLAYS)
    return [statistics.median(found[2:]) for found in times]


def kernels(run: Run) -> collections.Counter[str]:
    """How often each kernel runs."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return collections.Counter(event.name[:120] for event in profile.events() if event.device_type.name == "CUDA")


def measure(name: str, shape: tuple[int, int, int, int], size: int) -> dict[str, Any]:
    """One library on one shape and window."""
    batch, heads, length, dim = shape
    window, scale = Window.causal(size), dim**-0.5
    query, key, value, grad_output = (
        torch.randn(batch, length, heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(4)
    )
    row: dict[str, Any] = {"backend": name, "shape": shape, "window": size}
    pairs = (LIBRARIES[name](query, key, value, window, scale), ours(name, query, key, value, window, scale))
    for what in ("forward", "step"):
        runs: list[Run] = [
            forward if what == "forward" else functools.partial(step, grad_output) for forward, step in pairs
        ]
        for run in runs:
            run()
        host = alternately(*runs)
        row[what] = {"host_ratio": round(host[1] / host[0], 3)}
        row[what]["kernels"] = dict(kernels(runs[1]) - kernels(runs[0]))
        graphs = [captured(run) for run in runs]
        library, own_time = alternately(*(replay for replay, _ in graphs))
        del graphs
        row[what] |= {"library_us": round(library, 1), "attnreg_us": round(own_time, 1)}
        row[what]["ratio"] = round(own_time / library, 3)
    return row


def main(
    json_file: Annotated[Path, typer.Option("--json", metavar="FILE", help="Where the results go.")],
    backend: Annotated[list[str] | None, typer.Option(help="Which of the adapters; all by default.")] = None,
) -> None:
    """Measure all that can run here, print the ratios and store everything."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("this needs a GPU, and torch has no CUDA device")
    runs_here = {status.name for status in attnreg.backends() if status.runs_here}
    rows = []
    for name, shape, size in product(backend or [each for each in LIBRARIES if each in runs_here], SHAPES, WINDOWS):
        rows.append(measure(name, shape, size))
        print(rows[-1], flush=True)
    device = torch.device("cuda", torch.cuda.current_device())
    write({"date": now(), "environment": asdict(environment(device)), "rows": rows}, json_file)


if __name__ == "__main__":
    typer.run(main)
