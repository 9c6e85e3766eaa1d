"""The registered backends: found once through pluggy's entry points, or registered at run time."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from importlib import metadata
from types import TracebackType
from typing import Any

from attnreg.backend import Backend, why_not_prepared, with_options
from attnreg.composition import Function, complete
from attnreg.dispatch import Entry, Fault
from attnreg.request import parse_request


class Registry:
    """Backends by name, and the plug-ins that could not be used.

    Discovery runs once, at the first need. Every change replaces ``plans``, the dispatcher's memory of what it chose,
    so that no stale choice outlives it; a plan worked out meanwhile lands in the dictionary that was replaced.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.reset()

    def reset(self) -> None:
        """Forget every backend, fault and plan; plug-ins are discovered anew at the next need."""
        with self._lock:
            self._discovery = "due"
            self._tables: object = None
            self._autotune: bool | None = None
            self._prepared: set[str] = set()
            self._entries: dict[str, Entry] = {}
            self._faults: list[Fault] = []
            self._failed: dict[str, str] = {}
            self._functions: dict[str, dict[str, Function]] = {}
            self._changed()

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The registered backends in the order in which they came."""
        self._discover()
        return tuple(self._entries.values())

    @property
    def faults(self) -> tuple[Fault, ...]:
        """The plug-ins that could not be used, with their errors."""
        self._discover()
        return tuple(self._faults)

    @property
    def failed(self) -> dict[str, str]:
        """The backends whose preparation failed, by name, with the reason."""
        return dict(self._failed)

    def functions(self, request: str) -> dict[str, Function]:
        """The functions of a backend by name (``op`` and ``op_backward``), composed ones included, with its options.

        Raises:
            LookupError: no such backend is registered any more.
            ValueError: it does not take the options.
        """
        try:
            return self._functions[request]
        except KeyError:
            self._discover()
        asked = parse_request(request)
        with self._lock:
            entry = self._entries.get(asked.name)
            if entry is None:
                raise LookupError(f"backend {asked.name!r} is not registered (any more)")
            if request not in self._functions:
                self._functions[request] = complete(with_options(entry.backend, asked.options))
            return self._functions[request]

    def add(self, backend: Backend, distribution: str) -> None:
        """Register ``backend``.

        Raises:
            TypeError: it is no Backend.
            ValueError: its name is taken.
        """
        if not isinstance(backend, Backend):
            raise TypeError(f"a backend must be an attnreg.Backend, got {backend!r} ({type(backend).__name__})")
        with self._lock:
            taken = self._entries.get(backend.name)
            if taken is not None:
                raise ValueError(f"the name {backend.name!r} is taken by the backend of {taken.distribution}")
            self._entries[backend.name] = Entry(backend, distribution)
            self._changed()

    def remove(self, backend: Backend) -> None:
        """Take ``backend`` out again; nothing happens where it is not registered."""
        with self._lock:
            entry = self._entries.get(backend.name)
            if entry is not None and entry.backend is backend:
                del self._entries[backend.name]
                self._functions = {
                    request: functions
                    for request, functions in self._functions.items()
                    if parse_request(request).name != backend.name
                }
                self._failed.pop(backend.name, None)
                self._prepared.discard(backend.name)
                self._changed()

    def prepare(self, name: str) -> bool:
        """Prepare a backend for its first use. Where that fails it is refused, with the reason, from here on."""
        if name in self._prepared:
            return True
        # Under the lock: two threads must not build the same extension at once.
        with self._lock:
            entry = self._entries.get(name)
            if entry is None or name in self._failed:
                return False
            reason = why_not_prepared(entry.backend)
            if reason is not None:
                self._failed[name] = reason
                self._changed()
                return False
            self._prepared.add(name)
            return True

    def tables_are(self, stamp: object) -> None:
        """Drop every plan where the tables of measured times are not those that the plans were made by."""
        if stamp != self._tables:
            with self._lock:
                self._tables = stamp
                self._changed()

    @property
    def autotunes(self) -> bool:
        """Whether a call that was never measured is measured: as set, else as ``ATTNREG_AUTOTUNE`` says."""
        if self._autotune is not None:
            return self._autotune
        return os.environ.get("ATTNREG_AUTOTUNE", "") not in ("", "0")

    def set_autotune(self, on: bool | None) -> None:
        """Turn tuning on first use on or off; None leaves it to the environment."""
        with self._lock:
            self._autotune = on
            self._changed()

    def _renew_lock(self) -> None:
        """In a forked child: the thread that held the lock is not there to let it go."""
        self._lock = threading.RLock()

    def _changed(self) -> None:
        self.plans: dict[Any, Any] = {}

    def _discover(self) -> None:
        if self._discovery == "done":
            return
        with self._lock:
            # "running" is seen only by a plug-in that asks for backends while it is loaded: it gets those found so far.
            if self._discovery != "due":
                return
            self._discovery = "running"
            for entry_point in sorted(metadata.entry_points(group="attnreg"), key=_order):
                self._load(entry_point)
            self._discovery = "done"

    def _load(self, entry_point: metadata.EntryPoint) -> None:
        distribution = f"{entry_point.dist.name} {entry_point.dist.version}" if entry_point.dist else "unknown"

        def keep_fault(error: BaseException) -> None:
            self._faults.append(Fault(entry_point.name, distribution, f"{type(error).__name__}: {error}"))

        try:
            offered = False
            for backend in _offer(entry_point.load(), entry_point.name):
                offered = True
                try:
                    self.add(backend, distribution)
                except (TypeError, ValueError) as error:
                    keep_fault(error)
            if not offered:
                raise ValueError("attnreg_backends() yielded no backend")
        except (Exception, SystemExit) as error:
            keep_fault(error)


def _order(entry_point: metadata.EntryPoint) -> tuple[bool, str, str]:
    """Attnreg's own plug-ins first, so that nobody takes their names; the rest in an order that no file system decides."""
    distribution = entry_point.dist.name if entry_point.dist else ""
    return distribution != "attnreg", distribution, entry_point.name


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
        raise TypeError(f"attnreg_backends() must yield backends, it returned {type(offered).__name__}")
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
os.register_at_fork(after_in_child=registry._renew_lock)


def register(backend: Backend) -> Registration:
    """Register ``backend`` in this process; the handle that comes back removes it again.

    Raises:
        TypeError: it is no Backend.
        ValueError: its name is taken.
    """
    registry.entries  # noqa: B018 - discovery first: a plug-in's name is taken, whoever asks first
    registry.add(backend, "this process")
    return Registration(registry, backend)
