"""fast-transformers' local attention: its ``local_product`` functions and its ``LocalAttention``, computed by attnreg.

Names, order of arguments, layouts and masks are fast-transformers'. Its ``local_context`` keys around a query are
``Window.centered(local_context)``, and the *first* query stands at the first key where there are more keys than queries, or
fewer. Its CUDA kernel gives a wrong gradient of the keys for every window of 2 or more; the one here is right.

fast-transformers need not be installed. It is imported by ``install``, and where a module is told which event dispatcher to keep.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from operator import index
from typing import Any

import torch
from torch import Tensor, nn

import attnreg
from attnreg import Window

__all__ = [
    "Installation",
    "LocalAttention",
    "install",
    "local_dot_backward",
    "local_dot_product",
    "local_weighted_average",
    "local_weighted_average_backward",
]

# What the band of scores holds where there is no key, and what fast-transformers' masks add to hide one.
_NO_KEY = -1e24
# A mask hides what it adds this to, or less: 16 bits round the number above.
_HIDES = -1e23


# The products


def local_dot_product(
    queries: Tensor, keys: Tensor, attn_mask: Tensor, key_lengths: Tensor, local_context: int
) -> Tensor:
    """The scores of each query against the keys around it, ``query . key + attn_mask``.

    Column ``c`` of row ``l`` is key ``l - local_context // 2 + c``.

    Args:
        queries: (N, H, L, E), of a floating-point dtype.
        keys: (N, H, S, E), likewise.
        attn_mask: (L, S), floating-point, added to the scores. If it requires a gradient it gets one.
        key_lengths: (N,), integers in 0..S: how many keys each sequence has.
        local_context: how many keys a query sees, at least 1.

    Returns:
        (N, H, L, local_context), in the queries' dtype: -1e24 where a slot is outside the sequence, so that a softmax of a row
        without a key is not NaN (in float16 its least number). Such a slot passes no gradient on.

    Raises:
        TypeError, ValueError: an argument is bad; the message names it, what it was and what was expected.
    """
    window = _window(local_context)
    length, key_length = _lengths_of("queries", queries, 2), _lengths_of("keys", keys, 2)
    _check_tensor("attn_mask", attn_mask, (length, key_length), queries.device)
    _check_tensor("key_lengths", key_lengths, (queries.shape[0],), queries.device)
    scores = attnreg.local_dot_product(
        queries,
        keys,
        window,
        bias=_band(attn_mask, window) if key_length else None,
        key_lengths=key_lengths,
        query_starts=_starts(queries, length, key_length),
    )
    slots = _keys_of_slots(length, window, queries.device)
    outside = (slots < 0) | (slots >= key_lengths.clamp(max=key_length)[:, None, None])
    return scores.masked_fill(outside[:, None], max(_NO_KEY, torch.finfo(scores.dtype).min))


def local_dot_backward(
    queries: Tensor, keys: Tensor, key_lengths: Tensor, grad: Tensor, local_context: int
) -> tuple[Tensor, Tensor]:
    """The gradients of queries and keys for a gradient (N, H, L, local_context) of :func:`local_dot_product`.

    Raises:
        TypeError, ValueError: as there.
    """
    window = _window(local_context)
    length, key_length = _lengths_of("queries", queries, 2), _lengths_of("keys", keys, 2)
    _check_tensor("key_lengths", key_lengths, (queries.shape[0],), queries.device)
    _check_tensor("grad", grad, (*queries.shape[:3], window.size), queries.device)
    return _gradients(
        grad,
        (queries, keys),
        lambda query, key: attnreg.local_dot_product(
            query, key, window, key_lengths=key_lengths, query_starts=_starts(queries, length, key_length)
        ),
    )


def local_weighted_average(A: Tensor, V: Tensor) -> Tensor:
    """The average of the values around each query, with the weights ``A``.

    Args:
        A: (N, H, L, local_context), of a floating-point dtype; column ``c`` as in :func:`local_dot_product`.
        V: (N, H, S, D), likewise.

    Returns:
        (N, H, L, D). A weight outside the sequence is never read, and its gradient is 0.

    Raises:
        TypeError, ValueError: an argument is bad; the message names it, what it was and what was expected.
    """
    length, key_length = _lengths_of("A", A, 2), _lengths_of("V", V, 2)
    starts = _starts(A, length, key_length)
    return attnreg.local_weighted_average(A, V, _window(A.shape[3]), query_starts=starts)


def local_weighted_average_backward(attention: Tensor, values: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of weights and values for a gradient (N, H, L, D) of :func:`local_weighted_average`.

    Raises:
        TypeError, ValueError: as there.
    """
    _lengths_of("attention", attention, 2)
    _lengths_of("values", values, 2)
    _check_tensor("grad", grad, (*attention.shape[:3], values.shape[3]), attention.device)
    return _gradients(grad, (attention, values), local_weighted_average)


