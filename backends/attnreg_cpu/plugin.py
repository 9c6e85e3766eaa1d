"""What attnreg finds through the entry point: the backend's name and capability, and its functions."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attnreg import Backend, Capability, Problem, hookimpl
from attnreg_cpu import build, functions

# A single query is one lane of a vector, and the others are idle. From how many keys on, and in 16 bits by how many query heads a
# key head, `torch_block` is then faster, measured on one thread with AVX2.
MANY_KEYS, MANY_HEADS = 512, 4


def _rank(problem: Problem) -> float:
    """First, but for a decode step over a long window, after ``torch_block``."""
    is_step = problem.op == "local_attention" and problem.query_length == 1
    over_many = min(problem.window.size, problem.key_length) >= MANY_KEYS
    is_plain = all(name == "sinks" for name, _ in problem.given)
    shares = problem.dtype.itemsize == 2 and problem.heads >= MANY_HEADS * problem.kv_heads
    return 30 if is_step and over_many and is_plain and (problem.dtype == torch.float32 or shares) else 10


@hookimpl
def attnreg_backends() -> Iterator[Backend]:
    """Offer ``attnreg_cpu``; it is built when it is first used."""
    yield Backend(
        name="attnreg_cpu",
        summary="C++ for every instruction set of a CPU, tile by tile; built with the C++ compiler at first use",
        capability=Capability(
            devices={"cpu"},
            dtypes=(torch.float16, torch.bfloat16, torch.float32, torch.float64),
            takes=(
                *("bias", "key_lengths", "key_starts", "query_starts", "cu_seqlens_q", "cu_seqlens_k"),
                *("softcap", "sinks", "dropout_p", "seed", "grad_log_sum_exp"),
            ),
        ),
        local_dot_product=functions.local_dot_product,
        local_dot_product_backward=functions.local_dot_product_backward,
        local_weighted_average=functions.local_weighted_average,
        local_weighted_average_backward=functions.local_weighted_average_backward,
        local_attention=functions.local_attention,
        local_attention_backward=functions.local_attention_backward,
        unavailable=build.unavailable,
        prepare=build.prepare,
        rank=_rank,
    )
