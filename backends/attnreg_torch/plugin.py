"""What this package offers to attnreg."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from attnreg import Backend, Capability, Problem, hookimpl
from attnreg_torch import block, naive

CAPABILITY = Capability(
    dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64}),
    takes=frozenset(
        (
            *("bias", "key_lengths", "key_starts", "query_starts", "cu_seqlens_q", "cu_seqlens_k"),
            *("softcap", "sinks", "dropout_p", "seed", "grad_log_sum_exp"),
        )
    ),
)


def rank_of_blocks(problem: Problem) -> float:
    """The default of a CPU; elsewhere, kernels made for the device go before it."""
    return 20 if problem.device.type == "cpu" else 80


@hookimpl
def attnreg_backends() -> Iterable[Backend]:
    """Offer both backends."""
    yield Backend(
        name="torch",
        summary="the reference: the definition, gathered key by key; differentiable any number of times",
        capability=CAPABILITY,
        local_dot_product=naive.local_dot_product,
        local_weighted_average=naive.local_weighted_average,
        local_attention=naive.local_attention,
        differentiable=True,
        rank=100,
        workspace=naive.workspace,
    )
    yield Backend(
        name="torch_block",
        summary="blocks of queries against block + W - 1 keys in one batched product, memory O(L (block + W))",
        capability=CAPABILITY,
        local_dot_product=block.local_dot_product,
        local_dot_product_backward=block.local_dot_product_backward,
        local_weighted_average=block.local_weighted_average,
        local_weighted_average_backward=block.local_weighted_average_backward,
        local_attention=block.local_attention,
        local_attention_backward=block.local_attention_backward,
        rank=rank_of_blocks,
        workspace=block.workspace,
    )