def _gradients(
    grad: Tensor, tensors: tuple[Tensor, Tensor], function: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    first, second = (tensor.detach().requires_grad_() for tensor in tensors)
    with torch.enable_grad():
        result = function(first, second)
    of_first, of_second = torch.autograd.grad(result, (first, second), grad)
    return of_first, of_second


# The module


class LocalAttention(nn.Module):
    """fast-transformers' ``LocalAttention``, fused where a backend fuses it: no tensor of size L x S or L x local_context.

    A query that its masks leave no key has the output 0; fast-transformers has an average of what the masks hide there.

    Args:
        local_context: how many keys a query sees, its own position in the middle: ``Window.centered(local_context)``.
        softmax_temp: factor of the scores; None means ``1 / sqrt(E)``, as 0 does in fast-transformers.
        attention_dropout: the share of weights that are dropped in training, at least 0 and less than 1.
        event_dispatcher: the name of a dispatcher of fast-transformers, or one. It is kept, and no event is sent to it, as in
            fast-transformers.

    Raises:
        TypeError, ValueError: an argument is bad; the message names it, what it was and what was expected.
        ImportError: a dispatcher is asked for by name, and fast-transformers is not installed.
    """

    def __init__(
        self,
        local_context: int,
        softmax_temp: float | None = None,
        attention_dropout: float = 0.1,
        event_dispatcher: Any = "",
    ) -> None:
        super().__init__()
        _window(local_context)
        _scale(softmax_temp, 1)
        if isinstance(attention_dropout, bool) or not isinstance(attention_dropout, (int, float)):
            raise TypeError(f"attention_dropout must be a float, got {_brief(attention_dropout)}")
        if not 0 <= attention_dropout < 1:
            raise ValueError(f"attention_dropout must be at least 0 and less than 1, got {attention_dropout}")
        self.local_context = local_context
        self.softmax_temp = softmax_temp
        self.dropout = nn.Dropout(attention_dropout)
        self.event_dispatcher = _dispatcher(event_dispatcher)

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, attn_mask: Any, query_lengths: Any, key_lengths: Any
    ) -> Tensor:
        """Attention of each query to the keys around it.

        Args:
            queries: (N, L, H, E), of a floating-point dtype.
            keys: (N, S, H, E), likewise.
            values: (N, S, H, D), likewise.
            attn_mask: a mask (L, S) of fast-transformers, or an object with its attributes ``all_ones``, ``bool_matrix`` and
                ``additive_matrix_finite``; what the last one adds to a score is multiplied by the temperature, too.
            query_lengths: not looked at, as in fast-transformers: rows past a sequence's length are computed as all others.
            key_lengths: a mask (N, S) with ``all_ones``, ``bool_matrix`` and ``lengths``: keys past these are not seen.

        Returns:
            (N, L, H, D), contiguous, in the queries' dtype.

        Raises:
            TypeError, ValueError: an argument is bad; the message names it, what it was and what was expected.
        """
        length, key_length = _lengths_of("queries", queries, 1), _lengths_of("keys", keys, 1)
        _check_tensor("keys", keys, (queries.shape[0], None, None, queries.shape[3]), queries.device)
        _check_tensor("values", values, (*keys.shape[:3], None), queries.device)
        window, scale = _window(self.local_context), _scale(self.softmax_temp, queries.shape[3])
        shape, bias = (length, key_length), None
        if _is_causal(attn_mask):
            _check_shape("attn_mask", (attn_mask.lengths.shape[0],) * 2, shape)
            window = Window(window.left, 0)
        elif not _all_ones("attn_mask", attn_mask, shape) and key_length:
            bias = _bias(attn_mask, shape, window, scale, queries.device)
        output = attnreg.local_attention(
            queries.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            window,
            bias=bias,
            key_lengths=_key_lengths(key_lengths, (queries.shape[0], key_length), queries.device),
            query_starts=_starts(queries, length, key_length),
            scale=scale,
            dropout_p=self.dropout.p if self.dropout.training else 0.0,
        )
        return output.transpose(1, 2).contiguous()

    def extra_repr(self) -> str:
        """The settings, for the module's representation."""
        return f"local_context={self.local_context}, softmax_temp={self.softmax_temp}"


