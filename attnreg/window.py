"""The window of keys that a query sees."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from operator import index

import torch


@dataclass(frozen=True, slots=True)
class Window:
    """The keys seen by each query, as two distances from its own position.

    Query ``i`` sees key ``j`` if and only if ``-left <= j - (i + len_k - len_q) <= right``: the *ends* of
    the two sequences are aligned, so that a decode step with few queries and many keys means what it
    should. At the borders the window is truncated, never shifted.

    Args:
        left: how many keys before its own position a query sees, at least 0.
        right: how many keys after its own position a query sees, at least 0.

    Raises:
        TypeError: ``left`` or ``right`` is not an integer.
        ValueError: ``left`` or ``right`` is negative, or larger than 2**62 - 1.
    """

    left: int
    right: int

    def __post_init__(self) -> None:
        left, right = self.left, self.right
        # Who makes a window at each call should not pay for messages.
        if type(left) is int and type(right) is int and 0 <= left <= _LARGEST and 0 <= right <= _LARGEST:
            return
        for side in ("left", "right"):
            object.__setattr__(self, side, _count(f"Window: {side}", getattr(self, side), minimum=0))

    @classmethod
    def causal(cls, size: int) -> Window:
        """Exactly ``size`` keys, the query's own position being the last: ``Window(size - 1, 0)``."""
        return cls(_count("Window.causal: size", size, minimum=1) - 1, 0)

    @classmethod
    def centered(cls, size: int) -> Window:
        """Exactly ``size`` keys around the query's own position: ``Window(size // 2, (size - 1) // 2)``.

        This is fast-transformers' choice; an even size has its extra key on the left.
        """
        size = _count("Window.centered: size", size, minimum=1)
        return cls(size // 2, (size - 1) // 2)

    @property
    def size(self) -> int:
        """W, the number of keys in a window that no border cuts, ``left + right + 1``."""
        return self.left + self.right + 1


@functools.lru_cache(maxsize=4096)
def window_of(left: int, right: int) -> Window:
    """``Window(left, right)``, made once."""
    return Window(left, right)


# Torch counts in 64 bits, and W is the sum of both sides and 1.
_LARGEST = 2**62 - 1


def _count(what: str, given: object, *, minimum: int) -> int:
    try:
        if isinstance(given, bool):
            raise TypeError
        # A size of a traced tensor, an int to torch.compile, stays one: its number here is that of one call.
        count: int = given if type(given) in (int, torch.SymInt) else index(given)  # type: ignore[arg-type, assignment]
    except TypeError:
        raise TypeError(f"{what} must be an int, got {given!r} ({type(given).__name__})") from None
    if count < minimum:
        raise ValueError(f"{what} must be at least {minimum}, got {count}")
    if count > _LARGEST:
        raise ValueError(f"{what} must be at most 2**62 - 1, got {count}")
    return count
