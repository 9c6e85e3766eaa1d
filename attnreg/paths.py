"""Where attnreg keeps what it builds and measures."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """``ATTNREG_CACHE_DIR``, or ``attnreg`` in the user's cache directory as the platform has it."""
    given = os.environ.get("ATTNREG_CACHE_DIR")
    if given:
        return Path(given)
    try:
        from platformdirs import user_cache_path
    except ImportError:
        # Installed without its dependencies, attnreg still dispatches: on Linux this is the same folder.
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attnreg"
    return user_cache_path("attnreg", appauthor=False)
