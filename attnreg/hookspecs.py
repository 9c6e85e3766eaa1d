"""The hook through which a plug-in offers its backends."""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from attnreg.backend import Backend

PROJECT = "attnreg"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def attnreg_backends() -> Iterable[Backend]:
    """Yield (or return a list of) the backends of this plug-in.

    Called once, at the first need of a backend. It must be cheap: build, load and probe nothing here; that is what
    ``Backend.unavailable`` and ``Backend.prepare`` are for. A backend that cannot run on this machine is still offered.
    """
    raise NotImplementedError
