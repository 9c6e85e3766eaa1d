"""What was measured, against what is claimed: which rows see which keys, said in words and in numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
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

# What is called so follows no rule.
IRREGULAR = "irregular"


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


@dataclass(frozen=True)
class Part:
    """What was measured of one head, or of one gradient.

    Attributes:
        found: which rows see which keys: bool (L, L).
        known: of which pairs it is known: bool (L, L).
    """

    found: Tensor
    known: Tensor


@dataclass
class Seen:
    """What was measured of one layer in one way.

    Attributes:
        parts: those heads or gradients that see any other key than the row's own.
        known: of which pairs of a row and a key it is known: bool (L, L); a row's own key is not asked for.
        some: which rows see which keys in some part.
        every: likewise, in every one.
        parted: which rows see which keys in some heads, or by some gradients, and not in others.
    """

    known: Tensor
    some: Tensor
    every: Tensor
    parted: Tensor
    parts: list[Part] = field(default_factory=list)

    @classmethod
    def nothing(cls, length: int) -> Seen:
        """Nothing is known yet."""
        known, some, every, parted = (torch.zeros(length, length, dtype=torch.bool) for _ in range(4))
        return cls(known, some, every, parted)

    def add(self, part: Part) -> None:
        """Note one more part."""
        found = part.found & part.known
        self.parts.append(part)
        self.known, self.some = self.known | part.known, self.some | found
        self.every = torch.stack([each.found | ~each.known for each in self.parts]).all(0) & self.known
        self.parted = self.some & ~self.every

    def beyond(self, sequence: Sequence, claim: Claim | None) -> Seen:
        """What is known of the pairs that a claim says to be unseen; all of it where nothing is claimed."""
        if claim is None:
            return self
        known = self.known & ~sequence.expected(claim)
        return Seen(known, self.some & known, self.every & known, self.parted & known)


def measured(seen: Seen, sequence: Sequence, claim: Claim | None) -> Claim | None:
    """The simplest rule that says what was seen, the claim first; None where every key is seen, or every one to the left.

    What no rule says is a :class:`Pattern` called "irregular".
    """
    asked = seen.known & sequence.one_document & ~torch.eye(len(sequence), dtype=torch.bool)
    for rule in _rules(seen.some & asked, sequence, claim):
        if torch.equal(sequence.expected(rule) & asked, seen.some & asked):
            return None if isinstance(rule, Pattern) and rule.name.startswith("full") else rule
    return Pattern(IRREGULAR, lambda row, key: row == key)


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


@dataclass(frozen=True)
class Holes:
    """The keys that a claim names and that no row sees, or not every one, on one side.

    Attributes:
        systematic: a whole distance, the far end of rows, whole keys, or what another rule explains: bool (L, L).
        scattered: others, as of an attention that chooses among the keys in its window: bool (L, L).
        actual: the window of a part that has the systematic ones.
        in_some: whether other parts see the systematic ones.
    """

    systematic: Tensor
    scattered: Tensor
    actual: Claim | None = None
    in_some: bool = False


@dataclass(frozen=True)
class Sparse:
    """What is known of an attention in whose window keys are missing in scattered places.

    Attributes:
        pairs: which row and key they are, where it was run with as many positions: bool (L, L); they are no news.
        few: whether few positions are tried now: what is whole among these need not be.
    """

    pairs: Tensor | None
    few: bool


# A whole distance counts as never seen by no fewer pairs than these, of a window, of a pattern and of what is sparse.
FEWEST = 8
FEWEST_OF_PATTERN = 16
FEWEST_OF_SPARSE = 16
# Keys and ends of rows that are missing are no chance if they are as many as these.
NO_CHANCE = 3


def holes(seen: Seen, sequence: Sequence, claim: Claim, side: str, sparse: Sparse | None = None) -> Holes:
    """Which keys of a claim are not seen on one side, "left" or "right", each head and each gradient judged alone."""
    length = len(sequence)
    systematic, scattered, some = (torch.zeros(length, length, dtype=torch.bool) for _ in range(3))
    actual: Claim | None = None
    row, key = sequence.position[:, None], sequence.position[None]
    inside = (key < row if side == "left" else key > row) & sequence.expected(claim) & seen.known
    # Where no part sees any key, none can be told from another.
    for part in seen.parts or [Part(seen.some, seen.known)]:
        asked = inside & part.known
        missing = asked & ~part.found
        if not missing.any():
            some |= asked
            continue
        if sparse is None:
            wrong, rule = _systematic(part, missing, asked, sequence, claim)
        else:
            wrong, rule = _systematic_of_sparse(part, missing, asked, sequence, claim, sparse)
        if rule is not claim and not systematic.any():
            actual = rule
        systematic |= wrong
        scattered |= missing & ~wrong
        some |= part.found & asked
    return Holes(systematic, scattered, actual, bool((systematic & some).any()))


def _systematic_of_sparse(
    part: Part, missing: Tensor, asked: Tensor, sequence: Sequence, claim: Claim, sparse: Sparse
) -> tuple[Tensor, Claim | None]:
    if not sparse.few:
        return _systematic(part, missing, asked, sequence, claim)
    distance = (sequence.position[:, None] - sequence.position[None]).abs()
    if _at_borders(missing, asked, distance):
        return missing, Pattern(IRREGULAR, lambda row, key: row == key)
    if sparse.pairs is None:
        return torch.zeros_like(missing), claim
    missing, asked = missing & ~sparse.pairs, asked & ~sparse.pairs
    if not missing.any():
        return missing, claim
    whole = _whole_distances(missing, asked, distance, FEWEST_OF_SPARSE)
    return (whole, Pattern(IRREGULAR, lambda row, key: row == key)) if whole.any() else (whole, claim)


def _whole_distances(missing: Tensor, asked: Tensor, distance: Tensor, fewest: int) -> Tensor:
    """The missing pairs of a row and a key so far apart that no such pair is seen, of so many as were tried at least."""
    of = torch.bincount(distance[asked])
    never = torch.bincount(distance[missing], minlength=len(of)) == of
    return missing & (never & (of >= fewest))[distance.clamp_max(len(of) - 1)]


def _systematic(
    part: Part, missing: Tensor, asked: Tensor, sequence: Sequence, claim: Claim
) -> tuple[Tensor, Claim | None]:
    """Of the missing keys of one part those that no choice among keys explains, and the window that is seen instead."""
    alone = Seen(part.known, part.found, part.found, torch.zeros_like(part.found))
    rule = measured(alone, sequence, claim)
    if not (isinstance(rule, Pattern) and rule.name == IRREGULAR):
        return missing, rule
    distance = (sequence.position[:, None] - sequence.position[None]).abs()
    most = int(torch.bincount(distance[asked]).max())
    fewest = min(FEWEST if isinstance(claim, Window) else FEWEST_OF_PATTERN, max(most, NO_CHANCE))
    whole = _whole_distances(missing, asked, distance, fewest)
    if whole.any():
        return whole, rule
    # Of few positions chance would say so, too.
    if part.known.all() and _at_the_ends(missing, asked, distance):
        return missing, rule
    if _at_borders(missing, asked, distance):
        return missing, rule
    if int(missing.sum()) < NO_CHANCE:
        return whole, claim
    if (
        int(missing.sum()) >= FEWEST
        and len(distance[missing].unique()) == 1
        and len(distance[asked].unique()) > NO_CHANCE
    ):
        return missing, rule
    keys = missing.any(0)
    if torch.equal(asked & keys, missing) and 4 * int(keys.sum()) <= int(asked.any(0).sum()):
        return missing, rule
    tried = asked.sum(1)[missing.any(1)].float().mean()
    if _cut(missing, asked, distance) and (tried >= NO_CHANCE or _cut(missing.T, asked.T, distance.T)):
        return missing, rule
    return whole, claim


def _at_the_ends(missing: Tensor, asked: Tensor, distance: Tensor) -> bool:
    """Whether only rows miss their far end for which kernels have code of their own: the last few, the first or last full one."""
    counts = asked.sum(1)
    full_rows = (counts == counts.max()).nonzero()[:, 0].tolist()
    rows = missing.any(1).nonzero()[:, 0].tolist()
    last = int(counts.nonzero()[-1])
    here = rows == list(range(max(rows[0], last - NO_CHANCE + 1), last + 1)) or rows in (
        [full_rows[0]],
        [full_rows[-1]],
    )
    return here and _cut(missing, asked, distance)


# Tiles of kernels, and at how many of their borders it is no chance that rows miss their far end and others do not.
TILES = ((128, 2), (64, 2), (32, NO_CHANCE), (16, NO_CHANCE))


def _at_borders(missing: Tensor, asked: Tensor, distance: Tensor) -> bool:
    """Whether only rows at the borders of tiles miss their far end: each tile's first one, or its last one."""
    rows = missing.any(1).nonzero()[:, 0]
    at_borders = any(
        len(rows) >= fewest and bool((rows % tile == border).all())
        for tile, fewest in TILES
        for border in (0, tile - 1)
    )
    return at_borders and _cut(missing, asked, distance)


