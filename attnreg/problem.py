"""One call, described once: what a backend is chosen by. No tensor is kept.

:func:`check` is the only place where a call's arguments are checked. Whatever it lets pass, every backend may rely on.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from attnreg.op import ROWS, SIZES, Argument, Op
from attnreg.printable import brief
from attnreg.unknown import MISSING, TRANSPOSE, WINDOWS, missing_arguments
from attnreg.window import Window, window_of

_LARGEST = sys.float_info.max
# Columns of a band; one row of so many in 16 bits has two terabytes.
MOST_SLOTS = 2**40

_INDEX_DTYPES = (torch.int32, torch.int64)
INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` -> ``"float32"``."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class Given:
    """An optional argument that a call gives: of a tensor its shape and dtype, of a number nothing.

    Attributes:
        shape: of all dimensions that the op has for it, 1 where it broadcasts; empty where that says nothing of the call, as
            the number of packed sequences does not.
        dtype: its own.
    """

    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None

    def __str__(self) -> str:
        return (
            ""
            if self.dtype is None or not self.dtype.is_floating_point
            else f" {_sizes(self.shape)} {dtype_name(self.dtype)}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """The facts of one call that a backend can be chosen by; hashable.

    Attributes:
        op: the op's name, one of ``attnreg.op.OPS``.
        device: where the tensors are.
        dtype: of query, key, value and weights.
        batch: the batch size, N
        heads: the number of query heads, H
        kv_heads: the number of key/value heads, Hkv
        query_length: the number of queries, Lq
        key_length: the number of keys, Lk
        head_dim: E, the last dimension of query and key; 0 for ``local_weighted_average``.
        value_dim: D, the last dimension of value; 0 for ``local_dot_product``.
        window: the window of keys.
        given: the optional arguments that the call gives, and the gradients of results but the first that it may ask for, by
            name, in the order of the op's row; not those that every backend takes.
        needs_grad: whether any gradient may be asked for.
    """

    op: str
    device: torch.device
    dtype: torch.dtype
    batch: int
    heads: int
    kv_heads: int
    query_length: int
    key_length: int
    head_dim: int
    value_dim: int
    window: Window
    given: tuple[tuple[str, Given], ...] = ()
    needs_grad: bool = False

    def gives(self, name: str) -> Given | None:
        """The optional argument of this name; None where the call does not give it."""
        return next((given for each, given in self.given if each == name), None)

    def size(self, letter: str) -> int:
        """A size by its letter in ``attnreg.op``."""
        return self.window.size if letter == "W" else int(getattr(self, _FIELDS[letter]))

    @property
    def is_empty(self) -> bool:
        """Whether a tensor of the call has no element, so that a backend would have nothing to compute."""
        return 0 in (self.batch, self.heads, self.kv_heads, self.query_length, self.key_length)

    def __str__(self) -> str:
        letters = "".join(ROWS[self.op].tensors.values())
        sizes = " ".join(
            f"{SIZE_NAMES.get(letter, letter)}={self.size(letter)}" for letter in _FIELDS if letter in letters
        )
        parts = [f"{self.op} on {self.device}, {dtype_name(self.dtype)}", sizes, f"{self.window}, W={self.window.size}"]
        parts += [f"{name}{given}" for name, given in self.given]
        parts.append("with gradients" if self.needs_grad else "forward only")
        return "; ".join(parts)


def typical(problem: Problem) -> Problem:
    """The problem by which backends are compared for all that differ from it in :func:`size_class` of N, Lq or Lk alone.

    A choice among backends then serves the lengths around it: decoding makes a new one at every step.
    """
    return replace(
        problem,
        batch=size_class(problem.batch),
        query_length=size_class(problem.query_length),
        key_length=size_class(problem.key_length),
    )


@functools.lru_cache(maxsize=4096)
def size_class(size: int) -> int:
    """``size`` to the nearest eighth of an octave; below 16 itself."""
    return size if size < 16 else round(2 ** (round(8 * math.log2(size)) / 8))


_FIELDS = {
    "N": "batch",
    "H": "heads",
    "G": "kv_heads",
    "Q": "query_length",
    "K": "key_length",
    "E": "head_dim",
    "D": "value_dim",
}
# Sizes that messages call otherwise than by their letter.
SIZE_NAMES = {"G": "Hkv", "Q": "Lq", "K": "Lk", "S": "S + 1"}


def problem_of(
    op: Op,
    tensors: Sequence[Tensor],
    window: Window,
    arguments: Sequence[object],
    *,
    needs_grad: bool,
    all_results: bool = False,
) -> Problem:
    """Describe a call that :func:`check` has let pass; ``all_results`` says that results but the first have gradients too."""
    sizes = {
        letter: size for tensor, dims in zip(tensors, op.tensors.values()) for letter, size in zip(dims, tensor.shape)
    }
    given = tuple(
        (argument.name, _given(argument, value))
        for argument, value in zip(op.arguments, arguments)
        if value is not None and not argument.for_all
    )
    if all_results and needs_grad:
        given += tuple((argument.name, Given()) for argument in op.incoming)
    return Problem(
        op=op.name,
        device=tensors[0].device,
        dtype=tensors[0].dtype,
        window=window,
        given=given,
        needs_grad=needs_grad,
        **{field: sizes.get(letter, 0) for letter, field in _FIELDS.items()},
    )


def _given(argument: Argument, value: Any) -> Given:
    if argument.dims is None:
        return Given()
    if "S" in argument.dims:
        return Given(dtype=value.dtype)
    return Given((1,) * (len(argument.dims) - value.dim()) + tuple(value.shape), value.dtype)


def visible_window(op: Op, problem: Problem) -> Window:
    """The window cut to what a sequence of this length can show; only where no tensor has a column per offset."""
    window = problem.window
    # Sizes without numbers, in a trace, are not cut to: their numbers here are those of one call.
    if op.has_slots or not isinstance(problem.key_length, int) or not isinstance(problem.query_length, int):
        return window
    # A query may then stand anywhere.
    if problem.gives("query_starts") is not None:
        return window
    for argument in op.arguments:
        given, dims = problem.gives(argument.name), argument.dims or ""
        if given is not None and "W" in dims and given.shape[dims.index("W")] != 1:
            return window
    # The last query stands at the last key and sees Lk - 1 keys before it; the first one sees Lq - 1 keys after it.
    return window_of(
        min(window.left, max(problem.key_length - 1, 0)), min(window.right, max(problem.query_length - 1, 0))
    )


def check(op: Op, tensors: Sequence[object], window: object, arguments: Sequence[object]) -> None:
    """Check a call.

    Raises:
        TypeError, ValueError: an argument is bad; the message names it, what it was and what was expected.
    """
    if window is MISSING or any(tensor is MISSING for tensor in tensors):
        raise _missing(op, tensors, window)
    check_window(window)
    assert isinstance(window, Window)
    first_name = next(iter(op.tensors))
    first: Any = tensors[0]
    owners: dict[str, str] = {}
    sizes: dict[str, Any] = {"W": window.size}
    for (name, dims), tensor in zip(op.tensors.items(), tensors):
        _check_tensor(name, dims, tensor, first_name, first)
        assert isinstance(tensor, Tensor)
        for letter, size in zip(dims, tensor.shape):
            if letter == "W":
                if size != window.size:
                    raise ValueError(
                        f"{name}: the last dimension must be the window's size, {window.size} for {window}; got shape "
                        f"{_shape(tensor)}, expected (N, H, Lq, {window.size})"
                    )
            elif letter not in sizes:
                sizes[letter], owners[letter] = size, name
            elif size != sizes[letter]:
                owner = owners[letter]
                raise _mismatch(op, name, tensor, letter, owner, tensors[list(op.tensors).index(owner)])
    if op.has_slots and window.size > MOST_SLOTS:
        raise ValueError(
            f"window: {window} makes W = {window.size} columns, more than {op.name} can have, {MOST_SLOTS}"
        )
    for letter in ("E", "D"):
        if sizes.get(letter) == 0:
            owner = owners[letter]
            shape = _shape(tensors[list(op.tensors).index(owner)])
            raise ValueError(f"{owner}: head_dim must be at least 1, got shape {shape}")
    heads, kv_heads = sizes["H"], sizes["G"]
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads):
        second_name, second = list(op.tensors)[1], tensors[1]
        raise ValueError(
            f"{second_name}: the number of query heads (H = {heads}) must be a multiple of the number of key/value heads "
            f"(Hkv = {kv_heads}); got {first_name} {_shape(first)} and {second_name} {_shape(second)}"
            f"{_if_transposed(first, second)}"
        )
    given = [argument.name for argument, value in zip(op.arguments, arguments) if value is not None]
    for argument, value in zip(op.arguments, arguments):
        if value is None and not argument.required:
            continue
        if argument.dims is None:
            check_argument_number(argument, value)
        else:
            _check_argument(argument, argument.dims, value, sizes, first_name, first)
        _check_company(argument, given, sizes, first_name, first)


def _check_company(
    argument: Argument, given: Sequence[str], sizes: dict[str, Any], first_name: str, first: Tensor
) -> None:
    """Whether what stands beside an argument goes with it."""
    name = argument.name
    if argument.needs is not None and argument.needs not in given:
        raise ValueError(f"{name}: it needs {argument.needs} beside it, which is not given")
    for other in argument.excludes:
        if other in given:
            raise ValueError(f"{name}: it cannot be given together with {other}, of which the offsets say all")
    for letter, size in argument.sizes.items():
        if sizes[letter] != size:
            raise ValueError(
                f"{name}: with it the {SIZES[letter]} must be {size}, as sequences lie one after the other in "
                f"(1, H, T, E); got {first_name} {_shape(first)}"
            )


def check_window(window: object) -> None:
    """Raise a TypeError unless ``window`` is a Window; it says how to write one."""
    if isinstance(window, Window):
        return
    if isinstance(window, int) and not isinstance(window, bool):
        n: int | str = window if window > 0 else "n"
        raise TypeError(
            f"window: got the int {window}, which libraries read in different ways; say which keys are meant with "
            f"Window.causal({n}) ({n} keys, the query's own position the last) or Window.centered({n}) "
            f"({n} keys around it), or Window(left, right)"
        )
    raise TypeError(f"window must be an attnreg.Window, got {brief(window)}; {_how_to_write(window)}")


def _how_to_write(window: object) -> str:
    """What to write for a window that is none."""
    if isinstance(window, Tensor):
        return f"give window={WINDOWS}, and a mask as bias=band_from_dense(mask, window)"
    if not isinstance(window, (tuple, list)) or [type(side) for side in window] != [int, int]:
        return f"write {WINDOWS}"
    # A side of -1 is one without a limit, elsewhere.
    left, right = ("n" if side < 0 else side for side in window)
    return f"write Window({left}, {right})" + (", where n is the number of keys" if "n" in (left, right) else "")


def _missing(op: Op, tensors: Sequence[object], window: object) -> TypeError:
    names = [name for name, given in zip((*op.tensors, "window"), (*tensors, window)) if given is MISSING]
    for name, given in zip(op.tensors, tensors):
        if isinstance(given, Window) and window is MISSING:
            return TypeError(f"{op.name}() is missing its argument {name!r}: a Window is given in its place")
    return missing_arguments(op.name, names)


def check_number(name: str, value: object) -> float:
    """A number as a float; a TypeError unless it is a real number, a ValueError unless a finite float holds it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float, got {brief(value)}")
    # Compared rather than converted: an int may be too large for a float.
    if not -_LARGEST <= value <= _LARGEST:
        given = "an int too large for a float" if isinstance(value, int) else value
        raise ValueError(f"{name} must be finite, got {given}")
    return float(value)


