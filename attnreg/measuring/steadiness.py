"""Whether something else uses a device while it is measured.

Two things tell. A copy, always the same, takes longer than at the best of times: than after other candidates, than at an
earlier tuning of this device, than its memory could need. And on a CPU, threads had to wait for a core that somebody else had:
so a load shows that was there from first to last.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable
from contextlib import suppress

import torch

from attnreg.measuring.timing import CACHE_MULTIPLE, cache_bytes, measuring_stream

# A copy that takes so many times the least time was disturbed. Beside nothing else one in a few hundred is, on a CPU (two
# cores of an AMD EPYC), and none on a GPU; beside one busy core more than half are.
DISTURBED_FROM = 1.5
# So much of the time that is measured the threads may have waited for a core, all of them together.
WAITED_FROM = 0.1
# So long that a device that is shared in turns has taken some.
_COPYING_SECONDS = 0.01
# A copy reaches at least so much of the bandwidth that a GPU's memory has by its clock.
_SHARE_OF_BANDWIDTH = 0.75


def copy_seconds(device: torch.device) -> float | None:
    """The mean time of a copy of more than the device's cache holds, over a hundredth of a second; None without room for it."""
    try:
        with measuring_stream(device):
            source = torch.zeros(_copied_bytes(device), dtype=torch.uint8, device=device)
            return _mean_seconds(source, torch.empty_like(source))
    except (torch.OutOfMemoryError, MemoryError):
        return None


def usual_copy_seconds(device: torch.device) -> float | None:
    """What such a copy takes at most on a GPU that does nothing else, by its memory's clock; None where that is not known."""
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    kilohertz, bits = getattr(found, "memory_clock_rate", 0), getattr(found, "memory_bus_width", 0)
    if not kilohertz or not bits:
        return None
    bytes_a_second = 2 * kilohertz * 1e3 * bits / 8  # two at each tick
    return 2 * _copied_bytes(device) / (_SHARE_OF_BANDWIDTH * bytes_a_second)


def disturbed(copies: Iterable[float | None], usual: float | None = None) -> list[bool]:
    """Which of these times of copies are those of a disturbed device; where there is no time, nothing is held against it.

    ``usual`` is what a copy is known to take beside nothing else, if it is known.
    """
    given = list(copies)
    limit = DISTURBED_FROM * min((seconds for seconds in (usual, *given) if seconds is not None), default=math.inf)
    return [seconds is not None and seconds >= limit for seconds in given]


def waited_seconds() -> float | None:
    """For how long threads of this process have waited for a core until now, all of them together; None where nobody says."""
    total = 0
    try:
        for thread in os.listdir("/proc/self/task"):
            with suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/self/task/{thread}/schedstat") as file:
                total += int(file.read().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return total * 1e-9


def _copied_bytes(device: torch.device) -> int:
    return CACHE_MULTIPLE * cache_bytes(device)


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