def _cut(missing: Tensor, asked: Tensor, distance: Tensor) -> bool:
    """Whether what each row misses is its far end."""
    nearest = distance.where(missing, torch.tensor(len(distance) + 1)).amin(1, keepdim=True)
    return not bool((asked & ~missing & (distance > nearest)).any())


def faults(
    seen: Seen, sequence: Sequence, claim: Claim | None, parts: str, sparse: Sparse | None = None
) -> list[Fault]:
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
        pairs = asked & here
        beyond = pairs & seen.some & ~expected
        if beyond.any():
            in_some = bool((beyond & seen.parted).any())
            found.append(_told(side, "too many", beyond, in_some, pairs, sequence, claim, actual, parts))
        lacking = holes(seen, sequence, claim, side, sparse)
        if lacking.systematic.any():
            found.append(
                _told(
                    side,
                    "too few",
                    lacking.systematic,
                    lacking.in_some,
                    pairs & expected,
                    sequence,
                    claim,
                    lacking.actual,
                    parts,
                )
            )
    return found


def own_key_fault(seen: Seen, sequence: Sequence, claim: Claim | None) -> list[Fault]:
    """That rows do not see their own key, in a gradient that others' keys have: that of keys, or of values.

    What comes into a layer is its own row's query, too, and tells nothing of its key.
    """
    for rows, tried in _without_own(seen, sequence, claim):
        last = f"row {rows[-1]} of {len(sequence)}"
        told = f"{told_claim(claim)} is claimed"
        if len(rows) == tried:
            return [Fault(f"no row sees its own key; {told}", last)]
        return [
            Fault(
                f"some rows do not see their own key; {told}",
                f"{len(rows)} of {tried} that were tried, the last is {last}",
            )
        ]
    return []


