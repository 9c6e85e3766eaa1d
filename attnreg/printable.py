"""Text from elsewhere, such as a file or another process, as it may be shown: nothing in it can steer a terminal."""

from __future__ import annotations

# A reason is a sentence or two.
MOST_CHARACTERS = 300


def printable(text: str, most: int = MOST_CHARACTERS) -> str:
    """``text`` in one line of at most ``most`` characters; what cannot be printed is written as an escape.

    That are control characters, those that change the direction of writing, and halves of a surrogate pair.
    """
    cut = text[: most + 1]
    if not cut.isprintable():
        cut = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in cut)
    return cut if len(cut) <= most else f"{cut[: most - 3]}..."


def brief(given: object) -> str:
    """What was given, for a message: its repr, of 80 characters at most, and its type."""
    try:
        text = repr(given)
    except Exception:
        text = "an object without a repr"
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(given).__name__})"
