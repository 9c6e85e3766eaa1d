"""What a candidate that failed leaves behind: an error to be told, and memory."""

from __future__ import annotations

import gc
from contextlib import suppress

import torch

# What torch and CUDA libraries say where memory does not suffice and the error has no type of its own.
_NO_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice, which another time it may."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def release() -> None:
    """Give memory that nothing holds any more back to the device. What an error's traceback holds stays until that is gone."""
    gc.collect()
    if torch.cuda.is_available():
        with suppress(RuntimeError):  # a device that has become unusable is told by why_unusable
            torch.cuda.empty_cache()
