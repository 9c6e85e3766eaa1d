"""Builds the CUDA library with nvcc where it is first needed, and loads it.

The library uses torch's stable ABI and links against nothing of torch but the name of ``libtorch.so``: a build serves
every torch from 2.11 on and every Python. Builds lie in the user's cache directory, or in ``ATTNREG_CACHE_DIR``, under
a hash of sources and flags and the versions of compiler and GPU. A wheel may carry one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

# Built ahead of time for these; the last one also as PTX, which later GPUs compile for themselves.
PORTABLE_ARCHS = ("80", "90", "90+PTX")
FLAGS = (
    "-O3",
    "-std=c++17",
    "-shared",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-DUSE_CUDA",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    "-Xlinker=--no-as-needed",
    "-ltorch",
)


# Where a wheel carries a build for ``PORTABLE_ARCHS``.
PACKAGED = Path(__file__).parent / "lib"


class BuildError(RuntimeError):
    """The library could not be built or loaded; the message ends with the last lines of the compiler's output."""


def unavailable() -> str | None:
    """Why the backend cannot run on this machine, or None."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "torch has no CUDA device"
    if _loaded is None and find_nvcc() is None and not _any_build():
        return f"no nvcc found ($CUDACXX, $CUDA_HOME/bin, PATH, /usr/local/cuda/bin), and no build in {cache_dir()}"
    return None


def prepare() -> str | None:
    """Builds the library, if there is no cached one, and loads it. Returns None, or the reason why that failed."""
    try:
        ops()
    except (BuildError, OSError, subprocess.SubprocessError) as error:
        return str(error)
    return None


_loaded: Any = None


def ops() -> Any:
    """The ops of the library, which is built and loaded by the first call."""
    global _loaded
    if _loaded is None:
        reason = unavailable()
        if reason is not None:
            raise BuildError(reason)
        load(_cached(_present_archs(), find_nvcc()) or build(_present_archs()))
    return _loaded


def load(library: Path) -> None:
    """Loads a built library; its ops take tensors of the CPU as well, for tests."""
    global _loaded
    if _loaded is None:
        load_library: Callable[[str], None] = torch.ops.load_library
        try:
            load_library(str(library))
        except OSError as error:
            raise BuildError(f"{library} could not be loaded: {error.__cause__ or error}") from error
        _loaded = torch.ops.attnreg_cublas


def build(archs: Sequence[str], directory: Path | None = None) -> Path:
    """Compiles the library for GPU architectures such as ``"90"`` or ``"90+PTX"``; returns where it lies."""
    from filelock import FileLock

    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError("no nvcc found: set $CUDACXX or $CUDA_HOME, or put it on PATH")
    library = _library(archs, nvcc, directory or cache_dir())
    library.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{library}.lock"):
        if not library.exists():
            names = ", ".join(f"sm_{arch}" for arch in archs)
            print(
                f"attnreg: building cublas_block for {names} with {nvcc} (once; cached in {library.parent})",
                file=sys.stderr,
            )
            _compile(nvcc, archs, library)
    return library


def _compile(nvcc: str, archs: Sequence[str], library: Path) -> None:
    torch_root = Path(torch.__file__).parent
    # Built under another name and renamed, so that no process ever loads half a library.
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        unfinished = Path(scratch) / library.name
        command = [
            nvcc,
            *FLAGS,
            *map(_gencode, archs),
            f"-isystem={torch_root / 'include'}",
            f"-L{torch_root / 'lib'}",
            str(sources() / "library.cu"),
            f"-o={unfinished}",
        ]
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        if result.returncode != 0:
            last_lines = "\n".join(result.stdout.splitlines()[-20:])
            raise BuildError(f"building cublas_block failed: {' '.join(command)}\n{last_lines}")
        unfinished.replace(library)


def sources() -> Path:
    """The CUDA sources: beside this file in a wheel, ``csrc/`` at the root of a checkout."""
    installed = Path(__file__).parent / "csrc"
    return installed if installed.is_dir() else Path(__file__).resolve().parents[2] / "csrc"


def cache_dir() -> Path:
    """Where builds are kept: attnreg's cache directory."""
    # Not above: the wheel's build imports this module where attnreg is not installed yet.
    from attnreg.paths import cache_dir

    return cache_dir()


@cache
def find_nvcc() -> str | None:
    """The nvcc to build with, or None."""
    given = os.environ.get("CUDACXX")
    if given:
        return shutil.which(given)
    home = os.environ.get("CUDA_HOME")
    at_home = shutil.which("nvcc", path=f"{home}/bin") if home else None
    return at_home or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def _cached(archs: Sequence[str], nvcc: str | None) -> Path | None:
    """A finished build for these architectures or a portable one; by any compiler where there is none here, and in a wheel."""
    for target in (archs, PORTABLE_ARCHS):
        library = _library(target, nvcc, cache_dir())
        found = [library] if nvcc else sorted(library.parent.glob(library.name))
        for path in found:
            if path.exists():
                return path
    return packaged()


def packaged() -> Path | None:
    """The build that the wheel carried, if it did."""
    return next(iter(sorted(_directory(PACKAGED).glob("*.so"))), None)


def _any_build() -> bool:
    return packaged() is not None or any(_directory(cache_dir()).glob("*.so"))


def _library(archs: Sequence[str], nvcc: str | None, directory: Path) -> Path:
    compiler = _version(nvcc) if nvcc else "*"
    return _directory(directory) / f"nvcc-{compiler}-{'-'.join(archs)}.so"


def _directory(root: Path) -> Path:
    return root / "cublas_block" / _fingerprint()


@cache
def _fingerprint() -> str:
    """A hash of everything of ours that a build depends on."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sorted(sources().glob("*.cu*")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


@cache
def _version(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return text.rpartition(" V")[2].split()[0]


@cache
def _present_archs() -> tuple[str, ...]:
    capabilities = {torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())}
    return tuple(f"{major}{minor}" for major, minor in sorted(capabilities))


def _gencode(arch: str) -> str:
    number, _, ptx = arch.partition("+")
    code = "compute" if ptx else "sm"
    return f"-gencode=arch=compute_{number},code={code}_{number}"
