"""Who is measured: what a backend and a peer have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from attnreg.measuring.inputs import Calls, Inputs
from attnreg_benchmarks.workloads import Workload


@dataclass(frozen=True)
class Contender:
    """A backend of attnreg, or a peer: another library's implementation of the same op.

    Attributes:
        name: what it is called in results.
        kind: "backend" or "peer".
        ops: the ops that it has; it is not asked for others.
        refuse: ``(workload, direction, device) -> reason`` why it cannot run that there, or None.
        prepare: ``(workload, inputs) -> Calls``; called once for each set of inputs. It and what it returns may raise.
    """

    name: str
    kind: str
    ops: tuple[str, ...]
    refuse: Callable[[Workload, str, torch.device], str | None]
    prepare: Callable[[Workload, Inputs], Calls]
