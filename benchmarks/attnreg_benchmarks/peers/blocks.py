"""torch's scaled_dot_product_attention over blocks of queries, each against the keys that it sees: what a careful user writes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from attnreg import Problem
from attnreg.testing.inputs import Calls, Inputs, autograd_calls
from attnreg_benchmarks.contender import Contender
from attnreg_benchmarks.peers.refusals import not_on_a_cpu
from attnreg_benchmarks.workloads import FUSED

BLOCK = 128


def over_blocks(problem: Problem) -> Callable[..., Tensor]:
    """Attention of query, key and value, whose masks are made beforehand."""
    length, before, after = problem.key_length, problem.window.left, problem.window.right
    block = min(BLOCK, length)
    count, width = -(-length // block), block + before + after
    rows, columns = torch.arange(block)[:, None], torch.arange(width)
    band = (columns >= rows) & (columns <= rows + before + after)
    keys = torch.arange(count)[:, None, None] * block - before + columns
    mask = band & (keys >= 0) & (keys < length)
    mask = mask.expand(problem.batch, problem.heads, -1, -1, -1).transpose(1, 2).flatten(0, 1)
    missing, groups = count * block - length, problem.heads // problem.kv_heads

    def blocks_of(tensor: Tensor) -> Tensor:
        """(N, Hkv, L, E) -> (N * count, H, width, E)."""
        padded = pad(tensor, (0, 0, before, after + missing))
        heads = padded.unfold(2, width, block).permute(0, 2, 1, 4, 3).flatten(0, 1)
        return heads.repeat_interleave(groups, 1) if groups > 1 else heads

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        queries = pad(query, (0, 0, 0, missing)).unflatten(2, (count, block)).transpose(1, 2).flatten(0, 1)
        blocks = scaled_dot_product_attention(queries, blocks_of(key), blocks_of(value), mask)
        output: Tensor = blocks.unflatten(0, (-1, count)).transpose(1, 2).flatten(2, 3)
        return output[:, :, :length]

    return attend


def _refuse(problem: Problem) -> str | None:
    return not_on_a_cpu(problem)


def _prepare(problem: Problem, inputs: Inputs) -> Calls:
    return autograd_calls(over_blocks(problem), inputs)


BLOCKS = Contender("sdpa-blocks", "peer", (FUSED,), _refuse, _prepare)
