"""One call, described once: what the dispatcher chooses by. No tensor is kept.

The ``*_problem`` functions are the only place where a call's arguments are checked. Whatever they let pass, every
backend may rely on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnreg.window import Window

OPS = ("local_dot_product", "local_weighted_average", "local_attention")

KEY_LENGTH_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` -> ``"float32"``."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """The facts of one call that a backend can be chosen by; hashable.

    Attributes:
        op: one of ``attnreg.problem.OPS``.
        device: where the tensors are.
        dtype: of query, key, value and weights.
        batch, heads, kv_heads: N, H and Hkv.
        query_length, key_length: Lq and Lk.
        head_dim: E, the last dimension of query and key; 0 for ``local_weighted_average``.
        value_dim: D, the last dimension of value; 0 for ``local_dot_product``.
        window: the window of keys.
        bias_shape: None without a bias, else its four dimensions, 1 where it broadcasts.
        bias_dtype: None without a bias.
        has_key_lengths: whether the call gives key lengths.
        needs_grad: whether any gradient may be asked for.
    """

    op: str
    device: torch.device
    dtype: torch.dtype
    batch: int
    heads: int
    kv_heads: int
    query_length: int
    key_length: int
    head_dim: int
    value_dim: int
    window: Window
    bias_shape: tuple[int, ...] | None = None
    bias_dtype: torch.dtype | None = None
    has_key_lengths: bool = False
    needs_grad: bool = False

    def __str__(self) -> str:
        sizes = {
            "N": self.batch,
            "H": self.heads,
            "Hkv": self.kv_heads,
            "Lq": self.query_length,
            "Lk": self.key_length,
            "E": self.head_dim,
            "D": self.value_dim,
        }
        parts = [
            f"{self.op} on {self.device}, {dtype_name(self.dtype)}",
            " ".join(f"{name}={size}" for name, size in sizes.items() if (name, size) not in (("E", 0), ("D", 0))),
            f"{self.window}, W={self.window.size}",
        ]
        if self.bias_shape is not None and self.bias_dtype is not None:
            parts.append(f"bias {tuple(self.bias_shape)} {dtype_name(self.bias_dtype)}")
        if self.has_key_lengths:
            parts.append("key_lengths")
        parts.append("with gradients" if self.needs_grad else "forward only")
        return "; ".join(parts)


def dot_product_problem(
    query: Tensor,
    key: Tensor,
    window: Window,
    *,
    bias: Tensor | None = None,
    key_lengths: Tensor | None = None,
    needs_grad: bool = False,
) -> Problem:
    """Check the arguments of ``local_dot_product`` and describe the call.

    Raises:
        TypeError, ValueError: an argument is bad; the message names it, what it was and what was expected.
    """
    return _problem("local_dot_product", query, key, None, window, bias, key_lengths, needs_grad)


def weighted_average_problem(
    weights: Tensor,
    value: Tensor,
    window: Window,
    *,
    key_lengths: Tensor | None = None,
    needs_grad: bool = False,
) -> Problem:
    """Check the arguments of ``local_weighted_average`` and describe the call. Raises as ``dot_product_problem``."""
    check_window(window)
    _check_tensors(weights=weights, value=value)
    if weights.shape[3] != window.size:
        raise ValueError(
            f"weights: the last dimension must be the window's size, {window.size} for {window}, got shape "
            f"{_shape(weights)}; expected (N, H, Lq, {window.size})"
        )
    _check_batch_and_heads("weights", weights, "value", value)
    _check_key_lengths(key_lengths, weights.shape[0], weights.device)
    batch, heads, query_length, _ = weights.shape
    return Problem(
        op="local_weighted_average",
        device=weights.device,
        dtype=weights.dtype,
        batch=batch,
        heads=heads,
        kv_heads=value.shape[1],
        query_length=query_length,
        key_length=value.shape[2],
        head_dim=0,
        value_dim=value.shape[3],
        window=window,
        has_key_lengths=key_lengths is not None,
        needs_grad=needs_grad,
    )


def attention_problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window,
    *,
    bias: Tensor | None = None,
    key_lengths: Tensor | None = None,
    needs_grad: bool = False,
) -> Problem:
    """Check the arguments of ``local_attention`` and describe the call. Raises as ``dot_product_problem``."""
    return _problem("local_attention", query, key, value, window, bias, key_lengths, needs_grad)


def check_window(window: object) -> None:
    """Raise a TypeError unless ``window`` is a Window; for an int it says which two constructors there are."""
    if isinstance(window, Window):
        return
    if isinstance(window, int) and not isinstance(window, bool):
        raise TypeError(
            f"window: got the int {window}, which libraries read in different ways; say which keys are meant with "
            f"Window.causal({window}) ({window} keys, the query's own position the last) or Window.centered({window}) "
            f"({window} keys around it), or Window(left, right)"
        )
    raise TypeError(f"window must be an attnreg.Window, got {window!r} ({type(window).__name__})")


def check_scale(scale: object) -> float:
    """``scale`` as a float; a TypeError unless it is a real number, a ValueError unless it is finite."""
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a float, got {scale!r} ({type(scale).__name__})")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    return float(scale)


def prepare_key_lengths(key_lengths: Tensor, key_length: int) -> Tensor:
    """Key lengths as backends get them: contiguous, int32 or int64, and in range where that can be told.

    Raises:
        ValueError: a length lies outside 0..Lk; on an accelerator, where reading them would synchronise, none is read.
    """
    # A subclass may have no values: a fake tensor has none.
    if type(key_lengths) is Tensor and key_lengths.device.type == "cpu" and key_lengths.numel():
        lowest, highest = (int(bound) for bound in key_lengths.aminmax())
        if lowest < 0 or highest > key_length:
            at_fault = lowest if lowest < 0 else highest
            raise ValueError(f"key_lengths: every length must lie in 0..{key_length} (Lk), got {at_fault}")
    if key_lengths.dtype not in (torch.int32, torch.int64):
        key_lengths = key_lengths.long()
    return key_lengths.contiguous()


def _problem(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    window: Window,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    needs_grad: bool,
) -> Problem:
    check_window(window)
    if op == "local_dot_product":
        _check_tensors(query=query, key=key)
    else:
        _check_tensors(query=query, key=key, value=value)
    if query.shape[3] != key.shape[3]:
        raise ValueError(
            f"key: its head_dim must be query's, {query.shape[3]}; got query {_shape(query)} and key {_shape(key)}"
        )
    if query.shape[3] == 0:
        raise ValueError(f"query: head_dim must be at least 1, got shape {_shape(query)}")
    _check_batch_and_heads("query", query, "key", key)
    if value is not None and value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value: must agree with key in (N, Hkv, Lk), {_sizes(key.shape[:3])}; got shape {_shape(value)}"
        )
    batch, heads, query_length, head_dim = query.shape
    _check_bias(bias, (batch, heads, query_length, window.size), query.device)
    _check_key_lengths(key_lengths, batch, query.device)
    return Problem(
        op=op,
        device=query.device,
        dtype=query.dtype,
        batch=batch,
        heads=heads,
        kv_heads=key.shape[1],
        query_length=query_length,
        key_length=key.shape[2],
        head_dim=head_dim,
        value_dim=0 if value is None else value.shape[3],
        window=window,
        bias_shape=None if bias is None else (1,) * (4 - bias.dim()) + tuple(bias.shape),
        bias_dtype=None if bias is None else bias.dtype,
        has_key_lengths=key_lengths is not None,
        needs_grad=needs_grad,
    )


def _check_tensors(**tensors: Any) -> None:
    (first_name, first), *_ = tensors.items()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.layout is not torch.strided:
            raise TypeError(f"{name} must be a dense (strided) tensor, got layout {tensor.layout}")
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} must have four dimensions, (batch, heads, length, "
                f"{'window.size' if name == 'weights' else 'head_dim'}); got shape {_shape(tensor)}"
            )
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name} must have a floating-point dtype, got {tensor.dtype}")
        if tensor.dtype != first.dtype:
            raise TypeError(f"{name} must have {first_name}'s dtype, {first.dtype}; got {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(f"{name} must be on {first_name}'s device, {first.device}; got {tensor.device}")


def _check_batch_and_heads(first_name: str, first: Tensor, name: str, tensor: Tensor) -> None:
    if tensor.shape[0] != first.shape[0]:
        raise ValueError(
            f"{name}: its batch size must be {first_name}'s, {first.shape[0]}; got {first_name} {_shape(first)} "
            f"and {name} {_shape(tensor)}"
        )
    heads, kv_heads = first.shape[1], tensor.shape[1]
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(
            f"{name}: the number of query heads (H = {heads}) must be a multiple of the number of key/value heads "
            f"(Hkv = {kv_heads}); got {first_name} {_shape(first)} and {name} {_shape(tensor)}"
        )


def _check_bias(bias: Tensor | None, band: tuple[int, ...], device: torch.device) -> None:
    if bias is None:
        return
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias must be a torch.Tensor or None, got {type(bias).__name__}")
    if not bias.dtype.is_floating_point:
        hint = "; band_from_dense(mask, window) makes a bias of a boolean mask" if bias.dtype is torch.bool else ""
        raise TypeError(f"bias is added to the scores and must have a floating-point dtype, got {bias.dtype}{hint}")
    if bias.layout is not torch.strided:
        raise TypeError(f"bias must be a dense (strided) tensor, got layout {bias.layout}")
    if bias.device != device:
        raise ValueError(f"bias must be on query's device, {device}; got {bias.device}")
    shape = tuple(bias.shape)
    if len(shape) > 4 or any(size not in (1, full) for size, full in zip(reversed(shape), reversed(band))):
        raise ValueError(
            f"bias: shape {_shape(bias)} does not broadcast to (N, H, Lq, W) = {_sizes(band)}; each of its dimensions, "
            f"counted from the last, must be 1 or that size"
        )


def _check_key_lengths(key_lengths: Tensor | None, batch: int, device: torch.device) -> None:
    if key_lengths is None:
        return
    if not isinstance(key_lengths, Tensor):
        raise TypeError(f"key_lengths must be an integer torch.Tensor or None, got {type(key_lengths).__name__}")
    if key_lengths.dtype not in KEY_LENGTH_DTYPES:
        raise TypeError(f"key_lengths must have an integer dtype, got {key_lengths.dtype}")
    if tuple(key_lengths.shape) != (batch,):
        raise ValueError(f"key_lengths must have shape (N,) = ({batch},), got {_shape(key_lengths)}")
    if key_lengths.device != device:
        raise ValueError(f"key_lengths must be on query's device, {device}; got {key_lengths.device}")


def _shape(tensor: Tensor) -> str:
    return _sizes(tensor.shape)


def _sizes(sizes: Sequence[int]) -> str:
    return f"({', '.join(str(size) for size in sizes)}{',' if len(sizes) == 1 else ''})"
