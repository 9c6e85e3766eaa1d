"""FlexAttention of torch, compiled, with a block mask for the rows' keys, and the bias and the soft cap in its score function.

The mask of a window alone is kept. One of rows of which something is told, packed or padded, is made anew at each call, on the
device: some fifty small kernels, which a CUDA graph captures too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnreg import Problem, Window, empty_like
from attnreg.rows import Rows, rows_of
from attnreg_adapters.layout import in_order_of, unseeing_queries, unseen_keys
from attnreg_adapters.sinks import beside_sinks

# Queries and keys of a block of the mask.
_BLOCK = 128
# The mask lists every pair of blocks: 64 MiB of them here.
MOST_POSITIONS = 2**19
# Every shape is a compilation of its own; after the default of 8 torch would give up compiling.
_MOST_COMPILATIONS = 4096
# Below the largest of a row by that much, scores have no weight; times log2(e) they are still finite.
_LOWEST = -1e38
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
    if any(problem.gives(name) for name in ("key_lengths", "key_starts", "query_starts")):
        pairs = problem.batch * math.ceil(problem.query_length / _BLOCK) * math.ceil(problem.key_length / _BLOCK)
        if pairs > (MOST_POSITIONS // _BLOCK) ** 2:
            return f"its masks for {problem.batch} sequences list {pairs} pairs of blocks, tried up to {MOST_POSITIONS}^2 pairs"
    return None


def workspace(problem: Problem) -> int:
    """Which keys a bias shows; where it learns, also itself and its gradient, written out for all rows."""
    bias = problem.gives("bias")
    if bias is None or bias.dtype is None:
        return 0
    seen = bias.shape[0] * min(bias.shape[1], problem.kv_heads) * problem.query_length * problem.window.size * 9
    slots = problem.batch * problem.heads * problem.query_length * problem.window.size
    return seen + (2 * max(bias.dtype.itemsize, 4) * slots if problem.needs_grad else 0)


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window,
    *,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    key_starts: Tensor | None,
    query_starts: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The output, and the natural log-sum-exp of each row."""
    placing = {
        "key_lengths": key_lengths,
        "key_starts": key_starts,
        "query_starts": query_starts,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
    }
    queries, keys, device = query.size(2), key.size(2), query.device
    if any(each is not None for each in placing.values()):
        rows = rows_of(queries, keys, device, **placing)
        view = _view_of_rows(rows, window, queries, keys)
        output, log_sum_exp = _attention(query, key, value, window, view, bias, scale, softcap, sinks)
        return in_order_of(query, output), log_sum_exp
    unseeing, unseen = unseeing_queries(queries, keys, window), unseen_keys(queries, keys, window)
    seeing, key, value = query[:, :, unseeing:], key[:, :, unseen:], value[:, :, unseen:]
    if bias is not None and bias.size(2) > 1:
        bias = bias[:, :, unseeing:]
    mask, bounds = _block_mask(window.left, window.right, seeing.size(2), key.size(2), device)
    view = View(mask, bounds, None if bias is None else rows_of(seeing.size(2), key.size(2), device))
    output, log_sum_exp = _attention(seeing, key, value, window, view, bias, scale, softcap, sinks)
    if not unseeing:
        return in_order_of(query, output), log_sum_exp
    whole, whole_log_sum_exp = empty_like(query, value.size(3)), log_sum_exp.new_full(query.shape[:3], -math.inf)
    whole[:, :, :unseeing] = 0
    whole[:, :, unseeing:] = output
    whole_log_sum_exp[:, :, unseeing:] = log_sum_exp
    return whole, whole_log_sum_exp


class View(NamedTuple):
    """What the rows of a call see.

    Attributes:
        mask: the library's, by block.
        numbers: what its score function finds a slot by: of a window alone its bounds (2,); else of each row the key of its
            slot 0, (N or 1, Lq).
        rows: where rows stand; None where each sees a key, and each key is seen, and nothing has to be told of them.
    """

    mask: Any
    numbers: Tensor
    rows: Rows | None


