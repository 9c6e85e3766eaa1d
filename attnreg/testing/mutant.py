"""What a mutant is, and the ways in which most are made: ``mutants`` has them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnreg.backend import Backend, Function
from attnreg.op import ATTENTION
from attnreg.testing.placing import OF_ROWS, Placing, placing
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
        output, log_sum_exp = attention(query, key, value, window, **of_forward(given))
        return backward(grad, query, key, value, output, log_sum_exp, window, **given)

    return {"local_attention": local_attention, "local_attention_backward": local_attention_backward}


def of_forward(given: Mapping[str, Any]) -> dict[str, Any]:
    """What attention gets of that which its backward does."""
    names = {argument.name for argument in ATTENTION.arguments}
    return {name: each for name, each in given.items() if name in names}


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
    return of_argument(right, "key_lengths", lambda lengths, key: change(lengths, key.shape[2]))


def of_argument(right: Backend, name: str, change: Callable[[Any, Tensor], Any]) -> Changes:
    """Attention with ``change(argument, key)`` where an argument of this name is given."""

    def changed(query: Tensor, key: Tensor, value: Tensor, window: Window, given: dict[str, Any]) -> tuple[Any, ...]:
        argument = given.get(name)
        return query, key, value, window, given if argument is None else {**given, name: change(argument, key)}

    return of_inputs(right, changed)


def of_backward(right: Backend, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Changes:
    """Attention whose backward is given ``change(given)``, by name."""
    backward = function_of(right, "local_attention_backward")

    def local_attention_backward(*inputs: Any, **given: Any) -> Any:
        return backward(*inputs, **change(given))

    return {"local_attention_backward": local_attention_backward}


def of_weights(right: Backend, change: Callable[[Tensor, Tensor, Placing, Mapping[str, Any]], Tensor]) -> Changes:
    """Attention whose output is the average by ``change(weights, scores, place, given)``.

    Weights are those before dropout, in float32 or wider; scores have no bias, ``place`` says where the rows stand.
    """
    dot, average = function_of(right, "local_dot_product"), function_of(right, "local_weighted_average")

    def changed(
        output: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, window: Window, given: Any
    ) -> Tensor:
        rows = {name: given[name] for name in OF_ROWS if name in given}
        place = placing(query.shape[2], key.shape[2], window, rows, query.device)
        wide = torch.promote_types(query.dtype, torch.float32)
        operands = query.to(wide), key.to(wide), window
        plain = dot(*operands, **rows, bias=None, scale=given["scale"])
        cap = given.get("softcap")
        scores = plain if cap is None else (cap * (plain / cap).tanh()).where(plain != -torch.inf, -torch.inf)
        if given.get("bias") is not None:
            scores = scores + given["bias"].to(wide)
        weights = (scores - lse[..., None]).exp().where(scores != -torch.inf, 0)
        found: Tensor = average(change(weights, plain, place, given), value.to(wide), window, **rows)
        return found.to(output.dtype)

    return of_output(right, changed)
