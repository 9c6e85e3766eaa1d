"""Where attnreg keeps what it builds and measures, and who may write there."""

from __future__ import annotations

import os
import stat
from pathlib import Path


class NoCacheDir(OSError):
    """There is no folder to keep anything in; the message says why, and what to do."""


def cache_dir() -> Path:
    """``ATTNREG_CACHE_DIR``, or ``attnreg`` in the user's cache directory as the platform has it.

    Raises:
        NoCacheDir: nothing says where that is.
    """
    given = os.environ.get("ATTNREG_CACHE_DIR")
    if given:
        return expanded(given, "ATTNREG_CACHE_DIR")
    try:
        from platformdirs import user_cache_path
    except ImportError:
        # Installed without its dependencies, attnreg still dispatches: on Linux this is the same folder.
        found = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "attnreg"
    else:
        try:
            found = user_cache_path("attnreg", appauthor=False)
        except (RuntimeError, KeyError, OSError) as error:
            raise _no_home(str(error)) from None
    # Without a home, "~" stays as it is: a folder of that name in whichever folder the program runs in is nobody's cache.
    if not found.is_absolute():
        raise _no_home(f"the user's cache directory would be {str(found)!r}, which is relative")
    return found


def expanded(path: str, name: str) -> Path:
    """A path that an environment variable gives, its ``~`` expanded.

    Raises:
        NoCacheDir: there is no such home directory.
    """
    try:
        return Path(path).expanduser()
    except (RuntimeError, KeyError) as error:
        raise NoCacheDir(f"{name} is {path!r}: {error}") from None


def make_private(folder: Path) -> None:
    """Make a folder, and those above it that are missing, for this user alone; one that is there is left as it is.

    Raises:
        OSError: it cannot be made.
    """
    missing = [folder]
    while not missing[-1].parent.exists():
        missing.append(missing[-1].parent)
    for each in reversed(missing):
        each.mkdir(mode=0o700, exist_ok=True)


def why_not_trusted(path: Path) -> str | None:
    """Why somebody else may have put code into a file; None where only this user or root can have.

    The file and its folder belong to one of these, and neither their group nor others may write them. Of the folders above,
    which may belong to a group, it is asked that not everybody may put another folder in this one's place.
    """
    try:
        real = path.resolve(strict=True)
        for each in (real, *real.parents):
            status = each.stat()
            if status.st_uid not in (0, os.geteuid()):
                return f"{each} belongs to another user (uid {status.st_uid})"
            others = stat.S_IWOTH if each not in (real, real.parent) else stat.S_IWOTH | stat.S_IWGRP
            # What lies in a sticky folder is its owner's, who was asked one step before.
            is_sticky = each != real and status.st_mode & stat.S_ISVTX
            if status.st_mode & others and not is_sticky:
                return f"others may write to {each} (mode {stat.S_IMODE(status.st_mode):04o})"
    except OSError as error:
        return f"{path} cannot be looked at: {error.strerror or error}"
    return None


def _no_home(reason: str) -> NoCacheDir:
    return NoCacheDir(f"there is no home directory to keep anything in ({reason}); set ATTNREG_CACHE_DIR to a folder")
