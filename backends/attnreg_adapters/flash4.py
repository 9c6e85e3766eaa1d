"""FlashAttention 4 (the distribution flash-attn-4), where it is installed, called with a window."""

from __future__ import annotations

import torch
from torch import Tensor

from attnreg import Problem, Window
from attnreg_adapters.flash import lengths_first, positive_scale, refuse_shapes

DISTRIBUTION = "flash-attn-4"

# Where it has been seen to be right: release 4.0.0b36 against float32, at all head dims, random windows and lengths; but for the
# gradients that `refuse` names, of the query and with grouped heads also of key and value.
_CAPABILITY = (9, 0)


def unavailable() -> str | None:
    """Why it cannot run on this machine, where its library is installed."""
    if not torch.cuda.is_available():
        return "torch has no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability != _CAPABILITY:
        return "it was tested on compute capability 9.0 alone; this is {}.{}".format(*capability)
    return None


def prepare() -> str | None:
    """Why the library cannot be imported: it looks for its compiler meanwhile."""
    try:
        import flash_attn.cute  # noqa: F401
    except Exception as error:
        return f"{DISTRIBUTION} cannot be imported: {type(error).__name__}: {error}"
    return None


def refuse(problem: Problem) -> str | None:
    """What the capability cannot say."""
    if problem.needs_grad and problem.head_dim < 128 and problem.head_dim % 32 in (8, 16):
        return f"its gradients are wrong at E = {problem.head_dim}, as at all E < 128 that are 8 or 16 above a multiple of 32"
    return refuse_shapes(problem)


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window,
    *,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp of each row as the library gives it."""
    from flash_attn.cute import flash_attn_func

    query, scale, _ = positive_scale(query, scale)
    output, log_sum_exp = flash_attn_func(
        *(lengths_first(each) for each in (query, key, value)),
        softmax_scale=scale,
        window_size=(window.left, window.right),
        # The same bits every time, as attnreg promises.
        deterministic=True,
        return_lse=True,
    )
    return output.transpose(1, 2).contiguous(), log_sum_exp
