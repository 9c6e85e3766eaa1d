"""Local attention as a module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from attnreg.functional import local_attention
from attnreg.op import DROPOUT, SOFTCAP
from attnreg.problem import check_argument_number, check_number, check_window
from attnreg.request import written
from attnreg.unknown import MISSING, answers, missing_arguments, wrong_call
from attnreg.window import Window

if TYPE_CHECKING:
    from typing_extensions import Never


class LocalAttention(nn.Module):
    """``local_attention`` with its window, scale, soft cap, dropout and backend kept; the projections are the caller's.

    It takes the place of ``scaled_dot_product_attention``: query (N, H, Lq, E), key (N, Hkv, Lk, E) and value (N, Hkv, Lk, D) in,
    output (N, H, Lq, D) out. It has no parameters.

    Args:
        window: which keys a query sees.
        scale: factor of the dot products; None means ``1 / sqrt(E)``.
        softcap: a number greater than 0, see :func:`attnreg.local_attention`; None for none.
        dropout_p: the share of weights that are dropped in training, at least 0 and less than 1.
        backend: the backend to use, by name, or several in order of preference; None lets attnreg choose at each call.

    Raises:
        TypeError, ValueError: the window is no Window, a number is none that the op admits, or the backend no name.
    """

    @answers
    def __init__(
        self,
        window: Window,
        *_more: Never,
        scale: float | None = None,
        softcap: float | None = None,
        dropout_p: float = 0.0,
        backend: str | Sequence[str] | None = None,
        **_unknown: Never,
    ) -> None:
        if _unknown or _more:
            raise wrong_call(LocalAttention.__init__, _unknown, _more)
        if window is MISSING:
            raise missing_arguments("LocalAttention", ["window"])
        super().__init__()
        check_window(window)
        self.window = window
        self.scale = None if scale is None else check_number("scale", scale)
        self.softcap = None if softcap is None else check_argument_number(SOFTCAP, softcap)
        self.dropout_p = check_argument_number(DROPOUT[0], dropout_p)
        self.backend = written(backend)

    @answers
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *_more: Never,
        bias: Tensor | None = None,
        key_lengths: Tensor | None = None,
        key_starts: Tensor | None = None,
        query_starts: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        sinks: Tensor | None = None,
        seed: Tensor | None = None,
        **_unknown: Never,
    ) -> Tensor:
        """See :func:`attnreg.local_attention`, which this calls."""
        if _unknown or _more:
            raise wrong_call(LocalAttention.forward, _unknown, _more)
        return local_attention(
            query,
            key,
            value,
            self.window,
            bias=bias,
            key_lengths=key_lengths,
            key_starts=key_starts,
            query_starts=query_starts,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            scale=self.scale,
            softcap=self.softcap,
            sinks=sinks,
            dropout_p=self.dropout_p if self.training else 0.0,
            seed=seed,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """The settings, for the module's representation."""
        scale = "1/sqrt(E)" if self.scale is None else self.scale
        softcap = "" if self.softcap is None else f", softcap={self.softcap}"
        dropout = f", dropout_p={self.dropout_p}" if self.dropout_p else ""
        return f"{self.window}, scale={scale}{softcap}{dropout}, backend={self.backend!r}"
