"""What installed distributions offer attnreg by their entry points; its own backends also where it is not installed."""

from __future__ import annotations

import os
import pkgutil
import sys
from collections.abc import Callable, Iterator
from importlib import metadata

from attnreg.printable import printable, told

# The group of backends.
BACKENDS = "attnreg"
# Where attnreg comes from that was not installed, as in an archive that Python runs, or a copy of the sources.
NOT_INSTALLED = "attnreg, not installed"
# What metadata does not say.
UNKNOWN = "unknown"

# Gets an entry point's name, its distribution, and what is wrong with that.
KeepFault = Callable[[str, str, str], object]


def entry_points(group: str, keep_fault: KeepFault = lambda *_: None) -> list[tuple[metadata.EntryPoint, str]]:
    """The entry points of ``group``, each with its distribution as "name version", or "unknown" where its metadata is broken.

    Attnreg's own come first, so that nobody takes their names; the rest in an order that no file system decides.
    """
    named = []
    for each in metadata.entry_points(group=group):
        name, version, wrong = _said_of(each.dist)
        if wrong is not None:
            keep_fault(each.name, name, wrong)
        named.append((name, each, name if name == UNKNOWN else f"{name} {version}"))
    named.sort(key=lambda each: (each[0] != "attnreg", each[0], each[1].name))
    found = [(entry_point, distribution) for _, entry_point, distribution in named]
    if group != BACKENDS or any(name == "attnreg" for name, *_ in named):
        return found
    offered = {entry_point.value for entry_point, _ in found}
    return [*((each, NOT_INSTALLED) for each in _beside_attnreg() if each.value not in offered), *found]


def _said_of(distribution: metadata.Distribution | None) -> tuple[str, str, str | None]:
    """A distribution's name and version, and what is wrong with its metadata, if anything."""
    if distribution is None:
        return UNKNOWN, UNKNOWN, None
    try:
        said = distribution.metadata
        name, version = (printable(said[key] or UNKNOWN) for key in ("Name", "Version"))
    except Exception as error:
        return UNKNOWN, UNKNOWN, f"its metadata cannot be read: {told(error)}"
    return name, version, "its metadata lacks a name or a version" if UNKNOWN in (name, version) else None


def _beside_attnreg() -> Iterator[metadata.EntryPoint]:
    """The backends that lie beside attnreg, installed or not: packages ``attnreg_*`` with a module ``plugin``."""
    own = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    folders = [path for path in sys.path if path and os.path.abspath(path) in (own, os.path.join(own, "backends"))]
    for package in sorted(pkgutil.iter_modules(folders), key=lambda each: each.name):
        spec = package.module_finder.find_spec(package.name, None) if package.name.startswith("attnreg_") else None
        if spec is None or spec.submodule_search_locations is None:
            continue
        if any(module.name == "plugin" for module in pkgutil.iter_modules(spec.submodule_search_locations)):
            name = package.name.removeprefix("attnreg_")
            yield metadata.EntryPoint(name=name, value=f"{package.name}.plugin", group=BACKENDS)
