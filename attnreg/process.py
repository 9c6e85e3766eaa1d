"""Whether this process was forked from one that had imported attnreg: the threads that libraries keep do not survive a fork."""

from __future__ import annotations

import os

_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


def is_forked() -> bool:
    """Whether it was."""
    return _forked


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)