def check_argument_number(argument: Argument, value: object) -> float:
    """A number as backends get it; a TypeError unless it is a real number, a ValueError unless the op's row admits it."""
    number = check_number(argument.name, value)
    if argument.admits is not None and not argument.admits[1](number):
        raise ValueError(f"{argument.name} must be {argument.admits[0]}, got {value}")
    if argument.within is None:
        return number
    smallest, largest = argument.within
    return min(max(number, smallest), largest)


def prepared_integers(argument: Argument, bound: tuple[str, int] | None, value: Tensor) -> Tensor:
    """An argument of integers as backends get it: contiguous, in a dtype of theirs, and in range where that can be told.

    Args:
        argument: its row.
        bound: what no number may exceed, by the size's letter; None where reading the numbers would synchronise.
        value: as it was given.

    Raises:
        ValueError: a number lies outside 0 to ``bound``; or offsets do not begin with 0, or decrease.
    """
    # A subclass that has its own way with torch's ops may have no values: a fake tensor has none.
    if bound is not None and value.__class__.__torch_dispatch__ is Tensor.__torch_dispatch__:
        _check_numbers(argument, *bound, value)
    if not value.dim():
        value = value.view(1)
    if value.dtype not in _INDEX_DTYPES if argument.dtype is None else value.dtype != argument.dtype:
        value = value.to(argument.dtype or torch.int64)
    return value if value.is_contiguous() else value.contiguous()


