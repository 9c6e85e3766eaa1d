"""What is measured: one table of named workloads for every benchmark here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch

from attnreg import Window
from attnreg.measuring.task import AVERAGE, DOT, FUSED, Task

DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True, kw_only=True)
class Workload(Task):
    """A task that a benchmark measures.

    Attributes:
        group: the series that it belongs to, one curve in a plot.
        device_type: the kind of device that its size is meant for: "cuda" or "cpu".
    """

    group: str
    device_type: str = "cuda"

    @property
    def name(self) -> str:
        """What it is called in results and on the command line: ``group/w64``, in a series of lengths ``group/l4096``."""
        return f"{self.group}/{f'l{self.length}' if self.group in LENGTH_SERIES else f'w{self.window.size}'}"


def workload(
    group: str,
    op: str,
    batch: int,
    heads: int,
    kv_heads: int,
    length: int,
    head_dim: int,
    window: Window,
    dtype: torch.dtype,
    device_type: str = "cuda",
) -> Workload:
    """A row of the table below."""
    return Workload(
        group=group,
        op=op,
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        length=length,
        head_dim=head_dim,
        window=window,
        dtype=dtype,
        device_type=device_type,
    )


def _series(
    first: Workload, sizes: Sequence[int], window: Callable[[int], Window] = Window.causal
) -> tuple[Workload, ...]:
    return tuple(replace(first, window=window(size)) for size in sizes)


def _lengths(first: Workload, lengths: Sequence[int]) -> tuple[Workload, ...]:
    return tuple(replace(first, length=length) for length in lengths)


ONE = Window(0, 0)  # stands in the first of a series, until the series gives each its own
HALF, SINGLE = torch.bfloat16, torch.float32
FUSED_SIZES = (16, 64, 128, 256, 512, 1024)
BAND_SIZES = (8, 16, 32, 64, 128, 256, 512)
CURVE_SIZES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
CPU_SIZES = (8, 32, 128)

# Groups whose workloads differ in their length, not in their window.
LENGTH_SERIES = ("long",)
# Groups that are run only when they are named.
ON_REQUEST = ("long", "curve-dot-fp32", "curve-average-fp32", "curve-dot-bf16", "curve-average-bf16")

# Shapes in the order N, H, Hkv, L, E.
WORKLOADS: tuple[Workload, ...] = (
    *_series(workload("fused-e64", FUSED, 4, 16, 16, 8192, 64, ONE, HALF), FUSED_SIZES),
    *_series(workload("fused-e128", FUSED, 4, 16, 16, 8192, 128, ONE, HALF), FUSED_SIZES),
    workload("gpt-oss", FUSED, 2, 64, 8, 8192, 64, Window.causal(128), HALF),
    workload("modernbert", FUSED, 8, 12, 12, 8192, 64, Window(64, 64), HALF),
    *_series(workload("dot-fp32", DOT, 10, 12, 12, 2048, 64, ONE, SINGLE), BAND_SIZES, Window.centered),
    *_series(workload("average-fp32", AVERAGE, 10, 12, 12, 2048, 64, ONE, SINGLE), BAND_SIZES, Window.centered),
    *_series(workload("dot-bf16", DOT, 10, 12, 12, 8192, 64, ONE, HALF), BAND_SIZES, Window.centered),
    *_series(workload("average-bf16", AVERAGE, 10, 12, 12, 8192, 64, ONE, HALF), BAND_SIZES, Window.centered),
    *_lengths(workload("long", FUSED, 1, 2, 2, 1, 64, Window.causal(128), HALF), [2**power for power in range(14, 21)]),
    *_series(workload("curve-dot-fp32", DOT, 10, 12, 12, 2048, 64, ONE, SINGLE), CURVE_SIZES, Window.centered),
    *_series(workload("curve-average-fp32", AVERAGE, 10, 12, 12, 2048, 64, ONE, SINGLE), CURVE_SIZES, Window.centered),
    *_series(workload("curve-dot-bf16", DOT, 10, 12, 12, 2048, 64, ONE, HALF), CURVE_SIZES, Window.centered),
    *_series(workload("curve-average-bf16", AVERAGE, 10, 12, 12, 2048, 64, ONE, HALF), CURVE_SIZES, Window.centered),
    *_series(workload("cpu-fused", FUSED, 1, 4, 4, 2048, 64, ONE, SINGLE, "cpu"), CPU_SIZES),
    *_series(workload("cpu-fused-bf16", FUSED, 1, 4, 4, 2048, 64, ONE, HALF, "cpu"), CPU_SIZES),
    *_series(workload("cpu-dot", DOT, 1, 4, 4, 2048, 64, ONE, SINGLE, "cpu"), CPU_SIZES, Window.centered),
    *_series(workload("cpu-average", AVERAGE, 1, 4, 4, 2048, 64, ONE, SINGLE, "cpu"), CPU_SIZES, Window.centered),
)


def select(device_type: str, patterns: Sequence[str] = (), op: str | None = None) -> tuple[Workload, ...]:
    """The workloads for a kind of device, "cuda" or "cpu", in the order of the table; see :func:`matching`.

    Without a pattern, the groups that are run on request only are left out.
    """
    here = [workload for workload in WORKLOADS if workload.device_type == device_type]
    if not patterns:
        here = [workload for workload in here if workload.group not in ON_REQUEST]
    return matching(here, patterns, op)


def matching(workloads: Sequence[Workload], patterns: Sequence[str], op: str | None) -> tuple[Workload, ...]:
    """Those of ``workloads`` that are asked for, in their order.

    Args:
        workloads: what there is.
        patterns: names, groups or shell patterns of either (``fused-*``, ``*/w64``); without any, all.
        op: only those of this op; None for all.

    Raises:
        ValueError: a pattern fits none of them; the message lists the groups.
    """
    for pattern in patterns:
        if not any(_fits(workload, pattern) for workload in workloads):
            groups = ", ".join(dict.fromkeys(workload.group for workload in workloads)) or "none"
            raise ValueError(f"no workload here fits {pattern!r}; the groups are {groups}")
    return tuple(
        workload
        for workload in workloads
        if (not patterns or any(_fits(workload, pattern) for pattern in patterns)) and op in (None, workload.op)
    )


def _fits(workload: Workload, pattern: str) -> bool:
    return fnmatchcase(workload.name, pattern) or fnmatchcase(workload.group, pattern)
