"""What is true of a call, how far a result may be from it, and the kit that proves a backend: ``docs/testing.md``.

``oracle`` writes the ops down densely, with ``placing`` of rows and ``philox`` for dropout; ``budget`` says which error passes;
``inputs`` makes the tensors of a call; ``checking`` compares a contender's results; ``stage`` is what contenders for one call
share. Tuning, the benchmarks and the tests all judge by these.

The kit stands on them. A ``case`` is a Problem with a few facts; ``cases`` is the table of them; ``subject`` is a backend under
test, watched while it is called; a ``property`` is tried with cases that the backend declares (``about_values``,
``about_rows``, ``about_softmax``, ``about_memory``, ``about_calls``); ``conformance`` tries them all, ``shrinking`` finds the
smallest call that breaks one, ``with_pytest`` makes tests of them. ``mutants`` are broken backends that the kit must find.

Apart from these, ``audit`` measures which window the layers of any model really have: ``docs/audit.md``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnreg.testing.audit import audit_window
    from attnreg.testing.case import Case, make_case
    from attnreg.testing.conformance import check_case, conform
    from attnreg.testing.with_pytest import conformance_tests

__all__ = ["Case", "audit_window", "check_case", "conform", "conformance_tests", "make_case"]

# Tuning needs the oracle alone: neither pytest nor the kit is loaded before one of these is asked for.
_MODULES = {
    "Case": "case",
    "audit_window": "audit",
    "check_case": "conformance",
    "conform": "conformance",
    "conformance_tests": "with_pytest",
    "make_case": "case",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
