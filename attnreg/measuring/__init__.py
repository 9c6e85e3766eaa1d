"""Measuring: how long a call takes on its device, how much it must move, and whether something else used the device.

``attnreg tune`` and the benchmarks measure by these means; nothing of it is imported by a call.
"""
