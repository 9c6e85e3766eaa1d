"""What this package offers to attnreg."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attnreg import Backend, Capability, Problem, hookimpl
from attnreg_adapters import flash, flash4, flex

_FLASH_ATTENTION = Capability(
    devices={"cuda"},
    dtypes=(torch.float16, torch.bfloat16),
    head_dims=range(8, 257, 8),
)


def _rank_of_flash4(problem: Problem) -> float:
    """Before triton (10) where an H100 showed it to be faster: there, by up to 2.1 times."""
    wide = problem.window.size >= (512 if problem.head_dim > 128 else 2048)
    return 5 if wide and not problem.given else 20


@hookimpl
def attnreg_backends() -> Iterator[Backend]:
    """Offer all: fused attention alone, for windows in which their tiles fill up."""
    yield Backend(
        name="flash",
        summary="FlashAttention as torch carries it, with a window; its deterministic backward",
        capability=_FLASH_ATTENTION,
        local_attention=flash.local_attention,
        local_attention_backward=flash.local_attention_backward,
        unavailable=flash.unavailable,
        refuse=flash.refuse,
        rank=30,
        workspace=flash.workspace,
    )
    yield Backend(
        name="flash4",
        summary="FlashAttention 4, where flash-attn-4 is installed, with a window; its deterministic backward",
        capability=_FLASH_ATTENTION,
        local_attention=flash4.local_attention,
        local_attention_backward=flash4.local_attention_backward,
        unavailable=flash4.unavailable,
        prepare=flash4.prepare,
        refuse=flash4.refuse,
        library=flash4.DISTRIBUTION,
        rank=_rank_of_flash4,
        workspace=flash4.workspace,
    )
    yield Backend(
        name="flex",
        summary="torch's FlexAttention, compiled at the first call of each shape",
        capability=Capability(
            devices={"cuda"},
            dtypes=(torch.float32, torch.float16, torch.bfloat16),
            head_dims=range(16, 257),
            takes=frozenset(
                (
                    *("bias", "key_lengths", "key_starts", "query_starts", "cu_seqlens_q", "cu_seqlens_k"),
                    *("softcap", "sinks", "grad_log_sum_exp"),
                )
            ),
        ),
        local_attention=flex.local_attention,
        differentiable=True,
        unavailable=flex.unavailable,
        refuse=flex.refuse,
        workspace=flex.workspace,
        # Its fp32 is the slowest of all on an H200: four to sixteen times behind the fastest.
        rank=lambda problem: 80 if problem.dtype == torch.float32 else 40,
    )
