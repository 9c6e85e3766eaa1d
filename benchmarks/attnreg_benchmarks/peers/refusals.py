"""Reasons for which several peers refuse a workload."""

from __future__ import annotations

import torch

from attnreg_benchmarks.workloads import Workload


def not_half_on_cuda(workload: Workload, device: torch.device) -> str | None:
    """Why a fused kernel that a library wrote by hand, for CUDA and 16 bit, cannot run; None where it can."""
    if device.type != "cuda":
        return f"the device is {device.type}; it takes cuda"
    if workload.dtype not in (torch.float16, torch.bfloat16):
        return f"the dtype is {str(workload.dtype).removeprefix('torch.')}; it takes float16 and bfloat16"
    return None
