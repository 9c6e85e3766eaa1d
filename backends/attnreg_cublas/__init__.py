"""The ``cublas_block`` backend: band products as one batch of dense blocks, multiplied by cuBLAS.

The queries are cut into blocks of B rows, each against the B + W - 1 keys that its rows see. All blocks of all heads
are one strided-batched product, whose band is then read out. Nothing is built or loaded until an op is called;
``plugin.py`` is what attnreg finds. Read first: ``blocks.py``, then ``functions.py`` and ``call.py``; ``rule.py`` chooses the
block. The kernels are in ``csrc/cuda/``.
"""

from __future__ import annotations
