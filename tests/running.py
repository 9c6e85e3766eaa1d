"""Which backends run where, as pytest parameters; one that cannot run here is skipped with its own reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnreg

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def runs(*dtypes: torch.dtype) -> list[Any]:
    """Parameters (backend, device, dtype): every backend on every device and dtype that it takes, or of those given."""
    parameters = []
    for device in ("cpu", "cuda"):
        for status in attnreg.backends():
            if status.backend is None:
                continue
            capability = status.backend.capability
            for dtype in dtypes or DTYPES:
                if dtype in capability.dtypes and (capability.devices is None or device in capability.devices):
                    parameters.append(_parameter(status, device, dtype))
    return parameters


def _parameter(status: attnreg.BackendStatus, device: str, dtype: torch.dtype) -> Any:
    marks = []
    if device == "cuda":
        marks.append(pytest.mark.gpu)
        if not torch.cuda.is_available():
            marks.append(pytest.mark.skip(reason="needs a CUDA device"))
    if status.reason is not None:
        marks.append(pytest.mark.skip(reason=f"{status.name}: {status.reason}"))
    name = f"{status.name}-{device}-{str(dtype).removeprefix('torch.')}"
    return pytest.param(status.name, device, dtype, marks=marks, id=name)
