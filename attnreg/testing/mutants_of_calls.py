"""Broken backends that disturb what is around a call, or are disturbed by it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnreg.backend import Backend
from attnreg.testing.mutant import (
    Changes,
    mutant,
    of_lengths,
    of_output,
)
from attnreg.window import Window


@mutant("repeatable", "the last bits are another time other ones")
def _last_bits_at_random(right: Backend) -> Changes:
    calls: list[int] = []

    def change(output: Tensor, *rest: Any) -> Tensor:
        calls.append(len(calls))
        return output * (1 + calls[-1] % 2 * 2 * torch.finfo(output.dtype).eps)

    return of_output(right, change)


@mutant("settings", "the number of threads is set and left so")
def _threads_left_set(right: Backend) -> Changes:
    def change(output: Tensor, *rest: Any) -> Tensor:
        torch.set_num_threads(torch.get_num_threads() % 2 + 1)
        return output

    return of_output(right, change)


@mutant("settings", "a random number is drawn from torch's generator")
def _draws_random_numbers(right: Backend) -> Changes:
    def change(output: Tensor, *rest: Any) -> Tensor:
        torch.rand(1)
        return output

    return of_output(right, change)


@mutant("refusals", "its own filter raises instead of giving a reason")
def _filter_that_raises(right: Backend) -> Changes:
    def refuse(problem: Any) -> str | None:
        raise ValueError(f"{problem.window.size} is odd") if problem.window.size % 2 else KeyError("even")

    return {"refuse": refuse}


@mutant("refusals", "its own filter answers with False")
def _filter_that_answers_false(right: Backend) -> Changes:
    return {"refuse": lambda problem: False if problem.head_dim == 16 else None}


@mutant("values", "its own filter refuses every call")
def _refuses_everything(right: Backend) -> Changes:
    return {"refuse": lambda problem: "not today"}


@mutant("values", "the process is ended where a window reaches into the future")
def _ends_the_process(right: Backend) -> Changes:
    def change(
        output: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, window: Window, given: Any
    ) -> Tensor:
        if window.right:
            raise SystemExit(0)
        return output

    return of_output(right, change)


@mutant("key_lengths", "key lengths are declared, and raise")
def _declares_more_than_it_can(right: Backend) -> Changes:
    def change(lengths: Tensor, most: int) -> Tensor:
        raise NotImplementedError("key_lengths")

    return of_lengths(right, change)


def _along_with(right: Backend, effect: Callable[[Tensor], object]) -> Changes:
    """Attention that has a side effect, ``effect(query)``."""

    def change(output: Tensor, lse: Tensor, query: Tensor, *rest: Any) -> Tensor:
        effect(query)
        return output

    return of_output(right, change)


@mutant("repeatable", "in float64, the last bits are another time other ones")
def _last_bits_at_random_in_float64(right: Backend) -> Changes:
    calls: list[int] = []

    def change(output: Tensor, *rest: Any) -> Tensor:
        calls.append(len(calls))
        return output * (1 + calls[-1] % 2 * 4e-16) if output.dtype == torch.float64 else output

    return of_output(right, change)


@mutant("settings", "torch's generator is seeded where tensors are in bfloat16")
def _seeds_in_bfloat16(right: Backend) -> Changes:
    return _along_with(right, lambda query: query.dtype == torch.bfloat16 and torch.manual_seed(0))


@mutant("settings", "an environment variable is set")
def _environment_left_set(right: Backend) -> Changes:
    return _along_with(right, lambda query: os.environ.__setitem__("ATTNREG_MUTANT", "here"))


@mutant("settings", "warnings are switched off")
def _warnings_switched_off(right: Backend) -> Changes:
    return _along_with(right, lambda query: warnings.simplefilter("ignore"))


@mutant("settings", "denormal numbers are flushed from here on")
def _denormal_numbers_flushed(right: Backend) -> Changes:
    return _along_with(right, lambda query: torch.set_flush_denormal(True))


@mutant("settings", "oneDNN is switched off")
def _one_dnn_switched_off(right: Backend) -> Changes:
    return _along_with(right, lambda query: torch.backends.mkldnn.set_flags(_enabled=False))


@mutant("settings", "autograd's anomaly mode is switched on")
def _anomaly_mode_switched_on(right: Backend) -> Changes:
    return _along_with(right, lambda query: torch.autograd.set_detect_anomaly(True))


@mutant("other_settings", "a number is made in torch's default dtype, and makes a difference")
def _default_dtype_matters(right: Backend) -> Changes:
    return of_output(right, lambda output, *rest: output * (1 + 1e-3 * (torch.tensor(0.0).dtype == torch.float64)))


@mutant("other_settings", "with more than two threads the last sequence is not computed")
def _threads_matter(right: Backend) -> Changes:
    def change(output: Tensor, *rest: Any) -> Tensor:
        if torch.get_num_threads() > 2:
            output[-1:] = 0
        return output

    return of_output(right, change)


@mutant("quiet", "every call prints a line")
def _prints(right: Backend) -> Changes:
    return _along_with(right, lambda query: print("attention"))


@mutant("quiet", "every call warns")
def _warns(right: Backend) -> Changes:
    return _along_with(right, lambda query: warnings.warn("a slow path", stacklevel=1))


@mutant("refusals", "what it needs of memory is asked for, and raises")
def _workspace_that_raises(right: Backend) -> Changes:
    def workspace(problem: Any) -> int:
        raise ValueError("workspace")

    return {"workspace": workspace}
