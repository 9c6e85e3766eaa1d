"""What pyproject.toml cannot say: a wheel built where torch and a compiler are carries the libraries of backends.

Where there is none the wheel holds the sources alone, and a library is built when it is first used.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

if TYPE_CHECKING:
    from attnreg.extension import Extension, Target

ROOT = Path(__file__).parent
# What building imports beyond setuptools.
NEEDED = ("filelock", "platformdirs", "pluggy", "torch")


def compiled() -> list[tuple[str, Extension, Target]]:
    """The libraries that can be compiled here: the package that carries each, the library, and what it is built for."""
    if any(importlib.util.find_spec(name) is None for name in NEEDED):
        return []
    sys.path[:0] = [str(ROOT), str(ROOT / "backends")]
    from attnreg_cpu import build as cpu
    from attnreg_cublas import build as cublas

    libraries = [
        ("attnreg_cpu", cpu.LIBRARY, cpu.TARGET),
        ("attnreg_cublas", cublas.LIBRARY, cublas.target(cublas.PORTABLE_ARCHS)),
    ]
    return [each for each in libraries if each[1].find_compiler() is not None]


class BuildWithLibraries(build_py):
    """Compiles the libraries into their packages, beside their sources."""

    def run(self) -> None:
        """Build the packages, then the libraries in them."""
        super().run()
        if self.editable_mode:
            return
        libraries = compiled()
        if not libraries:
            return
        from attnreg.extension import BuildError

        for package, library, target in libraries:
            folder = Path(self.build_lib) / package / "lib"
            try:
                built = library.build(target, folder)
            except (BuildError, OSError) as error:
                # The rest of the package serves without it, and the first use builds again and says why not.
                print(f"attnreg: the wheel is built without {package}'s library: {error}", file=sys.stderr)
                shutil.rmtree(folder, ignore_errors=True)
            else:
                Path(f"{built}.lock").unlink(missing_ok=True)


class WheelWithLibraries(bdist_wheel):
    """A wheel with libraries is for this platform, though for every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """The tags of the wheel's name."""
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


class DistributionWithLibraries(Distribution):
    """Goes where packages for one platform go, if it carries libraries."""

    def has_ext_modules(self) -> bool:
        """Whether there is anything compiled."""
        return bool(compiled())


setup(
    distclass=DistributionWithLibraries,
    cmdclass={"build_py": BuildWithLibraries, "bdist_wheel": WheelWithLibraries},
)
