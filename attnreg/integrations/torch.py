"""torch's registry of flash attention: ``activate_flash_attention_impl("attnreg")`` serves ``varlen_attn`` with windows.

Importing this module registers the name. Once it is active, packed calls of ``aten::_flash_attention_forward`` and its backward
whose window has two sides run on attnreg; all other calls, SDPA's among them, run on the kernels that were there before: torch's
own, as it puts these back before it activates anything.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn import attention

import attnreg.plan
from attnreg import Window, local_attention_with_lse
from attnreg.op import ATTENTION
from attnreg.ops import without_autocast

__all__ = ["NAME", "Activation", "PackedCall", "activate", "backward", "forward", "packed_call"]

NAME = "attnreg"

_FORWARD, _BACKWARD = "_flash_attention_forward", "_flash_attention_backward"
_FORWARD_INTO = "_flash_attention_forward_no_dropout_inplace"
# torch has kernels for the second alone; a call on the first that attnreg does not serve is refused.
_DISPATCH_KEYS = ("CPU", "CUDA")
_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
# What `packed_call` reads; and bounds of the sequences' lengths, which attnreg does not need. The rest has to be left out.
_READ = frozenset(
    [
        "query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal", "return_debug_mask",
        "scale", "window_size_left", "window_size_right",
    ]
)  # fmt: skip
# A backend of attnreg that calls one of these ops itself is so near, in Python's frames.
_FRAMES = 12


# What the ops are asked, and what they answer


@dataclass(frozen=True)
class PackedCall:
    """A call that attnreg serves.

    Attributes:
        query: (Tq, H, E).
        key: (Tk, Hkv, E).
        value: (Tk, Hkv, E).
        cu_seqlens_q: (S + 1,), integers.
        cu_seqlens_k: likewise.
        window: which keys a query sees.
        scale: factor of the dot products; None means ``1 / sqrt(E)``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    window: Window
    scale: float | None


def packed_call(given: Mapping[str, Any]) -> PackedCall | None:
    """The call that arguments of one of the ops make, by their names in its schema; None where attnreg does not serve it.

    It serves packed sequences with a window that has two sides, without dropout, in 16, 32 or 64 bits, with one head dim. The
    window's sides are distances from a query's own position, so that (n, 0) has n + 1 keys; a causal call has 0 on the right.
    """
    query, key, value = given["query"], given["key"], given["value"]
    offsets = given["cum_seq_q"], given["cum_seq_k"]
    left, right = given["window_size_left"], 0 if given["is_causal"] else given["window_size_right"]
    if left is None or right is None or left < 0 or right < 0 or offsets[0] is None or offsets[1] is None:
        return None
    if given["dropout_p"] or given.get("return_debug_mask"):
        return None
    if any(given[name] is not None for name in given.keys() - _READ):
        return None
    if (
        query.dtype not in _DTYPES
        or not query.dim() == key.dim() == value.dim() == 3
        or query.shape[2] != value.shape[2]
    ):
        return None
    return PackedCall(query, key, value, *offsets, Window(left, right), given["scale"])


def forward(call: PackedCall) -> tuple[Tensor, Tensor]:
    """The output (Tq, H, E), and the log-sum-exp (H, Tq) in float32, as the op has it; -inf for a query without a key."""
    output, log_sum_exp = _attend(call)
    return _theirs(output), log_sum_exp[0].float()


def _attend(call: PackedCall) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), without_autocast(call.query.device.type):
        return local_attention_with_lse(
            _ours(call.query),
            _ours(call.key),
            _ours(call.value),
            call.window,
            cu_seqlens_q=call.cu_seqlens_q,
            cu_seqlens_k=_other_offsets(call),
            scale=call.scale,
        )


