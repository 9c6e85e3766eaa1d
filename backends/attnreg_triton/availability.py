"""Where the kernels can run, told without importing triton.

Triton decides when it is imported, by ``TRITON_INTERPRET``, whether kernels are compiled for a GPU or interpreted on
the CPU. That variable is read here likewise once per process.
"""

from __future__ import annotations

import importlib.util
import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")

DEVICES = frozenset({"cuda", "cpu"} if INTERPRETED else {"cuda"})

# The first with bf16 matrix units and asynchronous copies (Ampere).
MINIMUM_COMPUTE_CAPABILITY = (8, 0)


def unavailable() -> str | None:
    """None where the kernels can run, else the reason why not."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "no CUDA device (TRITON_INTERPRET=1 would interpret the kernels on the CPU)"
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < MINIMUM_COMPUTE_CAPABILITY:
        found, needed = (".".join(map(str, version)) for version in (capability, MINIMUM_COMPUTE_CAPABILITY))
        return f"compute capability {found} is under {needed}"
    return None
