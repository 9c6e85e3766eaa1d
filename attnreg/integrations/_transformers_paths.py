"""Which layer of a model runs where: a record that attention functions write while somebody asks."""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attnreg import BackendError, Decision
from attnreg.integrations._transformers_mask import BandMask, is_full, window_of

__all__ = ["LayerPath", "ModelPaths", "explain", "is_recorded", "record"]


@dataclass(frozen=True)
class LayerPath:
    """Where one layer runs.

    Attributes:
        name: the layer's name in the model.
        kind: what it sees: "window 128", "chunks of 8192", "window 64 + 1 + 64", "full" or "dense mask".
        path: "attnreg", "sdpa", "eager" or another implementation's name.
        decision: attnreg's choice of a backend; None where it does not run.
    """

    name: str
    kind: str
    path: str
    decision: Decision | None

    def __str__(self) -> str:
        backend = "" if self.decision is None else f" ({self.decision.backend})"
        return f"{self.name}: {self.kind}: {self.path}{backend}"


@dataclass(frozen=True)
class ModelPaths:
    """Where the layers of a model run, in the order of their calls."""

    layers: tuple[LayerPath, ...]

    def __str__(self) -> str:
        return "\n".join(str(layer) for layer in self.layers) or 'no layer ran on attn_implementation="attnreg"'


_LOG: ContextVar[list[tuple[nn.Module, str, str, Decision | None]] | None] = ContextVar("attnreg_layers", default=None)


def explain(model: nn.Module, *, batch: int = 1, length: int = 64, **inputs: Any) -> ModelPaths:
    """Run one forward, without gradients if the model is in eval mode, and say where each layer's attention ran.

    Args:
        model: a model of transformers with ``attn_implementation="attnreg"``, or a name registered beside it. It runs as it is,
            in its mode and on its device. A compiled model is asked for what it was compiled from.
        batch: how many sequences of tokens it gets.
        length: how many tokens each has.
        **inputs: the forward's arguments, instead of tokens that are all 1.

    Raises:
        ValueError: batch or length is less than 1, or tokens alone do not do for this model.
    """
    if batch < 1 or length < 1:
        raise ValueError(f"batch and length must be at least 1, got {batch} and {length}")
    model = getattr(model, "_orig_mod", model)
    are_given = bool(inputs)
    if not are_given:
        device = next(model.parameters()).device
        inputs = {"input_ids": torch.ones(batch, length, dtype=torch.long, device=device)}
    names = {module: name for name, module in model.named_modules()}
    token = _LOG.set([])
    try:
        with torch.set_grad_enabled(model.training and torch.is_grad_enabled()):
            model(**inputs)
        log = _LOG.get() or []
    except (AttributeError, TypeError, ValueError) as error:
        # What attnreg refuses is told already.
        if are_given or isinstance(error, BackendError) or str(error).startswith("attnreg"):
            raise
        raise ValueError(
            f"attnreg: explain gave {type(model).__name__} input_ids alone, and its forward failed ({error}); give explain what "
            f"the forward takes: explain(model, {_inputs_of(model)})"
        ) from error
    finally:
        _LOG.reset(token)
    return ModelPaths(tuple(LayerPath(names.get(module, "?"), kind, path, found) for module, kind, path, found in log))


# What models compute from, of which each has some.
_INPUTS = (
    *("input_ids", "decoder_input_ids", "pixel_values", "pixel_values_videos", "input_features", "input_values"),
    *("audio_codes", "hidden_states", "inputs_embeds"),
)


def _inputs_of(model: nn.Module) -> str:
    """The inputs that a model's forward takes, as arguments to write."""
    taken = inspect.signature(model.forward).parameters
    needed = [name for name, each in taken.items() if each.default is each.empty and each.kind is not each.VAR_KEYWORD]
    names = dict.fromkeys([*needed, *(name for name in _INPUTS if name in taken)])
    if "input_ids" in names:
        # Tokens and their embeddings are never given both.
        names.pop("inputs_embeds", None)
    return ", ".join(f"{name}=..." for name in names) or "..."


def is_recorded() -> bool:
    """Whether somebody asks."""
    return not torch.compiler.is_compiling() and _LOG.get() is not None


def record(module: nn.Module, mask: Any, path: str, decision: Decision | None = None) -> None:
    """A layer ran on a path, with a mask of whatever kind."""
    if not torch.compiler.is_compiling() and (log := _LOG.get()) is not None:
        kind = _kind(mask) if isinstance(mask, BandMask) else "full" if mask is None else "dense mask"
        log.append((module, kind, path, decision))


def _kind(mask: BandMask) -> str:
    if is_full(mask):
        return "full"
    if mask.chunk_size is not None:
        return f"chunks of {mask.chunk_size}"
    window = window_of(mask)
    return f"window {window.left} + 1 + {window.right}" if window.right else f"window {window.size}"
