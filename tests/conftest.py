"""Where the tests run: every backend that can, on the CPU, in Triton's interpreter, or on a GPU with ``-m gpu``."""

from __future__ import annotations

import os

import torch

# Before anything imports triton: without a GPU its kernels run in the interpreter. cuBLAS is deterministic only if told so.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.pop("ATTNREG_BACKEND", None)

import pytest

import attnreg


@pytest.fixture(autouse=True)
def _fresh_registry_after_each_test():
    """What a test registers or breaks is gone after it."""
    yield
    if any(status.distribution == "this process" for status in attnreg.backends()):
        attnreg.reset()


@pytest.fixture
def poisoned_memory():
    """Uninitialised memory holds NaN: an element that nobody writes shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all(), "torch no longer fills uninitialised memory with NaN"
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
