"""Which packages are installed."""

from __future__ import annotations

from importlib import metadata

from attnreg.memo import asked_once

# What a copy without metadata says: a version that others can parse.
NO_VERSION = "0+unknown"


@asked_once
def package_version(package: str) -> str | None:
    """The version of an installed package, without importing it; None where it is not, or its metadata cannot be read."""
    try:
        return metadata.version(package)
    # It is not there; or it is no name, or the metadata is broken, which raises what Python's version has for that.
    except Exception:
        return None


def own_version() -> str:
    """The version of attnreg; ``NO_VERSION`` for a copy of its source that nothing installed."""
    return package_version("attnreg") or NO_VERSION
