"""How many threads compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Tensors of a few hundred numbers are computed by one thread: more of them wait for each other.

    On a machine that is busy with something else as well, two were measured ten times slower than one. The number of threads
    before is set again, whatever was set meanwhile.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
