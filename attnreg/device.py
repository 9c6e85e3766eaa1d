"""Whether a device can be used."""

from __future__ import annotations

import torch


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
        return next(iter(str(error).splitlines()), type(error).__name__)
    return None
