"""Kernels for Hopper GPUs in Gluon, Triton's own language for one generation of GPUs.

The kernels of ``attnreg_triton.attention``, ``attention_backward``, ``band_dot`` and ``band_average`` run on every GPU. These
do the same work for the calls that ``service`` describes, with what only this generation has: tiles arrive by the bulk copy
engine (TMA), which needs no address arithmetic and no registers and fills what lies outside the sequence with zeros, and
products are asynchronous, so that one runs while the softmax of another is computed.
"""
