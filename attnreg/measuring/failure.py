"""What a candidate that failed leaves behind: an error to be told, and memory."""

from __future__ import annotations

import gc
from contextlib import suppress

import torch


def first_line(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def release() -> None:
    """Give memory that nothing holds any more back to the device. What an error's traceback holds stays until that is gone."""
    gc.collect()
    if torch.cuda.is_available():
        with suppress(RuntimeError):  # a device that has become unusable is told by why_unusable
            torch.cuda.empty_cache()
