"""What a mask function of transformers says, read from the operations that it makes.

transformers describes a mask by a function of four indices, composed of closures that ``torch.compile`` cannot look into. So
the function is called on a handful of zeros, whose shapes tell queries from keys, while a mode writes down what is done with
them: in eager mode and in a compiled region alike, and without reading a number of a tensor.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["MaskFunction", "Rule", "read_rule"]

MaskFunction = Callable[..., Tensor]


@dataclass(frozen=True)
class Rule:
    """A query at position p sees the keys at p + first .. p + last.

    Attributes:
        first: the distance to the first of them; None where nothing bounds it.
        last: likewise, to the last.
        packed: whether only those of the query's own document are seen.
        chunk: how many positions are a chunk, whose queries see only its own keys; None for no chunks.
    """

    first: int | None
    last: int | None
    packed: bool = False
    chunk: int | None = None

    @property
    def has_documents(self) -> bool:
        """Whether some key begins something that is seen by its own queries alone."""
        return self.packed or self.chunk is not None


# One operation: its name, the shapes of its tensors, its numbers.
_Step = tuple[str, tuple[tuple[int, ...], ...], tuple[int, ...]]

# The shapes of what the function is called on; what depends on queries and keys has the last.
_QUERY, _KEY, _BOTH = (2, 1), (1, 3), (2, 3)


# What a mode gets for an operation; not a dictionary, in which Dynamo does not find them.
_NAMES: tuple[tuple[Any, str], ...] = (
    *((getattr(Tensor, f"__{name}__"), name) for name in ("and", "or", "eq", "floordiv", "getitem")),
    *((getattr(Tensor, name), name) for name in ("le", "lt", "ge", "gt", "sub", "abs", "neg", "to")),
    *((getattr(Tensor, name), name) for name in ("new_ones", "new_zeros")),
    (torch.tensor, "tensor"),
    # Under torch.export(strict=True) Python's own operators come as they are.
    *(
        (getattr(operator, name), name)
        for name in ("eq", "floordiv", "getitem", "le", "lt", "ge", "gt", "sub", "abs", "neg")
    ),
    *((operator.and_, "and"), (operator.or_, "or")),
)


class _Steps(TorchFunctionMode):
    """Writes down what is done under it."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[_Step] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = "unknown"
        for known, its_name in _NAMES:
            if func is known:
                name = its_name
        if func.__name__ != "__get__":  # an attribute, such as the device
            shapes = tuple([tuple(each.shape) for each in args if isinstance(each, Tensor)])
            self.steps.append((name, shapes, tuple([each for each in args if isinstance(each, int)])))
        return func(*args, **(kwargs or {}))


# Rules by what makes a function: its code, its numbers, and the functions in it. A model asks at every token.
_known: dict[Any, Rule | None] = {}
_MOST_KNOWN = 256


def read_rule(function: MaskFunction, device: torch.device, *, is_given: bool) -> Rule | None:
    """The rule that a mask function states; None where it states another kind of rule, or cannot be read.

    Args:
        function: as transformers calls it, with the indices of batch, head, query and key.
        device: where its tensors are.
        is_given: whether a part of it comes from the model, whose documents may then be any sets of positions.
    """
    if torch.compiler.is_compiling():
        # What a model's own function does with indices of other shapes than it expects would end the compilation.
        return None if is_given else _read(function, device, is_given)
    made_of = _made_of(function)
    if made_of is None:
        return _read(function, device, is_given)
    key = (made_of, is_given)
    if key not in _known:
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[key] = _read(function, device, is_given)
    return _known[key]


def _made_of(part: Any) -> Any:
    """What decides which operations a function does, as far as it is a closure of numbers, tensors and such functions."""
    if isinstance(part, FunctionType):
        if any(type(part.__globals__.get(name)) in (int, bool, float, Tensor) for name in part.__code__.co_names):
            return None  # such a number may be another one at the next call
        parts = [_made_of(cell.cell_contents) for cell in part.__closure__ or ()]
        return None if None in parts or part.__defaults__ or part.__kwdefaults__ else (part.__code__, *parts)
    if isinstance(part, (tuple, list)):
        parts = [_made_of(each) for each in part]
        return None if None in parts else tuple(parts)
    if isinstance(part, Tensor):
        return Tensor
    return (part,) if type(part) in (int, bool) else None


def _read(function: MaskFunction, device: torch.device, is_given: bool) -> Rule | None:
    zero = torch.zeros(1, 1, dtype=torch.long, device=device)
    query, key = zero.expand(_QUERY), zero.expand(_KEY)
    mode = _Steps()
    if is_given:
        try:
            with mode:
                function(zero, zero, query, key)
        except (IndexError, RuntimeError, TypeError, ValueError):
            return None
    else:
        with mode:
            function(zero, zero, query, key)
    steps = _with_abs(mode.steps) if torch.compiler.is_dynamo_compiling() else mode.steps
    found = _composed(steps, 0)
    if found is None or found[1] != len(steps):
        return None
    rule = found[0]
    if rule.has_documents:
        # Where documents begin is asked with pairs of neighbours, of which the second has to see the first.
        is_told = (rule.first is None or rule.first < 0) or rule.last == 0
        return rule if is_told and not is_given else None
    return rule


def _with_abs(steps: Sequence[_Step]) -> list[_Step]:
    """Dynamo shows no mode that Python's abs is called. In a function of transformers' own no distance is compared without it."""
    told: list[_Step] = []
    for step in steps:
        if step[0] == "le" and told and _is(told[-1], "sub", _QUERY, _KEY):
            told.append(("abs", (_BOTH,), ()))
        told.append(step)
    return told


