"""Torch's and the process' settings: what they are, and calls under those with which the kit was loaded."""

from __future__ import annotations

import gc
import os
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Setting:
    """Something that holds for all of a process, or of a thread.

    Attributes:
        now: what it is.
        put: makes it that.
    """

    now: Callable[[], Any]
    put: Callable[[Any], object]


def _flushes_denormal() -> bool:
    # Torch tells nobody.
    return float(torch.tensor(1e-310, dtype=torch.float64) * 1.0) == 0.0


def _put_environment(wanted: Mapping[str, str]) -> None:
    for name in os.environ.keys() - wanted.keys():
        del os.environ[name]
    os.environ.update(wanted)


def _put_filters(wanted: list[Any]) -> None:
    warnings.filters[:] = wanted  # type: ignore[index]
    warnings._filters_mutated()  # type: ignore[attr-defined]


def _put_collection(wanted: bool) -> None:
    (gc.enable if wanted else gc.disable)()


SETTINGS: Mapping[str, Setting] = {
    "the number of threads": Setting(torch.get_num_threads, torch.set_num_threads),
    "the default dtype": Setting(torch.get_default_dtype, torch.set_default_dtype),
    "the precision of float32 products": Setting(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
    ),
    "gradient mode": Setting(torch.is_grad_enabled, lambda wanted: torch._C._set_grad_enabled(wanted)),
    "autocast on the CPU": Setting(
        lambda: torch.is_autocast_enabled("cpu"), lambda wanted: torch.set_autocast_enabled("cpu", wanted)
    ),
    "deterministic algorithms": Setting(
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda wanted: torch.use_deterministic_algorithms(wanted[0], warn_only=wanted[1]),
    ),
    "flushing of denormal numbers": Setting(_flushes_denormal, torch.set_flush_denormal),
    "anomaly mode": Setting(torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "oneDNN": Setting(torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled),
    "the environment": Setting(lambda: dict(os.environ), _put_environment),
    "the filters of warnings": Setting(lambda: list(warnings.filters), _put_filters),
    "the collection of garbage": Setting(gc.isenabled, _put_collection),
}
_AT_FIRST = {name: setting.now() for name, setting in SETTINGS.items()}


@contextmanager
def left_as_found() -> Iterator[None]:
    """Whatever a backend does to these settings is undone: the next property must not suffer for it."""
    found = {name: setting.now() for name, setting in SETTINGS.items()}
    try:
        yield
    finally:
        for name, setting in SETTINGS.items():
            if setting.now() != found[name]:
                setting.put(found[name])


@contextmanager
def as_at_first() -> Iterator[None]:
    """The settings with which the kit was loaded: what an earlier call has left behind would hide that each call does so."""
    with left_as_found():
        for name, setting in SETTINGS.items():
            if setting.now() != _AT_FIRST[name]:
                setting.put(_AT_FIRST[name])
        yield


@contextmanager
def other_random_numbers() -> Iterator[None]:
    """Generators as nobody has left them, not even a call that seeds them."""
    before, python = torch.get_rng_state(), random.getstate()
    torch.rand(1)
    random.random()
    try:
        yield
    finally:
        torch.set_rng_state(before)
        random.setstate(python)


def state(device: torch.device) -> dict[str, Any]:
    """The settings, and the states of generators."""
    found = {name: setting.now() for name, setting in SETTINGS.items()}
    found["the default device"] = torch.get_default_device()
    found["torch's generator"] = torch.get_rng_state()
    found["Python's generator"] = random.getstate()
    if device.type == "cuda":
        found["autocast"] = torch.is_autocast_enabled("cuda")
        found["the current device"] = torch.cuda.current_device()
        found["the current stream"] = torch.cuda.current_stream()
        found["the device's generator"] = torch.cuda.get_rng_state(device)
    return found


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """The first of these that is another one; None where all are the same."""
    for name, value in before.items():
        same = torch.equal(value, after[name]) if isinstance(value, Tensor) else value == after[name]
        if not same:
            return name
    return None
