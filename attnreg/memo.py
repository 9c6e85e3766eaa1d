"""Facts of the machine that are asked once in a process, and anew after ``attnreg.reset()``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

_asked: list[functools._lru_cache_wrapper[object]] = []


def asked_once(function: Callable[..., Result]) -> Callable[..., Result]:
    """``function``, whose answers are kept."""
    kept = functools.cache(function)
    _asked.append(kept)
    return kept


def forget() -> None:
    """Drop every answer."""
    for each in _asked:
        each.cache_clear()