_Read = tuple[Rule, int]


def _composed(steps: Sequence[_Step], at: int) -> _Read | None:
    """The rule that begins at a step, and the step after it."""
    if at >= len(steps):
        return None
    name = steps[at][0]
    if name in ("new_ones", "new_zeros"):
        return _joined(steps, at + 1, is_union=name == "new_zeros")
    if [step[0] for step in steps[at : at + 2]] == ["getitem", "getitem"] and not _names(steps, at + 2, ("eq",)):
        # Positions within documents stand for those in the pack; between neighbours of one document they are as far apart.
        return _composed(steps, at + 2)
    return _leaf(steps, at)


def _joined(steps: Sequence[_Step], at: int, *, is_union: bool) -> _Read | None:
    """The rule of several ones, by ``or_masks`` or ``and_masks``."""
    joined: Rule | None = None
    while True:
        part = _composed(steps, at)
        if part is None:
            return None
        rule, at = part
        if not _names(steps, at, ("to", "or" if is_union else "and")):
            return None
        at += 2
        joined = rule if joined is None else _union(joined, rule) if is_union else _intersection(joined, rule)
        if joined is None:
            return None
        if at == len(steps) or steps[at][0] == "to":
            return joined, at


def _intersection(one: Rule, other: Rule) -> Rule:
    firsts = [first for first in (one.first, other.first) if first is not None]
    lasts = [last for last in (one.last, other.last) if last is not None]
    packed = one.packed or other.packed
    return Rule(max(firsts, default=None), min(lasts, default=None), packed, one.chunk or other.chunk)


def _union(one: Rule, other: Rule) -> Rule | None:
    """None where it is no interval."""
    if one.has_documents or other.has_documents:
        return None
    for before, after in ((one, other), (other, one)):
        if before.last is not None and after.first is not None and before.last + 1 < after.first:
            return None
    first = None if one.first is None or other.first is None else min(one.first, other.first)
    last = None if one.last is None or other.last is None else max(one.last, other.last)
    return Rule(first, last)


def _names(steps: Sequence[_Step], at: int, names: tuple[str, ...]) -> bool:
    return tuple(step[0] for step in steps[at : at + len(names)]) == names


def _is(step: _Step, name: str, *shapes: tuple[int, ...], numbers: int = 0) -> bool:
    return step[0] == name and step[1] == shapes and len(step[2]) == numbers


def _leaf(steps: Sequence[_Step], at: int) -> _Read | None:
    """The rule of one function, by what it does."""
    one, two, three = (*steps[at : at + 3], ("", (), ()), ("", (), ()))[:3]
    if _is(one, "le", _KEY, _QUERY):  # key <= query
        return Rule(None, 0), at + 1
    if _is(one, "ge", _QUERY, numbers=1) and one[2] == (0,):  # query >= 0
        return Rule(None, None), at + 1
    if one[0] == "tensor" and not one[1] and one[2] == (True,):  # everything
        return Rule(None, None), at + 1
    if _is(one, "sub", _QUERY, numbers=1) and _is(two, "gt", _KEY, _QUERY):  # key > query - size
        return Rule(1 - one[2][0], None), at + 2
    if _is(one, "sub", _QUERY, _KEY) and _is(two, "abs", _BOTH):
        # |query - key| <= size, or < size
        if _is(three, "le", _BOTH, numbers=1) or _is(three, "lt", _BOTH, numbers=1):
            size = three[2][0] - (three[0] == "lt")
            return (Rule(-size, size), at + 3) if size >= 0 else None
        return None
    return _two_sides(steps, at) or _same_document(steps, at)


def _two_sides(steps: Sequence[_Step], at: int) -> _Read | None:
    """``(0 <= d < left) | (d < 0) & (-d < right)`` with d = query - key, as Gemma 4 and others have it."""
    names = ("sub", "ge", "lt", "and", "lt", "neg", "lt", "and", "or")
    found = steps[at : at + len(names)]
    if not _names(steps, at, names) or not _is(found[0], "sub", _QUERY, _KEY):
        return None
    if found[1][2] != (0,) or found[4][2] != (0,) or any(step[1][0] != _BOTH for step in found[1:]):
        return None
    left, right = found[2][2], found[6][2]
    if len(left) != 1 or len(right) != 1 or left[0] < 1:
        return None
    return Rule(1 - left[0], max(right[0] - 1, 0)), at + len(names)


def _same_document(steps: Sequence[_Step], at: int) -> _Read | None:
    """Packed sequences, whose numbers are equal; and chunks of positions from the first one that is not padded."""
    if _names(steps, at, ("getitem", "getitem", "eq")) and steps[at + 2][1] == (_QUERY, _KEY):
        # Blocks within a sequence are compared alike, and then asked whether they are blocks at all.
        return None if _names(steps, at + 3, ("ge",)) else (Rule(None, None, packed=True), at + 3)
    names = ("getitem", "sub", "floordiv", "getitem", "sub", "floordiv", "eq")
    if _names(steps, at, names) and steps[at + 6][1] == (_KEY, _QUERY):
        size, other = steps[at + 2][2], steps[at + 5][2]
        if size == other and len(size) == 1 and size[0] > 0:
            return Rule(1 - size[0], size[0] - 1, chunk=size[0]), at + len(names)
    return None
