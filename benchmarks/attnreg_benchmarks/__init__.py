"""attnreg's benchmark: named workloads, the physical floor, the peers, and how all of them are measured.

``attnreg bench`` is its command. Read first: ``workloads.py``, what is measured; ``floor.py``, what no kernel can beat;
``run.py``, how.
"""