def _check_numbers(argument: Argument, letter: str, largest: int, value: Tensor) -> None:
    try:
        # A few numbers are read sooner one by one.
        few = value.numel() <= 64
        numbers = value.tolist() if few else [int(bound) for bound in value.aminmax()]
        first = numbers[0] if few and numbers else int(value[0]) if numbers else 0
        ascends = not argument.ascends or _ascends(numbers if few else value)
    except RuntimeError:
        # Where torch.func maps over it, there are none to be read.
        if torch._C._functorch.peek_interpreter_stack() is None:
            raise
        return
    for number in numbers:
        if not 0 <= number <= largest:
            # The key itself is not known here: what was read as its length may be its number of heads.
            hint = f"; {TRANSPOSE}" if number > largest else ""
            if letter != argument.at_most:
                hint = "; give offsets of the keys, too, where these are other ones"
            one = "offset" if argument.ascends else argument.name.rpartition("_")[2].removesuffix("s")
            raise ValueError(
                f"{argument.name}: every {one} must lie in 0..{largest} ({SIZE_NAMES[letter]}), got {number}{hint}"
            )
    if argument.ascends and (first != 0 or not ascends):
        what = "some that decrease" if first == 0 else f"{first} as the first"
        raise ValueError(
            f"{argument.name}: offsets are 0 and then where each sequence ends, lengths.cumsum(0) behind a 0; got {what}"
        )


