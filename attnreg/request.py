"""What is written to ask for a backend: its name, and after a colon its options, as in ``cublas_block:block=64``.

A request stays one string from the argument, the ``with`` block, the environment or the command line to the plan, so that
wherever a name can be given, options can be, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Request:
    """A backend's name, and the options asked for, by name and as they were written; ``str()`` of it asks for the same.

    Attributes:
        name: the backend's name.
        options: the options.
        by: who asks.
    """

    name: str
    options: tuple[tuple[str, str], ...] = ()
    by: str = field(default="", compare=False)

    def __str__(self) -> str:
        options = ",".join(f"{option}={value}" for option, value in self.options)
        return f"{self.name}:{options}" if options else self.name


def parse_request(text: str, by: str = "") -> Request:
    """``NAME`` or ``NAME:OPTION=VALUE,...``.

    Raises:
        ValueError: the text is of another form, or an option is given twice.
    """
    name, colon, written = text.partition(":")
    options = []
    for each in written.split(",") if colon else ():
        option, equals, value = (part.strip() for part in each.partition("="))
        if not (option and equals and value):
            raise ValueError(f"a backend is asked for as NAME or NAME:OPTION=VALUE,..., got {text!r}")
        options.append((option, value))
    if len({option for option, _ in options}) < len(options):
        raise ValueError(f"an option is given twice in {text!r}")
    return Request(name, tuple(sorted(options)), by)
