"""The CUDA library of ``csrc/cuda/``: compiled by nvcc for the GPUs that are there, or ahead of time, and loaded once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from attnreg import extension
from attnreg.extension import NO_NVCC, BuildError, Extension, Target, Unit, find_nvcc

# Built ahead of time for these; the last one also as PTX, which later GPUs compile for themselves.
PORTABLE_ARCHS = ("80", "90", "90+PTX")

_PACKAGE = Path(__file__).resolve().parent

LIBRARY = Extension(
    name="cublas_block",
    package=_PACKAGE,
    checkout=_PACKAGE.parents[1] / "csrc" / "cuda",
    units=(Unit("library.cu"),),
    flags=(
        "-O3",
        "-std=c++17",
        "-shared",
        "-Xcompiler=-fPIC,-fvisibility=hidden",
        "-DUSE_CUDA",
        "-Xlinker=--no-as-needed",
    ),
    find_compiler=find_nvcc,
    no_compiler=NO_NVCC,
)

_loaded: Any = None


def unavailable() -> str | None:
    """Why the backend cannot run on this machine, or None."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "torch has no CUDA device"
    return LIBRARY.unavailable() if _loaded is None else None


def prepare() -> str | None:
    """Builds the library, if there is no cached one, and loads it. Returns None, or the reason why that failed."""
    return extension.why_not(ops)


def ops() -> Any:
    """The ops of the library, which is built and loaded by the first call."""
    if _loaded is None:
        reason = unavailable()
        if reason is not None:
            raise BuildError(reason)
        present = target(_present_archs())
        load(LIBRARY.find((present, target(PORTABLE_ARCHS))) or LIBRARY.build(present))
    return _loaded


def load(library: Path) -> None:
    """Loads a built library; its ops take tensors of the CPU as well, for tests."""
    global _loaded
    if _loaded is None:
        extension.load(library)
        _loaded = torch.ops.attnreg_cublas


def target(archs: Sequence[str]) -> Target:
    """The target of a build for GPU architectures such as ``"90"`` or ``"90+PTX"``."""
    title = ", ".join(f"sm_{arch}" for arch in archs)
    return Target("-".join(archs), tuple(map(_gencode, archs)), title)


@cache
def _present_archs() -> tuple[str, ...]:
    capabilities = {torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())}
    return tuple(f"{major}{minor}" for major, minor in sorted(capabilities))


def _gencode(arch: str) -> str:
    number, _, ptx = arch.partition("+")
    code = "compute" if ptx else "sm"
    return f"-gencode=arch=compute_{number},code={code}_{number}"
