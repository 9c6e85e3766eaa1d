"""What a user sees first: the package's names, and a decision in a notebook."""

from __future__ import annotations

import inspect
import pydoc

import pytest
import torch

import attnreg
from attnreg import Window


def test_every_public_name_is_listed_and_there():
    assert {*attnreg.__all__, "__version__"} <= set(dir(attnreg))
    assert all(getattr(attnreg, name) is not None for name in dir(attnreg))


def test_a_notebook_shows_the_trace_of_a_decision():
    class Printer:
        shown = ""

        def text(self, text: str) -> None:
            self.shown += text

    query, printer = torch.randn(1, 1, 5, 4), Printer()
    decision = attnreg.explain(query, query, query, Window(1, 1))
    decision._repr_pretty_(printer, cycle=False)
    assert printer.shown == str(decision)


ROWS = "key_lengths, key_starts, query_starts, cu_seqlens_q, cu_seqlens_k"


@pytest.mark.parametrize(
    ("function", "needed", "by_name"),
    [
        (attnreg.local_dot_product, "query, key, window", f"bias, {ROWS}, scale, backend"),
        (attnreg.local_weighted_average, "weights, value, window", f"{ROWS}, backend"),
        *[
            (function, "query, key, value, window", f"bias, {ROWS}, scale, softcap, sinks, dropout_p, seed, backend")
            for function in (attnreg.local_attention, attnreg.local_attention_with_lse)
        ],
        (attnreg.LocalAttention, "window", "scale, softcap, dropout_p, backend"),
        (attnreg.LocalAttention(Window(1, 0)).forward, "query, key, value", f"bias, {ROWS}, sinks, seed"),
    ],
)
def test_a_signature_says_what_a_call_takes_and_needs(function, needed, by_name):
    """What catches the names of other libraries, and what is missing, is no part of it."""
    parameters = inspect.signature(function).parameters.values()
    assert ", ".join(each.name for each in parameters if each.default is each.empty) == needed
    assert all((each.kind is each.KEYWORD_ONLY) == (each.name in by_name.split(", ")) for each in parameters)
    assert ", ".join(each.name for each in parameters if each.kind is each.KEYWORD_ONLY) == by_name
    shown = pydoc.plain(pydoc.render_doc(function))
    assert "_unknown" not in shown
    assert "_more" not in shown
