"""Whether a device can be used, and how much memory it has."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch

from attnreg.memo import asked_once
from attnreg.printable import printable

# Where Linux says how much memory the processes of this container may have.
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def why_unusable(device: torch.device | str) -> str | None:
    """Why nothing can run on ``device`` in this process, in torch's words; None where it can.

    It may not be there, or something that ran before may have spoilt it.
    """
    try:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)  # what ran before may fail only now, and on another stream
        torch.zeros(1, device=device).item()
    # A device that torch was built without is told by an AssertionError, an ImportError, ..., which differs by device.
    except Exception as error:
        return printable(next(iter(str(error).splitlines()), type(error).__name__))
    return None


@asked_once
def memory_bytes(type: str, index: int | None) -> int | None:
    """How much memory a device has, used or not; None where that is not known, or the device is not there."""
    if type == "cuda":
        is_there = torch.cuda.is_available() and (index or 0) < torch.cuda.device_count()
        return int(torch.cuda.get_device_properties(index).total_memory) if is_there else None
    if type != "cpu":
        return None
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _LIMITS:
        with suppress(OSError, ValueError):  # not there, or "max"
            found.append(int(Path(path).read_text()))
    return min(found)
