"""Attention of the ``triton`` backend before and now: an older version of the package beside the installed one.

    git archive --prefix=before/ REVISION backends/attnreg_triton | tar -x
    python -m attnreg_benchmarks.before_and_now --before before/backends/attnreg_triton --json FILE

This needs a GPU. Both versions get the same tensors, and are measured in turns.
"""

from __future__ import annotations

import importlib
import inspect
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from attnreg import Window
from attnreg.measuring.timing import measure, measuring_stream
from attnreg.problem import dtype_name
from attnreg_benchmarks.machine import environment
from attnreg_benchmarks.results import now, write

SECONDS = 0.03
TURNS = 3
SETS = 3
# N, H, Hkv, L, E
LONG, LONG_128, GROUPED = (4, 16, 16, 8192, 64), (4, 16, 16, 8192, 128), (2, 64, 8, 8192, 64)
SHORT, SHORT_128 = (1, 64, 64, 4096, 64), (1, 64, 64, 4096, 128)
WINDOWS = (16, 64, 256, 1024)
INPUTS = ("query", "key", "value", "bias")
BEFORE = "attnreg_triton_before"

Sets = list[tuple[Tensor, ...]]
Calls = list[Callable[[], object]]


@dataclass(frozen=True)
class Case:
    """A call of attention over a causal window.

    Attributes:
        sizes: N, H, Hkv, L, E.
        bias: "" for none, "bias" for one (H, 1, W), "bias with gradient" for one whose gradient is wanted.
    """

    dtype: torch.dtype
    sizes: tuple[int, int, int, int, int]
    size: int
    bias: str = ""

    def tensors(self, device: torch.device) -> tuple[Tensor, ...]:
        """Query, key, value, incoming gradient, and the bias if there is one."""
        batch, heads, kv_heads, length, dim = self.sizes
        shapes = [(batch, count, length, dim) for count in (heads, kv_heads, kv_heads, heads)]
        if self.bias:
            shapes.append((1, heads, 1, self.size))
        return tuple(torch.randn(shape, dtype=self.dtype, device=device) for shape in shapes)


def cases() -> list[Case]:
    """Dtypes, head dims and windows; grouped heads; with a bias."""
    plain = [
        Case(dtype, sizes, size)
        for dtypes, shapes in (
            ((torch.bfloat16, torch.float16), (LONG, LONG_128)),
            ((torch.float32,), (SHORT, SHORT_128)),
        )
        for dtype, sizes, size in product(dtypes, shapes, WINDOWS)
    ]
    grouped = [Case(torch.bfloat16, GROUPED, size) for size in (128, 1024)]
    biased = [
        Case(dtype, SHORT, 64, bias)
        for dtype, bias in product((torch.bfloat16, torch.float32), ("bias", "bias with gradient"))
    ]
    return [*plain, *grouped, *biased]


def under_another_name(package: Path, folder: Path) -> str:
    """A copy of ``package`` in ``folder`` that can be imported beside it: its name."""
    for source in package.rglob("*.py"):
        copy = folder / BEFORE / source.relative_to(package)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(source.read_text().replace("attnreg_triton", BEFORE))
    sys.path.insert(0, str(folder))
    return BEFORE


def calls_of(package: str, case: Case, sets: Sets) -> dict[str, Calls]:
    """The forward and the backward of one version, for each set of tensors."""
    forward = importlib.import_module(f"{package}.attention").local_attention
    backward = importlib.import_module(f"{package}.attention_backward").local_attention_backward
    wanted = [name for name in INPUTS if name != "bias" or case.bias == "bias with gradient"]
    # The first contract asked for gradients by place.
    by_place = "tuple" in str(inspect.signature(backward).parameters["needs_grad"].annotation)
    needs_grad = tuple(name in wanted for name in INPUTS) if by_place else frozenset(wanted)
    window = Window.causal(case.size)
    found: dict[str, Calls] = {"forward": [], "backward": []}
    for query, key, value, grad, *rest in sets:
        given = {"bias": rest[0] if rest else None, "scale": query.shape[3] ** -0.5}
        inputs = (query, key, value)
        # Versions differ in the optional arguments that they take.
        options, of_backward = (
            {
                name: given.get(name)
                for name, each in inspect.signature(function).parameters.items()
                if each.kind is each.KEYWORD_ONLY and name != "needs_grad"
            }
            for function in (forward, backward)
        )
        results = forward(*inputs, window, **options)

        def run_forward(inputs: Any = inputs, options: Any = options) -> object:
            return forward(*inputs, window, **options)

        def run_backward(
            grad: Tensor = grad, inputs: Any = inputs, results: Any = results, options: Any = of_backward
        ) -> object:
            return backward(grad, *inputs, *results, window, needs_grad=needs_grad, **options)

        found["forward"].append(run_forward)
        found["backward"].append(run_backward)
    return found


def compare(case: Case, packages: dict[str, str], device: torch.device) -> dict[str, Any]:
    """Microseconds of both versions, and their ratio, by direction."""
    row: dict[str, Any] = {"dtype": dtype_name(case.dtype), **dict(zip(("N", "H", "Hkv", "L", "E"), case.sizes))}
    row |= {"W": case.size, "bias": case.bias}
    with measuring_stream(device):
        sets = [case.tensors(device) for _ in range(SETS)]
        calls = {when: calls_of(package, case, sets) for when, package in packages.items()}
        for direction in ("forward", "backward"):
            times: dict[str, list[float]] = {when: [] for when in calls}
            for _ in range(TURNS):
                for when, each in calls.items():
                    times[when].append(measure(each[direction], device, seconds=SECONDS).median * 1e6)
            medians = {when: statistics.median(samples) for when, samples in times.items()}
            row[direction] = {when: round(median, 1) for when, median in medians.items()} | {
                "ratio": round(medians["now"] / medians["before"], 3)
            }
    return row


def main(
    before: Annotated[Path, typer.Option(metavar="FOLDER", help="The older package's folder.")],
    json_file: Annotated[Path, typer.Option("--json", metavar="FILE", help="Where the results go.")],
    what: Annotated[str, typer.Option(help="Which version the older one is, for the record.")] = "",
) -> None:
    """Measure all, print the ratios and store everything."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("this needs a GPU, and torch has no CUDA device")
    device = torch.device("cuda", torch.cuda.current_device())
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        packages = {"before": under_another_name(before, Path(folder)), "now": "attnreg_triton"}
        for case in cases():
            rows.append(compare(case, packages, device))
            print(*rows[-1].values(), flush=True)
    command = "python -m attnreg_benchmarks.before_and_now --before FOLDER --json FILE"
    stored = {
        "date": now(),
        "environment": asdict(environment(device)),
        "command": command,
        "before": what,
        "rows": rows,
    }
    write(stored, json_file)


if __name__ == "__main__":
    typer.run(main)
