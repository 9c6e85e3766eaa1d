"""What is written to ask for backends: names in order of preference, each with options, and names that are not wanted.

``mine:block=64`` asks for one with an option. ``flash; triton`` asks for the first of two that can run a call, and
``-flex`` for any other backend. A wish stays one string from the argument, the ``with`` block, the environment or the
command line to the plan, so that wherever a name can be given, all of that can be, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches


@dataclass(frozen=True, slots=True)
class Request:
    """A backend's name, and the options asked for, by name and as they were written; ``str()`` of it asks for the same.

    Attributes:
        name: the backend's name.
        options: the options.
    """

    name: str
    options: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        options = ",".join(f"{option}={value}" for option, value in self.options)
        return f"{self.name}:{options}" if options else self.name


@dataclass(frozen=True, slots=True)
class Wish:
    """What somebody asks for; ``str()`` of it asks for the same.

    Attributes:
        preferred: the backends of which the first that can run a call is taken; empty where any will do.
        excluded: the names of those that are not to be taken.
        by: who asks.
    """

    preferred: tuple[Request, ...]
    excluded: tuple[str, ...] = ()
    by: str = ""

    def __str__(self) -> str:
        return "; ".join([*map(str, self.preferred), *[f"-{name}" for name in self.excluded]])


def written(backend: object) -> str | None:
    """What a user gives for ``backend`` as a wish is written: a string or None as it is, a list of strings as one.

    Raises:
        TypeError: it is none of these.
    """
    if backend is None or isinstance(backend, str):
        return backend
    if isinstance(backend, (list, tuple)) and backend and all(isinstance(name, str) for name in backend):
        return "; ".join(backend)
    raise TypeError(
        f"backend must be a backend's name or None, got {backend!r} ({type(backend).__name__}); a list of names is taken, too"
    )


def parse_wish(text: str, by: str = "") -> Wish:
    """Names as in ``parse_request``, and names with a minus before them, separated by semicolons.

    Raises:
        ValueError: the text is of another form, or an option is given twice.
    """
    parts = [part.strip() for part in text.split(";")]
    if len(parts) > 1 and not all(parts):
        raise ValueError(f"a name is missing in {text!r}")
    preferred = tuple(parse_request(part) for part in parts if not part.startswith("-"))
    excluded = tuple(part[1:].strip() for part in parts if part.startswith("-"))
    for name in excluded:
        if not name or ":" in name:
            raise ValueError(f"a backend is excluded as -NAME, got {text!r}")
    return Wish(preferred, excluded, by)


def did_you_mean(name: str, names: Sequence[str]) -> str:
    """The likeliest of ``names`` as a question, in brackets: a text may go on behind it. Nothing where none is like it."""
    close = get_close_matches(name.lower(), names, 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def parse_request(text: str) -> Request:
    """``NAME`` or ``NAME:OPTION=VALUE,...``.

    Raises:
        ValueError: the text is of another form, or an option is given twice.
    """
    name, colon, given = text.partition(":")
    options = []
    for each in given.split(",") if colon else ():
        option, equals, value = (part.strip() for part in each.partition("="))
        if not (option and equals and value):
            raise ValueError(f"a backend is asked for as NAME or NAME:OPTION=VALUE,..., got {text!r}")
        options.append((option, value))
    if len({option for option, _ in options}) < len(options):
        raise ValueError(f"an option is given twice in {text!r}")
    return Request(name, tuple(sorted(options)))
