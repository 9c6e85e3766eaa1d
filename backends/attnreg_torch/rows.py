"""The arguments of rows, as every op's functions get them: which of them a call gives."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar

from torch import Tensor

from attnreg.op import ROWS_OF_CALL

OF_ROWS = tuple(row.name for row in ROWS_OF_CALL)

# Those that a call gives, by name.
Given: TypeAlias = Mapping[str, Tensor]

Function = TypeVar("Function", bound=Callable[..., Any])


def given(rows: Mapping[str, Tensor | None]) -> Given:
    """Those that are not None."""
    return {name: tensor for name, tensor in rows.items() if tensor is not None}


def naming_rows(function: Function) -> Function:
    """Let a function's signature name the arguments that it takes as ``**rows``: attnreg reads there what a backend takes."""
    signature = inspect.signature(function)
    *named, rows = signature.parameters.values()
    of_rows = [rows.replace(name=name, kind=rows.KEYWORD_ONLY, default=None) for name in OF_ROWS]
    function.__dict__["__signature__"] = signature.replace(parameters=[*named, *of_rows])
    return function
