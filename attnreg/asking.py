"""Who asks for which backends: the argument of a call, the enclosing ``use_backend`` block, the environment."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import replace
from types import TracebackType
from typing import Any, TypeVar

from attnreg.backend import BackendError, option_values
from attnreg.dispatch import unknown_backend
from attnreg.environ import variables
from attnreg.registry import registry
from attnreg.request import Request, Wish, parse_wish, written

# What the enclosing `use_backend` blocks ask for, innermost last, each with the object that asks.
wishes: ContextVar[tuple[tuple[str, use_backend], ...] | None] = ContextVar("attnreg_wishes", default=None)

REQUEST_KEY = b"ATTNREG_BACKEND"

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


class use_backend:
    """Ask for a backend in a ``with`` block or in a decorated (also async) function.

    ``use_backend("name", option=value)`` is the same as ``use_backend("name:option=value")``. A list of names, or names with
    semicolons between them, asks for the first that can run a call; a minus before a name asks for any other.

    The wish belongs to the current context: other threads and asyncio tasks do not see it. The innermost block
    counts; the argument ``backend=`` of a call goes before it.

    Raises:
        TypeError: the name is no string and no list of strings, or options are given for several.
        ValueError: an option is given twice, or a name is neither ``NAME`` nor ``NAME:OPTION=VALUE,...``.
        BackendError: on entry, when none of the backends is registered, or one does not take its options.
    """

    def __init__(self, name: str | Sequence[str], **options: object) -> None:
        try:
            text = written(name)
            if text is None:
                raise TypeError
        except TypeError:
            raise TypeError(
                f"use_backend: the backend's name must be a string, or a list of strings, got {name!r} ({type(name).__name__})"
            ) from None
        wish = parse_wish(text)
        if options:
            if len(wish.preferred) != 1:
                raise TypeError(f"use_backend: options belong to one backend, got {text!r}; write NAME:OPTION=VALUE")
            (request,) = wish.preferred
            given = tuple((option, str(value)) for option, value in options.items())
            wish = replace(wish, preferred=(Request(request.name, (*request.options, *given)),))
        self.wish = parse_wish(str(wish), "use_backend")
        self.name = str(self.wish)

    def __enter__(self) -> use_backend:
        entries = registry.entries
        backends = {entry.backend.name: entry.backend for entry in entries}
        found = [request for request in self.wish.preferred if request.name in backends]
        if self.wish.preferred and not found:
            raise BackendError(unknown_backend(self.wish.preferred[0], self.wish, entries, registry.faults))
        for request in found:
            _, wrong = option_values(backends[request.name], request.options)
            if wrong:
                raise BackendError(f"backend {str(request)!r}, asked for by use_backend: {'; '.join(wrong)}")
        wishes.set((*(wishes.get() or ()), (self.name, self)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Its own wish, the last one: blocks may be closed in another order than they were opened in.
        held = wishes.get() or ()
        for place in range(len(held) - 1, -1, -1):
            if held[place][1] is self:
                wishes.set((*held[:place], *held[place + 1 :]) or None)
                return

    def __call__(self, function: Decorated) -> Decorated:
        """Decorate a function or coroutine function: its body runs inside the block."""
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(
                f"use_backend cannot decorate the generator function {function.__qualname__}, whose body runs in "
                f"pieces between its caller's; open a `with use_backend({self.name!r}):` block inside it"
            )

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        @functools.wraps(function)
        async def await_call(*args: Any, **kwargs: Any) -> Any:
            with self:
                return await function(*args, **kwargs)

        return await_call if inspect.iscoroutinefunction(function) else call  # type: ignore[return-value]


def asked_for(backend: str | None) -> str | bytes | None:
    """What is asked for, first come first: the argument, the context, the environment (in bytes); or None."""
    if backend is not None:
        return backend
    held = wishes.get()
    return held[-1][0] if held else variables.get(REQUEST_KEY) or None


def wish_of(asked: str | bytes | None, backend: str | None) -> Wish | None:
    """What :func:`asked_for` found, in parts, with the one who asks.

    Raises:
        BackendError: it is no wish.
    """
    if asked is None:
        return None
    text = asked if isinstance(asked, str) else os.fsdecode(asked)
    by = (
        "the argument backend="
        if backend is not None
        else "use_backend"
        if asked is text
        else "the environment variable ATTNREG_BACKEND"
    )
    try:
        return parse_wish(text, by)
    except ValueError as error:
        raise BackendError(f"{by}: {error}") from None
