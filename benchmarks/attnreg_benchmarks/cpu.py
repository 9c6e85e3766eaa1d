"""attnreg on a CPU beside what a user would write: SDPA with a mask, SDPA over blocks, FlexAttention, fast-transformers.

``python -m attnreg_benchmarks.cpu --json FILE``. All that is compared is measured in turns, in one process; medians. Gradients:
a forward and a backward. The peers get what they need beforehand: masks, compiled functions. FlexAttention has no backward on a
CPU; fast-transformers' C++ kernel is measured where that package is installed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import attnreg
from attnreg import Problem, Window, local_attention, local_dot_product, local_weighted_average
from attnreg.drawing import check_picture, latency_axes
from attnreg.measuring.sizes import square_problem
from attnreg.printable import trouble
from attnreg_benchmarks.machine import ceilings, environment
from attnreg_benchmarks.peers.blocks import over_blocks
from attnreg_benchmarks.peers.dense import band_mask
from attnreg_benchmarks.peers.flex_on_cpu import FEWEST_POSITIONS, flex
from attnreg_benchmarks.results import command_line, now, write

TURNS = 9
# Calls shorter than this are repeated.
SECONDS_A_TURN = 0.01

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Line:
    """What is compared.

    Attributes:
        op: "local_attention", "local_dot_product" or "local_weighted_average".
        batch, heads, length, head_dim: N, H, L, E.
        size: W, of a causal window.
        dtype: of all tensors.
    """

    op: str
    batch: int
    heads: int
    length: int
    size: int
    head_dim: int = 64
    dtype: torch.dtype = torch.float32

    @property
    def window(self) -> Window:
        """The window."""
        return Window.causal(self.size)

    @property
    def problem(self) -> Problem:
        """The call."""
        sizes = (self.batch, self.heads, self.heads, self.length, self.head_dim)
        return square_problem(self.op, torch.device("cpu"), self.dtype, sizes, self.window)

    @property
    def multiplications(self) -> int:
        """Of one product: those of queries and keys that see each other."""
        inside = sum(min(row + 1, self.size) for row in range(self.length))
        return self.batch * self.heads * inside * self.head_dim

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op} N={self.batch} H={self.heads} L={self.length} W={self.size} E={self.head_dim} {dtype}"


ATTENTION = tuple(
    Line("local_attention", 1, heads, length, size)
    for heads, length, size in ((4, 1024, 16), (4, 2048, 128), (8, 8192, 128), (4, 4096, 1024), (4, 2048, 1024))
)
CURVE = tuple(Line("local_attention", 1, 4, 4096, 2**power) for power in range(1, 12))
PRODUCTS = tuple(
    Line(op, 2, 4, 1024, size)
    for op in ("local_dot_product", "local_weighted_average")
    for size in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
)
HALF = tuple(
    Line("local_attention", 1, heads, length, size, dtype=torch.bfloat16)
    for heads, length, size in ((4, 2048, 128), (4, 4096, 1024))
)
TINY = tuple(Line("local_attention", 1, 4, length, 4) for length in (1, 16))
GROUPS = {"attention": ATTENTION, "curve": CURVE, "products": PRODUCTS, "bf16": HALF, "tiny": TINY}


def masked(problem: Problem) -> Function:
    """SDPA with a boolean mask of L x L, which is made beforehand."""
    mask = band_mask(problem.key_length, problem.window, problem.device)
    return lambda query, key, value: scaled_dot_product_attention(query, key, value, mask)


def fast_transformers_is_compiled() -> bool:
    """Whether its own kernels are there: attnreg can stand in their place."""
    if find_spec("fast_transformers") is None:
        return False
    kernels = find_spec("fast_transformers.local_product.local_product_cpu")
    return kernels is not None and (kernels.origin or "").endswith(tuple(EXTENSION_SUFFIXES))


def of_fast_transformers(line: Line) -> Function:
    """The C++ kernels of fast-transformers, whose windows are centred."""
    from fast_transformers import local_product

    if line.op == "local_weighted_average":
        average: Function = local_product.local_weighted_average
        return average
    mask, lengths = torch.zeros(line.length, line.length), torch.full((line.batch,), line.length)
    return lambda query, key: local_product.local_dot_product(query, key, mask, lengths, line.size)


def of_attnreg(line: Line, backend: str) -> Function:
    """The op, by one backend."""
    ops: dict[str, Any] = {"local_dot_product": local_dot_product, "local_weighted_average": local_weighted_average}
    op, window = ops.get(line.op, local_attention), line.window
    return lambda *tensors: op(*tensors, window, backend=backend)


def contenders(line: Line, backends: list[str]) -> Iterator[tuple[str, Callable[[], Function], bool]]:
    """Who is compared on a line: the name, what makes the function, whether it has gradients."""
    for backend in backends:
        yield backend, partial(of_attnreg, line, backend), True
    if line.op == "local_attention":
        yield "sdpa, mask", partial(masked, line.problem), True
        yield "sdpa over blocks", partial(over_blocks, line.problem), True
        if line.length >= FEWEST_POSITIONS:
            yield "flex_attention", partial(flex, line.problem), False
    elif fast_transformers_is_compiled():
        yield "fast-transformers", partial(of_fast_transformers, line), True


def tensors_of(line: Line) -> list[Tensor]:
    """What the functions of a line are given."""
    shape = (line.batch, line.heads, line.length, line.head_dim)
    weights = (*shape[:3], line.size)
    shapes = {"local_dot_product": (shape, shape), "local_weighted_average": (weights, shape)}
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(each, generator=generator).to(line.dtype) for each in shapes.get(line.op, (shape,) * 3)]


def calls_of(function: Function, tensors: list[Tensor], *, has_gradients: bool) -> dict[str, Callable[[], object]]:
    """A forward, and a forward with its backward."""

    def forward() -> object:
        with torch.no_grad():
            return function(*tensors)

    leaves = [each.clone().requires_grad_() for each in tensors]
    upstream = torch.randn_like(function(*tensors))

    def both() -> object:
        return torch.autograd.grad(function(*leaves), leaves, upstream)

    return {"forward": forward, "with gradients": both} if has_gradients else {"forward": forward}


def seconds_of(call: Callable[[], object], repeats: int) -> float:
    """Of one call, of so many in a row."""
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


def compare(line: Line, backends: list[str], left_out: Collection[str] = ()) -> dict[str, Any]:
    """Milliseconds of all contenders, in turns; or the reason why there are none."""
    tensors = tensors_of(line)
    found: dict[str, Any] = {}
    ready: dict[tuple[str, str], Callable[[], object]] = {}
    for name, make, has_gradients in contenders(line, backends):
        if name in left_out:
            continue
        try:
            for direction, call in calls_of(make(), tensors, has_gradients=has_gradients).items():
                call()
                ready[name, direction] = call
        except Exception as error:
            found[name] = trouble(error)
    repeats = {each: max(1, int(SECONDS_A_TURN / seconds_of(call, 1))) for each, call in ready.items()}
    times: dict[tuple[str, str], list[float]] = {each: [] for each in ready}
    for _ in range(TURNS):
        for each, call in ready.items():
            times[each].append(seconds_of(call, repeats[each]))
    for (name, direction), samples in times.items():
        found.setdefault(name, {})[direction] = round(statistics.median(samples) * 1e3, 4)
    return found


def shares(line: Line, times: Mapping[str, Any], rate: float) -> dict[str, float]:
    """What a forward reaches of the machine's rate of products in float32, of the products inside the window."""
    operations = 2 * line.multiplications * (2 if line.op == "local_attention" else 1)
    return {
        name: round(operations / (each["forward"] * 1e-3) / rate, 3)
        for name, each in times.items()
        if isinstance(each, dict)
    }