class Beside(NamedTuple):
    """A bias of slots, and how much of it scores are told without.

    Attributes:
        added: what is added to scores, (N, H, Lq, W), broadcast.
        largest: of what a row sees the largest, in float32 or wider, (N or 1, H or 1, Lq, 1); 0 of a row that sees nothing.
    """

    added: Tensor
    largest: Tensor


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window,
    view: View,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What the library gives, brought to the contract."""
    if view.rows is None:
        output, log_sum_exp = _flex_attention(query, key, value, view, None, softcap, scale)
        return _beside_sinks(output, log_sum_exp, sinks)
    first, last = (each[:, None] for each in view.rows.seen(query.size(2), window))
    beside = None
    if bias is None:
        sees = first < last
        seen = _union(first.where(sees, key.size(2)), last.where(sees, 0), key.size(2))
        seen = _of_any_head(seen, key.size(1))
    else:
        added = _each_once(bias, query, window) if _learns(bias) else bias.expand(*bias.shape[:3], window.size)
        slots = _keys_of_slots(view.rows, query.size(2), window)
        visible = (added.detach() != -math.inf) & (slots >= first[..., None]) & (slots < last[..., None])
        sees, seen = visible.any(-1), _scattered(visible, slots, key)
        # Its backward takes the weights from the rounded log-sum-exp, so scores are to be near 0.
        largest = added.detach().where(visible, -math.inf).amax(-1, keepdim=True).where(sees[..., None], 0)
        beside = Beside(added, largest if largest.dtype.itemsize >= 4 else largest.float())
    # The kernel gives other keys weight 0, and multiplies their values by it; its backward multiplies all of such rows and keys.
    value = value.where(seen[..., None], 0)
    learns = _learns(query, key, value, *(each for each in (bias, sinks) if each is not None))
    if learns:
        query, key = query.where(sees[..., None], 0), key.where(seen[..., None], 0)
    output, log_sum_exp = _flex_attention(query, key, value, view, beside, softcap, scale)
    if beside is not None:
        log_sum_exp = log_sum_exp + _finite(beside.largest[..., 0], log_sum_exp.dtype)
    if sinks is not None:
        log_sum_exp = log_sum_exp.where(sees, -math.inf)
    output, log_sum_exp = _beside_sinks(output, log_sum_exp, sinks)
    if learns:
        output, log_sum_exp = output.where(sees[..., None], 0), log_sum_exp.where(sees, -math.inf)
    return output, log_sum_exp


def _learns(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _beside_sinks(output: Tensor, log_sum_exp: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    if sinks is None:
        return output, log_sum_exp
    share, total = beside_sinks(log_sum_exp, sinks)
    return (output * share[..., None]).to(output.dtype), total


def _flex_attention(
    query: Tensor, key: Tensor, value: Tensor, view: View, bias: Beside | None, softcap: float | None, scale: float
) -> tuple[Tensor, Tensor]:
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch
    from torch.nn.attention.flex_attention import AuxRequest

    # A number in a tensor, so that another one compiles nothing.
    cap = None if softcap is None else torch.full((1,), softcap, device=query.device)
    with dynamo.patch(recompile_limit=_MOST_COMPILATIONS), functorch.patch(donated_buffer=False):
        output, further = _compiled()(
            query,
            key,
            value,
            score_mod=_score_function(bias, view.numbers, cap),
            block_mask=view.mask,
            scale=scale,
            enable_gqa=query.size(1) != key.size(1),
            return_aux=AuxRequest(lse=True),
            kernel_options=_kernel_options(
                query.size(1) // key.size(1), query.size(2), bias is not None and bias.added.requires_grad
            ),
        )
    return output, further.lse


def _kernel_options(group: int, queries: int, bias_learns: bool) -> dict[str, Any]:
    """What the library would choose too large for a multiprocessor's memory."""
    options: dict[str, Any] = {}
    # Of few queries it holds all rows of a key head in one tile.
    if group > 1 and group * queries > _MOST_ROWS_OF_A_HEAD:
        options["BACKEND"] = "TRITON"
    # It prefetches tiles of a bias of all rows as those of keys.
    if bias_learns:
        options["num_stages"] = 1
    return options


def _each_once(bias: Tensor, query: Tensor, window: Window) -> Tensor:
    """A bias that learns, written out for all rows: the library adds to each of its numbers once then, so in one order.

    What autograd adds up after that is at least float32.
    """
    bias = bias if bias.dtype.itemsize >= 4 else bias.float()
    return bias.expand(*query.shape[:3], window.size).contiguous()


