"""What is measured: one table of calls, each with a name, for every benchmark here.

A call's name is its series and what differs in it: ``fused-e64/w64`` by the window's size, ``long/l4096`` by the length. Its
device says which kind of device its size is meant for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import torch

from attnreg import Problem, Window
from attnreg.measuring.sizes import square_problem
from attnreg.op import ATTENTION, DOT_PRODUCT, WEIGHTED_AVERAGE

DIRECTIONS = ("forward", "backward")
DOT, AVERAGE, FUSED = DOT_PRODUCT.name, WEIGHTED_AVERAGE.name, ATTENTION.name

ONE = Window(0, 0)  # stands in the first of a series, until the series gives each its own
HALF, SINGLE = torch.bfloat16, torch.float32
FUSED_SIZES = (16, 64, 128, 256, 512, 1024)
BAND_SIZES = (8, 16, 32, 64, 128, 256, 512)
CURVE_SIZES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
CPU_SIZES = (8, 32, 128)

# Series that are run only when they are named.
ON_REQUEST = ("long", "curve-dot-fp32", "curve-average-fp32", "curve-dot-bf16", "curve-average-bf16")


def _on(device: str, op: str, dtype: torch.dtype, *sizes: int, window: Window = ONE) -> Problem:
    """A row of the table below; shapes in the order N, H, Hkv, L, E."""
    batch, heads, kv_heads, length, width = sizes
    return square_problem(op, torch.device(device), dtype, (batch, heads, kv_heads, length, width), window)


def _windows(
    series: str, first: Problem, sizes: Sequence[int], window: Callable[[int], Window] = Window.causal
) -> dict[str, Problem]:
    return {f"{series}/w{size}": replace(first, window=window(size)) for size in sizes}


def _lengths(series: str, first: Problem, lengths: Sequence[int]) -> dict[str, Problem]:
    return {f"{series}/l{length}": replace(first, query_length=length, key_length=length) for length in lengths}


WORKLOADS: Mapping[str, Problem] = {
    **_windows("fused-e64", _on("cuda", FUSED, HALF, 4, 16, 16, 8192, 64), FUSED_SIZES),
    **_windows("fused-e128", _on("cuda", FUSED, HALF, 4, 16, 16, 8192, 128), FUSED_SIZES),
    "gpt-oss/w128": _on("cuda", FUSED, HALF, 2, 64, 8, 8192, 64, window=Window.causal(128)),
    "modernbert/w129": _on("cuda", FUSED, HALF, 8, 12, 12, 8192, 64, window=Window(64, 64)),
    **_windows("dot-fp32", _on("cuda", DOT, SINGLE, 10, 12, 12, 2048, 64), BAND_SIZES, Window.centered),
    **_windows("average-fp32", _on("cuda", AVERAGE, SINGLE, 10, 12, 12, 2048, 64), BAND_SIZES, Window.centered),
    **_windows("dot-bf16", _on("cuda", DOT, HALF, 10, 12, 12, 8192, 64), BAND_SIZES, Window.centered),
    **_windows("average-bf16", _on("cuda", AVERAGE, HALF, 10, 12, 12, 8192, 64), BAND_SIZES, Window.centered),
    **_lengths(
        "long",
        _on("cuda", FUSED, HALF, 1, 2, 2, 1, 64, window=Window.causal(128)),
        [2**power for power in range(14, 21)],
    ),
    **_windows("curve-dot-fp32", _on("cuda", DOT, SINGLE, 10, 12, 12, 2048, 64), CURVE_SIZES, Window.centered),
    **_windows("curve-average-fp32", _on("cuda", AVERAGE, SINGLE, 10, 12, 12, 2048, 64), CURVE_SIZES, Window.centered),
    **_windows("curve-dot-bf16", _on("cuda", DOT, HALF, 10, 12, 12, 2048, 64), CURVE_SIZES, Window.centered),
    **_windows("curve-average-bf16", _on("cuda", AVERAGE, HALF, 10, 12, 12, 2048, 64), CURVE_SIZES, Window.centered),
    **_windows("cpu-fused", _on("cpu", FUSED, SINGLE, 1, 4, 4, 2048, 64), CPU_SIZES),
    **_windows("cpu-fused-bf16", _on("cpu", FUSED, HALF, 1, 4, 4, 2048, 64), CPU_SIZES),
    **_windows("cpu-dot", _on("cpu", DOT, SINGLE, 1, 4, 4, 2048, 64), CPU_SIZES, Window.centered),
    **_windows("cpu-average", _on("cpu", AVERAGE, SINGLE, 1, 4, 4, 2048, 64), CPU_SIZES, Window.centered),
}


def series_of(name: str) -> str:
    """The series that a call belongs to, one curve in a plot."""
    return name.partition("/")[0]


def by_length(name: str) -> bool:
    """Whether the calls of a series differ in their length, not in their window."""
    return name.partition("/")[2].startswith("l")


def select(device_type: str, patterns: Sequence[str] = (), op: str | None = None) -> dict[str, Problem]:
    """The calls for a kind of device, "cuda" or "cpu", in the order of the table; see :func:`matching`.

    Without a pattern, the series that are run on request only are left out.
    """
    here = {name: problem for name, problem in WORKLOADS.items() if problem.device.type == device_type}
    if not patterns:
        here = {name: problem for name, problem in here.items() if series_of(name) not in ON_REQUEST}
    return matching(here, patterns, op)


def matching(workloads: Mapping[str, Problem], patterns: Sequence[str], op: str | None) -> dict[str, Problem]:
    """Those of ``workloads`` that are asked for, in their order.

    Args:
        workloads: what there is.
        patterns: names, series or shell patterns of either (``fused-*``, ``*/w64``); without any, all.
        op: only those of this op; None for all.

    Raises:
        ValueError: a pattern fits none of them; the message lists the series.
    """
    for pattern in patterns:
        if not any(_fits(name, pattern) for name in workloads):
            groups = ", ".join(dict.fromkeys(map(series_of, workloads))) or "none"
            raise ValueError(f"no workload here fits {pattern!r}; the groups are {groups}")
    return {
        name: problem
        for name, problem in workloads.items()
        if (not patterns or any(_fits(name, pattern) for pattern in patterns)) and op in (None, problem.op)
    }


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(series_of(name), pattern)
