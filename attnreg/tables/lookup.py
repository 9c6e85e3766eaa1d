"""Which entry of which table serves a call.

The distance of an entry from a call is counted in octaves, ``abs(log2(theirs / ours))``, of each size that differs: two for
one in the head dim (E or D, whichever differs more, as the next power of two from 16 up, which kernels pad it to; and a
quarter of what it differs itself), half of one in the window W, in N * H and in H / Hkv, and a quarter in each of Lq and
Lk. float16 and bfloat16 stand in for each other at a quarter of an octave. The op, any other dtype and whether gradients
are needed must be the same. A call with optional arguments, such as a bias, is served by the entries that were measured with
the same ones; where a table has none within reach, by those with most of them, and at last by those without any: what a call
has beyond an entry may change how long a candidate takes, what an entry has beyond the call may be the reason for its order.
The nearest entry of a table serves the call; where it compares no two candidates that can run the call, as after an
interrupted tuning, the next one does.

Whether float32 products may be computed in less, such as TF32, is said by a table's environment: figures of float32 calls that
were measured so serve no others, and others serve them where there are none (``Tables.stored``).

That the fastest backend depends on the head dim far more than on the window is measured: with each entry of the H100's
table left out in turn, the others choose a backend for it that takes 1.005 times the time of the best one (geometric
mean), 1.34 at worst; counted alike in both, 1.016 times and 1.76 (``python -m attnreg_benchmarks.regret --left-out TABLE
--json FILE``).

Tables are asked in turn, the user's before those that are shipped and those with fewer mismatches of versions first: for an
entry within ``NEAR``, then again for one within ``FAR``. Beyond that nothing measured is taken to say anything of the call.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import log2
from operator import itemgetter
from typing import NamedTuple, Protocol

import torch

from attnreg.measured import Figure, Measured, now
from attnreg.op import ROWS
from attnreg.problem import Problem
from attnreg.tables.call import as_measured, class_of, group, sizes_in_words, visible_size
from attnreg.tables.environment import Environment
from attnreg.tables.table import Row, Table, measured_last

# Octaves. NEAR is an entry of a neighbouring class, FAR one of the same kind of call all the same.
NEAR, FAR = 1.0, 4.0
# So many entries of a table are asked.
MOST_ENTRIES = 3
# So many calls of a kind that differ in more than the window are looked through for one call: a thousandth of a second.
MOST_SHAPES = 1024
# Sizes this close, a quarter of an octave, are of one class: see `same_class`.
CLASS = 0.25
_NARROW = frozenset((torch.float16, torch.bfloat16))
# More than the rounding of a distance that is put together of logarithms.
_ROUNDING = 1e-9


class Rows(Protocol):
    """What is asked of a table."""

    @property
    def environment(self) -> Environment:
        """Where it was measured."""

    @property
    def copy_seconds(self) -> float | None:
        """The least time of a copy there; None where it is not known."""

    def of_kind(self, op: str, dtypes: frozenset[torch.dtype], needs_grad: bool) -> list[Row]:
        """The rows of an op, in these dtypes, with or without gradients, in their order."""

    def whole(self) -> Table:
        """All of it."""


@dataclass(frozen=True, eq=False)
class Stored:
    """A table, and what is to be said of it.

    Attributes:
        table: the table.
        source: "tuned" or "shipped".
        name: the file's name.
        remarks: how its environment differs from this one.
    """

    table: Rows
    source: str
    name: str
    remarks: tuple[str, ...]
    _indices: dict[tuple[object, ...], dict[tuple[str, ...], Index]] = field(
        default_factory=dict, init=False, repr=False
    )

    def nearest(self, problem: Problem) -> list[tuple[float, Entry]]:
        """The entries that serve a call, with their distances, nearest first: at most ``MOST_ENTRIES``, none beyond ``FAR``.

        Raises:
            TableError: the table turns out to be none.
        """
        sizes, names = _sizes(problem), frozenset(class_of(problem))
        indices = (index for served, index in self._by_class(problem).items() if names.issuperset(served))
        return next(filter(None, (index.nearest(sizes) for index in indices)), [])

    def _by_class(self, problem: Problem) -> dict[tuple[str, ...], Index]:
        """The entries of a kind of call by their class, those with most arguments first, then in the order of the op's row."""
        dtypes = _NARROW if problem.dtype in _NARROW else frozenset((problem.dtype,))
        kind = (problem.op, dtypes, problem.needs_grad)
        indices = self._indices.get(kind)
        if indices is None:
            by_class: dict[tuple[str, ...], list[Entry]] = {}
            for place, row in enumerate(self.table.of_kind(problem.op, dtypes, problem.needs_grad)):
                by_class.setdefault(class_of(row[0]), []).append(Entry(self, *row, place))
            order = [argument.name for argument in ROWS[problem.op].extras]
            classes = sorted(by_class, key=lambda names: (-len(names), *map(order.index, names)))
            indices = self._indices[kind] = {names: Index(by_class[names]) for names in classes}
        return indices