def draw(measured: Mapping[Line, Mapping[str, Any]], title: str, path: Path) -> None:
    """Latency against window, forward and with gradients; backends solid, peers dashed.

    Raises:
        ValueError: the curve was not measured.
    """
    from matplotlib.figure import Figure

    curve = {line.size: times for line, times in measured.items() if line in CURVE}
    if not curve:
        raise ValueError("there is no curve to draw; measure it with --group curve")
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    contenders = dict.fromkeys(name for times in curve.values() for name in times)
    for axes, direction in zip(figure.subplots(1, 2), ("forward", "with gradients")):
        for name in contenders:
            timed = {size: times[name] for size, times in curve.items() if isinstance(times.get(name), dict)}
            points = [(size, each[direction]) for size, each in timed.items() if direction in each]
            if points:
                solid = any(each.name == name for each in attnreg.backends())
                axes.plot(*zip(*points), "-" if solid else "--", marker="o", markersize=3, label=name)
        latency_axes(axes, curve, "window W")
        axes.set_title(direction, fontsize=9)
        axes.legend(fontsize=8)
    figure.suptitle(f"{title}: {str(CURVE[0]).replace(f' W={CURVE[0].size}', '')}", fontsize=9)
    figure.savefig(path, dpi=110)


def main(
    json_file: Annotated[Path, typer.Option("--json", metavar="FILE", help="Where the results go.")],
    threads: Annotated[int, typer.Option(help="Threads of torch; 0: all.")] = 1,
    backend: Annotated[list[str] | None, typer.Option(help="Which backends; repeatable.")] = None,
    group: Annotated[list[str] | None, typer.Option(help=f"Which lines: {', '.join(GROUPS)}; repeatable.")] = None,
    leave_out: Annotated[
        list[str] | None, typer.Option("--without", metavar="NAME", help="A peer; repeatable.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the curve (needs attnreg[plot]).")] = None,
) -> None:
    """Measure all, print the times and store everything."""
    if plot is not None:
        check_picture(plot)
    if threads:
        torch.set_num_threads(threads)
    device = torch.device("cpu")
    rate = ceilings(device).flops_per_second["fp32"]
    names = backend or ["attnreg_cpu", "torch_block"]
    rows: list[dict[str, Any]] = []
    measured: dict[Line, dict[str, Any]] = {}
    print(f"torch.mm: {rate / 1e9:.0f} GFLOP/s in float32, {torch.get_num_threads()} threads", flush=True)
    for name in group or GROUPS:
        for line in GROUPS[name]:
            torch._dynamo.reset()
            times = compare(line, names, leave_out or ())
            share = shares(line, times, rate)
            measured[line] = times
            rows.append({"line": str(line), "ms": times, "share of torch.mm": share})
            print(line, flush=True)
            for contender, each in times.items():
                print(f"  {contender:18}", each, share.get(contender, ""), flush=True)
            stored = {"date": now(), "environment": asdict(environment(device)), "torch.mm, FLOP/s": rate, "rows": rows}
            write(
                {
                    **stored,
                    "attnreg": attnreg.__version__,
                    "command": command_line("attnreg_benchmarks.cpu", json_file),
                },
                json_file,
            )
    if plot is not None:
        draw(measured, environment(device).cpu, plot)


if __name__ == "__main__":
    typer.run(main)
