"""The floor: the time that no kernel can beat on a machine, whatever it does.

Each input is read once and each output written once at the machine's copy bandwidth, or the products over visible
(query, key) pairs are made at its matmul rate, whichever takes longer. The log-sum-exp, and what a backward reads of
it, is left out: it belongs to the method, not to the result.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnreg import Window
from attnreg.measuring.task import FUSED, bytes_moved
from attnreg_benchmarks.workloads import Workload


@dataclass(frozen=True)
class Ceilings:
    """What a machine can do at most, as measured.

    Attributes:
        bytes_per_second: of a large copy on the device, bytes read plus bytes written.
        flops_per_second: of large matrix products, by arithmetic: "bf16", "tf32", "fp32".
    """

    bytes_per_second: float
    flops_per_second: dict[str, float]

    @property
    def fastest_flops(self) -> float:
        """The highest rate of any arithmetic: the only one that no kernel can beat.

        A result as accurate as fp32 can be put together from products of TF32 or bf16 parts, so that the fp32 rate is no
        limit to it, and whatever number of parts a kernel needs is its own affair.
        """
        return max(self.flops_per_second.values())


def floor_seconds(workload: Workload, direction: str, ceilings: Ceilings) -> float:
    """The floor of a workload's "forward" or "backward" in seconds."""
    return max(
        bytes_moved(workload, direction) / ceilings.bytes_per_second,
        flops(workload, direction) / ceilings.fastest_flops,
    )


def flops(workload: Workload, direction: str) -> int:
    """The floating-point operations of the matrix products over visible pairs, two for each multiplication with its addition.

    The fused op makes two products forward and five backward (it makes the scores again); the others one and two.
    """
    products = {("forward", True): 2, ("backward", True): 5, ("forward", False): 1, ("backward", False): 2}
    pairs = workload.batch * workload.heads * visible_pairs(workload.length, workload.window)
    return 2 * products[direction, workload.op == FUSED] * workload.head_dim * pairs


def visible_pairs(length: int, window: Window) -> int:
    """How many (query, key) pairs a window shows in a sequence of ``length`` queries and keys, borders included."""
    left, right = min(window.left, length - 1), min(window.right, length - 1)
    return length * (left + right + 1) - left * (left + 1) // 2 - right * (right + 1) // 2
