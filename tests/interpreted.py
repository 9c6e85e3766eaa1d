"""Triton's interpreter in half its time, for the tests alone.

The interpreter replaces the functions of ``triton.language`` when a kernel is launched, and all of them again whenever the kernel
calls another jitted function: thousands of times a launch, and half its time. The second time changes nothing.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest


def run_faster(patch: pytest.MonkeyPatch) -> None:
    """A call of a jitted function replaces only what is not replaced already."""
    if find_spec("triton") is None:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    replace = interpreter._patch_lang

    @cache
    def languages(fn: Any) -> list[ModuleType]:
        return [module for module in (tl, tl.core) if any(value is module for value in fn.__globals__.values())]

    def replace_once(fn: Any) -> Any:
        if any(tl.core.is_builtin(module.load) for module in languages(fn)):
            return replace(fn)
        return interpreter._LangPatchScope()

    patch.setattr(interpreter, "_patch_lang", replace_once)
