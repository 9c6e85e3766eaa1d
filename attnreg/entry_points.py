"""What installed distributions offer attnreg by their entry points; its own backends also where it is not installed."""

from __future__ import annotations

import os
import pkgutil
import sys
from collections.abc import Iterator
from importlib import metadata

# The group of backends.
BACKENDS = "attnreg"
# Where attnreg comes from that was not installed, as in an archive that Python runs, or a copy of the sources.
NOT_INSTALLED = "attnreg, not installed"


def entry_points(group: str) -> list[tuple[metadata.EntryPoint, str]]:
    """The entry points of ``group``, each with its distribution as "name version".

    Attnreg's own come first, so that nobody takes their names; the rest in an order that no file system decides.
    """

    def order(entry_point: metadata.EntryPoint) -> tuple[bool, str, str]:
        distribution = entry_point.dist.name if entry_point.dist else ""
        return distribution != "attnreg", distribution, entry_point.name

    found = [
        (each, f"{each.dist.name} {each.dist.version}" if each.dist else "unknown")
        for each in sorted(metadata.entry_points(group=group), key=order)
    ]
    if group != BACKENDS or any(each.dist is not None and each.dist.name == "attnreg" for each, _ in found):
        return found
    offered = {each.value for each, _ in found}
    return [*((each, NOT_INSTALLED) for each in _beside_attnreg() if each.value not in offered), *found]


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
