"""FlexAttention of torch, compiled, with a block mask for the window and the bias in its score function."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnreg import Problem, Window, empty_like
from attnreg_adapters.layout import in_order_of, unseeing_queries, unseen_keys

# Queries and keys of a block of the mask.
_BLOCK = 128
# The mask lists every pair of blocks: 64 MiB of them here.
MOST_POSITIONS = 2**19
# Every shape is a compilation of its own; after the default of 8 torch would give up compiling.
_MOST_COMPILATIONS = 4096
# Of the query heads of a key head together: with 111 the library's kernel for few queries compiles, with 512 it does not.
_MOST_ROWS_OF_A_HEAD = 128


def unavailable() -> str | None:
    """Why it cannot run on this machine."""
    if not torch.cuda.is_available():
        return "torch has no CUDA device"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"FlexAttention is compiled to Triton, which is missing: {error}"
    return None


def refuse(problem: Problem) -> str | None:
    """What the capability cannot say."""
    if problem.dtype == torch.float32 and problem.needs_grad:
        # Its backward takes the weights from the rounded log-sum-exp, whose error is a share of the scores.
        return "gradients are needed in float32; where scores are in the hundreds, its are off by more than float32's own error"
    longest = max(problem.query_length, problem.key_length)
    if longest > MOST_POSITIONS:
        return f"a length is {longest}; its mask lists all pairs of blocks, tried up to {MOST_POSITIONS}"
    if problem.gives("bias") and problem.needs_grad:
        return "a bias is given and gradients are needed; it adds up the gradient of a bias in no fixed order"
    return None


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window,
    *,
    bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output, and the natural log-sum-exp of each row."""
    rows = unseeing_queries(query.size(2), key.size(2), window)
    unseen = unseen_keys(query.size(2), key.size(2), window)
    seeing, key, value = query[:, :, rows:], key[:, :, unseen:], value[:, :, unseen:]
    if bias is not None:
        bias = bias[:, :, rows:] if bias.size(2) > 1 else bias
        value = value.where(_seen(bias, seeing, key, window), 0)
    output, log_sum_exp = _flex_attention(seeing, key, value, window, bias, scale)
    if bias is not None:
        log_sum_exp = _of_lowest_scores(log_sum_exp, bias, key.size(2), window)
    if not rows:
        return in_order_of(query, output), log_sum_exp
    whole, whole_log_sum_exp = empty_like(query, value.size(3)), log_sum_exp.new_full(query.shape[:3], -math.inf)
    whole[:, :, :rows] = 0
    whole[:, :, rows:] = output
    whole_log_sum_exp[:, :, rows:] = log_sum_exp
    return whole, whole_log_sum_exp


