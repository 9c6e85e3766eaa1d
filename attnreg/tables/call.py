"""A call as tables hold it: a Problem, in one form for all calls whose time is the same; in words, and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from attnreg.op import ROWS, Argument
from attnreg.problem import Given, Problem, dtype_name
from attnreg.window import Window

SIZES = ("batch", "heads", "kv_heads", "query_length", "key_length", "head_dim", "value_dim")
# No tensor has so many elements along a dimension, and the distance of larger numbers cannot be counted.
LARGEST_SIZE = 2**48
# By name, as they are in torch now: to ask torch for any name would have it import what it loads only when it is asked for.
DTYPES = {dtype_name(each): each for each in vars(torch).values() if isinstance(each, torch.dtype)}


def as_measured(problem: Problem) -> Problem:
    """The form in which tables hold a call, the same for all that differ in nothing that its time depends on.

    The device is its type. N and H are multiplied into H. The window keeps the number of keys that a row sees at most, as
    many of them on the left as there are. Of the optional arguments, those that change no choice are left out, and the shapes
    of the others follow the call's.
    """
    batch, heads = problem.batch, problem.heads
    size = visible_size(problem)
    left = min(size - 1, max(problem.key_length - 1, 0))
    return replace(
        problem,
        device=torch.device(problem.device.type),
        batch=1,
        heads=batch * heads,
        kv_heads=batch * problem.kv_heads,
        window=Window(left, size - 1 - left),
        given=tuple(_given(problem, batch * heads, size)) if problem.given else (),
    )


def visible_size(problem: Problem) -> int:
    """How many keys a row sees at most: W, or less where the sequences are shorter."""
    window = problem.window
    if problem.gives("query_starts") is not None:
        # A row may stand anywhere.
        return max(min(window.size, problem.key_length), 1)
    return min(window.left, max(problem.key_length - 1, 0)) + min(window.right, max(problem.query_length - 1, 0)) + 1


def group(problem: Problem) -> int:
    """Query heads to a key/value head, H / Hkv."""
    return problem.heads // max(problem.kv_heads, 1)


def class_of(problem: Problem) -> tuple[str, ...]:
    """The names of the optional arguments that make a call one of a class of its own."""
    return tuple(name for name, _ in problem.given if name in ROWS[problem.op].optional) if problem.given else ()


def _given(problem: Problem, heads: int, window: int) -> Iterator[tuple[str, Given]]:
    for argument in ROWS[problem.op].extras:
        given = problem.gives(argument.name)
        if given is None or argument.for_all:
            continue
        own = dict(zip(argument.dims or "", given.shape))
        sizes = {**own, "N": 1, "H": heads if max(own.get("N", 1), own.get("H", 1)) > 1 else 1}
        sizes["W"] = window if own.get("W", 1) > 1 else 1
        yield argument.name, replace(given, shape=tuple(sizes[letter] for letter in own))


def sizes_in_words(problem: Problem) -> str:
    """The sizes of a call in the form of tables, its window's first."""
    return f"W={problem.window.size} {_all_but_window(problem)}"


def kinds(calls: Iterable[Problem]) -> dict[str, list[Problem]]:
    """Calls that differ in the window alone, in its order, by what they have in common in words."""
    found: dict[str, list[Problem]] = {}
    for call in sorted(calls, key=lambda call: (*order(call)[:5], *order(call)[6:], call.window.size)):
        what = "forward and backward" if call.needs_grad else "forward"
        kind = f"{call.op}, {what}; {dtype_name(call.dtype)} {_all_but_window(call)}"
        found.setdefault(kind, []).append(call)
    return found


def order(call: Problem) -> tuple[Any, ...]:
    """What entries are sorted by in a file."""
    return (
        call.op,
        dtype_name(call.dtype),
        call.head_dim,
        call.value_dim,
        group(call),
        call.window.size,
        call.query_length,
        call.key_length,
        call.batch * call.heads,
        call.needs_grad,
        tuple((name, given.shape, str(given.dtype)) for name, given in call.given),
    )


def _all_but_window(call: Problem) -> str:
    given = "".join(f"; {name}{shape}" for name, shape in call.given)
    return (
        f"E={call.head_dim} D={call.value_dim} Lq={call.query_length} Lk={call.key_length} "
        f"N*H={call.batch * call.heads} H/Hkv={group(call)}{given}"
    )


