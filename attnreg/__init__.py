"""attnreg: one call for local (sliding-window) attention, and a door for backends."""

from __future__ import annotations

from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from attnreg import process as _process  # noqa: F401  # it has to be there when the process forks
from attnreg.asking import use_backend
from attnreg.backend import CONTRACT, Backend, BackendError, Capability
from attnreg.band import band_from_dense
from attnreg.dispatch import Decision
from attnreg.functional import local_attention, local_attention_with_lse, local_dot_product, local_weighted_average
from attnreg.inspection import BackendStatus, backends, explain
from attnreg.memory import empty_like
from attnreg.modules import LocalAttention
from attnreg.ops import NotDifferentiable
from attnreg.precision import allow_tf32
from attnreg.problem import Problem
from attnreg.registry import Registration, register, registry
from attnreg.window import Window

if _TYPE_CHECKING:
    from attnreg.hookspecs import hookimpl
    from attnreg.tuning.tune import tune

__all__ = [
    "CONTRACT",
    "Backend",
    "BackendError",
    "BackendStatus",
    "Capability",
    "Decision",
    "LocalAttention",
    "NotDifferentiable",
    "Problem",
    "Registration",
    "Window",
    "allow_tf32",
    "autotune",
    "backends",
    "band_from_dense",
    "empty_like",
    "explain",
    "hookimpl",
    "local_attention",
    "local_attention_with_lse",
    "local_dot_product",
    "local_weighted_average",
    "register",
    "reset",
    "tune",
    "use_backend",
]


def reset() -> None:
    """Forget every backend, fault, choice and setting; plug-ins and tables are looked for anew at the next need."""
    registry.reset()


def autotune(on: bool | None = True) -> None:
    """Let the first call of a kind that was never measured on this machine measure its candidates.

    That takes seconds, once. The times go into the user's table, as with ``attnreg tune``. Nothing is measured
    while a CUDA graph is captured, in a compiled region, under ``torch.use_deterministic_algorithms``, or where
    ``ATTNREG_TABLE`` pins a table.

    Args:
        on: True or False for this process; None leaves it to ``ATTNREG_AUTOTUNE`` again.

    Raises:
        TypeError: ``on`` is neither.
    """
    if on is not None and not isinstance(on, bool):
        raise TypeError(f"autotune: on must be True, False or None, got {on!r} ({type(on).__name__})")
    registry.set_autotune(on)


def _tune_on_first_use(problem: Problem) -> bool:
    # Who never tunes does not load what measures.
    from attnreg.tuning.autotune import tune_on_first_use

    return tune_on_first_use(problem)


registry.tuner = _tune_on_first_use


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


def __getattr__(name: str) -> _Any:
    # Only a plug-in needs pluggy, only who tunes the tuning, only a curious reader the version: no import pays for them.
    if name == "hookimpl":
        from attnreg.hookspecs import hookimpl

        return hookimpl
    if name == "tune":
        from attnreg.tuning.tune import tune

        return tune
    if name == "__version__":
        from attnreg.packages import own_version

        return own_version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