def _scale(softmax_temp: object, head_dim: int) -> float:
    if softmax_temp is None:
        return 1 / math.sqrt(head_dim)
    if isinstance(softmax_temp, bool) or not isinstance(softmax_temp, (int, float)):
        raise TypeError(
            f"softmax_temp must be a float or None, got {_brief(softmax_temp)}; a temperature has no gradient here"
        )
    return float(softmax_temp) or 1 / math.sqrt(head_dim)


def _dispatcher(given: Any) -> Any:
    """What fast-transformers makes of the argument; None where it is its default and there is no fast-transformers."""
    if not isinstance(given, str):
        if not callable(getattr(given, "dispatch", None)):
            raise TypeError(f"event_dispatcher must be a name or an EventDispatcher, got {_brief(given)}")
        return given
    try:
        return import_module("fast_transformers.events").EventDispatcher.get(given)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "fast_transformers":
            raise
        if not given:
            return None
        raise ImportError(
            f"event_dispatcher={given!r} is the name of a dispatcher of fast_transformers, which is not installed"
        ) from error


# Masks


def _is_causal(mask: Any) -> bool:
    """Whether a mask is fast-transformers' triangular one, which its class says without a matrix of L x L."""
    masking = sys.modules.get("fast_transformers.masking")
    return masking is not None and type(mask) is masking.TriangularCausalMask


def _all_ones(name: str, mask: Any, shape: tuple[int, int]) -> bool:
    """Whether a mask is known to hide nothing of this shape.

    One that was made of a tensor answers by a tensor, which nobody reads here: on an accelerator that would wait for it.
    """
    hides_nothing = _read(name, mask, "all_ones") is True
    return hides_nothing and tuple(_read(name, mask, "bool_matrix").shape) == shape


def _bias(mask: Any, shape: tuple[int, int], window: Window, scale: float, device: torch.device) -> Tensor:
    """What a mask adds to the scores of each slot, which they are scaled with; -inf where it hides one."""
    finite = hasattr(mask, "additive_matrix_finite")
    additive = _read("attn_mask", mask, "additive_matrix_finite" if finite else "additive_matrix")
    _check_tensor("attn_mask", additive, shape, device)
    band = _band(additive, window)
    return (scale * band).masked_fill(band <= _HIDES, -torch.inf)


def _key_lengths(mask: Any, shape: tuple[int, int], device: torch.device) -> Tensor | None:
    if _all_ones("key_lengths", mask, shape):
        return None
    lengths: Tensor = _read("key_lengths", mask, "lengths")
    _check_tensor("key_lengths", lengths, shape[:1], device)
    return lengths


def _read(name: str, mask: Any, attribute: str) -> Any:
    try:
        return getattr(mask, attribute)
    except AttributeError:
        raise TypeError(
            f"{name} must be a mask of fast_transformers.masking, or have its attribute {attribute!r}; got {_brief(mask)}"
        ) from None


# Rows and slots