class Sizes(NamedTuple):
    """What a distance is counted of; see ``_sizes``."""

    dtype: torch.dtype
    window: int
    head_dim: int
    value_dim: int
    sequences: int
    group: int
    queries: int
    keys: int


class Entry:
    """A row of a table.

    Attributes:
        call: the row's call.
        figures: what was measured of each candidate.
        place: where in the table it stands.
        sizes: those of its call.
    """

    def __init__(self, stored: Stored, call: Problem, figures: Mapping[str, Figure], place: int) -> None:
        self.call = call
        self.figures = figures
        self.place = place
        self.sizes = _sizes(call)
        self._stored = stored
        self._measured: dict[bool, Measured] = {}

    def measured(self, itself: bool) -> Measured:
        """What the dispatcher gets; ``itself`` says whether the entry is the very call that it is asked for."""
        found = self._measured.get(itself)
        if found is None:
            stored = self._stored
            text = f"{stored.name}, {measured_last(self.figures, now())[:10] or 'no date'}"
            if not itself:
                text += f", the nearest entry, {sizes_in_words(self.call)}"
            remarks = (f"{stored.name} is from elsewhere: {'; '.join(stored.remarks)}",) if stored.remarks else ()
            if any(figure.disturbed for figure in self.figures.values()):
                remarks = (
                    *remarks,
                    f"something else used the device while this was measured: {text}; `attnreg tune` measures it again",
                )
            found = self._measured[itself] = Measured(stored.source, self.figures, text, remarks)
        return found


# The calls that differ in the window alone: their dtype, the logarithms of N * H, H / Hkv, Lq and Lk, those of their windows in
# order, and their entries.
_Shape = tuple[torch.dtype, float, float, float, float, list[float], list[Entry]]


