"""The library of ``csrc/cpu/``: compiled by the machine's C++ compiler once, or ahead of time, and loaded once."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from attnreg import extension
from attnreg.extension import NO_CXX, BuildError, Extension, Target, Unit, find_cxx
from attnreg.process import is_forked

# The kernels are compiled once for each instruction set; which ones run is chosen where they run.
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
    "-mprefer-vector-width=512",
)
_UNITS_OF_X86 = (Unit("isa_avx512.cpp", _AVX512), Unit("isa_avx2.cpp", _AVX2), Unit("isa_amx.cpp", _AVX512))

_MACHINE = platform.machine()
_PACKAGE = Path(__file__).resolve().parent

LIBRARY = Extension(
    name="attnreg_cpu",
    package=_PACKAGE,
    checkout=_PACKAGE.parents[1] / "csrc" / "cpu",
    # Those first that take the compiler longest.
    units=(
        *(_UNITS_OF_X86 if _MACHINE == "x86_64" else ()),
        Unit("isa_baseline.cpp"),
        Unit("library.cpp"),
    ),
    # Backward makes the very bits of the forward's scores: no compiler may fuse in one what it does not in the other.
    flags=("-O3", "-std=c++17", "-ffp-contract=off", "-shared", "-fPIC", "-fvisibility=hidden", "-Wl,--no-as-needed"),
    find_compiler=find_cxx,
    no_compiler=NO_CXX,
)

TARGET = Target(_MACHINE, (), _MACHINE)

OPS = (
    *("dot_product", "dot_product_backward", "weighted_average", "weighted_average_backward"),
    *("attention", "attention_backward", "plain_attention"),
)

_loaded: Any = None


def unavailable() -> str | None:
    """Why the backend cannot run on this machine, or None."""
    return LIBRARY.unavailable() if _loaded is None else None


def prepare() -> str | None:
    """Builds the library, if there is none, and loads it. Returns None, or the reason why that failed."""
    return extension.why_not(ops)


def ops() -> Any:
    """The ops of the library, which is built and loaded by the first call."""
    if _loaded is None:
        reason = unavailable()
        if reason is not None:
            raise BuildError(reason)
        load(LIBRARY.find((TARGET,)) or LIBRARY.build(TARGET))
    return _loaded


def load(library: Path) -> None:
    """Loads a built library.

    Raises:
        BuildError: it could not be loaded, is none of this backend, or lacks the kernels that ``ATTNREG_CPU_ISA`` names.
    """
    global _loaded
    if _loaded is None:
        extension.load(library)
        if not hasattr(torch.ops.attnreg_cpu, "choose_isa"):
            raise BuildError(f"{library} is no build of attnreg_cpu; without it, it is built anew")
        if is_forked():
            torch.ops.attnreg_cpu.compute_alone()
        choose_isa(os.environ.get("ATTNREG_CPU_ISA", ""))
        # One overload each, and what it calls in turn: a call need not look for it.
        overloads = {name: getattr(torch.ops.attnreg_cpu, name).default for name in OPS}
        _loaded = SimpleNamespace(**{name: getattr(overload, "_op", overload) for name, overload in overloads.items()})


def isas() -> tuple[str, ...]:
    """The instruction sets that the loaded library has kernels for and the processor has, the best one first."""
    return tuple(torch.ops.attnreg_cpu.isas().split())


def choose_isa(name: str) -> str:
    """Runs the kernels of this instruction set from now on, or of the best one where ``name`` is empty.

    Returns:
        Its name.

    Raises:
        BuildError: there are none.
    """
    if name and name not in isas():
        raise BuildError(f"ATTNREG_CPU_ISA={name!r}: it must be one of {', '.join(isas())} on this machine")
    chosen: str = torch.ops.attnreg_cpu.choose_isa(name)
    return chosen
