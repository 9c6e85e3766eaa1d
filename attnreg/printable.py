"""Text from elsewhere, such as a file, another process or a plug-in, as it may be shown: nothing in it can steer a terminal.

What gives the text is trusted with nothing: a string's or an exception's own methods may be wrong, or raise.
"""

from __future__ import annotations

from collections.abc import Callable

# A reason is a sentence or two.
MOST_CHARACTERS = 300
# One that ends with what a compiler printed is longer.
MOST_OF_A_REPORT = 8000


def printable(text: str, most: int = MOST_CHARACTERS) -> str:
    """``text`` in one line of at most ``most`` characters; what cannot be printed is written as an escape.

    That are control characters, those that change the direction of writing, and halves of a surrogate pair.
    """
    cut = plain(text)[: most + 1]
    if not cut.isprintable():
        cut = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in cut)
    return cut if len(cut) <= most else f"{cut[: most - 3]}..."


def report(text: str) -> str:
    """``text`` in as many lines as it has, each of them printable."""
    whole = plain(text)
    if whole.isprintable() and len(whole) <= MOST_OF_A_REPORT:
        return whole
    shown = "\n".join(printable(line, MOST_OF_A_REPORT) for line in whole[: MOST_OF_A_REPORT + 1].splitlines())
    return shown if len(shown) <= MOST_OF_A_REPORT else f"{shown[: MOST_OF_A_REPORT - 3]}..."


def plain(text: str) -> str:
    """``text`` as a string of no other class, whose methods are those of strings."""
    return str.__str__(text)


def brief(given: object) -> str:
    """What was given, for a message: its repr, of 80 characters at most, and its type."""
    return f"{printable(_asked(repr, given), 80)} ({type_name(given)})"


def type_name(given: object) -> str:
    """The name of its class; a metaclass is not asked."""
    name: str = type.__dict__["__name__"].__get__(type(given))
    return printable(name, 80)


def message(error: BaseException) -> str:
    """What an exception says, in one line."""
    return printable(" ".join(_asked(str, error).split()))


def told(error: BaseException) -> str:
    """An exception in one line, as ``ValueError: why``."""
    said = message(error)
    return printable(f"{type_name(error)}: {said}" if said else type_name(error))


def trouble(error: BaseException) -> str:
    """What went wrong in somebody else's code, as it is told. Ctrl-C is no such thing, and goes on its way: the user wants out.

    For what ``except BaseException`` caught: what is no ``Exception`` is raised there, too, by a library in Rust, or by pytest.
    """
    if issubclass(type(error), KeyboardInterrupt):
        raise error
    return told(error)


def _asked(question: Callable[[object], str], given: object) -> str:
    """The answer of ``str`` or ``repr``, which an object may make as it likes."""
    try:
        return plain(question(given))
    except BaseException as error:
        if issubclass(type(error), KeyboardInterrupt):
            raise
        return f"one that its own {question.__name__}() cannot show"
