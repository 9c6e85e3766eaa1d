"""attnreg: one call for local (sliding-window) attention, and a door for backends."""

from __future__ import annotations

from importlib import metadata as _metadata
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from attnreg.backend import Backend, BackendError, Capability
from attnreg.band import band_from_dense
from attnreg.dispatch import Decision
from attnreg.functional import local_attention, local_dot_product, local_weighted_average
from attnreg.inspection import BackendStatus, backends, explain
from attnreg.modules import LocalAttention
from attnreg.plan import use_backend
from attnreg.precision import allow_tf32
from attnreg.problem import Problem
from attnreg.registry import Registration, register, registry
from attnreg.window import Window

if _TYPE_CHECKING:
    from attnreg.hookspecs import hookimpl
    from attnreg.tuning.tune import tune

__all__ = [
    "Backend",
    "BackendError",
    "BackendStatus",
    "Capability",
    "Decision",
    "LocalAttention",
    "Problem",
    "Registration",
    "Window",
    "allow_tf32",
    "backends",
    "band_from_dense",
    "explain",
    "hookimpl",
    "local_attention",
    "local_dot_product",
    "local_weighted_average",
    "register",
    "reset",
    "tune",
    "use_backend",
]


def reset() -> None:
    """Forget every backend, fault and choice; plug-ins are discovered anew at the next need."""
    registry.reset()


def __getattr__(name: str) -> _Any:
    # Only a plug-in needs pluggy, only who tunes the tuning, only a curious reader the version: no import pays for them.
    if name == "hookimpl":
        from attnreg.hookspecs import hookimpl

        return hookimpl
    if name == "tune":
        from attnreg.tuning.tune import tune

        return tune
    if name == "__version__":
        return _metadata.version("attnreg")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
