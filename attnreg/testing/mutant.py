"""What a mutant is, and the ways in which most are made: ``mutants`` has them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from attnreg.backend import Backend, Function
from attnreg.window import Window

Changes = Mapping[str, Any]


@dataclass(frozen=True)
class Mutant:
    """A broken backend.

    Attributes:
        name: what it is called.
        says: what is wrong with it.
        property: the property that must be broken; others may be, too.
        change: the fields of a right backend that make it broken.
    """

    name: str
    says: str
    property: str
    change: Callable[[Backend], Changes]

    def of(self, right: Backend) -> Backend:
        """``right``, broken, called ``mutant.NAME``."""
        change = dict(self.change(right))
        capability = change.pop("capability", right.capability)
        if capability.takes is None:
            # What changes a function hands on whatever it is given, and names none of it.
            capability = replace(capability, takes=frozenset().union(*right.taken.values()))
        return replace(right, name=f"mutant.{self.name}", capability=capability, **change)


MUTANTS: dict[str, Mutant] = {}


def mutant(property: str, says: str) -> Callable[[Callable[[Backend], Changes]], Callable[[Backend], Changes]]:
    """Publish the decorated change of a right backend: which property must find it, and what is wrong with it."""

    def add(change: Callable[[Backend], Changes]) -> Callable[[Backend], Changes]:
        name = change.__name__.removeprefix("_")
        MUTANTS[name] = Mutant(name, says, property, change)
        return change

    return add


# The ways in which most are made


def of_output(right: Backend, change: Callable[..., Tensor]) -> Changes:
    """Attention whose output is ``change(output, log_sum_exp, query, key, value, window, given)``."""
    attention = function_of(right, "local_attention")

    def local_attention(query: Tensor, key: Tensor, value: Tensor, window: Window, **given: Any) -> Any:
        output, log_sum_exp = attention(query, key, value, window, **given)
        return change(output, log_sum_exp, query, key, value, window, given), log_sum_exp

    return {"local_attention": local_attention}


def of_log_sum_exp(right: Backend, change: Callable[[Tensor], Tensor]) -> Changes:
    """Attention whose log-sum-exp is ``change(log_sum_exp)``; its own backward gets the right one."""
    attention, backward = function_of(right, "local_attention"), function_of(right, "local_attention_backward")

    def local_attention(*inputs: Any, **given: Any) -> Any:
        output, log_sum_exp = attention(*inputs, **given)
        return output, change(log_sum_exp)

    def local_attention_backward(grad: Tensor, *inputs: Any, **given: Any) -> Any:
        query, key, value, _, _, window = inputs
        needs_grad = given.pop("needs_grad")
        output, log_sum_exp = attention(query, key, value, window, **given)
        return backward(grad, query, key, value, output, log_sum_exp, window, needs_grad=needs_grad, **given)

    return {"local_attention": local_attention, "local_attention_backward": local_attention_backward}


def of_inputs(right: Backend, change: Callable[..., tuple[Any, ...]]) -> Changes:
    """Attention, forward and backward, of ``change(query, key, value, window, given)`` instead of what is given."""
    attention, backward = function_of(right, "local_attention"), function_of(right, "local_attention_backward")

    def local_attention(query: Tensor, key: Tensor, value: Tensor, window: Window, **given: Any) -> Any:
        query, key, value, window, given = change(query, key, value, window, given)
        return attention(query, key, value, window, **given)

    def local_attention_backward(
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        lse: Tensor,
        window: Window,
        **given: Any,
    ) -> Any:
        query, key, value, window, given = change(query, key, value, window, given)
        return backward(grad, query, key, value, output, lse, window, **given)

    return {"local_attention": local_attention, "local_attention_backward": local_attention_backward}


def of_gradient(right: Backend, name: str, change: Callable[..., Any]) -> Changes:
    """Attention whose gradient of ``name`` is ``change(gradient, inputs, given)``."""
    backward = function_of(right, "local_attention_backward")

    def local_attention_backward(*inputs: Any, **given: Any) -> Any:
        gradients = dict(backward(*inputs, **given))
        if name in gradients:
            gradients[name] = change(gradients[name], inputs, given)
        return gradients

    return {"local_attention_backward": local_attention_backward}


def function_of(right: Backend, name: str) -> Function:
    """A function of a right backend, of which a mutant needs one."""
    function: Function | None = getattr(right, name)
    if function is None:
        raise ValueError(f"a mutant is made of a backend that has {name}, which {right.name!r} lacks")
    return function


def of_lengths(right: Backend, change: Callable[[Tensor, int], Tensor | None]) -> Changes:
    """Attention with ``change(key_lengths, Lk)`` where lengths are given."""

    def changed(query: Tensor, key: Tensor, value: Tensor, window: Window, given: dict[str, Any]) -> tuple[Any, ...]:
        lengths = given["key_lengths"]
        lengths = None if lengths is None else change(lengths, key.shape[2])
        return query, key, value, window, {**given, "key_lengths": lengths}

    return of_inputs(right, changed)
