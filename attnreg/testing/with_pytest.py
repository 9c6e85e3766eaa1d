"""Tests for pytest, of anybody's backend. The only module here that needs pytest."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch

from attnreg.backend import Backend
from attnreg.device import why_unusable
from attnreg.testing.case import Case, case_id
from attnreg.testing.conformance import chosen_properties, python_of, refused_of, unproven
from attnreg.testing.property import Property, Selection, examine, select
from attnreg.testing.subject import Subject, under_test, why_not_here


class NotTried(UserWarning):
    """Properties that do not apply to a backend: nothing is known of them."""


def conformance_tests(
    backend: str | Backend,
    *,
    device: str | torch.device = "cpu",
    quick: bool = False,
    properties: Iterable[str] | None = None,
) -> Callable[..., None]:
    """A test of all properties of a backend, for a test file.

    ``test_mine = conformance_tests("mine")`` is all that such a file needs.

    There is a test for each property and case. One more, ``not_tried``, warns of the properties that do not apply, and why: as
    those of gradients where a backend has none. It fails where nothing is known of the results, or of gradients that it has.
    Where the backend cannot run here, there is one that is skipped with the reason.

    Args:
        backend: a registered backend by name, with options or without; or a Backend, registered or not.
        device: where it is tested.
        quick: a fraction of the cases.
        properties: the names of those to try; None for all.

    Raises:
        LookupError: no such backend is registered.
        ValueError: a property is unknown, or the backend does not take the options.
    """
    on = torch.device(device)
    chosen = chosen_properties(properties)
    reason = why_unusable(on) if on.type != "cpu" else None
    reason = reason or why_not_here(backend, on)
    if reason is not None:
        parameters = [pytest.param(None, None, id="cannot run here", marks=pytest.mark.skip(reason=reason))]
        silent: list[str] = []
        missing: list[str] = []
    else:
        with under_test(backend, on) as subject:
            selections = {property: select(property, subject, quick=quick) for property in chosen}
            parameters, silent = _parameters(selections), _not_tried(subject, selections)
            reasons = {property.name: selection.reason for property, selection in selections.items()}
            missing = unproven(reasons, any(subject.has_gradients(op) for op in subject.ops))

    @pytest.mark.parametrize(("property", "case"), parameters)
    def test(property: Property | None, case: Case | None) -> None:
        if property is None or case is None:
            for reason in silent:
                warnings.warn(NotTried(reason), stacklevel=1)
            if missing:
                raise AssertionError("\n".join(missing))
            return
        with under_test(backend, on) as subject:
            failure = examine(property, subject, case)
        if failure is not None:
            lines = "\n".join(python_of(failure, subject.title))
            raise AssertionError(f"{property.says}; but {failure.fault}\n\n{lines}") from failure.error

    return test


def _parameters(selections: Mapping[Property, Selection]) -> list[Any]:
    parameters = [
        pytest.param(property, case, id=f"{property.name}-{case_id(case)}")
        for property, selection in selections.items()
        for case in selection.cases
    ]
    return [*parameters, pytest.param(None, None, id="not_tried")]


def _not_tried(subject: Subject, selections: Mapping[Property, Selection]) -> list[str]:
    silent = [
        f"{property.name} was not tried: {selection.reason}"
        for property, selection in selections.items()
        if selection.reason is not None
    ]
    silent += [f"forward only: it has no gradients of {op}" for op in subject.ops if not subject.has_gradients(op)]
    refused = refused_of(selections)
    return silent if refused is None else [*silent, refused]
