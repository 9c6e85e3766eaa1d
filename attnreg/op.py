"""The ops, each a row of data: its tensors, its results and its arguments.

Checks, ``Problem``, the ops of torch.library with their fake kernels and autograd, and the compositions all follow from these
rows. A new argument is an :class:`Argument` here, named in the rows of the ops that take it, and a keyword of their functions in
``attnreg.functional``.

Sizes are letters: N batch, H query heads, G key/value heads (H a multiple of G), Q queries, K keys, E head dim, D value dim,
W the window's size, S the offsets of packed sequences, one more than there are; 1 is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

# What each size is called where one is wrong.
SIZES: Mapping[str, str] = {
    "N": "batch size",
    "H": "number of query heads",
    "G": "number of key/value heads",
    "Q": "number of queries",
    "K": "number of keys",
    "E": "head_dim",
    "D": "head_dim",
    "W": "window's size",
    "S": "number of offsets",
}


@dataclass(frozen=True)
class Argument:
    """An optional argument of an op: a tensor where it has ``dims``, else a number.

    Attributes:
        name: what users write.
        dims: a tensor's sizes in letters; None for a number.
        kind: "floating" or "integer".
        broadcasts: whether a tensor may have fewer dimensions, and 1 in place of any size.
        differentiable: whether it has a gradient.
        dtype: of integers, the dtype in which backends get them; None for int32 or int64.
        at_most: the letter of the size that an integer must not exceed; it is then at least 0.
        ascends: whether integers are offsets: 0 first, and none under the one before.
        admits: what of numbers is admitted, in words and as a function; None for all that are finite.
        within: the smallest and the largest number that backends get, for one that is beyond them; None for any.
        needs: the argument that has to be given with it.
        excludes: the arguments that must not be given with it.
        sizes: what sizes must be where it is given, by letter.
        for_all: whether every backend of the op gets it: it is then no matter of ``Capability.takes``.
        required: whether None is refused: the op's function has a default of its own.
        default: what backends get where a call gives none, from the head dim E; None for None.
    """

    name: str
    dims: str | None = None
    kind: str = "floating"
    broadcasts: bool = False
    differentiable: bool = False
    dtype: torch.dtype | None = None
    at_most: str | None = None
    ascends: bool = False
    admits: tuple[str, Callable[[float], bool]] | None = None
    within: tuple[float, float] | None = None
    needs: str | None = None
    excludes: tuple[str, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict, hash=False)
    for_all: bool = False
    required: bool = False
    default: Callable[[int], float] | None = None

    @property
    def schema(self) -> str:
        """Its type in torch.library's words."""
        return "Tensor?" if self.dims is not None else "float?"


@dataclass(frozen=True)
class Result:
    """What an op returns: in the first tensor's dtype and order in memory, or else a statistic of rows.

    Attributes:
        dims: its sizes in letters.
        fill: what it is where no key is visible.
        of_rows: whether it is a statistic of rows: contiguous, in float32, or float64 for float64.
    """

    dims: str
    fill: float
    of_rows: bool = False

    def dtype(self, inputs: torch.dtype) -> torch.dtype:
        """Its dtype where the op's tensors have ``inputs``."""
        if not self.of_rows:
            return inputs
        return torch.float64 if inputs == torch.float64 else torch.float32


