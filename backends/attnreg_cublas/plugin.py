"""What attnreg finds through the entry point: the backend's name and capability, and its functions."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attnreg import Backend, Capability, Problem, hookimpl
from attnreg_cublas import build, functions, rule

# Positions and rows are 32-bit numbers in the kernels; a padded copy has some more than the sequences.
_MOST_ROWS = 2**30


def _refuse(problem: Problem) -> str | None:
    # Of keys that may begin anywhere, a line has a place for all that the window reaches from any query.
    moving = problem.gives("query_starts") is not None
    keys = problem.window.size if moving else problem.key_length
    rows = problem.batch * problem.heads * (problem.query_length + keys)
    if rows <= _MOST_ROWS:
        return None
    return f"it counts at most {_MOST_ROWS} rows; queries and {'windows' if moving else 'keys'} have {rows}"


@hookimpl
def attnreg_backends() -> Iterator[Backend]:
    """Offer ``cublas_block``; it is built when it is first used."""
    yield Backend(
        name="cublas_block",
        summary="dense blocks around the band, multiplied by cuBLAS; built with nvcc at first use",
        capability=Capability(devices={"cuda"}, dtypes=(torch.float32, torch.float16, torch.bfloat16)),
        local_dot_product=functions.local_dot_product,
        local_dot_product_backward=functions.local_dot_product_backward,
        local_weighted_average=functions.local_weighted_average,
        local_weighted_average_backward=functions.local_weighted_average_backward,
        unavailable=build.unavailable,
        prepare=build.prepare,
        refuse=_refuse,
        options={"block": rule.parse_block, "workspace": rule.parse_workspace},
        rank=60,
    )
