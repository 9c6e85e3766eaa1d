"""FlashAttention 4 (the distribution flash-attn-4, written in CuTe), where it is installed."""

from __future__ import annotations

import functools
from importlib.util import find_spec

import torch
from torch import Tensor

from attnreg.measuring.inputs import Calls, Inputs, autograd_calls
from attnreg.measuring.task import FUSED
from attnreg_benchmarks.contender import Contender
from attnreg_benchmarks.peers.refusals import not_half_on_cuda
from attnreg_benchmarks.workloads import Workload


def _refuse(workload: Workload, direction: str, device: torch.device) -> str | None:
    return _missing() or not_half_on_cuda(workload, device)


@functools.cache
def _missing() -> str | None:
    # flash_attn is the name of FlashAttention 2's package too, which has no cute.
    if find_spec("flash_attn") is None or find_spec("flash_attn.cute") is None:
        return "flash-attn-4 is not installed"
    try:
        import flash_attn.cute  # noqa: F401
    except Exception as error:  # it compiles and looks for a GPU while it is imported
        return f"flash-attn-4 cannot be imported: {type(error).__name__}: {error}"
    return None


def _prepare(workload: Workload, inputs: Inputs) -> Calls:
    from flash_attn.cute import flash_attn_func

    window = (workload.window.left, workload.window.right)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # It takes (N, L, H, E) and gives the log-sum-exp beside the output.
        result = flash_attn_func(*(each.transpose(1, 2) for each in (query, key, value)), window_size=window)
        output: Tensor = result[0] if isinstance(result, tuple) else result
        return output.transpose(1, 2)

    return autograd_calls(attend, inputs)


FLASH4 = Contender("flash4", "peer", (FUSED,), _refuse, _prepare)