def _ascends(offsets: Sequence[int] | Tensor) -> bool:
    if isinstance(offsets, Tensor):
        return not bool((offsets[1:] < offsets[:-1]).any())
    return all(before <= after for before, after in pairwise(offsets))


def _mismatch(op: Op, name: str, tensor: Any, letter: str, owner: str, theirs: Any) -> ValueError:
    dims = op.tensors[name]
    if dims[:3] == op.tensors[owner][:3]:
        letters = ", ".join(SIZE_NAMES.get(each, each) for each in dims[:3])
        hint = f"; {TRANSPOSE}" if tensor.transpose(1, 2).shape[:3] == theirs.shape[:3] else ""
        return ValueError(
            f"{name}: must agree with {owner} in ({letters}), {_sizes(theirs.shape[:3])}; got shape {_shape(tensor)}{hint}"
        )
    size = theirs.shape[op.tensors[owner].index(letter)]
    return ValueError(
        f"{name}: its {SIZES[letter]} must be {owner}'s, {size}; got {owner} {_shape(theirs)} and {name} {_shape(tensor)}"
    )


def _if_transposed(first: Any, second: Any) -> str:
    """What to do where the numbers of heads would fit if heads stood after the length, as other libraries have them."""
    heads, kv_heads = first.shape[2], second.shape[2]
    if kv_heads == 0 or heads % kv_heads:
        return ""
    return f"; {TRANSPOSE}"


