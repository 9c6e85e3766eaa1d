"""Which packages are installed."""

from __future__ import annotations

from importlib import metadata

from attnreg.memo import asked_once


@asked_once
def package_version(package: str) -> str | None:
    """The version of an installed package, without importing it; None where it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
