"""What the rule of ``cublas_block`` is made of: its products at every block, head dim and window, and its edge rows or copies.

``python -m attnreg_benchmarks.cublas_blocks --json FILE`` needs a GPU. What was concluded is ``backends/attnreg_cublas/rule.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from attnreg_cublas import call, functions
from torch import Tensor

from attnreg import Window
from attnreg.measuring.timing import measure
from attnreg.problem import dtype_name
from attnreg_benchmarks.machine import environment, float32_precision
from attnreg_benchmarks.results import now, write

SECONDS = 0.02
SETS = 3
BLOCKS = (16, 32, 64, 128)
ARITHMETICS = ("fp32", "tf32", "bf16")
HEAD_DIMS = (32, 64, 128, 256)
WINDOWS = (8, 32, 64, 128, 256, 512)
# N, H, L of the products, and of lines of three lengths.
SHAPE = (2, 12, 2560)
LINES = ((1, 8, 1024), (2, 8, 2048), (8, 8, 1024))
PRODUCTS = ("scores", "average", "average by key")

Row = dict[str, Any]


def blocks(device: torch.device) -> Iterator[Row]:
    """Microseconds of each product by block; scores in fp32 as they are and of fp16 factors."""
    for arithmetic, head_dim, window in product(ARITHMETICS, HEAD_DIMS, WINDOWS):
        with float32_precision("high" if arithmetic == "tf32" else "highest"):
            dtype = torch.bfloat16 if arithmetic == "bf16" else torch.float32
            data = [tensors(SHAPE, head_dim, window, dtype, device) for _ in range(SETS)]
            for name, block in product(PRODUCTS, BLOCKS):
                for factors in (False, True) if (arithmetic, name) == ("fp32", "scores") else (False,):
                    with mock.patch.object(call, "factors_pay", return_value=factors):
                        timing = measure(calls(name, data, window, block=block), device, seconds=SECONDS)
                    yield {
                        "arithmetic": arithmetic,
                        "head_dim": head_dim,
                        "window": window,
                        "product": name,
                        "block": block,
                        "factors": factors,
                        "microseconds": round(timing.median * 1e6, 2),
                    }


def edges(device: torch.device) -> Iterator[Row]:
    """Microseconds with edge rows however many they are, and with copies instead."""
    for dtype, shape, window, name in product((torch.float32, torch.bfloat16), LINES, (32, 128, 512), PRODUCTS):
        data = [tensors(shape, 64, window, dtype, device) for _ in range(SETS)]
        found = {}
        for what, most in (("edge rows", math.inf), ("copies", -1.0)):
            call._cut.cache_clear()
            with (
                mock.patch.object(call, "SCORE_EDGE_SLOTS", most),
                mock.patch.object(call, "AVERAGE_EDGE_SLOTS", most),
                mock.patch.object(call, "factors_pay", return_value=False),
            ):
                timing = measure(calls(name, data, window), device, seconds=SECONDS)
            found[what] = round(timing.median * 1e6, 2)
        call._cut.cache_clear()
        yield {
            "dtype": dtype_name(dtype),
            "positions": math.prod(shape),
            "window": window,
            "product": name,
            "microseconds": found,
        }


def tensors(
    shape: tuple[int, int, int], head_dim: int, window: int, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Queries, keys and a band, of random numbers."""
    return [torch.randn(*shape, width, dtype=dtype, device=device) for width in (head_dim, head_dim, window)]


def calls(name: str, data: list[list[Tensor]], window: int, **options: Any) -> list[Callable[[], object]]:
    """A call of one product for each set of tensors."""
    centered = Window.centered(window)
    more: dict[str, Any] = {"bias": None, "key_lengths": None, "scale": 0.1, **options}

    def one(query: Tensor, key: Tensor, band: Tensor) -> Callable[[], object]:
        if name == "scores":
            return lambda: functions.local_dot_product(query, key, centered, **more)
        if name == "average":
            return lambda: functions.local_weighted_average(band, key, centered, key_lengths=None, **options)
        only_key = frozenset({"key"})
        return lambda: functions.local_dot_product_backward(band, query, key, centered, needs_grad=only_key, **more)

    return [one(*each) for each in data]


def main(json_file: Annotated[Path, typer.Option("--json", metavar="FILE", help="Where the results go.")]) -> None:
    """Measure all, print the best block for each, and store everything."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("cublas_block needs a GPU, and torch has no CUDA device")
    device = torch.device("cuda", torch.cuda.current_device())
    found, copies = list(blocks(device)), list(edges(device))
    content = {"date": now(), "environment": asdict(environment(device)), "blocks": found, "edges": copies}
    write(content, json_file)
    same = ("arithmetic", "head_dim", "window", "product")
    for what in dict.fromkeys(tuple(row[name] for name in same) for row in found):
        rows = [row for row in found if tuple(row[name] for name in same) == what]
        best = min(rows, key=lambda row: row["microseconds"])
        print(*what, f"block {best['block']}{', factors' if best['factors'] else ''}: {best['microseconds']} us")
    for row in copies:
        print(*row.values())


if __name__ == "__main__":
    typer.run(main)