def _check_tensor(name: str, dims: str, tensor: object, first_name: str, first: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    _check_dense(name, tensor)
    if tensor.dim() != 4:
        last = "window.size" if dims[-1] == "W" else "head_dim"
        raise ValueError(
            f"{name} must have four dimensions, (batch, heads, length, {last}); got shape {_shape(tensor)}"
        )
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name} must have a floating-point dtype, got {tensor.dtype}")
    if tensor.dtype != first.dtype:
        raise TypeError(f"{name} must have {first_name}'s dtype, {first.dtype}; got {tensor.dtype}")
    if tensor.device != first.device:
        raise ValueError(f"{name} must be on {first_name}'s device, {first.device}; got {tensor.device}")


def check_alone(argument: Argument, value: object, first_name: str, first: Tensor) -> None:
    """Check a tensor among the arguments whose shape hangs on no size, beside the op's first tensor."""
    _check_argument(argument, argument.dims or "", value, {}, first_name, first)


def _check_argument(
    argument: Argument, dims: str, value: object, sizes: dict[str, Any], first_name: str, first: Tensor
) -> None:
    name = argument.name
    if not isinstance(value, Tensor):
        kind = "an integer torch.Tensor" if argument.kind == "integer" else "a torch.Tensor"
        raise TypeError(f"{name} must be {kind} or None, got {type(value).__name__}")
    _check_dense(name, value)
    if argument.kind == "integer" and value.dtype not in INTEGER_DTYPES:
        raise TypeError(f"{name} must have an integer dtype, got {value.dtype}")
    if argument.kind == "floating" and not value.dtype.is_floating_point:
        hint = "; band_from_dense(mask, window) makes a bias of a boolean mask" if value.dtype is torch.bool else ""
        raise TypeError(f"{name} must have a floating-point dtype, got {value.dtype}{hint}")
    if value.device != first.device:
        raise ValueError(f"{name} must be on {first_name}'s device, {first.device}; got {value.device}")
    if "S" in dims:
        if value.dim() != 1 or value.shape[0] == 0:
            raise ValueError(
                f"{name} must have shape (S + 1,), for S sequences where each ends behind a 0; got {_shape(value)}"
            )
        sizes.setdefault("S", value.shape[0])
    full = [1 if letter == "1" else sizes[letter] for letter in dims]
    letters = ", ".join(SIZE_NAMES.get(letter, letter) for letter in dims) + ("," if len(dims) == 1 else "")
    if not argument.broadcasts:
        if list(value.shape) != full:
            raise ValueError(f"{name} must have shape ({letters}) = {_sizes(full)}, got {_shape(value)}")
    elif not _broadcasts(value, full):
        otherwise = [
            sizes[{"H": "Q", "Q": "H"}[letter]] if letter in "HQ" else size for letter, size in zip(dims, full)
        ]
        hint = f"; {TRANSPOSE}" if _broadcasts(value, otherwise) else ""
        raise ValueError(
            f"{name}: shape {_shape(value)} does not broadcast to ({letters}) = {_sizes(full)}; each of its dimensions, "
            f"counted from the last, must be 1 or that size{hint}"
        )


def _broadcasts(value: Tensor, full: Sequence[int]) -> bool:
    return value.dim() <= len(full) and all(
        size == whole or size == 1 for size, whole in zip(reversed(value.shape), reversed(full))
    )


def _check_dense(name: str, tensor: Tensor) -> None:
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {tensor.layout}")
    if tensor.is_nested:
        raise TypeError(f"{name} must be a dense (strided) tensor, got a nested one; pad it, and give key_lengths")
    if tensor.is_quantized:
        raise TypeError(f"{name} must be a dense (strided) tensor, got a quantized one")


def _shape(tensor: Any) -> str:
    return _sizes(tensor.shape)


def _sizes(sizes: Sequence[int]) -> str:
    return f"({', '.join(str(size) for size in sizes)}{',' if len(sizes) == 1 else ''})"
