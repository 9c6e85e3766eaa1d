"""Which entry of which table serves a call.

The distance of an entry from a call is counted in octaves, ``abs(log2(theirs / ours))``, of each size that differs: two for
one in the head dim (E or D, whichever differs more, as the next power of two from 16 up, which kernels pad it to; and a
quarter of what it differs itself), half of one in the window W, in N * H and in H / Hkv, and a quarter in each of Lq and
Lk. float16 and bfloat16 stand in for each other at a quarter of an octave. The op, any other dtype and whether gradients
are needed must be the same. The nearest entry of a table serves the call; where it compares no two candidates that can run
the call, as after an interrupted tuning, the next one does.

That the fastest backend depends on the head dim far more than on the window is measured: with each entry of the H100's
table left out in turn, the others choose a backend for it that takes 1.005 times the time of the best one (geometric
mean), 1.34 at worst; counted alike in both, 1.016 times and 1.76 (``python -m attnreg_benchmarks.regret --left-out TABLE
--json FILE``).

Tables are asked in turn, the user's before those that are shipped and those with fewer mismatches of versions first: for an
entry within ``NEAR``, then again for one within ``FAR``. Beyond that nothing measured is taken to say anything of the call.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from heapq import nsmallest

from attnreg.measured import Measured
from attnreg.problem import Problem
from attnreg.tuning.store import Stored
from attnreg.tuning.table import Key, key_of

# Octaves. NEAR is an entry of a neighbouring class, FAR one of the same kind of call all the same.
NEAR, FAR = 1.0, 4.0
# So many entries of a table are asked.
MOST_ENTRIES = 3
# Sizes this close, a quarter of an octave, are of one class: see `same_class`.
CLASS = 0.25
_NARROW = {"float16", "bfloat16"}


def measured(problem: Problem, stored: Sequence[Stored]) -> tuple[Measured, ...]:
    """What tables have measured for ``problem``, the first to be asked first."""
    wanted = key_of(problem)
    nearest = [found for each in stored for found in _nearest(wanted, each)]
    nearest.sort(key=lambda found: (found[2].source == "shipped", len(found[2].remarks), found[0]))
    near = [each for each in nearest if each[0] <= NEAR]
    far = [each for each in nearest if each[0] > NEAR]
    return tuple(_measured(wanted, key, each) for _, key, each in (*near, *far))


def distance(entry: Key, wanted: Key) -> float:
    """How far an entry is from a call, in octaves; infinite where they have nothing to do with each other."""
    if (entry.op, entry.gradients) != (wanted.op, wanted.gradients):
        return math.inf
    if entry.dtype != wanted.dtype and not {entry.dtype, wanted.dtype} <= _NARROW:
        return math.inf
    return (entry.dtype != wanted.dtype) / 4 + sum(
        weight * difference for weight, difference in _differences(entry, wanted)
    )


def same_class(entry: Key, wanted: Key) -> bool:
    """Whether a call needs no measurement of its own beside this entry: every size is within a quarter of an octave."""
    return (entry.op, entry.gradients, entry.dtype) == (wanted.op, wanted.gradients, wanted.dtype) and all(
        difference <= CLASS for _, difference in _differences(entry, wanted)
    )


def _differences(entry: Key, wanted: Key) -> Iterator[tuple[float, float]]:
    """The weight and the octaves of every size."""
    yield 0.5, _octaves(entry.window, wanted.window)
    head_dims = ((entry.head_dim, wanted.head_dim), (entry.value_dim, wanted.value_dim))
    yield 2.0, max(_octaves(_padded(theirs), _padded(ours)) for theirs, ours in head_dims)
    yield 0.25, max(_octaves(theirs, ours) for theirs, ours in head_dims)
    yield 0.5, _octaves(entry.sequences, wanted.sequences)
    yield 0.5, _octaves(entry.group, wanted.group)
    yield 0.25, _octaves(entry.queries, wanted.queries)
    yield 0.25, _octaves(entry.keys, wanted.keys)


def _padded(size: int) -> int:
    return 1 << max(size - 1, 15).bit_length()


def _octaves(theirs: int, ours: int) -> float:
    return abs(math.log2(max(theirs, 1) / max(ours, 1)))


def _nearest(wanted: Key, stored: Stored) -> list[tuple[float, Key, Stored]]:
    # Of two as near, the first in the file, which is sorted: every process takes the same.
    entries = ((distance(key, wanted), index, key) for index, key in enumerate(stored.table.rows))
    return [(octaves, key, stored) for octaves, _, key in nsmallest(MOST_ENTRIES, entries) if octaves <= FAR]


def _measured(wanted: Key, key: Key, stored: Stored) -> Measured:
    figures = stored.table.rows[key]
    days = sorted({figure.measured[:10] for figure in figures.values()})
    text = f"{stored.name}, {days[-1] if days else 'no date'}"
    if key != wanted:
        text += f", the nearest entry, {key}"
    remarks = (f"{stored.name} is from elsewhere: {'; '.join(stored.remarks)}",) if stored.remarks else ()
    return Measured(stored.source, figures, text, remarks)
