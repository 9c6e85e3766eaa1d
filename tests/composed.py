"""Backends that have the two products alone, so that their attention is composed."""

from __future__ import annotations

from dataclasses import replace

import attnreg
from attnreg import Backend


def composed(of: str, **changes: object) -> Backend:
    """The backend ``of`` without attention of its own, called "composed"."""
    (backend,) = (status.backend for status in attnreg.backends() if status.name == of)
    without = {"name": "composed", "local_attention": None, "local_attention_backward": None}
    capability = replace(backend.capability, takes={"bias", "key_lengths"})
    return replace(backend, **{**without, "capability": capability, **changes})
