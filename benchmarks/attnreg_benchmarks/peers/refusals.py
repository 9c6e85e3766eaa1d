"""Reasons for which several peers refuse a call."""

from __future__ import annotations

import torch

from attnreg import Problem
from attnreg.problem import dtype_name


def not_half_on_cuda(problem: Problem) -> str | None:
    """Why a fused kernel that a library wrote by hand, for CUDA and 16 bit, cannot run; None where it can."""
    if problem.device.type != "cuda":
        return f"the device is {problem.device.type}; it takes cuda"
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return f"the dtype is {dtype_name(problem.dtype)}; it takes float16 and bfloat16"
    return None


def not_on_a_cpu(problem: Problem) -> str | None:
    """Why what is worth measuring on a CPU alone does not run; None where it does."""
    return None if problem.device.type == "cpu" else f"the device is {problem.device.type}; it takes cpu"
