"""The ``triton`` backend: Triton kernels for the three ops, forward and backward.

Nothing is imported or compiled until an op is called; ``plugin.py`` is what attnreg finds. Read first: ``band.py``, the
geometry that all kernels share. The three products between rows, keys and a band (``band_dot.py``, ``band_average.py``,
``band_average_transposed.py``) make up the two product ops with their gradients; the fused attention is in
``attention.py`` and ``attention_backward.py``.
"""
