"""Measuring a backend: one op on one shape, whether the result is right, and how long it takes.

``attnreg tune`` and the benchmarks measure by these means; nothing of it is imported by a call.
"""