def _finite(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """A bias in a dtype of less range: a finite number hides nothing."""
    most = torch.finfo(torch.float32).max
    return bias.clamp(-most, most).to(dtype)


def _keys_of_slots(rows: Rows, queries: int, window: Window) -> Tensor:
    """The positions of the keys of all slots, (N or 1, 1, Lq, W)."""
    first = rows.position(queries)[:, None, :, None] - window.left
    return first + torch.arange(window.size, device=first.device)


def _union(first: Tensor, last: Tensor, keys: int) -> Tensor:
    """Which keys lie in some row's interval, (..., Lk), of intervals (..., Lq) that never step back but where they are empty."""
    first, last = torch.broadcast_tensors(first, last)
    # An empty interval takes its place between its neighbours.
    first, last = first.flip(-1).cummin(-1).values.flip(-1).contiguous(), last.cummax(-1).values
    every = torch.arange(keys, device=first.device)
    begun = torch.searchsorted(first, every.expand(*first.shape[:-1], -1).contiguous(), right=True)
    return (begun > 0) & (last.gather(-1, (begun - 1).clamp(min=0)) > every)


def _of_any_head(seen: Tensor, kv_heads: int) -> Tensor:
    """What some query head of each key head sees."""
    by_kv_head: Tensor = seen.unflatten(1, (kv_heads, -1)) if seen.size(1) > 1 else seen[:, :, None]
    return by_kv_head.any(2)


def _scattered(visible: Tensor, slots: Tensor, key: Tensor) -> Tensor:
    """Which keys are visible to some row, (N or 1, Hkv or 1, Lk)."""
    visible, keys = _of_any_head(visible, key.size(1)), key.size(2)
    # Slots without a key fall on one more, the last.
    index = torch.where((slots >= 0) & (slots < keys), slots, keys).expand(visible.shape)
    found = torch.zeros(*visible.shape[:2], keys + 1, dtype=torch.uint8, device=key.device)
    found.scatter_reduce_(2, index.flatten(2), visible.flatten(2).to(torch.uint8), "amax")
    return found[:, :, :keys].bool()


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
    blocks = (begin[None], end[None], inner[None], outer[None])
    return _listed(blocks, visible, queries, keys), bounds


def _view_of_rows(rows: Rows, window: Window, queries: int, keys: int) -> View:
    """What rows see of whom something is told. Nothing is read on the host; the mask is made for each call."""
    first, last = (each.clamp(0, keys) for each in torch.broadcast_tensors(*rows.seen(queries, window)))
    sees, short = first < last, -queries % _BLOCK

    def of_blocks(numbers: Tensor, beyond: int) -> Tensor:
        """By block; what stands beyond the last row changes nothing."""
        blocks: Tensor = torch.nn.functional.pad(numbers, (0, short), value=beyond).unflatten(1, (-1, _BLOCK))
        return blocks

    # A row that sees no key leaves no block in which all see all.
    begins, ends = first.where(sees, keys), last.where(sees, 0)
    begin = of_blocks(begins, keys).amin(-1) // _BLOCK
    end = torch.maximum(-(-of_blocks(ends, 0).amax(-1) // _BLOCK), begin)
    inner = torch.minimum(-(-of_blocks(begins, 0).amax(-1) // _BLOCK), end)
    outer = torch.maximum(of_blocks(ends, keys).amin(-1) // _BLOCK, inner)
    many = first.size(0) > 1
    low, high = first.to(torch.int32), last.to(torch.int32)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        sequence = batch if many else query * 0
        seen: Tensor = (key >= low[sequence, query]) & (key < high[sequence, query])
        return seen

    origin = rows.position(queries) - window.left
    return View(_listed((begin, end, inner, outer), visible, queries, keys), origin, rows)


def _listed(
    blocks: tuple[Tensor, Tensor, Tensor, Tensor], visible: Callable[..., Tensor], queries: int, keys: int
) -> Any:
    """The library's mask of which blocks of keys each block of queries sees: begin, end, inner, outer, (N or 1, blocks)."""
    from torch.nn.attention.flex_attention import BlockMask

    begin, end, inner, outer = (each[..., None] for each in blocks)
    of_keys = torch.arange(math.ceil(keys / _BLOCK), device=begin.device)
    full = (of_keys >= inner) & (of_keys < outer)
    partial = (of_keys >= begin) & (of_keys < end) & ~full

    def ordered(sees: Tensor) -> tuple[Tensor, Tensor]:
        """How many blocks each block sees, and these first."""
        numbers = sees.to(torch.int32)[:, None]
        places = numbers.argsort(dim=-1, descending=True, stable=True)
        return numbers.sum(-1, dtype=torch.int32), places.to(torch.int32).contiguous()

    # Both directions are told: the library would find the second by vmap, which the first run of a compiled graph refuses.
    return BlockMask(
        (queries, keys),
        *(*ordered(partial), *ordered(full)),
        *(*ordered(partial.mT), *ordered(full.mT)),
        BLOCK_SIZE=(_BLOCK, _BLOCK),
        mask_mod=visible,
    )


def _score_function(bias: Beside | None, numbers: Tensor, cap: Tensor | None) -> Callable[..., Tensor] | None:
    """What the library does to each score; None where that is nothing."""
    add = None if bias is None else _adds(bias, numbers)
    if cap is None:
        return add

    def score_function(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        score = cap[0] * torch.tanh(score / cap[0])
        return score if add is None else add(score, batch, head, query, key)

    return score_function


def _adds(bias: Beside, numbers: Tensor) -> Callable[..., Tensor]:
    """The score function of a bias (N, H, Lq, W), broadcast: slot c of a row is key ``c`` after that of its slot 0."""
    added, largest = bias
    batch_size, heads, rows, slots = added.shape
    of_largest = largest.shape
    of_window, many = numbers.dim() == 1, numbers.size(0) > 1

    def add(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        zero = query * 0
        origin = query + numbers[0] if of_window else numbers[batch if many else zero, query]
        slot = (key - origin).clamp(0, slots - 1)
        number = added[
            batch if batch_size > 1 else zero,
            head if heads > 1 else zero,
            query if rows > 1 else zero,
            slot,
        ]
        most = largest[batch if of_largest[0] > 1 else zero, head if of_largest[1] > 1 else zero, query, zero]
        less = score + _finite(number, score.dtype) - _finite(most, score.dtype)
        # Hidden whatever the score is.
        return torch.where(number == -math.inf, -math.inf, less.clamp(min=_LOWEST))

    return add
