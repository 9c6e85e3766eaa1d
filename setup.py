"""What pyproject.toml cannot say: a wheel built where nvcc and torch are carries the CUDA library of ``cublas_block``.

torch is what the library is compiled against, so build without isolation for that: ``python -m build --wheel --no-isolation``.
Anywhere else the wheel holds the sources alone, and the library is built when it is first used.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


def carries_library() -> bool:
    """Whether the library can be compiled here."""
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("filelock") is None:
        return False
    sys.path.insert(0, str(ROOT / "backends"))
    from attnreg_cublas.build import find_nvcc

    return find_nvcc() is not None


class BuildWithLibrary(build_py):
    """Compiles the library into the package, beside its sources."""

    def run(self) -> None:
        """Build the package, then the library in it."""
        super().run()
        if self.editable_mode or not carries_library():
            return
        from attnreg_cublas.build import PACKAGED, PORTABLE_ARCHS, build

        library = build(PORTABLE_ARCHS, Path(self.build_lib) / "attnreg_cublas" / PACKAGED.name)
        Path(f"{library}.lock").unlink(missing_ok=True)


class WheelWithLibrary(bdist_wheel):
    """A wheel with the library is for this platform, though for every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """The tags of the wheel's name."""
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


class DistributionWithLibrary(Distribution):
    """Goes where packages for one platform go, if it carries the library."""

    def has_ext_modules(self) -> bool:
        """Whether there is anything compiled."""
        return carries_library()


setup(
    distclass=DistributionWithLibrary,
    cmdclass={"build_py": BuildWithLibrary, "bdist_wheel": WheelWithLibrary},
)