def _flex_attention(
    query: Tensor, key: Tensor, value: Tensor, window: Window, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch
    from torch.nn.attention.flex_attention import AuxRequest

    mask, bounds = _block_mask(window.left, window.right, query.size(2), key.size(2), query.device)
    with dynamo.patch(recompile_limit=_MOST_COMPILATIONS), functorch.patch(donated_buffer=False):
        output, further = _compiled()(
            query,
            key,
            value,
            score_mod=None if bias is None else _adds(bias, bounds),
            block_mask=mask,
            scale=scale,
            enable_gqa=query.size(1) != key.size(1),
            return_aux=AuxRequest(lse=True),
            kernel_options=_kernel_options(query.size(1) // key.size(1), query.size(2)),
        )
    return output, further.lse


def _kernel_options(group: int, queries: int) -> dict[str, Any]:
    """Of few queries the library holds all rows of a key head in one tile, which so many do not fit."""
    return {"BACKEND": "TRITON"} if group > 1 and group * queries > _MOST_ROWS_OF_A_HEAD else {}


def _of_lowest_scores(log_sum_exp: Tensor, bias: Tensor, keys: int, window: Window) -> Tensor:
    """The log-sum-exp also of rows of which all scores are near the lowest number, which is -inf times log2(e).

    Beside such a bias nothing counts: the largest of the row's is what the library lost.
    """
    slots = _keys_of_slots(bias, log_sum_exp.size(2), keys, window)
    largest = bias.where((slots >= 0) & (slots < keys), -math.inf).amax(-1)
    lowest = largest.clamp(min=torch.finfo(torch.float32).min).to(log_sum_exp.dtype)
    return log_sum_exp.where((log_sum_exp != -math.inf) | (largest == -math.inf), lowest)


def _keys_of_slots(bias: Tensor, queries: int, keys: int, window: Window) -> Tensor:
    """The positions of the keys of all slots, (Lq, W)."""
    first = torch.arange(queries, device=bias.device)[:, None] + (keys - queries - window.left)
    return first + torch.arange(window.size, device=bias.device)


def _seen(bias: Tensor, query: Tensor, key: Tensor, window: Window) -> Tensor:
    """Which keys the bias leaves to some row, (N or 1, Hkv or 1, Lk, 1).

    The kernel gives the others weight 0, and multiplies their values by it.
    """
    queries, (kv_heads, keys) = query.size(2), key.shape[1:3]
    visible = (bias != -math.inf).expand(-1, -1, queries, window.size)
    if visible.size(1) > 1:
        visible = visible.unflatten(1, (kv_heads, -1)).any(2)
    slots = _keys_of_slots(bias, queries, keys, window)
    # Slots without a key fall on one more, the last.
    index = torch.where((slots >= 0) & (slots < keys), slots, keys).expand(visible.shape)
    found = torch.zeros(*visible.shape[:2], keys + 1, dtype=torch.uint8, device=bias.device)
    found.scatter_reduce_(2, index.flatten(2), visible.flatten(2).to(torch.uint8), "amax")
    return found[:, :, :keys, None].bool()


@functools.cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # it is kept, and a training call saves it, which no inference tensor can be
def _block_mask(left: int, right: int, queries: int, keys: int, device: torch.device) -> tuple[Any, Tensor]:
    """The mask of a window, worked out by block: torch's own maker looks at every pair of positions.

    What the window is reaches the compiled kernel as numbers in a tensor, ``bounds``, so that another window of the same
    shapes compiles nothing.
    """
    from torch.nn.attention.flex_attention import BlockMask

    shift = keys - queries
    bounds = torch.tensor([shift - left, shift + right], device=device)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key - query >= bounds[0]) & (key - query <= bounds[1])

    first = torch.arange(math.ceil(queries / _BLOCK), device=device) * _BLOCK
    last = (first + _BLOCK - 1).clamp(max=queries - 1)
    # Some query of a block sees some key of the key blocks begin .. end - 1, and all see all of those in inner .. outer - 1.
    begin = (first + shift - left).clamp(min=0) // _BLOCK
    end = torch.maximum((last + shift + right).clamp(min=-1, max=keys - 1) // _BLOCK + 1, begin)
    inner = torch.minimum(-(-(last + shift - left).clamp(min=0) // _BLOCK), end)
    outer = torch.maximum((first + shift + right + 1).clamp(min=0, max=keys) // _BLOCK, inner)
    listed = torch.arange(math.ceil(keys / _BLOCK), device=device)
    before = (inner - begin)[:, None]
    partial = torch.where(listed < before, begin[:, None] + listed, outer[:, None] + listed - before)
    full = inner[:, None] + listed

    def indices(blocks: Tensor) -> Tensor:
        return blocks.clamp(max=len(listed) - 1).to(torch.int32)[None, None]

    def counts(blocks: Tensor) -> Tensor:
        return blocks.to(torch.int32)[None, None]

    mask = BlockMask.from_kv_blocks(
        counts(end - begin - (outer - inner)),
        indices(partial),
        counts(outer - inner),
        indices(full),
        BLOCK_SIZE=_BLOCK,
        mask_mod=visible,
        seq_lengths=(queries, keys),
    )
    return mask, bounds


def _adds(bias: Tensor, bounds: Tensor) -> Callable[..., Tensor]:
    """The score function of a bias (N, H, Lq, W), broadcast: slot c of query i is key ``i + shift - left + c``."""
    batch_size, heads, rows, slots = bias.shape

    def add(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        slot = (key - query - bounds[0]).clamp(0, slots - 1)
        zero = query * 0
        added = bias[
            batch if batch_size > 1 else zero,
            head if heads > 1 else zero,
            query if rows > 1 else zero,
            slot,
        ]
        # Hidden whatever the score is; a finite float64 beyond the range of float32 hides nothing.
        finite = added.clamp(min=torch.finfo(torch.float32).min).to(score.dtype)
        return torch.where(added == -math.inf, -math.inf, score + finite)

    return add