class Index:
    """The entries of one kind of call, arranged so that few of them are looked at: by head dims, by other sizes, by window.

    Of more than ``MOST_SHAPES`` calls that differ in more than the window, those that were measured last are kept.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        alike: dict[tuple[object, ...], list[Entry]] = {}
        for entry in entries:
            alike.setdefault((*entry.sizes[:1], *entry.sizes[2:], entry.call.given), []).append(entry)
        if len(alike) > MOST_SHAPES:
            today = now()
            last = {
                shape: max(measured_last(entry.figures, today) for entry in those) for shape, those in alike.items()
            }
            kept = sorted(alike, key=lambda shape: last[shape], reverse=True)[:MOST_SHAPES]
            alike = {shape: alike[shape] for shape in kept}
        by_head_dims: dict[tuple[float, float, float, float], list[_Shape]] = {}
        for those in alike.values():
            those.sort(key=lambda entry: entry.sizes.window)
            sizes = those[0].sizes
            head_dim, value_dim = sizes.head_dim, sizes.value_dim
            logs = (log2(_padded(head_dim)), log2(_padded(value_dim)), _log(head_dim), _log(value_dim))
            shape = (
                sizes.dtype,
                _log(sizes.sequences),
                _log(sizes.group),
                _log(sizes.queries),
                _log(sizes.keys),
                [_log(entry.sizes.window) for entry in those],
                those,
            )
            by_head_dims.setdefault(logs, []).append(shape)
        self._by_head_dims = list(by_head_dims.items())
        self._distances: dict[tuple[int, int], list[tuple[float, list[_Shape]]]] = {}

    def nearest(self, wanted: Sizes) -> list[tuple[float, Entry]]:
        """The entries nearest to a call, as ``Stored.nearest`` gives them."""
        dtype, window_size, head_dim, value_dim, sequences, group, queries, keys = wanted
        logs = (_log(sequences), _log(group), _log(queries), _log(keys))
        window = _log(window_size)
        # So far away the last of those may be that are kept.
        bound = FAR + _ROUNDING
        seen: list[tuple[float, int, Entry]] = []
        for apart, shapes in self._by_distance(head_dim, value_dim):
            if apart > bound:
                break
            for base, windows, entries in _by_other_sizes(shapes, apart, dtype, *logs):
                if base > bound:
                    break
                middle = bisect_left(windows, window)
                # The nearest are among as many on either side.
                first, last = max(middle - MOST_ENTRIES, 0), middle + MOST_ENTRIES
                seen += [
                    (base + 0.5 * abs(window - log), entry.place, entry)
                    for log, entry in zip(windows[first:last], entries[first:last])
                ]
                seen.sort()
                if len(seen) >= MOST_ENTRIES:
                    bound = min(bound, seen[MOST_ENTRIES - 1][0] + _ROUNDING)
        # Which of those that are as near comes first must not hang on how logarithms are rounded: they are counted anew.
        exact = [
            (_octaves_between(entry.sizes, wanted), place, entry) for octaves, place, entry in seen if octaves <= bound
        ]
        exact.sort()
        return [(octaves, entry) for octaves, _, entry in exact[:MOST_ENTRIES] if octaves <= FAR]

    def _by_distance(self, head_dim: int, value_dim: int) -> list[tuple[float, list[_Shape]]]:
        """The shapes by their head dims, nearest first, and how far these are."""
        known = self._distances.get((head_dim, value_dim))
        if known is None:
            width, value_width = log2(_padded(head_dim)), log2(_padded(value_dim))
            log, value_log = _log(head_dim), _log(value_dim)
            known = [
                (
                    2.0 * max(abs(width - their_width), abs(value_width - their_value_width))
                    + 0.25 * max(abs(log - their_log), abs(value_log - their_value_log)),
                    shapes,
                )
                for (their_width, their_value_width, their_log, their_value_log), shapes in self._by_head_dims
            ]
            known.sort(key=_FIRST)
            self._distances[head_dim, value_dim] = known
        return known


def _by_other_sizes(
    shapes: list[_Shape],
    apart: float,
    dtype: torch.dtype,
    sequences: float,
    group: float,
    queries: float,
    keys: float,
) -> list[tuple[float, list[float], list[Entry]]]:
    """The windows' logarithms and the entries of each shape, nearest first, and how far these are but for the window."""
    found = [
        (
            apart
            + 0.5 * (abs(sequences - their_sequences) + abs(group - their_group))
            + 0.25 * (abs(queries - their_queries) + abs(keys - their_keys) + (their_dtype is not dtype)),
            windows,
            entries,
        )
        for their_dtype, their_sequences, their_group, their_queries, their_keys, windows, entries in shapes
    ]
    found.sort(key=_FIRST)
    return found


_FIRST = itemgetter(0)


