"""Whether a device is there."""

from __future__ import annotations

import torch


def why_missing(device: torch.device | str) -> str | None:
    """Why no tensor can live on ``device`` here, in torch's words; None where one can."""
    try:
        torch.zeros(1, device=device).item()
    # A device that torch was built without is told by an AssertionError, an ImportError, ..., which differs by device.
    except Exception as error:
        return next(iter(str(error).splitlines()), type(error).__name__)
    return None
