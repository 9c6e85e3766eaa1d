"""Who asks for which backends: the argument of a call, the enclosing ``use_backend`` block, the environment."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from threading import get_ident
from types import AsyncGeneratorType, CoroutineType, FrameType, GeneratorType, TracebackType
from typing import Any, NamedTuple, TypeVar
from weakref import ref

import torch

from attnreg.backend import BackendError, option_values
from attnreg.dispatch import unknown_backend
from attnreg.environ import variables
from attnreg.printable import brief
from attnreg.registry import registry
from attnreg.request import Request, Wish, parse_wish, written


@dataclass(eq=False)
class _InGenerator:
    """A block inside a generator, whose caller goes on in the same context while the block is open.

    It counts while the generator runs, for what it calls; in what has inherited the context, a task or another thread, while
    the block is open.

    Attributes:
        name: what is asked for.
        frame: the generator's; None once the block is closed, wherever that was.
        opened: the thread and the task that opened it.
    """

    name: str
    frame: FrameType | None
    opened: tuple[int, object]

    def counts(self) -> bool:
        """Whether the block counts here and now."""
        own = self.frame
        if own is None:
            return False
        if own.f_back is not None:  # it runs, here or in another thread
            frame: FrameType | None = sys._getframe(1)
            while frame is not None:
                if frame is own:
                    return True
                frame = frame.f_back
        elif not own.f_code.co_flags & inspect.CO_ASYNC_GENERATOR:
            return False
        # It runs in another thread, or it awaits something.
        return _thread_and_task() != self.opened


class _Asked(NamedTuple):
    """What one ``use_backend`` block asks for.

    Attributes:
        name: what is asked for; None where ``block`` says whether it is.
        owner: the object that asks.
        block: the block, where it is a generator's.
    """

    name: str | None
    owner: use_backend
    block: _InGenerator | None = None


# What the enclosing `use_backend` blocks ask for, innermost last.
wishes: ContextVar[tuple[_Asked, ...] | None] = ContextVar("attnreg_wishes", default=None)

_is_tracing = torch.compiler.is_dynamo_compiling

REQUEST_KEY = b"ATTNREG_BACKEND"

# Who runs a generator not to iterate over it but to open a block for others: what it asks for is theirs.
_BLOCK_MAKERS = frozenset({"contextlib", "_pytest", "pluggy", "pytest_asyncio", "anyio"})

# What a function returns before any of its body has run.
_NOT_YET_RUN = frozenset({GeneratorType, CoroutineType, AsyncGeneratorType})

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def check_known(wish: Wish) -> None:
    """Some backend that a wish prefers is registered, and each of those that are has the options asked for.

    Raises:
        BackendError: none is, or one has not.
    """
    entries = registry.entries
    backends = {entry.backend.name: entry.backend for entry in entries}
    found = [request for request in wish.preferred if request.name in backends]
    if wish.preferred and not found:
        raise BackendError(unknown_backend(wish.preferred[0], wish, entries, registry.faults))
    for request in found:
        _, wrong = option_values(backends[request.name], request.options)
        if wrong:
            raise BackendError(f"backend {str(request)!r}, asked for by {wish.by}: {'; '.join(wrong)}")


class use_backend:
    """Ask for a backend in a ``with`` block or in a decorated (also async) function.

    ``use_backend("name", option=value)`` is the same as ``use_backend("name:option=value")``. A list of names, or names with
    semicolons between them, asks for the first that can run a call; a minus before a name asks for any other.

    The wish belongs to the current context: other threads and asyncio tasks do not see it, but tasks that are made inside the
    block do. The innermost block counts; the argument ``backend=`` of a call goes before it.

    In a generator a block counts for what the generator does, not for who iterates over it. Where somebody goes on with the
    generator in another thread or task, it has to open the block anew. A generator that ``contextlib.contextmanager`` or a
    fixture of pytest is made of opens the block for others, as ever.

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
        # Those of its blocks that are open in generators.
        self._blocks: list[_InGenerator] = []

    def __enter__(self) -> use_backend:
        check_known(self.wish)
        # Inside a graph there are no frames.
        block = None if _is_tracing() else _block_in_generator(self.name, sys._getframe(1))
        if block is not None:
            self._blocks.append(block)
        wishes.set((*_open_wishes(), _Asked(None if block else self.name, self, block)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A generator may be closed in another context: its block is then closed in all.
        if self._blocks:
            frame = sys._getframe(1)
            for block in reversed(self._blocks[:]):
                if block.frame is frame:
                    self._blocks.remove(block)
                    block.frame = None
                    wishes.set(_open_wishes() or None)
                    return
        # Its own wish, the last one: blocks may be closed in another order than they were opened in.
        held = _open_wishes()
        for place in range(len(held) - 1, -1, -1):
            if held[place].owner is self and held[place].block is None:
                wishes.set((*held[:place], *held[place + 1 :]) or None)
                return

    def __call__(self, function: Decorated) -> Decorated:
        """Decorate a function or coroutine function: its body runs inside the block.

        Raises:
            TypeError: it is neither, but a generator function, a class or no function at all.
        """
        is_coroutine = self._check_function(function)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self:
                result = function(*args, **kwargs)
            if result.__class__ in _NOT_YET_RUN:
                raise self._returned(function, result)
            return result

        @functools.wraps(function)
        async def await_call(*args: Any, **kwargs: Any) -> Any:
            with self:
                return await function(*args, **kwargs)

        return await_call if is_coroutine else call  # type: ignore[return-value]

    def _check_function(self, function: object) -> bool:
        """Whether what is decorated is a coroutine function; an error unless it is that or another function."""
        inner = function
        while isinstance(inner, functools.partial):
            inner = inner.func
        name = getattr(inner, "__qualname__", type(inner).__qualname__)
        if isinstance(inner, (staticmethod, classmethod, property)):
            kind = type(inner).__name__
            raise TypeError(f"use_backend decorates functions: write @{kind} above @use_backend({self.name!r})")
        if isinstance(inner, type):
            raise TypeError(f"use_backend decorates functions, and {name} is a class: decorate its methods")
        if not callable(inner):
            raise TypeError(f"use_backend decorates functions, got {brief(function)}")
        bodies = (inner, type(inner).__call__)  # an object is called by its class's
        if any(inspect.isgeneratorfunction(body) or inspect.isasyncgenfunction(body) for body in bodies):
            raise TypeError(
                f"use_backend cannot decorate the generator function {name}, whose body runs in pieces between its "
                f"caller's; open a `with use_backend({self.name!r}):` block inside it"
            )
        return any(map(inspect.iscoroutinefunction, bodies))

    def _returned(self, function: object, result: Any) -> TypeError:
        """The error where a decorated function returns what has not run yet."""
        kind = {GeneratorType: "a generator", CoroutineType: "a coroutine"}.get(type(result), "an async generator")
        if not isinstance(result, AsyncGeneratorType):
            result.close()  # nobody else will
        return TypeError(
            f"use_backend: {getattr(function, '__qualname__', brief(function))} returned {kind}, which would run outside the "
            f"block that decorates it; open a `with use_backend({self.name!r}):` block inside the {kind.split()[-1]}"
        )


# A coroutine's caller does not go on while it waits, unless in another task. A generator that is one (types.coroutine) is, too.
_GENERATORS = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


def _block_in_generator(name: str, frame: FrameType) -> _InGenerator | None:
    """The block that is opened in a frame, where that is a generator's, which opens it for itself."""
    if not frame.f_code.co_flags & _GENERATORS or _makes_a_block(frame):
        return None
    return _InGenerator(name, frame, _thread_and_task())


def _makes_a_block(frame: FrameType) -> bool:
    """Whether a generator, in its frame, opens a block for others, or is a coroutine."""
    if frame.f_code.co_flags & inspect.CO_ITERABLE_COROUTINE:
        return True
    runs_it: FrameType | None = frame
    while runs_it is not None and runs_it.f_code.co_flags & _GENERATORS:
        runs_it = runs_it.f_back
    return runs_it is not None and runs_it.f_globals.get("__name__", "").partition(".")[0] in _BLOCK_MAKERS


def _thread_and_task() -> tuple[int, object]:
    """This thread, and the asyncio task that runs in it."""
    task = None
    if "asyncio" in sys.modules:
        with suppress(RuntimeError):  # no loop runs here
            task = sys.modules["asyncio"].current_task()
    return get_ident(), None if task is None else ref(task)


def _open_wishes() -> tuple[_Asked, ...]:
    """This context's wishes but those of blocks that were closed in another."""
    held = wishes.get() or ()
    return tuple(asked for asked in held if asked.block is None or asked.block.frame is not None)


def _asked_beside_generators(held: Sequence[_Asked]) -> str | None:
    """What the innermost block asks for that counts."""
    for name, _, block in reversed(held):
        if block is None:
            return name
        if block.counts():
            return block.name
    return None


def asked_for(backend: str | None) -> str | bytes | None:
    """What is asked for, first come first: the argument, the context, the environment (in bytes); or None."""
    if backend is not None:
        return backend
    held = wishes.get()
    if held:
        name = held[-1][0] or _asked_beside_generators(held)
        if name is not None:
            return name
    return variables.get(REQUEST_KEY) or None


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
