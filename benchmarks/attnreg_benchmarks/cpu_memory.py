"""What attention with gradients takes of a CPU's memory, against the length.

``python -m attnreg_benchmarks.cpu_memory --json FILE``. Each length has a process of its own, whose peak it is: the tensors of
the call, its results, its gradients and what is made on the way. It is told in tensors of the size of a query.
"""

from __future__ import annotations

import resource
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import attnreg
from attnreg import Window, local_attention
from attnreg_benchmarks.machine import environment
from attnreg_benchmarks.results import command_line, now, write

LENGTHS = (65_536, 262_144, 1_048_576)
HEAD_DIM = 64
# ru_maxrss counts in these.
BYTES = 1 if sys.platform == "darwin" else 1024


def peak() -> int:
    """Bytes that the process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * BYTES


def run(length: int, size: int, backend: str) -> None:
    """A forward and a backward of one head in float32."""
    query, key, value = (torch.randn(1, 1, length, HEAD_DIM, requires_grad=True) for _ in range(3))
    output = local_attention(query, key, value, Window.causal(size), backend=backend)
    torch.autograd.grad(output, (query, key, value), torch.ones_like(output))


def growth(length: int, size: int, backend: str) -> int:
    """Bytes by which a call makes the peak of this process grow, after a small call that loads all that is needed."""
    torch.set_num_threads(1)
    run(2 * size, size, backend)
    before = peak()
    run(length, size, backend)
    return peak() - before


def main(
    json_file: Annotated[Path, typer.Option("--json", metavar="FILE", help="Where the results go.")],
    size: Annotated[int, typer.Option("--window", metavar="W", help="Keys of a causal window.")] = 128,
    backend: Annotated[str, typer.Option(help="Which backend.")] = "attnreg_cpu",
) -> None:
    """Measure all lengths, print what they take and store it."""
    rows: list[dict[str, Any]] = []
    for length in LENGTHS:
        # A process forgets no peak.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            grown = pool.submit(growth, length, size, backend).result()
        tensors = grown / (length * HEAD_DIM * 4)
        rows.append({"L": length, "W": size, "E": HEAD_DIM, "bytes": grown, "tensors of (L, E)": round(tensors, 2)})
        print(
            f"{backend}, L={length}, W={size}: {grown / 2**20:.0f} MiB, {tensors:.2f} tensors of (L, {HEAD_DIM})",
            flush=True,
        )
    stored = {"date": now(), "environment": asdict(environment(torch.device("cpu"))), "backend": backend, "rows": rows}
    write(
        {**stored, "attnreg": attnreg.__version__, "command": command_line("attnreg_benchmarks.cpu_memory", json_file)},
        json_file,
    )


if __name__ == "__main__":
    typer.run(main)