def rows_without_own(seen: Seen, sequence: Sequence, claim: Claim | None) -> set[int]:
    """The rows that do not see their own key in some part."""
    return {row for rows, _ in _without_own(seen, sequence, claim) for row in rows}


def _without_own(seen: Seen, sequence: Sequence, claim: Claim | None) -> Iterator[tuple[list[int], int]]:
    """Of each part in which rows do not see their own key: which they are, and of how many that is known."""
    if claim is None:
        return
    expected = sequence.expected(claim)
    own = torch.eye(len(sequence), dtype=torch.bool)
    # The weight of an only key has no gradient, and an attention that hides it may make an exception there.
    asked = own & expected & (expected & ~own).any(1, keepdim=True)
    # An attention that chooses among its keys may leave out a row's own, too.
    chooses = any(bool((expected & ~own & part.known & ~part.found).any()) for part in seen.parts)
    for part in seen.parts:
        here = asked & part.known
        rows = (here & ~part.found).diagonal().nonzero()[:, 0].tolist()
        tried = int(here.sum())
        every_row = torch.equal(here, asked)
        if rows and ((every_row and not chooses) or len(rows) == tried >= NO_CHANCE):
            yield rows, tried


def gaps(
    seen: Seen, sequence: Sequence, claim: Claim | None, parts: str, sparse: Sparse | None = None
) -> tuple[list[Fault], Tensor]:
    """That some rows do not see some keys in the window, which is no lie: an attention may choose among them; and which."""
    pairs = torch.zeros_like(seen.known)
    found: list[Fault] = []
    if claim is None:
        return found, pairs
    for side in ("left", "right"):
        lacking = holes(seen, sequence, claim, side, sparse)
        pairs |= lacking.scattered
        if lacking.scattered.any() and not lacking.systematic.any():
            some = f" of some {parts}" if bool((lacking.scattered & seen.some).any()) else ""
            found.append(
                Fault(
                    f"{side}: keys inside {told_claim(claim)} are not seen by some rows{some}",
                    _example(lacking.scattered, sequence, sees=False),
                )
            )
    return found, pairs


def _told(
    side: str,
    kind: str,
    wrong: Tensor,
    in_some: bool,
    asked: Tensor,
    sequence: Sequence,
    claim: Claim,
    actual: Claim | None,
    parts: str,
) -> Fault:
    example = _example(wrong, sequence, sees=kind == "too many")
    irregular = isinstance(actual, Pattern) and actual.name == IRREGULAR
    heads = f" in some {parts}" if in_some else ""
    said = f"{told_claim(claim)} is claimed"
    # Of a head that sees too few that is what this head sees; of one that sees too many, what all together see.
    there = " there" if in_some and kind == "too few" else ""
    compared = said if irregular else f"{said}, {told_claim(actual, 'full')} is seen{there}"
    distance = (sequence.position[:, None] - sequence.position[None]).abs()
    furthest = int(distance[wrong].max())
    if isinstance(claim, Window):
        limit = claim.left if side == "left" else claim.right
        whole = asked & (distance > limit) & sequence.one_document
        if kind == "too many" and (wrong == whole).all() and furthest > limit + 1:
            return Fault(f"{side}: the window is ignored{heads}; {said}", example)
        if kind == "too many" and (isinstance(actual, Window) or in_some):
            return Fault(f"{side}: {_keys(furthest - limit)} too many{heads}; {compared}", example)
        if kind == "too many" and irregular:
            return Fault(
                f"{side}: up to {_keys(furthest - limit)} too many in some rows{heads}; {said}",
                f"{example}; {_rows(wrong, asked)}",
            )
        if kind == "too few":
            nearest = int(distance[wrong].min())
            if torch.equal(wrong, asked):
                return Fault(f"{side}: no key is seen{heads}; {said}", example)
            # From the border inward, without a gap.
            if torch.equal(asked & (distance >= nearest), wrong):
                return Fault(f"{side}: {_keys(limit - nearest + 1)} too few{heads}; {compared}", example)
            if irregular and _cut(wrong, asked, distance):
                return Fault(
                    f"{side}: up to {_keys(limit - nearest + 1)} too few in some rows{heads}; {said}",
                    f"{example}; {_rows(wrong, asked)}",
                )
    return Fault(
        f"{side}: keys {'seen that are not to be' if kind == 'too many' else 'missing'}{heads}; {compared}",
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
