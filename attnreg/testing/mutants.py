"""Broken backends, each made from a right one by a small change, and the property that must find it.

They are the test of the kit: a fault that none of its properties finds is a hole in it. They are published so that another
kit, or another right backend, can be tried with the same faults: ``mutant.of(backend)`` for one that has all three ops, their
gradients, and takes all optional arguments.
"""

from __future__ import annotations

from attnreg.testing import (  # noqa: F401  each adds its own
    mutants_of_calls,
    mutants_of_gradients,
    mutants_of_memory,
    mutants_of_numbers,
    mutants_of_rows,
    mutants_of_softmax,
    mutants_of_state,
)
from attnreg.testing.mutant import MUTANTS, Mutant

__all__ = ["MUTANTS", "Mutant"]
