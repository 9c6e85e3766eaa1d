"""The ``attnreg_cpu`` backend: all ops in C++ for CPUs, compiled once for each instruction set and chosen where they run.

Nothing is built or loaded until an op is called; ``plugin.py`` is what attnreg finds. Read first: ``functions.py``. The kernels
are in ``csrc/cpu/``: ``kernels.h`` says what each one is given.
"""

from __future__ import annotations
