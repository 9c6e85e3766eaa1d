"""What was measured of a call's candidates, as the dispatcher gets it: facts alone, from whichever table they came."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone

# How the reason of a candidate begins whose result was compared with the truth and was another one.
WRONG = "wrong: "


def now() -> str:
    """The time in UTC, as ISO 8601 in the form in which the dates of figures can be compared."""
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")


@dataclass(frozen=True, slots=True)
class Figure:
    """What was found out about one candidate.

    Attributes:
        seconds: the median time of a call; None where there is none.
        spread: seconds between the quartiles.
        reason: why there is no time: it refused, raised, was wrong, ran out of memory, took too long; None where there is one.
        measured: when, in UTC, as ISO 8601.
        disturbed: whether something else seems to have used the device meanwhile.
        passing: whether the reason may be gone the next time, as memory may be free then: no fact to be kept in a file.
    """

    seconds: float | None = None
    spread: float = 0.0
    reason: str | None = None
    measured: str = ""
    disturbed: bool = False
    passing: bool = False

    @property
    def is_wrong(self) -> bool:
        """Whether the candidate's result was not the truth."""
        return self.reason is not None and self.reason.startswith(WRONG)


@dataclass(frozen=True, slots=True)
class Measured:
    """The figures that a table has for a call.

    Attributes:
        source: "tuned" for a table of this machine's user, "shipped" for one that came with attnreg.
        figures: by the candidate's name.
        text: which table it is, of when, and which of its entries, where that is not the call itself.
        remarks: how the environment of the measurement differs from this one.
    """

    source: str
    figures: Mapping[str, Figure] = field(default_factory=dict)
    text: str = ""
    remarks: tuple[str, ...] = ()
