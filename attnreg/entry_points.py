"""What installed distributions offer attnreg by their entry points."""

from __future__ import annotations

from importlib import metadata


def entry_points(group: str) -> list[tuple[metadata.EntryPoint, str]]:
    """The entry points of ``group``, each with its distribution as "name version".

    Attnreg's own come first, so that nobody takes their names; the rest in an order that no file system decides.
    """

    def order(entry_point: metadata.EntryPoint) -> tuple[bool, str, str]:
        distribution = entry_point.dist.name if entry_point.dist else ""
        return distribution != "attnreg", distribution, entry_point.name

    return [
        (each, f"{each.dist.name} {each.dist.version}" if each.dist else "unknown")
        for each in sorted(metadata.entry_points(group=group), key=order)
    ]
