"""torch's float32 matmul setting, read for backends that bring their own products."""

from __future__ import annotations

import torch


def allow_tf32() -> bool:
    """Whether torch allows TF32 in the float32 matrix products of a CUDA device.

    True after ``torch.set_float32_matmul_precision("high")`` (or "medium"), ``torch.backends.cuda.matmul.allow_tf32 = True``
    or ``torch.backends.cuda.matmul.fp32_precision = "tf32"``; False by default.
    """
    # The older getters raise once the newer setting was used; this one answers in every case.
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