def measured(problem: Problem, stored: Sequence[Stored], of: Problem | None = None) -> tuple[Measured, ...]:
    """What tables have measured for ``problem``, the first to be asked first.

    ``of`` is the call that is asked for, where ``problem`` stands for it: whose very entry one is, its text says.

    Raises:
        TableError: one of them turns out to be no table.
    """
    nearest = [(each, *found) for each in stored for found in each.nearest(problem)]
    nearest.sort(key=lambda found: (found[0].source == "shipped", len(found[0].remarks), found[1]))
    near = [found for found in nearest if found[1] <= NEAR]
    far = [found for found in nearest if found[1] > NEAR]
    own, sizes = of or problem, None if of is None else _sizes(of)
    return tuple(
        entry.measured(
            (octaves == 0 if sizes is None else _octaves_between(entry.sizes, sizes) == 0)
            and (not own.given or entry.call == as_measured(own))
        )
        for _, octaves, entry in (*near, *far)
    )


def distance(entry: Problem, wanted: Problem) -> float:
    """How far an entry is from a call, in octaves; infinite where they have nothing to do with each other."""
    if (entry.op, entry.needs_grad) != (wanted.op, wanted.needs_grad):
        return math.inf
    if entry.dtype != wanted.dtype and not {entry.dtype, wanted.dtype} <= _NARROW:
        return math.inf
    if not set(class_of(entry)) <= set(class_of(wanted)):
        return math.inf
    return _octaves_between(_sizes(entry), _sizes(wanted))


def same_class(entry: Problem, wanted: Problem) -> bool:
    """Whether a call needs no measurement of its own beside this entry: every size is within a quarter of an octave."""
    return (
        (entry.op, entry.needs_grad, entry.dtype) == (wanted.op, wanted.needs_grad, wanted.dtype)
        and class_of(entry) == class_of(wanted)
        and all(octaves <= CLASS for octaves in _differences(_sizes(entry), _sizes(wanted)))
    )


def _sizes(problem: Problem) -> Sizes:
    return Sizes(
        problem.dtype,
        visible_size(problem),
        problem.head_dim,
        problem.value_dim,
        problem.batch * problem.heads,
        group(problem),
        problem.query_length,
        problem.key_length,
    )


def _octaves_between(entry: Sizes, wanted: Sizes) -> float:
    """The sum of :func:`_differences` by their weights, term by term in their order: most sizes are the same."""
    dtype, window, head_dim, value_dim, sequences, group, queries, keys = entry
    our_dtype, our_window, our_head_dim, our_value_dim, our_sequences, our_group, our_queries, our_keys = wanted
    octaves = 0.0
    if window != our_window:
        octaves += 0.5 * _octaves(window, our_window)
    if head_dim != our_head_dim or value_dim != our_value_dim:
        _, padded, exactly, *_ = _differences(entry, wanted)
        octaves += 2.0 * padded
        octaves += 0.25 * exactly
    if sequences != our_sequences:
        octaves += 0.5 * _octaves(sequences, our_sequences)
    if group != our_group:
        octaves += 0.5 * _octaves(group, our_group)
    if queries != our_queries:
        octaves += 0.25 * _octaves(queries, our_queries)
    if keys != our_keys:
        octaves += 0.25 * _octaves(keys, our_keys)
    return octaves if dtype is our_dtype else 0.25 + octaves


def _differences(entry: Sizes, wanted: Sizes) -> tuple[float, ...]:
    """The octaves of the window, the padded head dim, the head dim, N * H, H / Hkv, Lq and Lk."""
    head_dims = ((entry.head_dim, wanted.head_dim), (entry.value_dim, wanted.value_dim))
    return (
        _octaves(entry.window, wanted.window),
        max(_octaves(_padded(theirs), _padded(ours)) for theirs, ours in head_dims),
        max(_octaves(theirs, ours) for theirs, ours in head_dims),
        _octaves(entry.sequences, wanted.sequences),
        _octaves(entry.group, wanted.group),
        _octaves(entry.queries, wanted.queries),
        _octaves(entry.keys, wanted.keys),
    )


def _padded(size: int) -> int:
    return 1 << max(size - 1, 15).bit_length()


def _log(size: int) -> float:
    return log2(max(size, 1))


def _octaves(theirs: int, ours: int) -> float:
    return abs(log2((theirs or 1) / (ours or 1)))
