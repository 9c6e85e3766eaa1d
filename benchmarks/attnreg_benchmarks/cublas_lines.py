"""What ``cublas_block`` costs on tensors (N, L, H, E), in place and copied, and on contiguous ones beside them.

``python -m attnreg_benchmarks.cublas_lines --json FILE`` needs a GPU. The lines of all heads are read and written in place, by a
product that finds their blocks by address, or they are copied into one line. Calls are timed in a CUDA graph, without the host,
and eager, one after the other. What was concluded: in place at every size.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from attnreg_cublas import call
from torch import Tensor

from attnreg.measuring.timing import measure, sets_for_cold_cache
from attnreg.problem import dtype_name
from attnreg_benchmarks.cublas_blocks import PRODUCTS, calls, tensors
from attnreg_benchmarks.machine import environment
from attnreg_benchmarks.memory_order import contiguous, kernels_of, lengths_first
from attnreg_benchmarks.results import now, write

SECONDS = 0.01
SAMPLES = 7
DTYPES = (torch.float32, torch.bfloat16)
# H, E.
HEADS = ((4, 64), (16, 64), (16, 128))
WINDOWS = (32, 128)
# N, and N * L.
BATCH = 2
POSITIONS = (2**11, 2**13, 2**15, 2**17)
# In what order tensors lie, and whether lines of heads are seen in them.
WAYS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "contiguous": (contiguous, True),
    "in place": (lengths_first, True),
    "copied": (lengths_first, False),
}
COPIES = ("Pack", "Unpack", "copy", "Memcpy", "elementwise", "CatArray")

Row = dict[str, Any]
Calls = list[Callable[[], object]]


def rows(device: torch.device) -> Iterator[Row]:
    """Microseconds of each product, each way; and what was copied beside the products in place."""
    for dtype, (heads, head_dim), window, positions in product(DTYPES, HEADS, WINDOWS, POSITIONS):
        shape = (BATCH, heads, positions // BATCH)
        size = math.prod(shape) * (2 * head_dim + window) * dtype.itemsize
        data = [tensors(shape, head_dim, window, dtype, device) for _ in range(sets_for_cold_cache(size, device))]
        for name in PRODUCTS:
            row: Row = {
                "dtype": dtype_name(dtype),
                "product": name,
                "heads": heads,
                "head_dim": head_dim,
                "window": window,
                "line": positions * head_dim * dtype.itemsize,
                "graph": {},
                "eager": {},
            }
            for way, (layout, seen) in WAYS.items():
                given = [[layout(tensor) for tensor in each] for each in data]
                with nullcontext() if seen else mock.patch.object(call, "as_heads", no_heads):
                    runs = calls(name, given, window)
                    row["graph"][way] = round(measure(runs, device, seconds=SECONDS).median * 1e6, 2)
                    row["eager"][way] = round(eager(runs) * 1e6, 2)
                    if way == "in place":
                        row["copies"] = copies(runs)
            yield row


def no_heads(tensor: Tensor) -> None:
    """In the place of what sees lines of heads in a tensor. A mock would keep the tensors."""


def eager(runs: Calls) -> float:
    """Seconds a call, where calls follow each other: the host's or the GPU's, whichever are more."""
    rounds = max(16 // len(runs), 1)
    samples: list[float] = []
    for _ in range(SAMPLES):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for run in runs * rounds:
            run()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) / (rounds * len(runs)))
    return statistics.median(samples) * 1e-3


def copies(runs: Calls) -> list[str]:
    """The kernels of a call that copy."""
    return [name for name in kernels_of({"call": runs}) if any(word in name for word in COPIES)]


def ratios(found: list[Row], timing: str, other: str) -> str:
    """Of the time in place over the other way's: the geometric mean, and the largest."""
    each = [row[timing]["in place"] / row[timing][other] for row in found]
    return f"{statistics.geometric_mean(each):.3f}, at most {max(each):.3f}"


def main(json_file: Annotated[Path, typer.Option("--json", metavar="FILE", help="Where the results go.")]) -> None:
    """Measure all, print each and the ratios, and store everything."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("cublas_block needs a GPU, and torch has no CUDA device")
    device = torch.device("cuda", torch.cuda.current_device())
    found = []
    for row in rows(device):
        found.append(row)
        print(*row.values(), flush=True)
    write({"date": now(), "environment": asdict(environment(device)), "rows": found}, json_file)
    for timing, dtype, window in product(("graph", "eager"), map(dtype_name, DTYPES), WINDOWS):
        of_kind = [row for row in found if (row["dtype"], row["window"]) == (dtype, window)]
        for other in ("contiguous", "copied"):
            print(timing, dtype, f"W = {window}: in place over {other} {ratios(of_kind, timing, other)}")


if __name__ == "__main__":
    typer.run(main)