def backward(
    call: PackedCall, grad_output: Tensor, output: Tensor, log_sum_exp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, by what the forward returned."""
    if call.query.dtype == torch.float64:
        # The op keeps it in float32, which is too little for gradients in float64.
        log_sum_exp = _attend(call)[1][0]
    tensors = {"query": call.query, "key": call.key, "value": call.value}
    kept = {"grad_output": grad_output, "output": output}
    given = {
        **{argument.name: None for argument in (*ATTENTION.incoming, *ATTENTION.arguments)},
        **{name: _ours(tensor) for name, tensor in {**tensors, **kept}.items()},
        "log_sum_exp": log_sum_exp[None],
        "cu_seqlens_q": call.cu_seqlens_q,
        "cu_seqlens_k": _other_offsets(call),
        "scale": call.scale,
        "left": call.window.left,
        "right": call.window.right,
        "backend": None,
        # No call of attnreg's own comes before this one, whose backend it would have to take.
        "ticket": call.query.new_empty(0, dtype=torch.uint8),
        "needs_grad": list(tensors),
    }
    with torch.no_grad(), without_autocast(call.query.device.type):
        query, key, value = torch.ops.attnreg.local_attention_backward(**given)
    return _theirs(query), _theirs(key), _theirs(value)


def _other_offsets(call: PackedCall) -> Tensor | None:
    return None if call.cu_seqlens_k is call.cu_seqlens_q else call.cu_seqlens_k


def _ours(tensor: Tensor) -> Tensor:
    """(1, H, T, E) of (T, H, E)."""
    return tensor.transpose(0, 1)[None]


def _theirs(tensor: Tensor) -> Tensor:
    """The way back."""
    return tensor[0].transpose(0, 1)


# The ops


def _forward(given: Mapping[str, Any], call: PackedCall) -> tuple[Tensor, ...]:
    output, log_sum_exp = forward(call)
    # Nothing is dropped: no state of a random generator, no mask.
    state = call.query.new_zeros(2, dtype=torch.uint64)
    return output, log_sum_exp, state, state.new_zeros(()), output.new_empty(0)


def _forward_into(given: Mapping[str, Any], call: PackedCall) -> Tensor:
    output, log_sum_exp = forward(call)
    out: Tensor = given["out"]
    if out.shape != output.shape or out.dtype != output.dtype:
        shapes = f"{tuple(output.shape)} and {output.dtype}; got {tuple(out.shape)} and {out.dtype}"
        raise ValueError(f"out must have the query's shape and dtype, {shapes}")
    out.copy_(output)
    return log_sum_exp


def _backward(given: Mapping[str, Any], call: PackedCall) -> tuple[Tensor, ...]:
    return backward(call, given["grad_out"], given["out"], given["logsumexp"])


# What computes an op, and the arguments that it takes beside those of the call.
_OPS: Mapping[str, tuple[Callable[[Mapping[str, Any], PackedCall], Any], frozenset[str]]] = {
    _FORWARD: (_forward, frozenset()),
    _FORWARD_INTO: (_forward_into, frozenset({"out"})),
    _BACKWARD: (_backward, frozenset({"grad_out", "out", "logsumexp", "rng_state", "unused"})),
}


def _kernel(name: str, previous: Any, keyset: Any, *args: Any, **kwargs: Any) -> Any:
    """What runs for an op: attnreg, or the kernel that was there before."""
    # SDPA, which comes this way too, gives no window and should not wait.
    if kwargs.get("window_size_left") is not None:
        # The dispatcher leaves out what is as the schema has it.
        defaults, (compute, own) = _defaults(name), _OPS[name]
        given = {**defaults, **dict(zip(defaults, args)), **kwargs}
        call = packed_call({each: given[each] for each in given.keys() - own})
        if call is not None and not _is_asked_by_attnreg():
            return compute(given, call)
    if previous is None:
        raise NotImplementedError(
            f"aten::{name}: torch has no kernel for this device, and attnreg serves packed sequences with a window that has "
            f"two sides, without dropout and further arguments, alone"
        )
    return previous.call_boxed(keyset, *args, **kwargs)


@functools.cache
def _defaults(name: str) -> Mapping[str, Any]:
    """An op's arguments by name, in their order: None where one has to be given."""
    schema = getattr(torch.ops.aten, name).default._schema
    return {argument.name: argument.default_value for argument in schema.arguments}


def _is_asked_by_attnreg() -> bool:
    """Whether a backend of attnreg asks, which wants the kernel that torch has and not a choice among backends."""
    frame = sys._getframe(1)
    for _ in range(_FRAMES):
        if frame.f_back is None:
            return False
        frame = frame.f_back
        if frame.f_globals.get("__name__") == attnreg.plan.__name__:
            return True
    return False


@dataclass(eq=False)
class Activation:
    """The kernels in torch's dispatcher. ``remove()``, which torch calls, puts back what was there before.

    Attributes:
        library: holds them as long as it is there.
    """

    library: torch.library.Library | None

    def remove(self) -> None:
        """Put back what was there before."""
        self.library = None


_activations: WeakSet[Activation] = WeakSet()


def activate() -> Activation:
    """Put the kernels into torch's dispatcher: what ``activate_flash_attention_impl`` calls.

    Raises:
        RuntimeError: torch is built for ROCm, whose kernels lay out the log-sum-exp in another way.
    """
    if torch.version.hip is not None:
        raise RuntimeError(
            "attnreg serves torch's flash attention on CUDA and CPUs alone; this torch is built for ROCm"
        )
    # Kernels of an earlier activation would be the ones that were there before, and be gone with it.
    for earlier in list(_activations):
        earlier.remove()
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        # That a kernel is replaced is what was asked for.
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        for name in _OPS:
            if not hasattr(torch.ops.aten, name):
                continue
            for key in _DISPATCH_KEYS:
                kernel = functools.partial(_kernel, name, _previous(name, key))
                library.impl(name, kernel, key, with_keyset=True)
    activation = Activation(library)
    _activations.add(activation)
    return activation


def _previous(name: str, key: str) -> Any:
    """The kernel that runs now; None where there is none."""
    if not torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"aten::{name}", key):
        return None
    return torch.library.get_kernel(f"aten::{name}", key)


attention.register_flash_attention_impl(NAME, register_fn=activate)
