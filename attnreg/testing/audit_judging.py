"""What was measured, against what is claimed: which rows see which keys, said in words and in numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from attnreg.testing.audit_claims import (
    Claim,
    Pattern,
    chunks,
    full,
    told_claim,
    told_window,
    visible,
    window_and_first,
)
from attnreg.window import Window


@dataclass(frozen=True)
class Sequence:
    """The positions that were tried: of which document each is, and where in it.

    Attributes:
        document: (L,), int64, -1 for padding.
        position: (L,), int64, from 0 in each document and in each run of padding.
    """

    document: Tensor
    position: Tensor

    @classmethod
    def of(cls, length: int, documents: tuple[int, ...] | None = None, padding: tuple[int, int] = (0, 0)) -> Sequence:
        """Documents of these lengths, one if none are given, between so many padded positions on the left and on the right."""
        inner = length - sum(padding)
        numbers = torch.arange(inner)
        document, position = torch.zeros_like(numbers), numbers
        if documents is not None:
            document = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents))
            position = torch.cat([torch.arange(count) for count in documents])
        outside = [torch.full((count,), -1) for count in padding]
        return cls(
            torch.cat([outside[0], document, outside[1]]),
            torch.cat([torch.arange(padding[0]), position, torch.arange(padding[1])]),
        )

    def __len__(self) -> int:
        return len(self.document)

    @property
    def one_document(self) -> Tensor:
        """Which pairs of a row and a key are of one document: bool (L, L)."""
        return (self.document[:, None] == self.document) & (self.document >= 0)[:, None]

    def expected(self, claim: Claim) -> Tensor:
        """Which rows see which keys by a claim: bool (L, L)."""
        return visible(claim, self.position[:, None], self.position[None]) & self.one_document


@dataclass(frozen=True)
class Fault:
    """How a layer differs from its claim: in words that are the same for every length, and the pair that shows it."""

    text: str
    example: str


@dataclass
class Seen:
    """What was measured of one layer in one way.

    Attributes:
        known: of which pairs of a row and a key it is known: bool (L, L); a row's own key is not asked for.
        some: which rows see which keys in some head or part.
        every: likewise, in every one of those that see any other key than the row's own.
        parted: which rows see which keys in some heads, or by some gradients, and not in others.
    """

    known: Tensor
    some: Tensor
    every: Tensor
    parted: Tensor

    @classmethod
    def nothing(cls, length: int) -> Seen:
        """Nothing is known yet."""
        return cls(*(torch.zeros(length, length, dtype=torch.bool) for _ in range(4)))


def measured(seen: Seen, sequence: Sequence, claim: Claim | None) -> Claim | None:
    """The simplest rule that says what was seen, the claim first; None where every key is seen, or every one to the left.

    What no rule says is a :class:`Pattern` called "irregular".
    """
    asked = seen.known & sequence.one_document & ~torch.eye(len(sequence), dtype=torch.bool)
    for rule in _rules(seen.some & asked, sequence, claim):
        if torch.equal(sequence.expected(rule) & asked, seen.some & asked):
            return None if isinstance(rule, Pattern) and rule.name.startswith("full") else rule
    return Pattern("irregular", lambda row, key: row == key)


def _rules(seen: Tensor, sequence: Sequence, claim: Claim | None) -> Iterator[Claim]:
    if claim is not None:
        yield claim
    yield from (full(), full(causal=False))
    row, key = seen.nonzero().unbind(1)
    if not len(row):
        yield Window(0, 0)
        return
    distance = sequence.position[row] - sequence.position[key]
    left, right = max(int(distance.max()), 0), max(int(-distance.min()), 0)
    yield Window(left, right)
    yield Window(left, int(sequence.position.max()))
    yield Window(int(sequence.position.max()), right)
    for causal in (True, False):
        yield chunks(max(left, right) + 1, causal=causal)
    yield from _with_first(seen, sequence)
    found = sorted(set(distance.tolist()) | {0})
    steps = {b - a for a, b in pairwise(found)}
    if len(steps) == 1 and steps != {1}:
        (step,) = steps
        rule = torch.tensor(found)
        yield Pattern(f"dilated by {step}: {told_window(Window(left, right))}", lambda r, k: torch.isin(r - k, rule))
    yield from _shifted(seen, sequence)


def _with_first(seen: Tensor, sequence: Sequence) -> Iterator[Claim]:
    """The last row of the longest document tells how many first keys it sees beside a window."""
    row = int(sequence.position.where(seen.any(1), torch.tensor(-1)).argmax())
    start = row - int(sequence.position[row])
    keys = seen[row, start:row].tolist()
    count = keys.index(False) if False in keys else 0
    rest = keys[count:]
    if count and True in rest:
        yield window_and_first(Window(len(rest) - rest.index(True), 0), count)
    elif count:
        # The sampled columns may have none of the window.
        yield window_and_first(Window(0, 0), count)


def _shifted(seen: Tensor, sequence: Sequence) -> Iterator[Claim]:
    """As many keys for every row, those at the ends too."""
    last = int(sequence.position.max())
    middle = int((sequence.position == last // 2).nonzero()[0])
    ahead = seen[middle].nonzero()
    if not len(ahead):
        return
    left, right = max(middle - int(ahead.min()), 0), max(int(ahead.max()) - middle, 0)

    def rule(row: Tensor, key: Tensor) -> Tensor:
        first = (row - left).clamp(0, max(last - left - right, 0))
        return (key >= first) & (key <= first + left + right)

    yield Pattern(f"{told_window(Window(left, right))}, shifted at the ends", rule)


def faults(seen: Seen, sequence: Sequence, claim: Claim | None, parts: str) -> list[Fault]:
    """How what was seen differs from the claim; of padding and documents alone where nothing is claimed.

    ``parts`` are what a layer that lies in some of them lies in, "heads".
    """
    length = len(sequence)
    own = torch.eye(length, dtype=torch.bool)
    # What stands at padding sees what it likes.
    asked = seen.known & ~own & (sequence.document >= 0)[:, None]
    found: list[Fault] = []
    leaked = seen.some & asked & (sequence.document < 0)
    if leaked.any():
        found.append(Fault("padding leaks", _example(leaked, sequence)))
    mixed = seen.some & asked & (sequence.document >= 0) & ~sequence.one_document
    if mixed.any():
        found.append(Fault("documents are mixed", _example(mixed, sequence)))
    if claim is None:
        return found
    asked &= sequence.one_document
    expected = sequence.expected(claim)
    actual = measured(seen, sequence, claim)
    row, key = sequence.position[:, None], sequence.position[None]
    for side, here in (("left", key < row), ("right", key > row)):
        for pairs, wrong, kind in (
            (asked & here, seen.some & ~expected, "too many"),
            (asked & here, expected & ~seen.every, "too few"),
        ):
            if (pairs & wrong).any():
                found.append(_told(side, kind, pairs & wrong, seen, pairs, sequence, claim, actual, parts))
    return found


def _told(
    side: str,
    kind: str,
    wrong: Tensor,
    seen: Seen,
    asked: Tensor,
    sequence: Sequence,
    claim: Claim,
    actual: Claim | None,
    parts: str,
) -> Fault:
    example = _example(wrong, sequence, sees=kind == "too many")
    said = told_claim(claim)
    in_some = bool((wrong & seen.parted).any())
    heads = f" in some {parts}" if in_some else ""
    if isinstance(claim, Window):
        limit = claim.left if side == "left" else claim.right
        distance = (sequence.position[:, None] - sequence.position[None]).abs()
        if kind == "too few" and not (seen.some & asked).any() and limit:
            return Fault(f"{side}: no key is seen{heads}; {said} is claimed", example)
        whole = asked & (distance > limit) & sequence.one_document
        if kind == "too many" and (wrong == whole).all() and int(distance[wrong].max()) > limit + 1:
            return Fault(f"{side}: the window is ignored{heads}; {said} is claimed", example)
        if kind == "too many" and (isinstance(actual, Window) or in_some):
            count = int(distance[wrong].max()) - limit
            return Fault(
                f"{side}: {_keys(count)} too many{heads}; {said} is claimed, {told_claim(actual, 'full')} is seen",
                example,
            )
        if kind == "too few":
            hidden = distance[wrong]
            # From the border inward, without a gap.
            inward = asked & (distance >= int(hidden.min())) & (distance <= limit)
            if torch.equal(inward, wrong):
                count = limit - int(hidden.min()) + 1
                return Fault(
                    f"{side}: {_keys(count)} too few{heads}; {said} is claimed, {told_claim(actual, 'full')} is seen",
                    example,
                )
    irregular = isinstance(actual, Pattern) and actual.name == "irregular"
    if irregular and kind == "too many" and isinstance(claim, Window):
        limit = claim.left if side == "left" else claim.right
        count = int((sequence.position[:, None] - sequence.position[None]).abs()[wrong].max()) - limit
        return Fault(
            f"{side}: up to {_keys(count)} too many in some rows{heads}; {said} is claimed",
            f"{example}; {_rows(wrong, asked)}",
        )
    return Fault(
        f"{side}: keys {'seen that are not to be' if kind == 'too many' else 'missing'}{heads}; {said} is claimed, "
        f"{told_claim(actual, 'full')} is seen",
        f"{example}; {_rows(wrong, asked)}" if irregular else example,
    )


def _keys(count: int) -> str:
    return "1 key" if count == 1 else f"{count} keys"


def _rows(wrong: Tensor, asked: Tensor) -> str:
    rows = wrong.any(1).nonzero()[:, 0]
    columns = wrong.any(0).nonzero()[:, 0]
    told = f"rows {int(rows.min())} to {int(rows.max())}"
    return f"{told}, keys {int(columns.min())} to {int(columns.max())}, {int(wrong.sum())} of {int(asked.sum())} that were tried"


def _example(wrong: Tensor, sequence: Sequence, *, sees: bool = True) -> str:
    """The pair that is furthest apart where a key is seen, nearest where it is not."""
    row, key = wrong.nonzero().unbind(1)
    place = int((row - key).abs().argmax() if sees else (row - key).abs().argmin())
    at, of = int(row[place]), int(key[place])
    verb = "sees" if sees else "does not see"
    side = "before" if of < at else "after"
    return f"row {at} {verb} key {of}, {abs(at - of)} {side} it, of {len(sequence)}"