def _window(local_context: object) -> Window:
    try:
        if isinstance(local_context, bool):
            raise TypeError
        size = index(local_context)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"local_context must be an int, got {_brief(local_context)}") from None
    if size < 1:
        raise ValueError(f"local_context must be at least 1, got {size}")
    return Window.centered(size)


def _starts(first: Tensor, length: int, key_length: int) -> Tensor | None:
    """The first query stands at the first key; where there are as many keys as queries, attnreg says so, too."""
    return None if length == key_length else first.new_zeros(first.shape[0], dtype=torch.int64)


def _keys_of_slots(length: int, window: Window, device: torch.device) -> Tensor:
    """Which key each slot of each row is: (L, W)."""
    return torch.arange(length, device=device)[:, None] + torch.arange(-window.left, window.right + 1, device=device)


def _band(dense: Tensor, window: Window) -> Tensor:
    """(L, W) of (L, S): what it holds at the key of each slot; anything where there is none."""
    length, key_length = dense.shape
    return dense.gather(1, _keys_of_slots(length, window, dense.device).clamp(0, key_length - 1))


# Checks


def _lengths_of(name: str, tensor: object, dim: int) -> int:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {_brief(tensor)}")
    if tensor.dim() != 4:
        raise ValueError(f"{name} must have four dimensions, got shape {tuple(tensor.shape)}")
    return tensor.shape[dim]


def _check_tensor(name: str, tensor: object, shape: tuple[int | None, ...], device: torch.device) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {_brief(tensor)}")
    _check_shape(name, tuple(tensor.shape), shape)
    if tensor.device != device:
        raise ValueError(f"{name} must be on the device of the others, {device}; got {tensor.device}")


def _check_shape(name: str, found: tuple[int, ...], shape: tuple[int | None, ...]) -> None:
    if len(found) != len(shape) or any(size not in (None, own) for own, size in zip(found, shape)):
        expected = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape ({expected}), got {found}")


def _brief(value: object) -> str:
    return f"{type(value).__name__} {value!r}" if isinstance(value, (str, int, float)) else type(value).__name__


# In fast-transformers itself


@dataclass
class Installation:
    """What :func:`install` replaced. ``remove()`` puts it back, and so does leaving a ``with`` block.

    Attributes:
        replaced: where each stood: a namespace, the name in it, what was there before, and what is there now.
    """

    replaced: list[tuple[dict[str, Any], str, Any, Any]]

    def remove(self) -> None:
        """Put back what was there before, but where somebody else has replaced it since."""
        for namespace, name, before, ours in self.replaced:
            if namespace.get(name) is ours:
                namespace[name] = before
        self.replaced = []

    def __enter__(self) -> Installation:
        return self

    def __exit__(self, *_error: object) -> None:
        self.remove()


def install() -> Installation:
    """Let fast-transformers compute its local attention with attnreg.

    Its builders make :class:`LocalAttention` for ``attention_type="local"``; ``fast_transformers.local_product`` has the two
    products of this module, and models that were built before compute with these. A name that was imported from there before
    stays what it was. Where it is installed already, nothing is replaced.

    Raises:
        ImportError: fast-transformers is not installed, or its extensions were not built.
    """
    local_product = import_module("fast_transformers.local_product")
    attention = import_module("fast_transformers.attention")
    local_attention = import_module("fast_transformers.attention.local_attention")
    registry = import_module("fast_transformers.attention_registry").AttentionRegistry
    functions = {"local_dot_product": local_dot_product, "local_weighted_average": local_weighted_average}
    ours: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (vars(local_product), functions),
        (vars(local_attention), {**functions, "LocalAttention": LocalAttention}),
        (vars(attention), {"LocalAttention": LocalAttention}),
        # Its `register` refuses a name that is taken, and it has no other way in.
        (registry._classes, {"local": LocalAttention}),
    ]
    replaced = []
    for namespace, values in ours:
        for name, value in values.items():
            before = namespace[name]
            if before is not value:
                namespace[name] = value
                replaced.append((namespace, name, before, value))
    return Installation(replaced)
