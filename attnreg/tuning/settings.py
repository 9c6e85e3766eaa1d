"""The settings of torch under which candidates are measured: a table says which, so they are the same in every process.

Threads and the precision of float32 products are those of the process that tunes; what else may be set where it tunes, such as
``no_grad`` or autocast, has no part in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from attnreg.ops import without_autocast

_MATMULS = {"cuda": torch.backends.cuda.matmul, "cpu": torch.backends.mkldnn.matmul}  # type: ignore[attr-defined]


def settings() -> dict[str, Any]:
    """This process' settings, for another one, as JSON."""
    found: dict[str, Any] = {"threads": torch.get_num_threads()}
    # Torch does not answer in its older way where only its newer one says what is set.
    with suppress(RuntimeError):
        found["float32"] = torch.get_float32_matmul_precision()
    return {**found, "matmul": {device: matmul.fp32_precision for device, matmul in _MATMULS.items()}}


def take_over(given: dict[str, Any]) -> None:
    """Make another process' settings this one's, in the ways in which they were made there: libraries ask in both."""
    now = settings()
    if now["threads"] != given["threads"]:
        torch.set_num_threads(given["threads"])
    if "float32" in given and now.get("float32") != given["float32"]:
        torch.set_float32_matmul_precision(given["float32"])
    for device, precision in given["matmul"].items():
        if _MATMULS[device].fp32_precision != precision:
            _MATMULS[device].fp32_precision = precision


@contextmanager
def of_its_own(device: torch.device) -> Iterator[None]:
    """What is run in such a block runs as if nothing stood around it: no ``no_grad``, no ``inference_mode``, no autocast."""
    with torch.inference_mode(False), torch.enable_grad(), without_autocast(device.type):
        yield
