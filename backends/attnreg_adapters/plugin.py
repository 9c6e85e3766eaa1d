"""What this package offers to attnreg."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attnreg import Backend, Capability, hookimpl
from attnreg_adapters import flash, flex


@hookimpl
def attnreg_backends() -> Iterator[Backend]:
    """Offer both: fused attention alone, for windows in which their tiles fill up."""
    yield Backend(
        name="flash",
        summary="FlashAttention as torch carries it, with a window; its deterministic backward",
        capability=Capability(
            devices={"cuda"},
            dtypes=(torch.float16, torch.bfloat16),
            head_dims=range(8, 257, 8),
            bias=False,
            key_lengths=False,
        ),
        local_attention=flash.local_attention,
        local_attention_backward=flash.local_attention_backward,
        unavailable=flash.unavailable,
        refuse=flash.refuse,
        rank=30,
    )
    yield Backend(
        name="flex",
        summary="torch's FlexAttention, compiled at the first call of each shape",
        capability=Capability(
            devices={"cuda"},
            dtypes=(torch.float32, torch.float16, torch.bfloat16),
            head_dims=range(16, 257),
            key_lengths=False,
        ),
        local_attention=flex.local_attention,
        differentiable=True,
        unavailable=flex.unavailable,
        refuse=flex.refuse,
        # Its fp32 is the slowest of all on an H200: four to sixteen times behind the fastest.
        rank=lambda problem: 80 if problem.dtype == torch.float32 else 40,
    )
