"""Broken backends that err between the two products: soft cap, sinks, dropout, and gradients of the log-sum-exp."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from attnreg.backend import Backend
from attnreg.testing import philox
from attnreg.testing.mutant import (
    Changes,
    function_of,
    mutant,
    of_argument,
    of_backward,
    of_gradient,
    of_output,
    of_weights,
)
from attnreg.testing.placing import OF_ROWS, Placing
from attnreg.window import Window

# Soft cap


@mutant("softcap", "the soft cap is ignored")
def _softcap_ignored(right: Backend) -> Changes:
    return of_argument(right, "softcap", lambda cap, key: None)


@mutant("softcap", "the soft cap comes before scaling")
def _softcap_before_scaling(right: Backend) -> Changes:
    # scale * cap * tanh(q . k / cap), by the scores that a cap of ``scale * cap`` bends.
    return of_argument(right, "softcap", lambda cap, key: cap * key.shape[3] ** -0.5)


@mutant("softcap", "the soft cap comes after the bias")
def _softcap_after_bias(right: Backend) -> Changes:
    def change(weights: Tensor, scores: Tensor, place: Placing, given: Mapping[str, Any]) -> Tensor:
        cap, bias = given.get("softcap"), given["bias"]
        if cap is None or bias is None:
            return weights
        hidden = weights == 0
        capped: Tensor = cap * ((scores + bias.to(scores.dtype)) / cap).tanh()
        return capped.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0)

    return of_weights(right, change)


@mutant("softcap", "the gradient of a score lacks the derivative of the soft cap")
def _softcap_without_its_derivative(right: Backend) -> Changes:
    backward, of_dot = function_of(right, "local_attention_backward"), function_of(right, "local_dot_product_backward")

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
        inputs = (query, key, value, output, lse, window)
        gradients = dict(backward(grad, *inputs, **given))
        wanted = given["needs_grad"] & {"query", "key"}
        if given.get("softcap") is None or not wanted:
            return gradients
        # A bias with every slot has the gradient of the capped scores.
        bias = given["bias"] if given["bias"] is not None else query.new_zeros(())
        bias = bias.expand(*query.shape[:3], window.size).contiguous()
        alone = {**given, "bias": bias, "needs_grad": frozenset({"bias"})}
        scores = backward(grad, *inputs, **alone)["bias"].to(query.dtype)
        rows = {name: given[name] for name in OF_ROWS if name in given}
        return gradients | of_dot(
            scores, query, key, window, **rows, bias=None, scale=given["scale"], needs_grad=wanted
        )

    return {"local_attention_backward": local_attention_backward}


# Sinks


def _share(given: Mapping[str, Any], lse: Tensor) -> Tensor | None:
    """The weight of the sink in each row, (N, H, Lq, 1); None without sinks."""
    sinks = given.get("sinks")
    if sinks is None:
        return None
    share: Tensor = (sinks.to(lse.dtype)[:, None] - lse).exp().where(lse != -torch.inf, 0)
    return share[..., None]


@mutant("sinks", "sinks are ignored")
def _sinks_ignored(right: Backend) -> Changes:
    def change(output: Tensor, lse: Tensor, *rest: Any) -> Tensor:
        share = _share(rest[-1], lse)
        return output if share is None else (output / (1 - share).clamp(min=1e-30)).to(output.dtype)

    return of_output(right, change)


@mutant("sinks", "a sink weighs the first value")
def _sink_in_the_output(right: Backend) -> Changes:
    def change(
        output: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, window: Window, given: Any
    ) -> Tensor:
        share = _share(given, lse)
        if share is None:
            return output
        first = value[:, :, :1].repeat_interleave(query.shape[1] // value.shape[1], 1)
        return output + (share * first.where(share > 0, 0)).to(output.dtype)

    return of_output(right, change)


@mutant("sinks", "a row that sees nothing but its sink has the average of values that it does not see")
def _sinks_of_blind_rows(right: Backend) -> Changes:
    def change(
        output: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, window: Window, given: Any
    ) -> Tensor:
        if given.get("sinks") is None:
            return output
        return output.where((lse != -torch.inf)[..., None], 1.0)

    return of_output(right, change)


@mutant("sinks", "query head h has the sink of its key head")
def _sinks_by_key_head(right: Backend) -> Changes:
    def change(sinks: Tensor, key: Tensor) -> Tensor:
        group = sinks.shape[0] // key.shape[1]
        return sinks[::group].repeat_interleave(group)

    return of_argument(right, "sinks", change)


@mutant("sinks", "sinks are read as if they lay one after the other")
def _sinks_read_densely(right: Backend) -> Changes:
    return of_argument(right, "sinks", lambda sinks, key: sinks.as_strided(sinks.shape, (1,)))


@mutant("sinks", "the gradient of the sinks is 0")
def _sink_gradient_missing(right: Backend) -> Changes:
    return of_gradient(right, "sinks", lambda gradient, inputs, given: torch.zeros_like(gradient))


def _sink_gradient_of(right: Backend, part: Callable[[Tensor], Tensor]) -> Changes:
    """Attention whose sinks have the gradient of ``part`` of what comes in alone."""
    backward = function_of(right, "local_attention_backward")

    def change(gradient: Tensor, inputs: Any, given: Any) -> Any:
        grad, *others = inputs
        of_lse = given.get("grad_log_sum_exp")
        alone = {**given, "needs_grad": frozenset({"sinks"})}
        if of_lse is not None:
            alone["grad_log_sum_exp"] = part(of_lse)
        return backward(part(grad), *others, **alone)["sinks"]

    return of_gradient(right, "sinks", change)


def _but_first(tensor: Tensor, dim: int) -> Tensor:
    """Zeros but in the first place of a dimension."""
    kept = torch.zeros_like(tensor)
    kept.narrow(dim, 0, 1).copy_(tensor.narrow(dim, 0, 1))
    return kept


@mutant("sinks", "the gradient of a sink is that of the first row alone")
def _sink_gradient_of_one_row(right: Backend) -> Changes:
    return _sink_gradient_of(right, lambda tensor: _but_first(tensor, 2))


@mutant("sinks", "the gradient of a sink is that of the first sequence alone")
def _sink_gradient_of_one_sequence(right: Backend) -> Changes:
    return _sink_gradient_of(right, lambda tensor: _but_first(tensor, 0))


# The log-sum-exp


@mutant("log_sum_exp", "the log-sum-exp is that of the scores without the sink")
def _lse_without_sink(right: Backend) -> Changes:
    attention = function_of(right, "local_attention")

    def local_attention(*inputs: Any, **given: Any) -> Any:
        output, lse = attention(*inputs, **given)
        share = _share(given, lse)
        return output, lse if share is None else lse + torch.log1p(-share[..., 0].clamp(max=1 - 1e-6))

    return {"local_attention": local_attention}


@mutant("log_sum_exp", "the log-sum-exp is that of the weights that dropout leaves")
def _lse_after_dropping(right: Backend) -> Changes:
    attention = function_of(right, "local_attention")

    def local_attention(*inputs: Any, **given: Any) -> Any:
        output, lse = attention(*inputs, **given)
        dropout_p = given.get("dropout_p")
        return output, lse if dropout_p is None else lse + torch.log1p(torch.tensor(-dropout_p))

    return {"local_attention": local_attention}


@mutant("lse_gradients", "the gradient of the log-sum-exp is dropped")
def _lse_gradient_dropped(right: Backend) -> Changes:
    return of_backward(
        right, lambda given: {**given, "grad_log_sum_exp": None} if "grad_log_sum_exp" in given else given
    )


@mutant("lse_gradients", "the gradient of the log-sum-exp has the wrong sign")
def _lse_gradient_negative(right: Backend) -> Changes:
    def change(given: dict[str, Any]) -> dict[str, Any]:
        gradient = given.get("grad_log_sum_exp")
        return given if gradient is None else {**given, "grad_log_sum_exp": -gradient}

    return of_backward(right, change)


@mutant("lse_gradients", "the gradient of the log-sum-exp does not reach the sinks")
def _lse_gradient_without_sinks(right: Backend) -> Changes:
    backward = function_of(right, "local_attention_backward")

    def change(gradient: Tensor, inputs: Any, given: Any) -> Any:
        alone = {**given, "needs_grad": frozenset({"sinks"})}
        if "grad_log_sum_exp" in given:
            alone["grad_log_sum_exp"] = None
        return backward(*inputs, **alone)["sinks"]

    return of_gradient(right, "sinks", change)


@mutant("hidden", "the incoming gradient of the log-sum-exp of rows that see nothing reaches the sinks")
def _lse_gradient_of_blind_rows_leaks(right: Backend) -> Changes:
    def change(gradient: Tensor, inputs: Any, given: Any) -> Any:
        of_lse = given.get("grad_log_sum_exp")
        return gradient if of_lse is None else gradient + 0 * of_lse.sum((0, 2)).to(gradient.dtype)

    return of_gradient(right, "sinks", change)


# Dropout


@mutant("dropout", "what dropout leaves does not make up for what it drops")
def _dropout_not_rescaled(right: Backend) -> Changes:
    def change(output: Tensor, *rest: Any) -> Tensor:
        dropout_p = rest[-1].get("dropout_p")
        return output if dropout_p is None else output * (1 - dropout_p)

    return of_output(right, change)


@mutant("dropped_weights", "the backward drops other weights than the forward")
def _other_weights_dropped_in_backward(right: Backend) -> Changes:
    def change(given: dict[str, Any]) -> dict[str, Any]:
        return given if given.get("seed") is None else {**given, "seed": given["seed"] + 1}

    return of_backward(right, change)


@mutant("dropout", "the gradient of scores is that of other dropped weights")
def _gradient_of_other_dropped_weights(right: Backend) -> Changes:
    backward = function_of(right, "local_attention_backward")

    def change(gradient: Tensor, inputs: Any, given: Any) -> Any:
        if given.get("seed") is None:
            return gradient
        return backward(*inputs, **{**given, "seed": given["seed"] + 1, "needs_grad": frozenset({"query"})})["query"]

    return of_gradient(right, "query", change)


@mutant("dropped_weights", "dropout is ignored")
def _dropout_ignored(right: Backend) -> Changes:
    def change(weights: Tensor, scores: Tensor, place: Placing, given: Mapping[str, Any]) -> Tensor:
        return weights

    return _of_dropped(right, change)


def _of_dropped(right: Backend, change: Callable[[Tensor, Tensor, Placing, Mapping[str, Any]], Tensor]) -> Changes:
    """Attention with weights of its own where there is dropout."""
    wrong = of_weights(right, change)["local_attention"]
    attention = function_of(right, "local_attention")

    def local_attention(*inputs: Any, **given: Any) -> Any:
        return (attention if given.get("dropout_p") is None else wrong)(*inputs, **given)

    return {"local_attention": local_attention}


def _of_words(right: Backend, place_of: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]) -> Changes:
    """Attention that drops what the generator says of ``place_of(n, h, i, j, slot, heads)`` instead of (n, h, i, j)."""

    def change(weights: Tensor, scores: Tensor, place: Placing, given: Mapping[str, Any]) -> Tensor:
        n, h, i, slot = (torch.arange(size, device=weights.device) for size in weights.shape)
        n, h, i = n[:, None, None, None], h[:, None, None], i[:, None]
        key = place.key_of_slot.clamp(min=0)
        n, h, i, j = place_of(n, h, i, key, slot, weights.shape[1])
        seed, dropout_p = int(given["seed"]), given["dropout_p"]
        words = torch.stack(philox.philox((n, h, i, j // 4), (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)), -1)
        word = words.gather(-1, (j % 4).expand(words.shape[:-1])[..., None])[..., 0]
        left: Tensor = weights.where(word >= int(dropout_p * 2**32), 0) / (1 - dropout_p)
        return left

    return _of_dropped(right, change)


@mutant("dropped_weights", "all keys of a counter have its first word")
def _one_word_for_four_keys(right: Backend) -> Changes:
    return _of_words(right, lambda n, h, i, j, slot, heads: (n, h, i, j // 4 * 4))


@mutant("dropped_weights", "dropout counts slots, not keys")
def _dropout_by_slot(right: Backend) -> Changes:
    return _of_words(right, lambda n, h, i, j, slot, heads: (n, h, i, slot))


@mutant("dropped_weights", "dropout counts rows from where they stand among the keys")
def _dropout_by_position(right: Backend) -> Changes:
    return _of_words(right, lambda n, h, i, j, slot, heads: (n, h, (j - slot).clamp(min=0), j))


@mutant("dropped_weights", "all sequences drop the weights of the first")
def _dropout_of_one_sequence(right: Backend) -> Changes:
    return _of_words(right, lambda n, h, i, j, slot, heads: (n * 0, h, i, j))


@mutant("dropped_weights", "two query heads that read one key head drop the same weights")
def _dropout_by_key_head(right: Backend) -> Changes:
    return _of_words(right, lambda n, h, i, j, slot, heads: (n, h // 2, i, j))


@mutant("dropped_weights", "the high word of the seed is ignored")
def _seed_in_32_bits(right: Backend) -> Changes:
    return of_argument(right, "seed", lambda seed, key: seed & 0xFFFFFFFF)


@mutant("dropped_weights", "the seed in a tensor is read once")
def _seed_read_once(right: Backend) -> Changes:
    first: dict[int, tuple[Tensor, Tensor]] = {}
    # The tensors are kept, too: no other one gets their memory.
    return of_argument(right, "seed", lambda seed, key: first.setdefault(seed.data_ptr(), (seed.clone(), seed))[0])
