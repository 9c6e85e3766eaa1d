"""Where attnreg keeps what it builds and measures, and who may write there."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from attnreg.printable import printable

# So many symbolic links Linux follows for one path.
_MOST_LINKS = 40
# Characters of a path in a message.
_MOST_SHOWN = 120


class NoCacheDir(OSError):
    """There is no folder to keep anything in; the message says why, and what to do."""


def cache_dir() -> Path:
    """``ATTNREG_CACHE_DIR``, or ``attnreg`` in the user's cache directory as the platform has it; always a whole path.

    Raises:
        NoCacheDir: nothing says where that is, or there can be no such folder.
    """
    given = os.environ.get("ATTNREG_CACHE_DIR")
    found = expanded(given, "ATTNREG_CACHE_DIR") if given else _default_cache_dir()
    reason = why_nowhere(found)
    # It would be another folder wherever the program goes, and libraries would be loaded from whichever that is.
    if reason is None and not found.is_absolute():
        reason = "a relative path"
    if reason is not None:
        where = f"ATTNREG_CACHE_DIR={shown(found)}" if given else f"the cache directory would be {shown(found)}"
        raise NoCacheDir(
            f"{where}: {reason}; set {'it' if given else 'ATTNREG_CACHE_DIR'} to the whole path of a folder"
        )
    return found


def _default_cache_dir() -> Path:
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


def why_nowhere(path: Path) -> str | None:
    """Why no folder can have that name, or None: it is too long, or a link on the way leads nowhere."""
    for each in (path, *path.parents):
        try:
            os.stat(each)
        except (FileNotFoundError, NotADirectoryError) as error:
            if isinstance(error, FileNotFoundError) and each.is_symlink():
                return f"{shown(each)} is a symbolic link to {shown(Path(os.readlink(each)))}, which is not there"
        except PermissionError:  # told to whoever makes it, or writes into it
            return None
        except OSError as error:
            return error.strerror or str(error)
        else:
            return None
    return None


def make_private(folder: Path) -> None:
    """Make a folder for this user alone, as :func:`make_folder` does."""
    make_folder(folder, 0o700)


def make_folder(folder: Path, mode: int) -> None:
    """Make a folder, and those above it that are missing, with this mode; one that is there is left as it is.

    Raises:
        OSError: it cannot be made; a NoCacheDir where something is in the way.
    """
    reason = why_nowhere(folder)
    if reason is None:
        there = next((each for each in (folder, *folder.parents) if each.exists()), None)
        reason = None if there is None or there.is_dir() else f"{shown(there)} is no folder"
    if reason is not None:
        raise NoCacheDir(f"{shown(folder)} cannot be made: {reason}")
    missing = [folder]
    while not missing[-1].parent.exists():
        missing.append(missing[-1].parent)
    for each in reversed(missing):
        each.mkdir(mode=mode, exist_ok=True)


def why_not_trusted(path: Path) -> str | None:
    """Why somebody else may have put code into a file, or in its place; None where only this user or root can have.

    The file and its folder belong to one of these, and neither their group nor others may write them; so does a symbolic link
    in the file's place, and its folder. Of the folders above, and of those in which links on the way lie, which may belong to a
    group, it is asked that not everybody may put something else in the place of what lies in them.
    """
    try:
        for each, is_last in _on_the_way(path):
            status = each.lstat()
            if status.st_uid not in (0, os.geteuid()):
                return f"{each} belongs to another user (uid {status.st_uid})"
            if stat.S_ISLNK(status.st_mode):  # anybody may write those, and nobody can
                continue
            others = stat.S_IWOTH | stat.S_IWGRP if is_last else stat.S_IWOTH
            # What lies in a sticky folder is its owner's, who is asked one step later.
            is_sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
            if status.st_mode & others and not is_sticky:
                return f"others may write to {each} (mode {stat.S_IMODE(status.st_mode):04o})"
    except OSError as error:
        return f"{path} cannot be looked at: {error.strerror or error}"
    return None


def _on_the_way(path: Path) -> Iterator[tuple[Path, bool]]:
    """Every folder and symbolic link that is passed on the way to a file, and the file.

    With each comes whether it is the file, or a link in its place, or the folder that holds one of these.

    Raises:
        OSError: there is no such file.
    """
    links, here = 0, Path("/")
    parts = list(reversed(path.absolute().parts[1:]))
    while parts:
        part = parts.pop()
        found = here / part
        if part == "..":
            here = here.parent
        elif not stat.S_ISLNK(found.lstat().st_mode):
            yield here, False
            here = found
        else:
            links += 1
            if links > _MOST_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            yield here, not parts
            yield found, not parts
            target = Path(os.readlink(found))
            if target.is_absolute():
                here = Path("/")
            parts += reversed(target.parts[1:] if target.is_absolute() else target.parts)
    yield here.parent, True
    yield here, True


def shown(path: Path) -> str:
    """A path for a message, without its middle where it is long: a reason stands after it."""
    text, half = str(path), _MOST_SHOWN // 2
    parts = (text,) if len(text) <= _MOST_SHOWN else (text[:half], text[-half:])
    return "...".join(printable(part, 10 * _MOST_SHOWN) for part in parts)


def _no_home(reason: str) -> NoCacheDir:
    return NoCacheDir(f"there is no home directory to keep anything in ({reason}); set ATTNREG_CACHE_DIR to a folder")
