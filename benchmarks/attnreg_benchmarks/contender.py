"""Who is measured: what a backend and a peer have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from attnreg import Problem
from attnreg.testing.inputs import Calls, Inputs


@dataclass(frozen=True)
class Contender:
    """A backend of attnreg, or a peer: another library's implementation of the same op.

    Attributes:
        name: what it is called in results.
        kind: "backend" or "peer".
        ops: the ops that it has; it is not asked for others.
        refuse: ``problem -> reason`` why it cannot run that call, or None; with gradients it is its backward that is asked for.
        prepare: ``(problem, inputs) -> Calls``; called once for each set of inputs. It and what it returns may raise.
    """

    name: str
    kind: str
    ops: tuple[str, ...]
    refuse: Callable[[Problem], str | None]
    prepare: Callable[[Problem, Inputs], Calls]
