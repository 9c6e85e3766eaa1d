"""What pip builds attnreg with: setuptools, and where there is a compiler also what the libraries are compiled against.

A wheel carries them where they could be compiled. torch has the headers: that of the environment which pip installs into,
where it has one, else the release that ``constraints.txt`` names, which is fetched for the build alone. Every torch that
attnreg works with can load what was built.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

_ROOT = Path(__file__).parent
# What the build imports of attnreg, beyond torch.
_IMPORTED = ("filelock", "platformdirs", "pluggy")
_FIND_TORCH = """
from importlib import metadata, util
release = metadata.version("torch").split(".")
if (int(release[0]), int(release[1])) >= (2, 11):
    print(util.find_spec("torch").submodule_search_locations[0])
"""


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """The distributions that building a wheel needs here."""
    needed = build_meta.get_requires_for_build_wheel(config_settings)
    # Whatever arguments come behind it.
    given = os.environ.get("CXX", "").split()[:1]
    if not any(map(shutil.which, (*given, "g++", "clang++", "c++"))):
        return needed
    return [*needed, *_IMPORTED, *([] if torch_outside() else [_pinned_torch()])]


def build_wheel(wheel_directory: Any, config_settings: Any = None, metadata_directory: Any = None) -> str:
    """Build a wheel, with the torch that is outside where the build has none of its own."""
    outside = torch_outside()
    if outside and importlib.util.find_spec("torch") is None:
        # Last: what the build has been given goes first.
        sys.path.append(outside)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def torch_outside() -> str:
    """Where the environment of this Python has a torch that will do; "" if nowhere. ``-I``: pip hides it by PYTHONPATH."""
    found = subprocess.run([sys.executable, "-I", "-c", _FIND_TORCH], capture_output=True, text=True, check=False)
    return str(Path(found.stdout.strip()).parent) if found.stdout.strip() else ""


def _pinned_torch() -> str:
    """An unpinned torch may bring gigabytes of CUDA packages."""
    constraints = (_ROOT / "constraints.txt").read_text().splitlines()
    return next(line for line in constraints if line.startswith("torch=="))
