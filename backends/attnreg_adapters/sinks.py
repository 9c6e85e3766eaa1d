"""Attention sinks beside a library that has none: they divide each row of its output by more, and nothing else."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def beside_sinks(log_sum_exp: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """``(share, total)``: what each row's keys keep of the weights beside its sink, and the log-sum-exp of both; (N, H, Lq).

    A row that sees no key keeps its log-sum-exp of -inf, and a share of 0 that has no gradient.
    """
    sees = log_sum_exp != -math.inf
    own = log_sum_exp.where(sees, 0)
    total = torch.logaddexp(own, sinks.to(own.dtype)[:, None])
    return (own - total).exp().where(sees, 0), total.where(sees, -math.inf)


def gradient_of_sinks(grad_output: Tensor, output: Tensor, log_sum_exp: Tensor, sinks: Tensor) -> Tensor:
    """The sum over all rows of ``exp(sink - log_sum_exp) * -D``, where ``D`` is the sum over ``grad_output * output``."""
    weight = (sinks.to(log_sum_exp.dtype)[:, None] - log_sum_exp).exp()
    d = (grad_output.to(log_sum_exp.dtype) * output).sum(-1)
    return (weight * d).where(log_sum_exp != -math.inf, 0).sum((0, 2)).neg_().to(sinks.dtype)
