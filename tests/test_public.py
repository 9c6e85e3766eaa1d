"""What a user sees first: the package's names, and a decision in a notebook."""

from __future__ import annotations

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
