"""The floor: the time that no kernel can beat on a machine, whatever it does.

Each input is read once and each output written once at the machine's copy bandwidth, or the products over visible
(query, key) pairs are made at its matmul rate, whichever takes longer. The log-sum-exp, and what a backward reads of
it, is left out: it belongs to the method, not to the result.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnreg import Problem, Window
from attnreg.measuring.sizes import bytes_moved
from attnreg.op import ROWS


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


def floor_seconds(problem: Problem, direction: str, ceilings: Ceilings) -> float:
    """The floor of a call's "forward" or "backward" in seconds."""
    return max(
        bytes_moved(problem, direction) / ceilings.bytes_per_second,
        flops(problem, direction) / ceilings.fastest_flops,
    )


def flops(problem: Problem, direction: str) -> int:
    """The floating-point operations of the matrix products over visible pairs, two for each multiplication with its addition.

    Scores are sums over E, averages give D numbers; each has two gradients. A backward that gets the results, and so not the
    scores, makes these again.
    """
    multiplications = problem.head_dim + problem.value_dim
    if direction == "backward":
        again = problem.head_dim if ROWS[problem.op].keeps_results else 0
        multiplications = 2 * multiplications + again
    pairs = visible_pairs(problem.query_length, problem.key_length, problem.window)
    return 2 * multiplications * problem.batch * problem.heads * pairs


def visible_pairs(queries: int, keys: int, window: Window) -> int:
    """How many (query, key) pairs a window shows in a sequence whose ends are aligned, borders included."""
    left, right = min(window.left, keys - 1), min(window.right, queries - 1)
    # One diagonal of the pairs for each distance between a key and a row's position.
    start = keys - queries
    return sum(
        max(min(queries, queries - distance) - max(0, -start - distance), 0) for distance in range(-left, right + 1)
    )