def call_to_json(problem: Problem) -> dict[str, Any]:
    """A call as JSON, all but its device."""
    written: dict[str, Any] = {
        "op": problem.op,
        "dtype": dtype_name(problem.dtype),
        **{name: getattr(problem, name) for name in SIZES},
        "window": [problem.window.left, problem.window.right],
        "needs_grad": problem.needs_grad,
    }
    if problem.given:
        written["given"] = {
            name: {} if given.dtype is None else {"shape": list(given.shape), "dtype": dtype_name(given.dtype)}
            for name, given in problem.given
        }
    return written


def call_from_json(written: Mapping[str, Any], device: torch.device) -> Problem:
    """The call that :func:`call_to_json` wrote, on ``device``.

    Raises:
        KeyError, TypeError, ValueError: it is none.
    """
    op, needs_grad, window, given = written["op"], written["needs_grad"], written["window"], written.get("given", {})
    unknown = set(written) - {"op", "dtype", "window", "needs_grad", "given", *SIZES}
    if unknown:
        raise ValueError(f"a call has no {', '.join(map(repr, sorted(unknown)))}")
    if not isinstance(op, str) or op not in ROWS or type(needs_grad) is not bool:
        raise ValueError(f"a call has the op {op!r} and needs_grad {needs_grad!r}")
    sizes = {name: _size(name, written[name]) for name in SIZES}
    if type(window) is not list or len(window) != 2:
        raise ValueError(f"a window is {window!r}, not two numbers")
    if sizes["kv_heads"] and sizes["heads"] % sizes["kv_heads"]:
        raise ValueError(f"heads is {sizes['heads']}, no multiple of kv_heads, {sizes['kv_heads']}")
    unknown = set(given) - {argument.name for argument in ROWS[op].extras}
    if unknown:
        raise ValueError(f"{op} takes no {', '.join(map(repr, sorted(unknown)))}")
    return Problem(
        op=op,
        device=device,
        dtype=_dtype(written["dtype"], floating=True),
        **sizes,
        window=Window(*(_size("window", each) for each in window)),
        given=tuple(
            (argument.name, _given_from_json(argument, given[argument.name]))
            for argument in ROWS[op].extras
            if argument.name in given
        )
        if given
        else (),
        needs_grad=needs_grad,
    )


def from_format_1(written: Mapping[str, Any]) -> dict[str, Any]:
    """What the first format of tables calls a call, as today's JSON."""
    heads = max(written["sequences"], written["group"])
    left = min(written["window"] - 1, max(written["keys"] - 1, 0))
    return {
        "op": written["op"],
        "dtype": written["dtype"],
        "batch": 1,
        "heads": heads,
        "kv_heads": heads // max(written["group"], 1),
        "query_length": written["queries"],
        "key_length": written["keys"],
        "head_dim": written["head_dim"],
        "value_dim": written["value_dim"],
        "window": [left, written["window"] - 1 - left],
        "needs_grad": written["gradients"],
    }


def _given_from_json(argument: Argument, written: Mapping[str, Any]) -> Given:
    if argument.dims is None:
        if written:
            raise ValueError(f"{argument.name} is a number, and has {written!r}")
        return Given()
    shape, dtype = written["shape"], _dtype(written["dtype"], floating=argument.kind == "floating")
    # How many offsets there are says nothing of a call.
    dims = argument.dims.replace("S", "")
    if type(shape) is not list or len(shape) != len(dims) or len(written) != 2:
        raise ValueError(f"{argument.name} has {len(dims)} dimensions; got {written!r}")
    return Given(tuple(_size(f"the shape of {argument.name}", size) for size in shape), dtype)


def _size(name: str, size: object) -> int:
    if type(size) is not int or not 0 <= size <= LARGEST_SIZE:
        raise ValueError(f"{name} is {size!r}, not a whole number from 0 to {LARGEST_SIZE}")
    return size


def _dtype(name: object, *, floating: bool) -> torch.dtype:
    dtype = DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None or dtype.is_floating_point is not floating:
        raise ValueError(f"{name!r} is no {'floating-point' if floating else 'integer'} dtype")
    return dtype
