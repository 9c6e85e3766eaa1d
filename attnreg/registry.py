"""The registered backends: found once through pluggy's entry points, or registered at run time."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from time import monotonic
from types import TracebackType
from typing import Any

from attnreg.backend import (
    THIS_PROCESS,
    Backend,
    Entry,
    Fault,
    Function,
    is_able,
    made_anew,
    why_not_prepared,
    with_options,
)
from attnreg.composition import complete
from attnreg.entry_points import entry_points
from attnreg.environ import switch
from attnreg.memo import forget
from attnreg.printable import brief, printable, trouble, type_name
from attnreg.problem import Problem
from attnreg.request import Request, parse_request
from attnreg.tables.store import Tables

# A table that another process writes is noticed so much later at most.
SECONDS_BETWEEN_LOOKS = 1e-3
# A plug-in that yields more has no end.
MOST_BACKENDS = 256
# What can differ in what a backend is able to do is bounded for a program, but for its windows; so are classes of sizes.
MOST_CLASSES = 4096


def keep(memory: dict[Any, Any], key: Hashable, value: object, most: int) -> None:
    """Put ``value`` into a memory of ``most`` entries, which is emptied where it is full."""
    if len(memory) >= most:
        memory.clear()
    memory[key] = value


@dataclass(frozen=True, eq=False)
class Implementation:
    """A backend with the options that were asked for, ready to be called.

    Attributes:
        backend: the backend.
        request: what asks for it.
        functions: by name (``op`` and ``op_backward``), composed ones included, with the options given to each.
    """

    backend: Backend
    request: Request
    functions: Mapping[str, Function]


@dataclass(frozen=True, eq=False)
class _Discovery:
    """One search for plug-ins, by the thread that makes it."""

    thread: int


class Registry:
    """Backends by name, and the plug-ins that could not be used.

    Discovery runs once, at the first need. Every change replaces ``plans`` and ``chosen``, the memory of what was chosen,
    so that no stale choice outlives it: who makes a plan takes these dictionaries first and looks at the backends then.
    """

    def __init__(self) -> None:
        # What measures a call that was never measured, and says whether the matter is settled; set by the package, above.
        self.tuner: Callable[[Problem], bool] | None = None
        # What was measured.
        self.tables = Tables()
        # Told when a discovery ends.
        self._lock = threading.Condition(threading.RLock())
        # Who is finding the plug-ins, by a sign that a reset takes away.
        self._discovering: _Discovery | None = None
        # What backwards of ops may still ask for, by ticket: a reset and a removal leave it.
        self._by_ticket: dict[int, Implementation] = {}
        self._tickets: dict[Implementation, int] = {}
        self.reset()

    def reset(self) -> None:
        """Forget every backend, fault and plan; plug-ins are discovered anew at the next need.

        Raises:
            RuntimeError: a plug-in calls it while it is loaded, which would begin without an end.
        """
        with self._lock:
            if self._discovering is not None and self._discovering.thread == threading.get_ident():
                raise RuntimeError("attnreg.reset() was called by a plug-in while it is loaded")
            self.tables.forget()
            forget()
            self._discovered = False
            self._discovering = None
            self._lock.notify_all()
            # What the tables were at the last look.
            self.stamp: Hashable = None
            # When a call by a plan that is there looks at the tables again, by the monotonic clock.
            self.next_look = 0.0
            self._autotune: bool | None = None
            self._entries: dict[str, Entry] = {}
            self._listed: tuple[tuple[Entry, ...], dict[str, Entry]] = ((), self._entries)
            self._faults: tuple[Fault, ...] = ()
            self._prepared: set[Backend] = set()
            self._failed: Mapping[str, str] = {}
            # Held while a backend is prepared: two threads must not build the same extension at once.
            self._preparing: dict[Backend, threading.RLock] = {}
            self._implementations: dict[tuple[Backend, Request], Implementation] = {}
            self._changed()

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The registered backends in the order in which they came."""
        self.discover()
        entries, of = self._listed
        if of is not self._entries:
            of = self._entries
            entries = tuple(of.values())
            self._listed = entries, of
        return entries

    @property
    def faults(self) -> tuple[Fault, ...]:
        """The plug-ins that could not be used, with their errors."""
        self.discover()
        return self._faults

    @property
    def failed(self) -> Mapping[str, str]:
        """The registered backends whose preparation failed, by name, with the reason."""
        return self._failed

    def functions(self, text: str) -> Mapping[str, Function]:
        """The functions of a registered backend by name (``op`` and ``op_backward``), composed ones included.

        Raises:
            LookupError: no such backend is registered.
            ValueError: it does not take the options, or the text is no request.
        """
        request = parse_request(text)
        for entry in self.entries:
            if entry.backend.name == request.name:
                return self.implementation(entry.backend, request).functions
        raise LookupError(f"backend {request.name!r} is not registered")

    def implementation(self, backend: Backend, request: Request) -> Implementation:
        """``backend`` with the options of ``request``, made once.

        Raises:
            ValueError: it does not take the options.
        """
        try:
            return self._implementations[backend, request]
        except KeyError:
            pass
        with self._lock:
            found = self._implementations.get((backend, request))
            if found is None:
                functions = complete(with_options(backend, request.options))
                found = self._implementations[backend, request] = Implementation(backend, request, functions)
            return found

    def ticket(self, implementation: Implementation) -> int:
        """A number of this process by which a graph's backward finds the implementation of its forward."""
        number = self._tickets.get(implementation)
        if number is None:
            with self._lock:
                number = self._tickets.setdefault(implementation, len(self._tickets) + 1)
                self._by_ticket[number] = implementation
        return number

    def by_ticket(self, ticket: int) -> Implementation | None:
        """The implementation of that number, registered still or not; None where it was forgotten."""
        return self._by_ticket.get(ticket)

    def register(self, backend: Backend) -> Backend:
        """Add a backend of this process, after the plug-ins: their names are taken, whoever asks first.

        Returns:
            The registered backend, as of ``add``.

        Raises:
            TypeError, ValueError: as ``add``.
        """
        # Not to be waited for: it may be waiting for the import that this comes from.
        self.discover(wait=False)
        return self.add(backend, THIS_PROCESS)

    def add(self, backend: Backend, distribution: str) -> Backend:
        """Register a copy of ``backend``, in which nothing changes any more.

        Returns:
            The copy.

        Raises:
            TypeError: it is no Backend, or of a class derived from it, or was not made by it.
            ValueError: its name is taken.
        """
        if type(backend) is not Backend:
            raise TypeError(f"a backend must be an attnreg.Backend, got {brief(backend)}")
        own = made_anew(backend)
        with self._lock:
            taken = self._entries.get(own.name)
            if taken is not None:
                raise ValueError(f"the name {own.name!r} is taken by the backend of {taken.distribution}")
            self._entries = {**self._entries, own.name: Entry(own, distribution)}
            self._changed()
        return own

    def remove(self, backend: Backend) -> None:
        """Take ``backend`` out again; nothing happens where it is not registered.

        A backward whose forward it ran still finds it.
        """
        with self._lock:
            entry = self._entries.get(backend.name)
            if entry is not None and entry.backend is backend:
                self._entries = {name: each for name, each in self._entries.items() if name != backend.name}
                self._listed = (), {}
                self._failed = {name: reason for name, reason in self._failed.items() if name != backend.name}
                self._prepared.discard(backend)
                self._preparing.pop(backend, None)
                for key in [key for key in self._implementations if key[0] is backend]:
                    del self._implementations[key]
                self._changed()

    def prepare(self, backend: Backend) -> bool:
        """Prepare a backend for its first use. Where that fails it is refused, with the reason, from here on."""
        if backend in self._prepared:
            return True
        with self._lock:
            preparing = self._preparing.setdefault(backend, threading.RLock())
        with preparing:
            if backend in self._prepared:
                return True
            if not self._is_usable(backend):
                return False
            reason = why_not_prepared(backend)
            with self._lock:
                if reason is None:
                    self._prepared.add(backend)
                elif self._is_usable(backend):
                    self._failed = {**self._failed, backend.name: reason}
                    self._changed()
            return reason is None

    def _is_usable(self, backend: Backend) -> bool:
        """Whether it is registered and its preparation has not failed."""
        entry = self._entries.get(backend.name)
        return entry is not None and entry.backend is backend and backend.name not in self._failed

    def look_at_tables(self) -> None:
        """Drop every plan where a table has changed since the plans were made."""
        stamp = self.tables.stamp()
        self.next_look = monotonic() + SECONDS_BETWEEN_LOOKS
        if stamp != self.stamp:
            with self._lock:
                self.stamp = stamp
                self._changed()

    def able(self, problem: Problem, facts: Hashable, entries: Sequence[Entry]) -> Sequence[Entry]:
        """Those of the backends whose capability admits ``problem``, by its ``facts_of_ability``."""
        known = self._able.get(facts)
        if known is None or known[0] is not entries:
            known = entries, [entry for entry in entries if is_able(entry.backend, problem)]
            keep(self._able, facts, known, MOST_CLASSES)
        return known[1]

    @property
    def autotunes(self) -> bool:
        """Whether a call that was never measured is measured: as set, else as ``ATTNREG_AUTOTUNE`` says.

        Raises:
            ValueError: the variable is neither on nor off.
        """
        if self._autotune is not None:
            return self._autotune
        return switch(b"ATTNREG_AUTOTUNE")

    def set_autotune(self, on: bool | None) -> None:
        """Turn tuning on first use on or off; None leaves it to the environment."""
        with self._lock:
            self._autotune = on
            self._changed()

    def _after_fork(self) -> None:
        """In a forked child: a thread that held a lock, or was discovering, is not there to finish."""
        self._lock = threading.Condition(threading.RLock())
        self._preparing = {}
        if self._discovering is not None and self._discovering.thread != threading.get_ident():
            with self._lock:
                self._forget_discovery()

    def _changed(self) -> None:
        self.plans: dict[Any, Any] = {}
        # What was chosen for problems of about the same sizes.
        self.chosen: dict[Hashable, Implementation] = {}
        self._able: dict[Hashable, tuple[Sequence[Entry], Sequence[Entry]]] = {}

    def discover(self, *, wait: bool = True) -> None:
        """Find the plug-ins, once. While another thread does so, wait for it, or else go on with those found so far."""
        if self._discovered:
            return
        own = _Discovery(threading.get_ident())
        with self._lock:
            # A plug-in that asks for backends while it is loaded gets those found so far.
            while wait and self._discovering is not None and self._discovering.thread != own.thread:
                self._lock.wait()
            if self._discovered or self._discovering is not None:
                return
            self._discovering = own
        # Without the lock: another thread may hold the import of a plug-in that registers a backend while it is imported.
        try:
            for entry_point, distribution in entry_points("attnreg", partial(self._keep_fault, own)):
                self._load(entry_point, distribution, own)
        except BaseException:  # Ctrl-C: the next need begins anew
            with self._lock:
                if self._discovering is own:
                    self._forget_discovery()
            raise
        with self._lock:
            if self._discovering is own:
                self._discovered, self._discovering = True, None
                self._lock.notify_all()

    def _forget_discovery(self) -> None:
        self._discovering = None
        self._faults = ()
        self._entries = {name: each for name, each in self._entries.items() if each.distribution == THIS_PROCESS}
        self._changed()
        self._lock.notify_all()

    def _load(self, entry_point: metadata.EntryPoint, distribution: str, discovery: _Discovery) -> None:
        """Add what one plug-in offers, or what is wrong with it, unless a reset has ended the discovery."""
        keep_fault = partial(self._keep_fault, discovery, entry_point.name, distribution)
        count = 0
        try:
            for count, backend in enumerate(_offer(entry_point.load(), entry_point.name), 1):
                if count > MOST_BACKENDS:
                    raise ValueError(
                        f"attnreg_backends() yields more than {MOST_BACKENDS} backends; the others are left out"
                    )
                try:
                    with self._lock:
                        if self._discovering is discovery:
                            self.add(backend, distribution)
                except BaseException as error:
                    keep_fault(trouble(error))
            if not count:
                raise ValueError("attnreg_backends() yielded no backend")
        except BaseException as error:
            keep_fault(trouble(error))

    def _keep_fault(self, discovery: _Discovery, plugin: str, distribution: str, error: str) -> None:
        with self._lock:
            if self._discovering is discovery:
                self._faults = (*self._faults, Fault(printable(plugin), distribution, error))


