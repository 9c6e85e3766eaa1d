"""Whether something else uses a device while it is measured: a copy, always the same, then takes longer than before."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

import torch

from attnreg.measuring.timing import CACHE_MULTIPLE, cache_bytes, measuring_stream

# A copy that takes so many times the least time was disturbed. Beside nothing else one in a few hundred is, on a CPU (two
# cores of an AMD EPYC), and none on a GPU; beside one busy core more than half are.
DISTURBED_FROM = 1.5
# So long that a device that is shared in turns has taken some.
_COPYING_SECONDS = 0.01


def copy_seconds(device: torch.device) -> float | None:
    """The mean time of a copy of more than the device's cache holds, over a hundredth of a second; None without room for it."""
    try:
        with measuring_stream(device):
            source = torch.zeros(CACHE_MULTIPLE * cache_bytes(device), dtype=torch.uint8, device=device)
            return _mean_seconds(source, torch.empty_like(source))
    except (torch.OutOfMemoryError, MemoryError):
        return None


def disturbed(copies: Iterable[float | None]) -> list[bool]:
    """Which of these times of copies are those of a disturbed device; where there is no time, nothing is held against it."""
    given = list(copies)
    limit = DISTURBED_FROM * min((seconds for seconds in given if seconds is not None), default=math.inf)
    return [seconds is not None and seconds >= limit for seconds in given]


def _mean_seconds(source: torch.Tensor, target: torch.Tensor) -> float:
    def elapsed(copies: int) -> float:
        start = time.perf_counter()
        for _ in range(copies):
            target.copy_(source)
        if source.is_cuda:
            torch.cuda.current_stream(source.device).synchronize()
        return time.perf_counter() - start

    elapsed(1)
    copies = math.ceil(_COPYING_SECONDS / max(elapsed(3) / 3, 1e-6))
    return elapsed(copies) / copies
