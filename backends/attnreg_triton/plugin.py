"""What attnreg finds through the entry point: the backend's name and capability, and its functions by reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch

from attnreg import Backend, Capability, Problem, hookimpl
from attnreg_triton.availability import DEVICES, unavailable
from attnreg_triton.tiles import narrow_product


def _deferred(module: str, name: str) -> Callable[..., Any]:
    """``attnreg_triton.<module>.<name>``, whose import (and that of triton with it) waits for the first call."""
    function: Callable[..., Any] | None = None

    def call(*args: Any, **options: Any) -> Any:
        nonlocal function
        if function is None:
            function = getattr(import_module(f"attnreg_triton.{module}"), name)
        return function(*args, **options)

    call.__name__ = call.__qualname__ = name
    return call


def _rank(problem: Problem) -> float:
    """First choice on a GPU, but where an H100 showed something else to be faster. The interpreter (CPU) is for tests and last.

    In 16 bits and up to a head dim of 128 hardly anything is. Above, in fp32, ``cublas_block`` (60) is, by up to 1.9 times,
    unless an average is all there is, or narrow tiles make up for it.
    """
    if problem.device.type != "cuda":
        return 1000
    dim = max(problem.head_dim, problem.value_dim)
    if problem.dtype != torch.float32 or dim <= 128:
        return 10
    if problem.op == "local_weighted_average" and not problem.needs_grad:
        return 10
    is_product = problem.op != "local_attention"
    return 10 if is_product and problem.needs_grad and narrow_product(dim, problem.window) is not None else 70


@hookimpl
def attnreg_backends() -> Iterator[Backend]:
    """One backend, for all three ops, forward and backward."""
    yield Backend(
        name="triton",
        summary="Triton kernels that visit only the keys inside the window",
        capability=Capability(
            devices=DEVICES,
            dtypes=(torch.float32, torch.float16, torch.bfloat16),
            head_dims=range(1, 257),
            takes=(
                *("bias", "key_lengths", "key_starts", "query_starts", "cu_seqlens_q", "cu_seqlens_k"),
                *("softcap", "sinks", "dropout_p", "seed", "grad_log_sum_exp"),
            ),
        ),
        local_dot_product=_deferred("dot_product", "local_dot_product"),
        local_dot_product_backward=_deferred("dot_product", "local_dot_product_backward"),
        local_weighted_average=_deferred("weighted_average", "local_weighted_average"),
        local_weighted_average_backward=_deferred("weighted_average", "local_weighted_average_backward"),
        local_attention=_deferred("attention", "local_attention"),
        local_attention_backward=_deferred("attention_backward", "local_attention_backward"),
        unavailable=unavailable,
        rank=_rank,
    )