@dataclass(frozen=True, eq=False)
class Op:
    """One op.

    Attributes:
        name: its name, that of its public function, of a backend's function and of the op in torch.library.
        tensors: the sizes of each tensor, by name, in the order in which the op takes them. The first has a row for each query.
        results: what the op computes, by name; users get the first.
        arguments: the optional arguments.
        keeps_results: whether its backward gets the results.
        has_slots: whether a tensor or a result has a column for each slot of the window.
        incoming: the incoming gradients of results but the first, which a call asks for that differentiates these: backward
            functions get them, by name.
        optional: the names of the arguments and incoming gradients that a backend may not handle.
    """

    name: str
    tensors: Mapping[str, str]
    results: Mapping[str, Result]
    arguments: tuple[Argument, ...]
    keeps_results: bool = False
    has_slots: bool = field(init=False)
    incoming: tuple[Argument, ...] = field(init=False)
    optional: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        tensors, results = self.tensors.values(), [row.dims for row in self.results.values()]
        object.__setattr__(self, "has_slots", any("W" in dims for dims in (*tensors, *results)))
        object.__setattr__(self, "incoming", tuple(Argument(f"grad_{name}") for name in [*self.results][1:]))
        optional = frozenset(argument.name for argument in self.extras if not argument.for_all)
        object.__setattr__(self, "optional", optional)

    @property
    def extras(self) -> tuple[Argument, ...]:
        """All that a call may give or ask for beside the op's tensors: the arguments, then incoming gradients."""
        return (*self.arguments, *self.incoming)

    def defaults(self, head_dim: int) -> dict[str, float | None]:
        """What stands for each argument where a call gives none."""
        return {
            argument.name: None if argument.default is None else argument.default(head_dim)
            for argument in self.arguments
        }

    @property
    def backward(self) -> str:
        """The name of its backward."""
        return f"{self.name}_backward"

    @property
    def differentiable(self) -> tuple[str, ...]:
        """What has a gradient: the tensors, then arguments."""
        return (*self.tensors, *(argument.name for argument in self.arguments if argument.differentiable))

    def __repr__(self) -> str:
        return f"Op({self.name!r})"


def _softmax_scale(head_dim: int) -> float:
    return head_dim**-0.5 if head_dim else 1.0


def _no_scale(head_dim: int) -> float:
    return 1.0


BIAS = Argument("bias", dims="NHQW", broadcasts=True, differentiable=True)
OF_SEQUENCES = (
    Argument("key_lengths", dims="N", kind="integer", at_most="K"),
    Argument("key_starts", dims="N", kind="integer", at_most="K"),
    Argument("query_starts", dims="N", kind="integer"),
)
ROWS_OF_CALL = (
    *OF_SEQUENCES,
    Argument(
        "cu_seqlens_q",
        dims="S",
        kind="integer",
        at_most="Q",
        ascends=True,
        excludes=tuple(argument.name for argument in OF_SEQUENCES),
        sizes={"N": 1},
    ),
    Argument("cu_seqlens_k", dims="S", kind="integer", at_most="K", ascends=True, needs="cu_seqlens_q"),
)
SCALE = Argument("scale", for_all=True, default=_softmax_scale)
# What float32 cannot hold, or divide by, makes no difference to what it can.
SOFTCAP = Argument("softcap", admits=("greater than 0", lambda number: number > 0), within=(1e-30, 1e30))
SINKS = Argument("sinks", dims="H", differentiable=True)
DROPOUT = (
    Argument("dropout_p", admits=("at least 0 and less than 1", lambda number: 0 <= number < 1), needs="seed"),
    Argument("seed", dims="1", kind="integer", broadcasts=True, dtype=torch.int64, needs="dropout_p"),
)

DOT_PRODUCT = Op(
    name="local_dot_product",
    tensors={"query": "NHQE", "key": "NGKE"},
    results={"scores": Result("NHQW", fill=-math.inf)},
    arguments=(BIAS, *ROWS_OF_CALL, replace(SCALE, required=True, default=_no_scale)),
)
WEIGHTED_AVERAGE = Op(
    name="local_weighted_average",
    tensors={"weights": "NHQW", "value": "NGKD"},
    results={"output": Result("NHQD", fill=0.0)},
    arguments=ROWS_OF_CALL,
)
ATTENTION = Op(
    name="local_attention",
    tensors={"query": "NHQE", "key": "NGKE", "value": "NGKD"},
    results={"output": Result("NHQD", fill=0.0), "log_sum_exp": Result("NHQ", fill=-math.inf, of_rows=True)},
    arguments=(BIAS, *ROWS_OF_CALL, SCALE, SOFTCAP, SINKS, *DROPOUT),
    keeps_results=True,
)

ROWS: Mapping[str, Op] = {op.name: op for op in (DOT_PRODUCT, WEIGHTED_AVERAGE, ATTENTION)}
OPS = tuple(ROWS)