def _offer(plugin: object, name: str) -> Iterable[Backend]:
    """What one plug-in's hook yields. Each plug-in has a manager of its own: its errors then cost only itself."""
    import pluggy

    from attnreg import hookspecs

    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(plugin, name=name)
    manager.check_pending()
    results = manager.hook.attnreg_backends()
    if not results:
        raise TypeError(f"{getattr(plugin, '__name__', plugin)!r} has no @attnreg.hookimpl attnreg_backends()")
    (offered,) = results
    if isinstance(offered, Backend) or not isinstance(offered, Iterable):
        raise TypeError(f"attnreg_backends() must yield backends, it returned {type_name(offered)}")
    return offered


class Registration:
    """A backend registered at run time; ``remove()``, or leaving a ``with`` block, takes it out again."""

    def __init__(self, registry: Registry, backend: Backend) -> None:
        self._registry = registry
        self.backend = backend

    def remove(self) -> None:
        """Take the backend out of the registry; a second call does nothing."""
        self._registry.remove(self.backend)

    def __enter__(self) -> Registration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"Registration({self.backend.name!r})"


registry = Registry()
os.register_at_fork(after_in_child=registry._after_fork)


def register(backend: Backend) -> Registration:
    """Register ``backend`` in this process; the handle that comes back has what was registered, a copy, and removes it again.

    Raises:
        TypeError: it is no Backend, or of a class derived from it.
        ValueError: its name is taken.
    """
    return Registration(registry, registry.register(backend))
