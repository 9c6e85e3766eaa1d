"""torch's float32 matmul settings, read for backends that bring their own products, and for the tables of what was measured."""

from __future__ import annotations

import torch


def allow_tf32() -> bool:
    """Whether torch allows TF32 in the float32 matrix products of a CUDA device.

    True after ``torch.set_float32_matmul_precision("high")`` (or "medium"), ``torch.backends.cuda.matmul.allow_tf32 = True``
    or ``torch.backends.cuda.matmul.fp32_precision = "tf32"``; False by default.
    """
    # The older getters raise once the newer setting was used; this one answers in every case.
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def reduced_precision(device_type: str) -> str | None:
    """In what less than float32 torch may compute float32 matrix products on such a device; None for nothing less.

    That is "tf32" on a CUDA device where :func:`allow_tf32` says so, and "tf32" or "bf16" for oneDNN on a CPU.
    """
    if device_type == "cuda":
        found = torch.backends.cuda.matmul.fp32_precision
    elif device_type == "cpu":
        found = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    else:
        return None
    return None if found in ("none", "ieee") else str(found)
